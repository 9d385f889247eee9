"""The worker's queue: how many jobs run at once, in which order, on which GPU."""

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
    """First come, first served, in memory.

    Args:
        slots: Jobs that may run at the same time.
        gpus: Numbers of the GPUs to share out among the slots; empty if there are none.
    """

    def __init__(self, slots: int, gpus: Sequence[int] = ()) -> None:
        self.slots = slots
        self._gpus = tuple(gpus)
        self._free = list(range(slots - 1, -1, -1))
        self._waiting: deque[_Ticket] = deque()

    @property
    def free(self) -> int:
        """Slots that nobody uses or waits for."""
        return len(self._free)

    @property
    def waiting(self) -> int:
        """Jobs in the queue."""
        return len(self._waiting)

    @asynccontextmanager
    async def slot(
        self, on_position: Callable[[int], None]
    ) -> AsyncIterator[tuple[int, ...] | None]:
        """Wait for a slot and hold it.

        Args:
            on_position: Is told how many jobs are ahead, at once and after each change.

        Yields:
            The GPUs that a job in this slot may use, or None if there are none to
            share out.
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
        while self._free and self._waiting:
            ticket = self._waiting.popleft()
            ticket.slot = self._free.pop()
            ticket.granted.set()

    def _gpus_of(self, slot: int) -> tuple[int, ...] | None:
        """Give every slot its GPUs: several if there are more GPUs than slots."""
        if not self._gpus:
            return None
        if self.slots >= len(self._gpus):
            return (self._gpus[slot % len(self._gpus)],)
        return self._gpus[slot :: self.slots]
