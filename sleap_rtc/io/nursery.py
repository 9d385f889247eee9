"""Background tasks of an asynchronous context manager."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


@asynccontextmanager
async def open_background_nursery() -> AsyncIterator[trio.Nursery]:
    """Open a nursery whose tasks serve the body, and are cancelled after it.

    What the body raises leaves as it is. A plain nursery would wrap it into an
    `ExceptionGroup`, because it cannot know that its tasks are only servants.
    """
    raised: Exception | None = None
    async with trio.open_nursery() as nursery:
        try:
            yield nursery
        except Exception as error:
            raised = error
        nursery.cancel_scope.cancel(reason="the body is done")
    if raised is not None:
        raise raised
