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

from sleap_rtc.worker import job_store, store_writer
from sleap_rtc.worker.job_store import JobStore, StoreError
from sleap_rtc.worker.store_writer import StoreWriter, open_store_writer
from tests.worker.stores import ME, opened, record


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "jobs.db"


@contextmanager
def deadline() -> Iterator[None]:
    with trio.fail_after(60):
        yield


def make_writer(store: JobStore) -> StoreWriter:
    return StoreWriter(store, structlog.get_logger())


async def until_written(writer: StoreWriter) -> None:
    while writer._waiting:
        await trio.lowlevel.checkpoint()


async def test_records_are_written_in_order(path: Path) -> None:
    with opened(path) as store, deadline():
        writer = make_writer(store)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.run)
            for number in (2, 1, 3):
                writer.put(record(number))
            await until_written(writer)
            assert store.load(ME).records == [record(2), record(1), record(3)]
            writer.remove(record(1).job_id)
            writer.put(record(3, state="COMPLETE"))
            await until_written(writer)
            nursery.cancel_scope.cancel()
        assert store.load(ME).records == [record(2), record(3, state="COMPLETE")]


async def test_only_the_latest_record_of_a_job_waits_for_a_slow_disk(
    path: Path,
) -> None:
    with opened(path) as store, deadline():
        writer = make_writer(store)
        for number in range(10_000):
            writer.put(record(number % 3, updated=float(number)))
        assert len(writer._waiting) == 3
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.run)
            await until_written(writer)
            nursery.cancel_scope.cancel()
        assert sorted(job.updated for job in store.load(ME).records) == [
            9997.0,
            9998.0,
            9999.0,
        ]


async def test_waiting_records_are_written_when_the_worker_ends(path: Path) -> None:
    with opened(path) as store, deadline():
        writer = make_writer(store)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.run)
            await trio.testing.wait_all_tasks_blocked()
            for number in range(20):
                writer.put(record(number))
            nursery.cancel_scope.cancel()
        assert len(store.load(ME).records) == 20


async def test_a_write_that_is_interrupted_is_done_again(path: Path) -> None:
    with opened(path) as store, deadline():
        writer = make_writer(store)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.run)
            with store._lock:  # the disk is busy
                writer.put(record(1))
                while not writer._limiter.borrowed_tokens:
                    await trio.lowlevel.checkpoint()
                writer.put(record(1, state="FAILED"))
                writer.put(record(2))
                nursery.cancel_scope.cancel()
                await trio.lowlevel.cancel_shielded_checkpoint()
        assert store.load(ME).records == [record(1, state="FAILED"), record(2)]


async def test_a_worker_ends_although_its_disk_hangs(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_writer, "_FLUSH_TIMEOUT", 0.05)
    with opened(path) as store, deadline(), capture_logs() as logs:
        writer = make_writer(store)
        with store._lock:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(writer.run)
                writer.put(record(1))
                while not writer._limiter.borrowed_tokens:
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
        while writer._limiter.borrowed_tokens:  # before the store is closed
            await trio.lowlevel.checkpoint()
    assert [(log["event"], log["jobs"]) for log in logs] == [
        ("jobs not stored", [record(1).job_id])
    ]


async def test_a_locked_store_is_logged_once_and_tried_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_store, "_BUSY_TIMEOUT", 0.01)
    with opened(path) as store, deadline(), capture_logs() as logs:
        writer = make_writer(store)
        other = sqlite3.connect(path, isolation_level=None)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.run)
            for round_ in range(2):
                other.execute("BEGIN IMMEDIATE")
                for number in range(3):
                    writer.put(record(number, updated=float(round_)))
                while len(logs) == round_:
                    await trio.lowlevel.checkpoint()
                writer.put(record(8, updated=float(round_)))
                while not writer._limiter.borrowed_tokens:
                    await trio.lowlevel.checkpoint()
                other.execute("ROLLBACK")
                writer.put(record(9, updated=float(round_)))
                await until_written(writer)
                assert len(store.load(ME).records) == 5
                assert len(logs) == round_ + 1
            nursery.cancel_scope.cancel()
        other.close()
    assert "locked" in logs[0]["reason"]


async def test_a_job_that_cannot_be_written_does_not_delay_others(path: Path) -> None:
    with opened(path) as store, deadline(), capture_logs() as logs:
        writer = make_writer(store)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.run)
            writer.put(record(1, directory="/\udcff"))
            for number in range(2, 5):
                writer.put(record(number))
                while len(writer._waiting) > 1:
                    await trio.lowlevel.checkpoint()
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
        while writer._limiter.borrowed_tokens:
            await trio.lowlevel.checkpoint()
    assert [log["event"] for log in logs] == ["jobs not stored", "job store not closed"]
    store.close()
