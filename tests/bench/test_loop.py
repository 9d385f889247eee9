"""The instrument that finds blocking calls in the event loop, and its findings."""

import gc
import hashlib
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
import trio

from bench.loop import Side
from bench.loop_watch import Findings, LoopWatch
from bench.processes import python_module

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux tells how long a thread waited"
)

COMMAND = python_module("bench.loop")
DEADLINE = 60.0

CHUNKS = 16
STOPPED_BY_OTHERS = CHUNKS // 2
"""Steps over the limit that a busy machine may cause. A call that blocks for each chunk
of the package would cause one for each."""


def watched(main: Callable[[], Awaitable[None]]) -> Findings:
    watch = LoopWatch()
    trio.run(main, instruments=[watch])
    return watch.findings()


def compute(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        sum(range(1000))


def test_a_call_that_sleeps_is_found() -> None:
    async def main() -> None:
        await trio.lowlevel.checkpoint()
        time.sleep(0.05)  # noqa: ASYNC251
        await trio.lowlevel.checkpoint()

    step = watched(main).blocking()[0]
    assert step.slept > 0.04
    assert "test_loop.py" in step.place
    assert "main" in step.task


def test_a_call_that_computes_is_found() -> None:
    async def main() -> None:
        compute(0.03)

    step = watched(main).blocking()[0]
    assert step.computed >= 0.03
    assert "compute" in step.place


def test_waiting_for_the_interpreter_does_not_count_as_blocking() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(trio.to_thread.run_sync, compute, 0.1)
            for _ in range(100):
                await trio.sleep(0.001)
                for _ in range(3):
                    hashlib.sha256(bytes(10000)).hexdigest()  # releases the lock

    found = watched(main)
    # A busy machine stops a thread at times; each step waits for the lock.
    assert len(found.blocking(limit=0.002)) <= STOPPED_BY_OTHERS
    assert found.steps > 100


def test_collecting_garbage_does_not_count_as_computing() -> None:
    keep = [[number] for number in range(300_000)]

    async def main() -> None:
        gc.collect()

    found = watched(main)
    assert found.collection > 0
    assert all(step.computed < found.collection for step in found.worst)
    assert len(keep) == 300_000


def test_a_run_restores_all_settings() -> None:
    before = sys.getswitchinterval(), list(gc.callbacks), threading.active_count()

    async def main() -> None:
        await trio.lowlevel.checkpoint()

    watched(main)
    now = sys.getswitchinterval(), list(gc.callbacks), threading.active_count()
    assert now == before


@pytest.mark.parametrize("way", ["tcp", "quic", "shared"])
def test_no_call_blocks_the_loops_of_a_transfer(way: str, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = subprocess.run(
        [
            *(*COMMAND, "--size", f"{CHUNKS}MiB", "--ways", way),
            *("--directory", str(tmp_path), "--json", str(report)),
        ],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert report.exists(), done.stdout + done.stderr
    sides = msgspec.json.decode(report.read_bytes(), type=list[Side])
    assert [side.name for side in sides] == ["worker", "client"]
    for side in sides:
        assert side.found.steps > 100
        # A shared machine stops a thread at times, and hides it.
        blocking = side.found.blocking()
        assert len(blocking) <= STOPPED_BY_OTHERS, f"{side.name}:\n{done.stdout}"
