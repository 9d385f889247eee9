"""Background tasks end after the body, and no exception of either is lost."""

from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from sleap_rtc.io.nursery import open_background_nursery

Task = Callable[[], Awaitable[None]]


async def fail_at_once() -> None:
    raise OSError("from the task")


async def fail_when_cancelled() -> None:
    try:
        await trio.sleep_forever()
    finally:
        await fail_at_once()


async def run_body(task: Task, fault: Exception | None) -> None:
    """Run a task behind a body that fails, or that waits to be cancelled and fails."""
    async with open_background_nursery() as nursery:
        nursery.start_soon(task)
        try:
            await trio.testing.wait_all_tasks_blocked()
            if task is fail_at_once:
                await trio.sleep_forever()
        finally:
            if fault is not None:
                raise fault


async def test_tasks_end_with_the_body() -> None:
    ended = trio.Event()

    async def serve() -> None:
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    await run_body(serve, None)
    assert ended.is_set()


async def test_an_exception_of_the_body_leaves_unwrapped() -> None:
    with pytest.raises(ValueError, match="from the body"):
        await run_body(trio.sleep_forever, ValueError("from the body"))


@pytest.mark.parametrize("task", [fail_at_once, fail_when_cancelled])
async def test_an_exception_of_a_task_leaves_in_a_group(task: Task) -> None:
    with pytest.raises(ExceptionGroup) as raised:
        await run_body(task, None)
    assert [str(error) for error in raised.value.exceptions] == ["from the task"]


@pytest.mark.parametrize("task", [fail_at_once, fail_when_cancelled])
async def test_a_task_that_fails_does_not_hide_an_exception_of_the_body(
    task: Task,
) -> None:
    with pytest.raises(ExceptionGroup) as raised:
        await run_body(task, ValueError("from the body"))
    assert [repr(error) for error in raised.value.exceptions] == [
        "ValueError('from the body')",
        "OSError('from the task')",
    ]


async def test_cancellation_from_outside_is_not_an_exception_of_the_body() -> None:
    with trio.CancelScope() as scope:
        async with open_background_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught


@pytest.mark.parametrize("is_late", [False, True])
async def test_cancellation_from_outside_does_not_wrap_an_exception_of_the_body(
    is_late: bool,
) -> None:
    handled: list[str] = []
    with trio.CancelScope() as scope:

        async def serve() -> None:
            try:
                await trio.sleep_forever()
            finally:
                scope.cancel()  # while the nursery waits for its tasks

        async def run() -> None:
            async with open_background_nursery() as nursery:
                nursery.start_soon(serve if is_late else trio.sleep_forever)
                await trio.testing.wait_all_tasks_blocked()
                if not is_late:
                    scope.cancel()
                raise ValueError("from the body")

        try:
            await run()
        except ValueError as error:
            handled.append(str(error))
        await trio.lowlevel.checkpoint()
    assert handled == ["from the body"]
    assert scope.cancelled_caught  # the cancellation was delivered again
