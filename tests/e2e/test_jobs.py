"""Jobs from one machine to another, and their results."""

import json
import os
import re
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import trio

from sleap_rtc import client
from tests.e2e.harness import (
    END_TO_END,
    EXAMPLES,
    Lab,
    Running,
    release,
    tree,
)
from tests.e2e.packages import make_package

pytestmark = END_TO_END


def made_here(package: Path, folder: Path, *command: str) -> dict[str, bytes]:
    """Run the tiny trainer on a package without sleap-rtc; return its files."""
    with zipfile.ZipFile(package) as archive:
        archive.extractall(folder)
    before = tree(folder)
    trainer = [sys.executable, str(EXAMPLES / "tiny_trainer.py")]
    subprocess.run(
        [*trainer, *command], cwd=folder, check=True, stdout=subprocess.DEVNULL
    )
    return {path: data for path, data in tree(folder).items() if path not in before}


def train_here(folder: Path) -> dict[str, bytes]:
    return made_here(
        EXAMPLES / "synth_job.zip",
        folder,
        *("train", "--config-name", "single_instance.yaml", "--config-dir", "."),
        *("trainer_config.ckpt_dir=models", "trainer_config.run_name=synth_run"),
    )


def test_a_training_job_comes_back_byte_for_byte(lab: Lab) -> None:
    machine = lab.machine("gpu")
    machine.start_worker()
    done = machine.run("send", EXAMPLES / "synth_job.zip").expect(0)
    results = machine.home / "synth_job-results"
    assert done.out.splitlines()[-1] == str(results)
    expected = train_here(lab.folder / "here")
    assert len(expected) == 4
    assert tree(results) == {
        **expected,
        "job.log": (results / "job.log").read_bytes(),
    }
    assert "Epoch 9: 100%" in (results / "job.log").read_text()
    assert "Epoch 9: 100%" in done.out
    assert "Job: training complete" in done.err
    assert machine.jobs_left() == []


def test_a_tracking_job_brings_its_predictions(lab: Lab) -> None:
    machine = lab.machine("gpu")
    machine.start_worker()
    package = EXAMPLES / "synth_track_job.zip"
    done = machine.run("send", package, "--output", "out").expect(0)
    assert "Job: inference complete" in done.err
    predictions = json.loads(
        (machine.home / "out" / "synth.predictions.slp").read_bytes()
    )
    assert len(predictions["predictions"]) == 40


def test_another_machine_joins_with_the_printed_command(lab: Lab) -> None:
    gpu, laptop = lab.machine("gpu"), lab.machine("laptop")
    worker = gpu.start_worker("--listen", "127.0.0.1:0")
    invite = gpu.run("invite").expect(0).out.strip()
    laptop.run("send", EXAMPLES / "synth_job.zip").expect(2)
    joined = laptop.run("join", invite).expect(0)
    assert "Joined the room at ws://127.0.0.1:" in joined.out
    done = laptop.run("send", EXAMPLES / "synth_job.zip").expect(0)
    assert "Route: channel (Shared storage not configured" in done.err
    results = tree(laptop.home / "synth_job-results")
    assert train_here(lab.folder / "here").items() <= results.items()
    assert invite not in worker.err + done.err + done.out + joined.out + joined.err


def test_results_never_replace_older_files(lab: Lab) -> None:
    machine = lab.machine("gpu")
    machine.start_worker()
    package = make_package(machine.home / "job.zip", "act say hello")
    results = machine.home / "job-results"
    for _ in range(2):
        machine.run("send", package).expect(0)
    (again,) = (path for path in results.iterdir() if path.is_dir())
    assert again.name.startswith("job_")
    assert tree(results).keys() == {"job.log", f"{again.name}/job.log"}
    # A clash is about files: a directory with other things in it gets the results.
    other = machine.home / "other"
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    machine.run("send", package, "--output", other).expect(0)
    assert tree(other).keys() == {"mine.txt", "job.log"}


def test_a_thousand_result_files_and_an_empty_one_arrive(lab: Lab) -> None:
    machine = lab.machine("gpu")
    machine.start_worker()
    package = make_package(
        machine.home / "job.zip", "act files out 1000", "act empty out/empty"
    )
    machine.run("send", package).expect(0)
    results = tree(machine.home / "job-results")
    assert len(results) == 1002
    assert results["out/empty"] == b""
    for number in range(1000):
        path = f"out/{number // 100}/{number}.txt"
        assert results[path] == f"file {number}\n".encode()


