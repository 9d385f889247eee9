"""The sending half of a stream for bulk, which keeps what it sends without a copy."""

from bisect import bisect_right
from typing import NamedTuple

from aioquic.quic.packet_builder import QuicDeliveryState
from aioquic.quic.rangeset import RangeSet

Payload = bytes | bytearray | memoryview


class Piece(NamedTuple):
    """Bytes of the stream that go into one packet."""

    start: int
    stop: int
    views: list[memoryview]


class BulkSender:
    """What waits to be sent or acknowledged, in the pieces in which it was queued.

    Attributes:
        acknowledged: All bytes before this offset have arrived.
        sent: The highest offset that was ever sent; what is beyond is new.
        end: The offset behind all that was queued.
    """

    def __init__(self) -> None:
        self.acknowledged = 0
        self.sent = 0
        self.end = 0
        self._starts: list[int] = []
        self._views: list[memoryview] = []
        self._lost = RangeSet()
        self._arrived = RangeSet()

    @property
    def unacknowledged(self) -> int:
        """Bytes that were queued and have not been acknowledged."""
        return self.end - self.acknowledged

    @property
    def unsent(self) -> int:
        """Bytes that were queued and never sent."""
        return self.end - self.sent

    def has_more(self, limit: int) -> bool:
        """Tell if there is something to take.

        Args:
            limit: The offset behind which the peer takes nothing.
        """
        return len(self._lost) > 0 or self.sent < min(self.end, limit)

    def queue(self, data: Payload) -> None:
        """Queue bytes, which must not change any more."""
        if not data:
            return
        self._starts.append(self.end)
        self._views.append(memoryview(data).toreadonly())
        self.end += len(data)

    def take(self, size: int, limit: int) -> Piece:
        """Take what comes next, lost bytes first; only if there is more.

        Args:
            size: The most bytes to take.
            limit: See `has_more`.
        """
        if len(self._lost):
            lost = self._lost[0]
            start, stop = lost.start, min(lost.stop, lost.start + size)
            self._lost.subtract(start, stop)
        else:
            start, stop = self.sent, min(self.end, self.sent + size, limit)
            self.sent = stop
        return Piece(start, stop, self._views_of(start, stop))

    def on_delivery(self, delivery: QuicDeliveryState, start: int, stop: int) -> None:
        """Note what has become of a piece."""
        if delivery is not QuicDeliveryState.ACKED:
            self._lost.add(start, stop)
        elif start == self.acknowledged and not len(self._arrived):
            self._forget_before(stop)
        else:
            self._arrived.add(start, stop)
            if self._arrived[0].start == self.acknowledged:
                self._forget_before(self._arrived.shift().stop)

    def _views_of(self, start: int, stop: int) -> list[memoryview]:
        index = bisect_right(self._starts, start) - 1
        at = start - self._starts[index]
        size = stop - start
        views = [self._views[index][at : at + size]]
        size -= len(views[0])
        while size:
            index += 1
            views.append(self._views[index][:size])
            size -= len(views[-1])
        return views

    def _forget_before(self, offset: int) -> None:
        self.acknowledged = offset
        while self._views and self._starts[0] + len(self._views[0]) <= offset:
            del self._starts[0], self._views[0]
