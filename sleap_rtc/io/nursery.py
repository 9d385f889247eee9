"""Background tasks of an asynchronous context manager."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


@asynccontextmanager
async def open_background_nursery() -> AsyncIterator[trio.Nursery]:
    """Open a nursery whose tasks serve the body, and are cancelled after it.

    An exception of the body leaves unwrapped. A plain nursery would wrap it into an
    `ExceptionGroup`, because it treats the body like its tasks. If a task also fails,
    the exceptions of the body and of the tasks leave in one group.
    """
    raised: Exception | None = None
    try:
        async with trio.open_nursery() as nursery:
            try:
                yield nursery
            except Exception as error:
                raised = error
            nursery.cancel_scope.cancel(reason="the body is done")
    except BaseExceptionGroup as group:
        if raised is None:
            raise
        # A cancellation from outside is not a failure, and is delivered again.
        _, failures = group.split(trio.Cancelled)
        if failures is not None:
            raise BaseExceptionGroup(
                "the body and its background tasks failed",
                [raised, *failures.exceptions],
            ) from None
    if raised is not None:
        raise raised