def test_control_sequences_of_a_job_never_reach_the_terminal(lab: Lab) -> None:
    machine = lab.machine("gpu")
    machine.start_worker()
    package = make_package(machine.home / "job.zip", "act control")
    done = machine.run("send", package).expect(0)
    assert "alert" in done.out
    shown = set(done.out + done.err) - {"\n"}
    assert all(char.isprintable() for char in shown), shown
    as_json = machine.run("send", package, "--json").expect(0)
    assert all(char.isprintable() for char in set(as_json.out) - {"\n"})


def test_a_chatty_job_is_kept_whole_in_its_log(lab: Lab) -> None:
    machine = lab.machine("gpu")
    machine.start_worker()
    package = make_package(machine.home / "job.zip", "act lines 100000")
    done = machine.run("send", package).expect(0)
    log = (machine.home / "job-results" / "job.log").read_text().splitlines()
    assert log[1:] == [f"line {number}" for number in range(100_000)]
    # The live view may leave lines out, and marks the gap; it ends with the newest.
    shown = done.out.splitlines()
    assert shown[-2] == "line 99999"
    told = sum(int(n) for n in re.findall(r"\.\.\. (\d+) lines? left out", done.out))
    assert sum(line.startswith("line ") for line in shown) + told == 100_000


def test_commands_run_in_order_up_to_the_first_that_fails(lab: Lab) -> None:
    machine = lab.machine("gpu")
    machine.start_worker()
    package = make_package(
        machine.home / "job.zip",
        "act say first",
        "act big half.bin 1",
        "act fail 3",
        "act say never",
    )
    done = machine.run("send", package).expect(5)
    assert "first" in done.out
    assert "never" not in done.out.replace("act say never", "")
    assert "3" in done.err
    results = tree(machine.home / "job-results")
    assert results.keys() == {"job.log", "half.bin"}
    assert "job-results" in done.err


def most_at_once(marks: list[str]) -> int:
    depth = most = 0
    for mark in marks:
        depth += 1 if mark == "+" else -1
        most = max(most, depth)
    return most


async def test_twenty_jobs_share_two_slots(lab: Lab) -> None:
    machine = lab.machine("gpu")
    await trio.to_thread.run_sync(machine.start_worker, "--slots", 2)
    marks = lab.folder / "marks"
    packages = [
        make_package(
            machine.home / f"job{number}.zip",
            f"act mark {marks} +",
            "act copy input.bin models/output.bin",
            f"act mark {marks} -",
            files={"input.bin": os.urandom(100_000) + str(number).encode()},
        )
        for number in range(20)
    ]
    environ = {"SLEAP_RTC_STATE_DIR": str(machine.state)}
    results: dict[Path, client.JobResult] = {}

    async def send(package: Path) -> None:
        request = client.JobRequest(package, output=package.with_suffix(""))
        results[package] = await client.submit(
            request, lambda event: None, environ=environ
        )

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for package in packages:
                nursery.start_soon(send, package)
    assert len({result.job_id for result in results.values()}) == 20
    for number, package in enumerate(packages):
        made = package.with_suffix("") / "models" / "output.bin"
        assert made.read_bytes().endswith(str(number).encode())
        assert len(made.read_bytes()) == 100_000 + len(str(number))
    written = marks.read_text().split()
    assert Counter(written) == {"+": 20, "-": 20}
    assert most_at_once(written) == 2


def test_a_job_waits_for_a_slot_and_reports_it(lab: Lab) -> None:
    machine = lab.machine("gpu")
    machine.start_worker()
    fifo = lab.fifo()
    holding = make_package(machine.home / "hold.zip", f"act wait {fifo}")
    quick = make_package(machine.home / "quick.zip", "act say done")
    first = machine.start("send", holding)
    first.wait_for("waiting")
    second = machine.start("send", quick)
    second.wait_for("Job: queued")
    release(fifo)
    first.finish().expect(0)
    second.finish().expect(0)


REAL = os.environ.get("SLEAP_NN_BIN")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(
    REAL is None,
    reason="NOT CHECKED WITH THE REAL sleap-nn: set SLEAP_NN_BIN to its folder",
)
def test_the_real_sleap_nn_trains(lab: Lab) -> None:
    machine = lab.machine("gpu")
    machine.variables["PATH"] = f"{REAL}{os.pathsep}{os.environ['PATH']}"
    worker: Running = machine.start_worker()
    assert "sleap_nn='not found'" not in worker.err
    machine.run("send", EXAMPLES / "synth_job.zip", timeout=500).expect(0)
    assert "models/synth_run/best.ckpt" in tree(machine.home / "synth_job-results")
