"""The queue of a worker: it shares slots and GPUs out among jobs."""

from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import trio


class _Ticket:
    """One job's place in the queue."""

    def __init__(self, on_position: Callable[[int], None]) -> None:
        self.on_position = on_position
        self.granted = trio.Event()
        self.slot = -1


class SlotQueue:
    """Grants slots in the order of the requests. It is kept in memory only.

    Args:
        slots: Jobs that may run at the same time.
        gpus: Numbers of the GPUs to share out among the slots; empty without GPUs.
    """

    def __init__(self, slots: int, gpus: Sequence[int] = ()) -> None:
        self.slots = slots
        self._gpus = tuple(gpus)
        self._free = list(range(slots - 1, -1, -1))
        self._waiting: deque[_Ticket] = deque()
        self._changed = trio.Event()

    @property
    def free(self) -> int:
        """Slots that no job uses."""
        return len(self._free)

    @property
    def waiting(self) -> int:
        """Jobs in the queue."""
        return len(self._waiting)

    async def wait_changed(self) -> None:
        """Wait until `free` or `waiting` has changed since the last call ended.

        One task at a time may wait.
        """
        await self._changed.wait()
        self._changed = trio.Event()

    @asynccontextmanager
    async def slot(
        self, on_position: Callable[[int], None]
    ) -> AsyncIterator[tuple[int, ...] | None]:
        """Wait for a slot and hold it for as long as the body runs.

        Args:
            on_position: Called with the number of jobs ahead, at once and after each
                change.

        Yields:
            The GPUs that a job in this slot may use; None if the queue has no GPUs.
        """
        ticket = _Ticket(on_position)
        self._waiting.append(ticket)
        try:
            self._share_out()
            if not ticket.granted.is_set():
                on_position(self._waiting.index(ticket))
            await ticket.granted.wait()
            yield self._gpus_of(ticket.slot)
        finally:
            if ticket.slot >= 0:
                self._free.append(ticket.slot)
            else:
                self._waiting.remove(ticket)
            self._share_out()
            for position, other in enumerate(self._waiting):
                other.on_position(position)

    def _share_out(self) -> None:
        self._changed.set()
        while self._free and self._waiting:
            ticket = self._waiting.popleft()
            ticket.slot = self._free.pop()
            ticket.granted.set()

    def _gpus_of(self, slot: int) -> tuple[int, ...] | None:
        """Return the GPUs of a slot: several if there are more GPUs than slots."""
        if not self._gpus:
            return None
        if self.slots >= len(self._gpus):
            return (self._gpus[slot % len(self._gpus)],)
        return self._gpus[slot :: self.slots]
