"""The benchmark that kills processes notices lost and damaged transfers."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.kills import Kill, Run, Scene
from bench.processes import python_module

COMMAND = python_module("bench.kills")
DEADLINE = 60.0
SIZE = 1024**2


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no process groups")
def test_an_undisturbed_transfer_arrives(tmp_path: Path) -> None:
    folder, report = tmp_path / "files", tmp_path / "report.json"
    folder.mkdir()
    command = [*COMMAND, "--size", "1MiB", "--kills", "0"]
    found = subprocess.run(
        [*command, "--directory", str(folder), "--json", str(report)],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert os.listdir(folder) == []
    told = json.loads(report.read_bytes())
    assert told["undisturbed"]["is_intact"]
    assert told["undisturbed"]["kills"] == told["transfers"] == []


def progress(scene: Scene, done: int, total: int | None = None) -> dict[str, Any]:
    return {"event": "progress", "done": done, "total": total or scene.size}


def test_bytes_sent_again_count_for_the_last_kill(tmp_path: Path) -> None:
    scene = Scene(tmp_path, SIZE, "tcp")
    run = Run(scene, random.Random(1), 1.0, budget=2)
    run._note(progress(scene, 700))
    run.transfer.kills.append(Kill("worker", 700))
    run._note(progress(scene, 5, total=10))  # results, not the package
    run._note(progress(scene, 600))
    run._note(progress(scene, 900))
    run.transfer.kills.append(Kill("client", 900))
    run._note(progress(scene, 900))
    assert [kill.again for kill in run.transfer.kills] == [100, 0]


def test_other_bytes_are_noticed(tmp_path: Path) -> None:
    scene = Scene(tmp_path, SIZE, "tcp")
    assert not scene.is_intact()
    content = bytearray(scene.package.read_bytes())
    scene.arrived.write_bytes(content)
    assert scene.is_intact()
    content[-1] ^= 1
    scene.arrived.write_bytes(content)
    assert not scene.is_intact()
    before = scene.package.read_bytes()
    scene.renew_package()
    assert scene.package.read_bytes() != before
    assert not scene.arrived.exists()
