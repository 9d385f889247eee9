"""Links that are cut, and processes that come back: nothing starts over."""

import os
import re
import signal
from math import inf
from pathlib import Path

import pytest

from tests.e2e.harness import (
    END_TO_END,
    UPLOADING,
    Lab,
    Machine,
    Running,
    Town,
    release,
    tree,
    wait_until,
)
from tests.e2e.packages import make_package
from tests.e2e.relay import SLOW, relayed_worker

pytestmark = END_TO_END

MEGABYTES = 96


def big_package(machine: Machine, *lines: str) -> Path:
    """Make a package that takes some seconds through a slow relay."""
    return make_package(
        machine.home / "big.zip",
        *(lines or ("act say done",)),
        files={"big.bin": os.urandom(MEGABYTES * 1024 * 1024)},
    )


def uploaded(client: Running) -> list[int]:
    """List the percentages that a client has shown."""
    return [int(n) for n in re.findall(r"Sending big\.zip: (\d+) %", client.err)]


def results_of(machine: Machine, name: str = "big") -> dict[str, bytes]:
    return tree(machine.home / f"{name}-results")


# ------------------------------------------------------------------------ a lost link


def test_a_cut_link_is_opened_again_and_the_job_continues(lab: Lab) -> None:
    machine = lab.machine("gpu")
    fifo = lab.fifo()
    package = make_package(
        machine.home / "job.zip",
        "act say one",
        f"act wait {fifo}",
        "act big made.bin 1",
    )
    with relayed_worker(machine) as (worker, relay):
        client = machine.start("send", package, "--route", "tcp")
        client.wait_for("waiting")
        for _ in range(3):
            before = len(worker.err)
            relay.cut()
            worker.wait_for("client came back", after=before)
        release(fifo)
        done = client.finish().expect(0)
    assert done.err.count("Link: lost") == 3
    assert done.out.splitlines().count("one") == 1
    assert done.out.splitlines().count("released") == 1
    assert worker.err.count("job runs") == 1
    assert len(results_of(machine, "job")["made.bin"]) == 1024 * 1024


def test_output_that_was_printed_without_a_link_is_shown(lab: Lab) -> None:
    town = Town(lab)
    fifo, second = lab.fifo(), lab.fifo("second")
    package = make_package(
        town.laptop.home / "job.zip",
        f"act wait {fifo}",
        "act say meanwhile",
        f"act wait {second}",
    )
    worker, client = town.worker, town.laptop.start("send", package)
    client.wait_for("waiting")
    client.signal(signal.SIGSTOP)
    worker.wait_for("client gone")
    release(fifo)
    client.signal(signal.SIGCONT)
    client.wait_for("meanwhile")
    release(second)
    done = client.finish().expect(0)
    assert done.out.splitlines().count("meanwhile") == 1
    assert "Link: lost" in done.err


# ------------------------------------------------------------------ a killed process


def test_an_upload_continues_when_send_is_typed_again(lab: Lab) -> None:
    machine = lab.machine("gpu")
    package = big_package(machine)
    with relayed_worker(machine, 2 * SLOW) as (worker, relay):
        client = machine.start("send", package, "--route", "tcp")
        client.wait_for(r"Sending big\.zip: [3-9]\d %")
        client.kill()
        relay.rate = inf
        worker.wait_for("client gone")
        assert len(machine.jobs_left()) == 1
        again = machine.run("send", package, "--route", "tcp").expect(0)
    assert "continuing job_" in again.err
    told = [int(n) for n in re.findall(r"Sending big\.zip: (\d+) %", again.err)]
    assert told[0] >= 20, again.err
    assert worker.err.count("job runs") == 1
    wait_until(lambda: machine.jobs_left() == [], "the job directory to go")


def test_an_upload_continues_when_the_worker_comes_back(lab: Lab) -> None:
    machine = lab.machine("gpu")
    with relayed_worker(machine, SLOW) as (worker, _):
        client = machine.start("send", big_package(machine), "--route", "tcp")
        client.wait_for(UPLOADING)
        worker.kill()
        client.wait_for("Link: lost")
    worker = machine.start_worker()
    worker.wait_for("job restored .*RECEIVING")
    client.finish().expect(0)
    assert worker.err.count("job runs") == 1
    assert uploaded(client) == sorted(set(uploaded(client)))


