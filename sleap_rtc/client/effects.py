"""The effects of a job: one at a time, and each can be stopped."""

from collections.abc import Awaitable, Callable
from typing import TypeVarTuple

import trio

Args = TypeVarTuple("Args")

STOP_TIMEOUT = 10.0
"""Seconds that an effect waits for its predecessor, which may hang on a mount."""


class Effects:
    """Runs effects one after the other.

    Args:
        nursery: The nursery of their tasks.
        on_done: Called after each effect, even if it was stopped.
    """

    def __init__(self, nursery: trio.Nursery, on_done: Callable[[], None]) -> None:
        self._nursery = nursery
        self._on_done = on_done
        self._scope = trio.CancelScope()
        self._done = trio.Event()
        self._done.set()

    def start(self, effect: Callable[[*Args], Awaitable[None]], *args: *Args) -> None:
        """Run an effect once the one before it is over."""
        before = self._done
        self._scope, self._done = trio.CancelScope(), trio.Event()
        self._nursery.start_soon(
            self._run, self._scope, before, self._done, lambda: effect(*args)
        )

    def stop(self) -> None:
        """Cancel the effect that was started last."""
        self._scope.cancel(reason="the job no longer needs it")

    async def _run(
        self,
        scope: trio.CancelScope,
        before: trio.Event,
        done: trio.Event,
        effect: Callable[[], Awaitable[None]],
    ) -> None:
        try:
            with scope:
                # Wait even if cancelled: this effect may remove files of that one.
                with trio.move_on_after(STOP_TIMEOUT, shield=True):
                    await before.wait()
                await effect()
        finally:
            done.set()
        self._on_done()
