"""The measurement of shared storage, on a local directory."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from bench.processes import python_module

COMMAND = python_module("bench.nfs")
DEADLINE = 60.0
MEBIBYTE = 1024**2


def command(*options: object) -> list[str]:
    return [*COMMAND, *map(str, options)]


def run(*options: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command(*options), capture_output=True, text=True, timeout=DEADLINE
    )


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    local, storage = tmp_path / "local", tmp_path / "a storage"
    local.mkdir()
    storage.mkdir()
    return local, storage


def test_storage_is_measured_and_left_as_it_was(places: tuple[Path, Path]) -> None:
    local, storage = places
    report = local.parent / "report.json"
    again = local.parent / "again"
    again.symlink_to(storage)
    found = run(
        *(storage, "--second", again, "--source", local),
        *("--size", "3MiB", "--rounds", "2", "--json", report),
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert os.listdir(local) == os.listdir(storage) == []
    told = json.loads(report.read_bytes())
    assert told["size"] == 3 * MEBIBYTE
    assert [mount["directory"] for mount in told["mounts"]] == [
        *map(str, (local, storage, again))
    ]
    assert all(mount["file_system"] != "unknown" for mount in told["mounts"])
    rows = {row["name"].strip(): row for row in told["copies"]}
    for name in ("sleap-rtc", "read/write", "shutil.copy2", "fetch"):
        assert rows[name]["failure"] == ""
        assert len(rows[name]["seconds"]) == 2
        assert name in found.stdout
    for row in rows.values():
        assert row["failure"] or len(row["seconds"]) == 2
    assert [latency["name"] for latency in told["latencies"]] == [
        "probe of the storage",
        "a new file is seen",
        "the same, after it was looked for",
    ]


def test_an_interrupt_leaves_nothing_behind(places: tuple[Path, Path]) -> None:
    local, storage = places
    with subprocess.Popen(
        command(storage, "--source", local, "--rounds", "1000"),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        end = time.monotonic() + DEADLINE
        while not list(storage.glob("*/copy.bin")):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.001)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=DEADLINE)
    assert process.returncode == 130
    assert os.listdir(local) == os.listdir(storage) == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--size", "5"], "is not a size such as"),
        (["--size", "0MiB"], "is not a size such as"),
        (["--rounds", "0"], "at least one round"),
        (["--second", "/nowhere/at/all"], "is not a directory"),
    ],
)
def test_impossible_options_are_refused(
    tmp_path: Path, options: list[str], reason: str
) -> None:
    found = run(tmp_path, *options)
    assert found.returncode == 2
    assert reason in found.stderr


def test_too_little_room_is_reported_at_once(tmp_path: Path) -> None:
    found = run(tmp_path, "--source", tmp_path, "--size", "900000GiB")
    assert found.returncode == 1
    assert "has no room" in " ".join(found.stdout.split())


def test_another_directory_is_not_a_second_mount(places: tuple[Path, Path]) -> None:
    local, storage = places
    found = run(storage, "--second", local, "--source", local)
    assert found.returncode == 1
    assert os.listdir(local) == os.listdir(storage) == []
