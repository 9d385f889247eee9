"""Background writes to the worker's store of jobs."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import structlog
import trio
import trio.testing
from structlog.testing import capture_logs
from trio.testing import MockClock
from typing_extensions import override

from sleap_rtc.worker.job_store import LIMITS, JobStore, StoreError, StoreLimits
from sleap_rtc.worker.store_writer import StoreWriter, open_store_writer
from tests.worker.stores import ME, opened, record


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "jobs.db"


@contextmanager
def deadline() -> Iterator[None]:
    with trio.fail_after(60):
        yield


class WatchedWriter(StoreWriter):
    """A writer whose passes over the waiting records a test can wait for."""

    def __init__(self, store: JobStore, limits: StoreLimits = LIMITS) -> None:
        super().__init__(store, structlog.get_logger(), limits)
        self._passed = trio.Event()

    async def wait_for_pass(self) -> None:
        """Wait until each waiting record was written or has failed once."""
        await self._passed.wait()

    async def wait_written(self) -> None:
        """Wait until no record waits."""
        while self._waiting:
            await self._passed.wait()

    @override
    async def _write_waiting(self) -> None:
        await super()._write_waiting()
        self._passed.set()
        self._passed = trio.Event()


async def test_records_are_written_in_order(path: Path) -> None:
    with opened(path) as store, deadline():
        writer = WatchedWriter(store)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.run)
            for number in (2, 1, 3):
                writer.put(record(number))
            await writer.wait_written()
            assert store.load(ME).records == [record(2), record(1), record(3)]
            writer.remove(record(1).job_id)
            writer.put(record(3, state="COMPLETE"))
            await writer.wait_written()
            nursery.cancel_scope.cancel()
        assert store.load(ME).records == [record(2), record(3, state="COMPLETE")]


async def test_only_the_latest_record_of_a_job_waits_for_a_slow_disk(
    path: Path,
) -> None:
    with opened(path) as store, deadline():
        writer = WatchedWriter(store)
        for number in range(10_000):
            writer.put(record(number % 3, updated=float(number)))
        assert len(writer._waiting) == 3
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.run)
            await writer.wait_written()
            nursery.cancel_scope.cancel()
        assert sorted(job.updated for job in store.load(ME).records) == [
            9997.0,
            9998.0,
            9999.0,
        ]


async def test_waiting_records_are_written_when_the_worker_ends(path: Path) -> None:
    with opened(path) as store, deadline():
        writer = WatchedWriter(store)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.run)
            await trio.testing.wait_all_tasks_blocked()
            for number in range(20):
                writer.put(record(number))
            nursery.cancel_scope.cancel()
        assert len(store.load(ME).records) == 20


async def test_a_write_that_is_interrupted_is_done_again(path: Path) -> None:
    with opened(path) as store, deadline():
        writer = WatchedWriter(store)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.run)
            with store._lock:  # the disk is busy
                writer.put(record(1))
                await trio.testing.wait_all_tasks_blocked()
                writer.put(record(1, state="FAILED"))
                writer.put(record(2))
                nursery.cancel_scope.cancel()
                await trio.lowlevel.cancel_shielded_checkpoint()
        assert store.load(ME).records == [record(1, state="FAILED"), record(2)]


async def test_a_worker_ends_although_its_disk_hangs(path: Path) -> None:
    with opened(path) as store, deadline(), capture_logs() as logs:
        writer = WatchedWriter(store, StoreLimits(flush_timeout=0.05))
        with store._lock:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(writer.run)
                writer.put(record(1))
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
    assert [(log["event"], log["jobs"]) for log in logs] == [
        ("jobs not stored", [record(1).job_id])
    ]


async def test_a_locked_store_is_logged_once_and_tried_again(path: Path) -> None:
    limits = StoreLimits(busy_timeout=0.01)
    with opened(path, limits) as store, deadline(), capture_logs() as logs:
        writer = WatchedWriter(store)
        other = sqlite3.connect(path, isolation_level=None)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.run)
            for round_ in range(2):
                other.execute("BEGIN IMMEDIATE")
                for number in range(3):
                    writer.put(record(number, updated=float(round_)))
                await writer.wait_for_pass()
                writer.put(record(8, updated=float(round_)))
                await trio.testing.wait_all_tasks_blocked()
                other.execute("ROLLBACK")
                writer.put(record(9, updated=float(round_)))
                await writer.wait_written()
                assert len(store.load(ME).records) == 5
                assert len(logs) == round_ + 1
            nursery.cancel_scope.cancel()
        other.close()
    assert "locked" in logs[0]["reason"]


async def test_a_job_that_cannot_be_written_does_not_delay_others(path: Path) -> None:
    with opened(path) as store, deadline(), capture_logs() as logs:
        writer = WatchedWriter(store)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.run)
            writer.put(record(1, directory="/\udcff"))
            for number in range(2, 5):
                writer.put(record(number))
                await writer.wait_for_pass()
            nursery.cancel_scope.cancel()
        assert store.load(ME).records == [record(2), record(3), record(4)]
    events = [log["event"] for log in logs]
    assert events == ["job not stored", "jobs not stored"]


async def test_the_store_is_closed_after_its_last_write(path: Path) -> None:
    with deadline():
        async with open_store_writer(path, structlog.get_logger()) as (store, writer):
            writer.put(record(1))
        with pytest.raises(StoreError, match="closed"):
            store.save(record(2))
    with opened(path) as again:
        assert again.load(ME).records == [record(1)]


async def test_closing_a_store_whose_disk_hangs_takes_limited_time(
    path: Path, mock_clock: MockClock
) -> None:
    with capture_logs() as logs:
        async with open_store_writer(path, structlog.get_logger()) as (store, writer):
            store._lock.acquire()  # a thread hangs inside the store
            writer.put(record(1))
            mock_clock.rate = 50
        store._lock.release()
    assert [log["event"] for log in logs] == ["jobs not stored", "job store not closed"]
    store.close()
