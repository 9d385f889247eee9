"""The sending half of a bulk stream, which keeps sent bytes without copying them."""

from bisect import bisect_right
from typing import NamedTuple

from aioquic.quic.rangeset import RangeSet

Payload = bytes | bytearray | memoryview


class Piece(NamedTuple):
    """Bytes of the stream that go into one packet.

    Args:
        start: The offset of the first byte.
        stop: The offset after the last one.
        views: The bytes.
    """

    start: int
    stop: int
    views: list[memoryview]


class BulkSender:
    """Bytes that are not acknowledged yet, in the pieces in which they were queued.

    Attributes:
        acknowledged: The offset before which all bytes have arrived.
        sent: The offset before which all bytes were sent at least once.
        end: The offset after the last byte that was queued.
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
        """Bytes that were queued and are not acknowledged."""
        return self.end - self.acknowledged

    @property
    def unsent(self) -> int:
        """Bytes that were queued and never sent."""
        return self.end - self.sent

    def has_more(self, limit: int) -> bool:
        """Return True if bytes wait to be sent.

        Args:
            limit: The offset before which the peer accepts bytes.
        """
        return len(self._lost) > 0 or self.sent < min(self.end, limit)

    def queue(self, data: Payload) -> None:
        """Queue bytes. They are not copied, so the caller must not change them."""
        if not data:
            return
        self._starts.append(self.end)
        self._views.append(memoryview(data).toreadonly())
        self.end += len(data)

    def take(self, size: int, limit: int) -> Piece:
        """Return the next bytes to send, lost ones first; only after `has_more`.

        Args:
            size: The most bytes to return.
            limit: See `has_more`.
        """
        if len(self._lost):
            lost = self._lost[0]
            start, stop = lost.start, min(lost.stop, lost.start + size)
            self._lost.subtract(start, stop)
        else:
            start, stop = self.sent, min(self.end, self.sent + size, limit)
            self.sent = stop
        return Piece(start, stop, self._views_between(start, stop))

    def piece_lost(self, start: int, stop: int) -> None:
        """Queue the bytes of a piece again."""
        self._lost.add(start, stop)

    def piece_acknowledged(self, start: int, stop: int) -> None:
        """Record that a piece has arrived, and release the bytes before it."""
        if start == self.acknowledged and not len(self._arrived):
            self._release_before(stop)
            return
        self._arrived.add(start, stop)
        if self._arrived[0].start == self.acknowledged:
            self._release_before(self._arrived.shift().stop)

    def _views_between(self, start: int, stop: int) -> list[memoryview]:
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

    def _release_before(self, offset: int) -> None:
        self.acknowledged = offset
        while self._views and self._starts[0] + len(self._views[0]) <= offset:
            del self._starts[0], self._views[0]
