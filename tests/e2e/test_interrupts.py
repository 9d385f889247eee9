"""Ctrl-C in every phase of `send`, and its time limit."""

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from sleap_rtc.proto.rendezvous.invite import Invite, encode_invite
from tests.e2e.harness import (
    DEADLINE,
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


def interrupt(client: Running) -> None:
    client.signal(signal.SIGINT)


def check_healthy(machine: Machine, worker: Running) -> None:
    package = make_package(machine.home / "next.zip", "act say hello")
    machine.run("send", package, "--output", "next").expect(0)
    wait_until(lambda: machine.jobs_left() == [], "the job directories to go")
    assert "Traceback" not in worker.err


@contextmanager
def silent_server(machine: Machine) -> Iterator[socket.socket]:
    """Join a machine to a room whose server never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(DEADLINE)
        invite = Invite(f"ws://127.0.0.1:{server.getsockname()[1]}", bytes(32))
        machine.run("join", encode_invite(invite)).expect(0)
        yield server


def test_an_interrupt_while_waiting_for_the_signaling_server(lab: Lab) -> None:
    machine = lab.machine("laptop")
    package = make_package(machine.home / "job.zip", "act say hello")
    with silent_server(machine) as server:
        client = machine.start("send", package)
        connection, _ = server.accept()
        with connection:
            interrupt(client)
            done = client.finish().expect(130)
    assert "The job was cancelled" in done.err
    assert "Traceback" not in done.err


def test_an_interrupt_while_waiting_for_the_answer_of_a_worker(lab: Lab) -> None:
    town = Town(lab)
    town.worker.signal(signal.SIGSTOP)
    package = make_package(town.laptop.home / "job.zip", "act say hello")
    client = town.laptop.start("send", package)
    client.wait_for("Worker: ")
    interrupt(client)
    done = client.finish().expect(130)
    assert "The job was cancelled" in done.err
    town.worker.signal(signal.SIGCONT)
    town.laptop.run("send", package).expect(0)


def test_an_interrupt_during_the_upload(lab: Lab) -> None:
    machine = lab.machine("gpu")
    files: dict[str, str | bytes] = {"big.bin": os.urandom(64 * 1024 * 1024)}
    package = make_package(machine.home / "big.zip", "act say never", files=files)
    with relayed_worker(machine, SLOW) as (worker, _):
        client = machine.start("send", package, "--route", "tcp")
        client.wait_for(UPLOADING)
        interrupt(client)
        client.finish().expect(130)
        wait_until(lambda: machine.jobs_left() == [], "the half job to go")
        assert "job runs" not in worker.err
        check_healthy(machine, worker)


def test_an_interrupt_while_the_job_is_queued(lab: Lab) -> None:
    machine = lab.machine("gpu")
    worker = machine.start_worker()
    fifo = lab.fifo()
    holder = machine.start(
        "send", make_package(machine.home / "hold.zip", f"act wait {fifo}")
    )
    holder.wait_for("waiting")
    package = make_package(machine.home / "job.zip", "act say never")
    client = machine.start("send", package)
    client.wait_for("Job: queued")
    interrupt(client)
    client.finish().expect(130)
    release(fifo)
    holder.finish().expect(0)
    assert worker.err.count("job runs") == 1
    check_healthy(machine, worker)


def hold_with_a_result(lab: Lab, machine: Machine) -> Running:
    """Send a job that makes a result and then waits; return its client."""
    package = make_package(
        machine.home / "job.zip",
        "act copy given.txt made.txt",
        f"act wait {lab.fifo()}",
        files={"given.txt": "made"},
    )
    client = machine.start("send", package)
    client.wait_for("waiting")
    assert lab.processes("actor.py")
    return client


def test_an_interrupt_while_the_job_runs(lab: Lab) -> None:
    machine = lab.machine("gpu")
    worker = machine.start_worker()
    client = hold_with_a_result(lab, machine)
    interrupt(client)
    done = client.finish().expect(130)
    results = tree(machine.home / "job-results")
    assert results.keys() == {"job.log", "made.txt"}
    assert results["made.txt"] == b"made"
    assert "job-results" in done.err
    lab.wait_gone("actor.py")
    check_healthy(machine, worker)


def test_an_interrupt_while_results_are_fetched(lab: Lab) -> None:
    machine = lab.machine("gpu")
    package = make_package(machine.home / "job.zip", "act big big.bin 64")
    with relayed_worker(machine, SLOW) as (worker, _):
        client = machine.start("send", package, "--route", "tcp")
        client.wait_for("Fetching results: [1-9]")
        interrupt(client)
        done = client.finish().expect(130)
    assert "Traceback" not in done.err
    assert "big.bin" not in tree(machine.home / "job-results")
    package = make_package(machine.home / "next.zip", "act say hello")
    machine.run("send", package).expect(0)
    assert "Traceback" not in worker.err


def test_a_second_interrupt_exits_at_once(lab: Lab) -> None:
    machine = lab.machine("gpu")
    worker = machine.start_worker()
    client = hold_with_a_result(lab, machine)
    worker.signal(signal.SIGSTOP)
    interrupt(client)
    client.wait_for("Ctrl-C again")
    interrupt(client)
    done = client.finish().expect(130)
    assert "Traceback" not in done.err
    worker.signal(signal.SIGCONT)
    worker.wait_for("client gone")
    worker.wait_for("job ended")
    lab.wait_gone("actor.py")
    assert worker.process.poll() is None
    package = make_package(machine.home / "next.zip", "act say hello")
    machine.run("send", package).expect(0)


def test_a_time_limit_cancels_a_job(lab: Lab) -> None:
    machine = lab.machine("gpu")
    worker = machine.start_worker()
    package = make_package(
        machine.home / "job.zip",
        "act copy given.txt made.txt",
        f"act wait {lab.fifo()}",
        files={"given.txt": "made"},
    )
    done = machine.run("send", package, "--timeout", 3).expect(8)
    assert "cancelled after 3 s (--timeout)" in done.err.replace("\n", " ")
    lab.wait_gone("actor.py")
    check_healthy(machine, worker)


def test_a_time_limit_counts_from_the_start(lab: Lab) -> None:
    machine = lab.machine("laptop")
    package = make_package(machine.home / "job.zip", "act say hello")
    with silent_server(machine):
        done = machine.run("send", package, "--timeout", 1).expect(8)
    assert "cancelled after 1 s (--timeout)" in done.err.replace("\n", " ")
