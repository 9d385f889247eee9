"""Calls to storage that hangs end in bounded time, and other calls lose no result."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from sleap_rtc.io.storage.call import GRACE_TIMEOUT, MAX_THREADS, call_storage
from sleap_rtc.io.storage.folder import StorageError
from tests.io.storage.places import HangingStorage

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="FIFOs")


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[HangingStorage]:
    with HangingStorage(tmp_path / "fifo") as storage:
        yield storage


async def test_a_result_and_an_error_arrive() -> None:
    assert await call_storage(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await call_storage(divmod, 7, 0, timeout=20, shield=True)


async def test_storage_that_hangs_is_given_up_at_the_timeout(
    storage: HangingStorage, mock_clock: MockClock
) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_expect_timeout, storage)
        await storage.wait_touched()
        mock_clock.jump(20)


async def _expect_timeout(storage: HangingStorage) -> None:
    with pytest.raises(StorageError, match="Storage at root did not answer within 20 "):
        await call_storage(storage.touch, root=Path("root"), timeout=20)


async def test_a_call_that_hangs_can_be_cancelled(
    storage: HangingStorage, mock_clock: MockClock
) -> None:
    async with trio.open_nursery() as nursery:
        scope = trio.CancelScope()
        nursery.start_soon(_call_in, scope, storage)
        await storage.wait_touched()
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(GRACE_TIMEOUT)
    assert scope.cancelled_caught


async def _call_in(scope: trio.CancelScope, storage: HangingStorage) -> None:
    with scope:
        await call_storage(storage.touch)


async def test_a_shield_ends_with_its_timeout(
    storage: HangingStorage, mock_clock: MockClock
) -> None:
    failures: list[str] = []

    async def clean_up() -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            try:
                await call_storage(storage.touch, timeout=3, shield=True)
            except StorageError as error:
                failures.append(str(error))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(clean_up)
        await storage.wait_touched()
        assert failures == []
        mock_clock.jump(3)
    assert failures == ["Storage did not answer within 3 seconds"]


async def test_a_shield_without_a_timeout_is_refused() -> None:
    with pytest.raises(ValueError, match="requires a timeout"):
        await call_storage(divmod, 7, 2, shield=True)


async def test_a_result_within_the_grace_period_is_not_lost(
    storage: HangingStorage,
) -> None:
    results: list[str] = []

    async def call() -> None:
        results.append(await call_storage(storage.touch, grace=60))
        await trio.lowlevel.checkpoint()
        results.append("went on")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(call)
        await storage.wait_touched()
        nursery.cancel_scope.cancel()
        storage.recover()
    assert results == ["answered"]


async def test_a_result_that_comes_too_late_is_discarded(
    storage: HangingStorage,
) -> None:
    discarded, is_discarded = list[str](), threading.Event()

    def discard(result: str) -> None:
        discarded.append(result)
        is_discarded.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(_call_without_grace, storage.touch, discard)
        await storage.wait_touched()
        nursery.cancel_scope.cancel()
    storage.recover()
    assert is_discarded.wait(20)
    assert discarded == ["answered"]


async def _call_without_grace(
    function: Callable[[], str], discard: Callable[[str], None]
) -> None:
    await call_storage(function, grace=0, discard=discard)


async def test_a_function_can_stop_itself(storage: HangingStorage) -> None:
    stopped = threading.Event()

    def work() -> None:
        try:
            while True:
                trio.from_thread.check_cancelled()
                storage.touched.set()
        finally:
            stopped.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(call_storage, work)
        await storage.wait_touched()
        nursery.cancel_scope.cancel()
    assert stopped.is_set()


async def test_calls_that_hang_leave_threads_for_everything_else(
    storage: HangingStorage, mock_clock: MockClock
) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(MAX_THREADS):
            nursery.start_soon(_expect_timeout, storage)
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(20)
    assert await trio.to_thread.run_sync(divmod, 7, 2) == (3, 1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_expect_timeout, storage)  # no thread is free for it
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(20)


def test_a_thread_left_behind_does_not_keep_the_process_alive(tmp_path: Path) -> None:
    program = (
        "import os, sys, trio\n"
        "from sleap_rtc.io.storage.call import call_storage\n"
        "def hang():\n"
        "    print('hangs', flush=True)\n"
        "    os.open(sys.argv[1], os.O_RDONLY)\n"
        "trio.run(lambda: call_storage(hang, timeout=0.5))\n"
    )
    with HangingStorage(tmp_path / "fifo"):
        ended = subprocess.run(
            [sys.executable, "-c", program, tmp_path / "fifo"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert ended.stdout == "hangs\n"
    assert "did not answer within 0.5 seconds" in ended.stderr
