"""The timer of a machine, for the one task that serves its deadlines."""

import math

import trio


class Alarm:
    """Wakes one task at a deadline that may change while the task waits.

    The task calls `wait` in a loop. After each drain of the machine its driver passes
    the new deadline to `set`, which wakes nothing.
    """

    def __init__(self) -> None:
        self._scope = trio.CancelScope()

    def set(self, deadline: float | None) -> None:
        """Set when `wait` returns.

        Args:
            deadline: On Trio's clock; None means never.
        """
        self._scope.deadline = math.inf if deadline is None else deadline

    async def wait(self) -> None:
        """Wait until the deadline. The next call needs a deadline of its own."""
        with self._scope:
            await trio.sleep_forever()
        self._scope = trio.CancelScope()
