"""A big package and a big result: memory stays flat, and every byte arrives."""

import hashlib
import os
import sys
from pathlib import Path

import pytest

from tests.e2e.harness import END_TO_END, Lab, release, wait_until
from tests.e2e.packages import make_package

pytestmark = [
    *END_TO_END,
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(
        sys.platform != "linux", reason="peak memory is read from /proc"
    ),
]

MEGABYTE = 1024 * 1024
SIZE = 300
"""Megabytes of the package and of its result: twice the memory that a side may use."""

PATIENCE = 150.0
"""Seconds for a transfer in one direction on a busy machine."""

MOST_MEMORY = 150 * MEGABYTE


def hash_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def make_input(path: Path) -> None:
    with path.open("wb") as file:
        for _ in range(SIZE):
            file.write(os.urandom(MEGABYTE))


@pytest.mark.parametrize("route", ["channel", "shared"])
def test_memory_stays_flat_at_any_size(lab: Lab, route: str) -> None:
    machine = lab.machine("gpu")
    storage = lab.folder / "storage"
    storage.mkdir()
    machine.variables["SHARED_STORAGE_ROOT"] = str(storage)
    worker = machine.start_worker()
    given, fifo = lab.folder / "given.bin", lab.fifo()
    make_input(given)
    package = make_package(
        machine.home / "big.zip",
        "act copy given.bin made.bin",
        f"act wait {fifo}",
        big=given,
    )
    arguments = ("send", package, "--route", route, "--output", "out")
    client = machine.start(*arguments)
    client.wait_for("waiting", timeout=PATIENCE)
    release(fifo)
    client.wait_for("Fetching results", timeout=PATIENCE)
    peaks = {"client": 0, "worker": 0}

    def it_has_ended() -> bool:
        # A peak can only be read while its process runs.
        if client.process.poll() is None:
            peaks["client"] = max(peaks["client"], client.peak_memory())
        return client.process.poll() is not None

    wait_until(it_has_ended, "the end of the client", PATIENCE)
    client.finish().expect(0)
    peaks["worker"] = worker.peak_memory()
    assert 0 < min(peaks.values()) <= max(peaks.values()) < MOST_MEMORY, peaks
    assert hash_of(machine.home / "out" / "made.bin") == hash_of(given)
