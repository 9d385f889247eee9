"""Processes that are killed, stopped or restarted, and the effect on their peers."""

import os
import re
import signal

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

pytestmark = END_TO_END


def big_package(machine: Machine) -> str:
    """Make a package that takes more than a second over QUIC on a fast machine."""
    return str(
        make_package(
            machine.home / "big.zip",
            "act say never",
            files={"big.bin": os.urandom(192 * 1024 * 1024)},
        )
    )


def check_healthy(machine: Machine, worker: Running) -> None:
    """Check that a worker takes the next job, and has nothing of the last one."""
    package = make_package(machine.home / "next.zip", "act say hello")
    done = machine.run("send", package).expect(0)
    assert "hello" in done.out
    wait_until(lambda: machine.jobs_left() == [], "the job directories to go")
    assert worker.process.poll() is None
    assert "Traceback" not in worker.err


def test_a_client_that_dies_changes_nothing_for_its_job(lab: Lab) -> None:
    machine = lab.machine("gpu")
    worker = machine.start_worker("--slots", 2)
    fifo, copied = lab.fifo(), lab.folder / "copied.txt"
    package = make_package(
        machine.home / "job.zip",
        f"act wait {fifo}",
        f"act copy made.txt {copied}",
        files={"made.txt": "made"},
    )
    client = machine.start("send", package)
    client.wait_for("waiting")
    client.kill()
    worker.wait_for("client gone")
    release(fifo)
    worker.wait_for("job ended .*outcome=complete")
    assert copied.read_text() == "made"
    assert worker.process.poll() is None
    # The results were not fetched, so they stay.
    (job,) = machine.jobs_left()
    assert "released" in (machine.jobs / job / "job.log").read_text()


@pytest.mark.parametrize("moment", ["upload", "run"])
def test_a_client_notices_that_its_worker_died(lab: Lab, moment: str) -> None:
    machine = lab.machine("gpu")
    worker = machine.start_worker()
    if moment == "upload":
        client = machine.start("send", big_package(machine), "--route", "quic")
        client.wait_for(UPLOADING)
    else:
        package = make_package(machine.home / "job.zip", f"act wait {lab.fifo()}")
        client = machine.start("send", package)
        client.wait_for("waiting")
    worker.kill()
    done = client.finish().expect(7)
    assert re.search(r"connection to worker-.* was lost", done.err.replace("\n", " "))
    assert "What to do: " in done.err
    assert "Traceback" not in done.err


def test_a_client_does_not_wait_forever_for_a_worker_that_hangs(lab: Lab) -> None:
    machine = lab.machine("gpu")
    worker = machine.start_worker()
    package = make_package(machine.home / "job.zip", f"act wait {lab.fifo()}")
    client = machine.start("send", package, "--patience", 1)
    client.wait_for("waiting")
    worker.signal(signal.SIGSTOP)
    done = client.finish(60).expect(7)
    assert "was lost" in done.err
    worker.signal(signal.SIGCONT)
    wait_until(lambda: "client gone" in worker.err, "the worker to notice")
    assert worker.process.poll() is None


def test_a_worker_that_is_stopped_informs_its_client_and_ends_the_job(lab: Lab) -> None:
    machine = lab.machine("gpu")
    worker = machine.start_worker()
    package = make_package(machine.home / "job.zip", f"act wait {lab.fifo()}")
    client = machine.start("send", package)
    client.wait_for("waiting")
    assert lab.processes("actor.py")
    worker.signal(signal.SIGTERM)
    worker.finish().expect(0)
    done = client.finish()
    assert done.code in (5, 7), done.err
    assert "the worker was stopped" in done.err.replace("\n", " ")
    lab.wait_gone("actor.py")
    assert "Traceback" not in worker.err


def test_a_job_continues_while_the_signaling_server_restarts(lab: Lab) -> None:
    town = Town(lab)
    fifo = lab.fifo()
    package = make_package(
        town.laptop.home / "job.zip", f"act wait {fifo}", "act big made.bin 1"
    )
    client = town.laptop.start("send", package)
    client.wait_for("waiting")
    before = len(town.worker.err)
    town.server.kill()
    late = make_package(town.laptop.home / "late.zip", "act say late")
    waiting = town.laptop.start("send", late)
    release(fifo)
    client.finish().expect(0)
    assert "made.bin" in tree(town.laptop.home / "job-results")
    town.server = town.start_server()
    town.worker.wait_for("registered", after=before)
    # It was started without a server, and has waited for it.
    assert "late" in waiting.finish().expect(0).out


def test_a_signaling_server_ends_in_order(lab: Lab) -> None:
    town = Town(lab)
    town.server.signal(signal.SIGTERM)
    town.server.finish().expect(0)
    before = len(town.worker.err)
    town.server = town.start_server()
    town.worker.wait_for("registered", after=before)
    assert "Traceback" not in town.worker.err + town.server.err


def test_a_worker_that_serves_its_room_comes_back_with_it(lab: Lab) -> None:
    machine = lab.machine("gpu")
    worker = machine.start_worker()
    invite = machine.run("invite").expect(0).out
    worker.kill()
    worker = machine.start_worker()
    assert machine.run("invite").expect(0).out == invite
    check_healthy(machine, worker)