def test_a_changed_package_is_a_new_job(lab: Lab) -> None:
    machine = lab.machine("gpu")
    package = big_package(machine)
    with relayed_worker(machine, SLOW) as (worker, _):
        client = machine.start("send", package, "--route", "tcp")
        client.wait_for(UPLOADING)
        client.kill()
        worker.wait_for("client gone")
        make_package(package, "act say changed")
        done = machine.run("send", package).expect(0)
    assert "changed since it was submitted as job_" in done.err.replace("\n", " ")
    assert "changed\n" in done.out


def test_a_job_that_waited_runs_after_the_worker_was_restarted(lab: Lab) -> None:
    machine = lab.machine("gpu")
    worker = machine.start_worker()
    holder = make_package(machine.home / "hold.zip", f"act wait {lab.fifo()}")
    held = machine.start("send", holder)
    held.wait_for("waiting")
    package = make_package(machine.home / "job.zip", "act say hello")
    client = machine.start("send", package)
    client.wait_for("Job: queued")
    worker.kill()
    worker = machine.start_worker()
    assert "hello\n" in client.finish().expect(0).out
    done = held.finish().expect(5)
    assert "the worker was stopped while the job ran" in done.err.replace("\n", " ")


def test_a_running_job_is_followed_when_send_is_typed_again(lab: Lab) -> None:
    machine = lab.machine("gpu")
    worker = machine.start_worker()
    fifo = lab.fifo()
    package = make_package(
        machine.home / "job.zip", "act say early", f"act wait {fifo}", "act say late"
    )
    client = machine.start("send", package)
    client.wait_for("waiting")
    client.kill()
    worker.wait_for("client gone")
    again = machine.start("send", package)
    again.wait_for("waiting")
    release(fifo)
    done = again.finish().expect(0)
    lines = done.out.splitlines()
    assert lines.count("early") == lines.count("late") == 1
    assert worker.err.count("job runs") == 1


@pytest.mark.parametrize("killed", ["client", "worker"])
def test_results_are_fetched_after_either_side_was_killed(
    lab: Lab, killed: str
) -> None:
    machine = lab.machine("gpu")
    package = make_package(
        machine.home / "job.zip", *[f"act big {n}.bin 24" for n in range(4)]
    )
    with relayed_worker(machine, 2 * SLOW) as (worker, relay):
        client = machine.start("send", package, "--route", "tcp")
        client.wait_for("Fetching results: [1-9]")
        if killed == "client":
            client.kill()
            relay.rate = inf
            client = machine.start("send", package, "--route", "tcp")
        else:
            worker.kill()
            machine.start_worker()
        client.finish().expect(0)
    assert "job ended" not in worker.err or worker.err.count("job runs") == 1
    results = results_of(machine, "job")
    assert sorted(results) == ["0.bin", "1.bin", "2.bin", "3.bin", "job.log"]
    assert {len(results[f"{n}.bin"]) for n in range(4)} == {24 * 1024 * 1024}
    wait_until(lambda: machine.jobs_left() == [], "the job directory to go")


def test_a_second_send_of_a_package_is_a_job_of_its_own(lab: Lab) -> None:
    machine = lab.machine("gpu")
    worker = machine.start_worker("--slots", 2)
    package = make_package(machine.home / "job.zip", f"act wait {lab.fifo()}")
    first, second = (machine.start("send", package) for _ in range(2))
    for client in (first, second):
        client.wait_for("waiting")
    assert worker.err.count("job runs") == 2
    for client in (first, second):
        client.signal(signal.SIGINT)
        client.finish().expect(130)
    logs = sorted((machine.home / "job-results").rglob("job.log"))
    assert len(logs) == 2


def test_fresh_starts_a_new_job(lab: Lab) -> None:
    machine = lab.machine("gpu")
    worker = machine.start_worker("--slots", 2)
    fifo = lab.fifo()
    package = make_package(machine.home / "job.zip", f"act wait {fifo}")
    client = machine.start("send", package)
    client.wait_for("waiting")
    client.kill()
    again = machine.start("send", package, "--fresh")
    again.wait_for("waiting")
    assert worker.err.count("job runs") == 2
    again.signal(signal.SIGINT)
    again.finish().expect(130)


def test_a_job_whose_worker_is_away_is_not_started_elsewhere(lab: Lab) -> None:
    town = Town(lab)
    package = make_package(town.laptop.home / "job.zip", f"act wait {lab.fifo()}")
    client = town.laptop.start("send", package)
    client.wait_for("waiting")
    client.kill()
    town.worker.kill()
    done = town.laptop.run("send", package).expect(3)
    assert "This package was submitted to worker-" in done.err.replace("\n", " ")
    assert "--fresh" in done.err
