"""The benchmark measures what it says, and cleans up."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.e2e.harness import DEADLINE, END_TO_END

pytestmark = END_TO_END

SCRIPT = Path(__file__).parents[2] / "bench" / "transfer.py"
MEBIBYTE = 1024**2


def bench(folder: Path, *options: str) -> "subprocess.Popen[str]":
    command = [sys.executable, str(SCRIPT), "--directory", str(folder), *options]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_both_routes_and_the_copies_are_measured(tmp_path: Path) -> None:
    folder, report = tmp_path / "files", tmp_path / "report.json"
    folder.mkdir()
    routes = ("shared", "channel")
    options = ("--size", "8MiB", "--rounds", "1", "--json", str(report))
    with bench(folder, *options) as process:
        out, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, out
    assert os.listdir(folder) == []
    found = json.loads(report.read_bytes())
    assert found["size"] > 8 * MEBIBYTE
    ways = {way["name"]: way for way in found["ways"]}
    assert list(ways) == ["cp", "dd", "shutil.copy2", *routes]
    for name, way in ways.items():
        (sample,) = way["samples"]
        assert sample["is_intact"]
        assert sample["seconds"] > 0
        assert name in out
        is_route = name in routes
        assert (sample["worker_cpu"] is not None) is is_route
        assert len(way["small_samples"]) == is_route
        if is_route and sys.platform == "linux":
            for peak in (sample["client_peak"], sample["worker_peak"]):
                assert MEBIBYTE < peak < 150 * MEBIBYTE
    links = [ways[route]["samples"][0]["link"] for route in routes]
    assert links in (["", "tcp"], ["", "quic"])


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    with bench(tmp_path, "--size", "8MiB", "--routes", "channel") as process:
        end = time.monotonic() + DEADLINE
        while not list(tmp_path.glob("*/*/worker.log")):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 130, out
    assert os.listdir(tmp_path) == []
