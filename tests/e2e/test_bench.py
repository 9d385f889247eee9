"""The benchmark measures and reports every row, and cleans up."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from bench.processes import python_module
from tests.e2e.harness import DEADLINE, END_TO_END

pytestmark = END_TO_END

COMMAND = python_module("bench.compare")
MEBIBYTE = 1024**2


def bench(folder: Path, *options: str) -> "subprocess.Popen[str]":
    command = [*COMMAND, *options]
    command += ["--directory", str(folder), "--memory", str(folder)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def rows_of(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return every row of a report, by the key of its section and its own name."""
    return {
        f"{section['key']}: {row['name']}": row
        for section in report["sections"]
        for row in section["rows"]
    }


def check_usage(row: dict[str, Any]) -> None:
    """Check the reported resources of both sides of a transfer."""
    (sample,) = row["samples"]
    for side in ("sender", "receiver"):
        assert sample[side]["cpu_seconds"] >= 0
        if sys.platform == "linux":
            assert MEBIBYTE < sample[side]["peak_bytes"] < 150 * MEBIBYTE


def test_the_table_the_json_and_the_chart_agree(tmp_path: Path) -> None:
    folder, report, chart = tmp_path / "files", tmp_path / "json", tmp_path / "svg"
    folder.mkdir()
    options = ("--size", "64MiB", "--rounds", "1", "--sections", "tcp,start")
    files = ("--json", str(report), "--svg", str(chart))
    with bench(folder, *options, *files) as process:
        out, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, out
    assert os.listdir(folder) == []

    found = json.loads(report.read_bytes())
    assert [section["key"] for section in found["sections"]] == ["tcp", "start"]
    assert found["machine"]["versions"]["aioquic"]
    rows = rows_of(found)
    drawn = "".join(ElementTree.fromstring(chart.read_text()).itertext())
    for row in rows.values():
        assert row["name"] in out
        assert bool(row["samples"]) is not bool(row["absent"])
        assert row["absent"][:20] in out
        assert (row["name"] in drawn) is bool(row["samples"])
        for sample in row["samples"]:
            assert sample["is_intact"]
            assert sample["seconds"] > 0

    check_usage(rows["tcp: tcp"])
    assert rows["start: shared"]["samples"]
    (stream,) = rows["tcp: a bare TLS stream (Trio)"]["samples"]
    (own,) = rows["tcp: tcp"]["samples"]
    goals = {verdict["goal"]: verdict for verdict in found["verdicts"]}
    ((goal, verdict),) = ((g, v) for g, v in goals.items() if "TLS stream" in g)
    assert verdict["values"] == [round(stream["seconds"] / own["seconds"], 3)]
    assert verdict["is_met"] is (verdict["values"][0] >= 0.85)
    assert goal in out
    (left_out,) = (v for g, v in goals.items() if "aiortc" in g)
    assert left_out["is_met"] is None
    assert left_out["reason"] == "left out"


def test_a_missing_program_is_left_out_and_named(tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("dd", "ln"):
        (tools / name).symlink_to(str(shutil.which(name)))
    folder, report = tmp_path / "files", tmp_path / "json"
    folder.mkdir()
    command = [*COMMAND, "--size", "1MiB", "--rounds", "1"]
    command += ["--sections", "disk", "--directory", str(folder), "--json", str(report)]
    environ = {**os.environ, "PATH": str(tools)}
    done = subprocess.run(
        command, env=environ, capture_output=True, text=True, timeout=DEADLINE
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(json.loads(report.read_bytes()))
    assert rows["disk: rsync + fsync"]["absent"] == "rsync is not installed"
    check_usage(rows["disk: shared"])
    for name in ("shared: the copy", "dd + fsync", "shutil.copy2 + fsync"):
        assert rows[f"disk: {name}"]["samples"]
    assert "rsync is not installed" in done.stdout
    assert rows["disk: cp + fsync"]["absent"] == "cp is not installed"


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    with bench(tmp_path, "--size", "8MiB", "--sections", "tcp") as process:
        end = time.monotonic() + DEADLINE
        while not list(tmp_path.glob("*/*/*/worker.log")):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 130, out
    assert os.listdir(tmp_path) == []
