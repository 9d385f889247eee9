"""A worker whose job directories hang stays responsive: to its clients and to signals.

The storage of the worker hangs in a real system call; see `hanging_worker`.
"""

import os
import signal
from pathlib import Path

from tests.e2e import hanging_worker
from tests.e2e.harness import END_TO_END, Lab, Machine, Running, release
from tests.e2e.packages import make_package

pytestmark = END_TO_END


class Hangs:
    """A worker with one running job, on storage that can be made to hang."""

    def __init__(self, lab: Lab) -> None:
        self.machine = lab.machine("gpu")
        self._hang = lab.folder / "hang"
        self.machine.variables["HANG"] = str(self._hang)
        self.machine.variables["HANG_BENEATH"] = str(self.machine.jobs)
        self.worker = self.machine.start_worker(module=hanging_worker.__name__)
        self.command = lab.fifo()
        self.client = self._send(self.machine)

    def _send(self, machine: Machine) -> Running:
        package = make_package(machine.home / "job.zip", f"act wait {self.command}")
        client = machine.start("send", package)
        client.wait_for("waiting")
        return client

    def begin(self) -> Path:
        os.mkfifo(self._hang)
        return self._hang


def test_a_job_is_cancelled_and_its_worker_ends(lab: Lab) -> None:
    storage = Hangs(lab)
    storage.begin()
    storage.client.signal(signal.SIGINT)
    storage.client.finish().expect(130)
    storage.worker.wait_for("the storage hangs")
    storage.worker.wait_for("job ended")
    storage.worker.signal(signal.SIGTERM)
    storage.worker.finish().expect(0)


def test_a_worker_ends_while_the_results_of_a_job_hang(lab: Lab) -> None:
    storage = Hangs(lab)
    storage.begin()
    release(storage.command)
    storage.worker.wait_for("the storage hangs")
    storage.worker.signal(signal.SIGTERM)
    storage.worker.finish().expect(0)
    assert "Traceback" not in storage.worker.err


def test_a_job_ends_when_its_storage_answers_again(lab: Lab) -> None:
    storage = Hangs(lab)
    hang = storage.begin()
    release(storage.command)
    storage.worker.wait_for("the storage hangs")
    fifo = os.open(hang, os.O_RDWR)  # keeps every later touch from waiting
    hang.unlink()
    storage.client.finish().expect(0)
    os.close(fifo)
