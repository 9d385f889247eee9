"""The examples, run as a worker runs them."""

import csv
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import trio

from sleap_rtc.proto.job.lines import LineEvent
from sleap_rtc.proto.job.script import DEFAULT_PROGRAMS, plan_scripts_untrusted
from sleap_rtc.worker.job_log import open_job_log
from sleap_rtc.worker.process import run_script

EXAMPLES = Path(__file__).parent.parent / "examples"
TRAINER = EXAMPLES / "tiny_trainer.py"

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="workers run on Linux and macOS"
)


def call(script: Path, *arguments: object, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        encoding="utf-8",
        check=True,
        timeout=60,
    )
    return done.stdout


async def run_package(package: Path, folder: Path) -> list[str]:
    """Run a package in a fresh folder, with the tiny trainer; return its log."""
    job = folder / "job"
    with zipfile.ZipFile(package) as archive:
        archive.extractall(job)
    call(TRAINER, "--install", folder / "bin", cwd=folder)
    scripts = plan_scripts_untrusted(
        {path.name: path.read_text() for path in job.glob("*.sh")}, DEFAULT_PROGRAMS
    )
    lines: dict[int, str] = {}

    def on_line(event: LineEvent) -> None:
        lines[event.line] = event.text

    async with open_job_log(folder, on_line) as log:
        for script in scripts:
            with trio.fail_after(60):
                outcome = await run_script(
                    script.commands,
                    cwd=job,
                    environment={**os.environ, "PATH": str(folder / "bin")},
                    log=log,
                )
            assert outcome.ok, outcome.reason
    return list(lines.values())


def losses(run: Path, column: str) -> list[float]:
    with (run / "training_log.csv").open(newline="") as file:
        return [float(row[column]) for row in csv.DictReader(file)]


async def test_the_training_package_trains(tmp_path: Path) -> None:
    log = await run_package(EXAMPLES / "synth_job.zip", tmp_path)
    epochs = [line for line in log if line.startswith("Epoch")]
    assert len(epochs) == 10
    assert all("100%|██████████| 20/20" in line for line in epochs)
    run = tmp_path / "job" / "models" / "synth_run"
    for column in ("train/loss", "val/loss"):
        course = losses(run, column)
        assert len(course) == 10
        assert course[-1] < course[0] / 3
    assert {path.name for path in run.iterdir()} == {
        "best.ckpt",
        "initial_config.yaml",
        "training_config.yaml",
        "training_log.csv",
    }


async def test_the_tracking_package_tracks(tmp_path: Path) -> None:
    log = await run_package(EXAMPLES / "synth_track_job.zip", tmp_path)
    assert "Predicted 40 frames" in log[-2]
    output = json.loads((tmp_path / "job" / "synth.predictions.slp").read_text())
    assert len(output["predictions"]) == 40
    assert output["mean_error"] < 0.5


async def test_a_package_of_any_size_trains_a_model_that_tracks(tmp_path: Path) -> None:
    package = tmp_path / "job.zip"
    options = ("--megabytes", 3, "--epochs", 4)
    call(EXAMPLES / "make_package.py", package, *options, cwd=tmp_path)
    assert 3 * 2**20 < package.stat().st_size < 3.01 * 2**20
    await run_package(package, tmp_path)
    run = tmp_path / "job" / "models" / "tiny_run"
    assert len(losses(run, "val/loss")) == 4
    call(
        TRAINER,
        *("track", "--data_path", package, "--model_paths", run),
        *("-o", tmp_path / "out.slp", "--frames", "0-9,20", "--device", "cpu"),
        cwd=tmp_path,
    )
    output = json.loads((tmp_path / "out.slp").read_text())
    numbers = [prediction["frame"] for prediction in output["predictions"]]
    assert numbers == [*range(10), 20]
    assert output["mean_error"] < 1.0


def test_a_missing_file_ends_the_trainer_with_a_reason(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        call(TRAINER, "train", "--config-name", "none.yaml", cwd=tmp_path)
    assert caught.value.returncode == 1
    assert "none.yaml" in caught.value.stderr
    assert "Traceback" not in caught.value.stderr
