"""One TCP connection as a link sees it, without sockets and without an event loop.

The one stream carries records (see `sleap_rtc.proto.transfer.records`) in TLS 1.3. The
client's first message is `Auth`.
"""

import math
from collections import deque
from typing import Never, assert_never

from typing_extensions import override

from sleap_rtc.io.link.limits import LIMITS, LinkLimits
from sleap_rtc.io.link.link import ReceivedT_co
from sleap_rtc.io.link.session import (
    REFUSED,
    Client,
    Ended,
    Phase,
    Role,
    Session,
)
from sleap_rtc.io.tcp.tls import TlsEngine
from sleap_rtc.proto.errors import RemoteProtocolError
from sleap_rtc.proto.terminal import printable
from sleap_rtc.proto.transfer.frames import HEADER_SIZE, FrameDecoder
from sleap_rtc.proto.transfer.records import (
    MAX_BULK,
    RecordDecoder,
    RecordType,
    encode_record_header,
)

BATCH = 96 * 1024
"""Bytes that are encrypted at once. A message overtakes data that is not encrypted yet.
Pieces of 128 KiB or more would be allocated from the system each time."""

MESSAGE_COST = 512
"""Bytes that the shortest unread message takes beside its text."""

_PING_SIZE = 8


class TcpSession(Session[ReceivedT_co, Never]):
    """The messages and frames of one TCP connection.

    A driver calls, in any order, `receive_data` (while `wants_data`), `handle_timeout`,
    `connection_lost` and the commands; after each of them it sends as much as possible
    of `data_to_send`, and reports that to `data_sent`. When an ended session has
    nothing more to send, the driver ends its direction of the stream.

    Args:
        engine: TLS; a client's side has not begun its handshake.
        address: The peer's ``host:port``, for people.
        role: Which side of the connection this is.
        limits: The limits of the link.
        now: The time in seconds.
    """

    def __init__(
        self,
        engine: TlsEngine,
        address: str,
        role: Role[ReceivedT_co],
        *,
        limits: LinkLimits = LIMITS,
        now: float,
    ) -> None:
        super().__init__(address, role, limits, now)
        self._engine = engine
        self._decoder = RecordDecoder()
        self._frame_decoder = FrameDecoder()
        self._held: deque[tuple[RecordType, bytes]] = deque()  # while JUDGING
        self._control: deque[bytes] = deque()
        self._control_size = 0
        self._bulk: deque[memoryview] = deque()
        self._bulk_size = 0
        self._pong_due: bytes | None = None
        self._encrypted = memoryview(b"")
        self._unread = 0
        self._silent_at = math.inf
        self._close_until = math.inf
        if isinstance(role, Client):
            engine.shake_hands_untrusted()

    # ------------------------------------------------------------------ the world

    def receive_data(self, data: bytes | memoryview, now: float) -> None:
        """Handle bytes of the stream."""
        self.bytes_received += len(data)
        self._silent_at = now + self._limits.idle_timeout
        if self.ended is not None:
            return
        try:
            self._receive_untrusted(data, now)
        except RemoteProtocolError as error:
            self._violated(error, now)

    def connection_lost(self, reason: str) -> None:
        """Handle the end of the stream, or of the peer's direction of it.

        Args:
            reason: The cause, for people.
        """
        self._end(Ended(reason, is_fault=True))
        self._finish()

    @override
    def handle_timeout(self, now: float) -> None:
        if not self.wants_data:
            # While this side does not read, the silence proves nothing.
            self._silent_at = now + self._limits.idle_timeout
        match self.state:
            case Phase.READY if now >= self._silent_at:
                ended = self._silence()
                self._fail(ended, ended.reason, now)
            case Phase.READY if now >= self._ping_at:
                self._ping(now)
            case Phase() if self.state is not Phase.READY:
                if now >= self._proof_deadline:
                    self._give_up_unproven(now)
            case Ended() if now >= self._close_until:
                self._finish()

    @override
    def deadline(self) -> float | None:
        match self.state:
            case Ended(finished=finished):
                return None if finished else self._close_until
            case Phase.READY:
                return min(self._ping_at, self._silent_at)
            case _:
                return self._proof_deadline

    def data_to_send(self) -> memoryview:
        """Return bytes to send now; the same ones until `data_sent` removes them."""
        self.has_news = False
        if not self._encrypted:
            if batch := self._next_batch():
                self._engine.encrypt(batch)
            self._encrypted = memoryview(self._engine.take())
        return self._encrypted

    def data_sent(self, count: int) -> None:
        """Remove this many of the bytes to send: they are sent."""
        self.bytes_sent += count
        self._encrypted = self._encrypted[count:]

    # -------------------------------------------------------------------- queries

    @property
    def wants_data(self) -> bool:
        """True unless much data is unread, or the proof is being checked."""
        if self.ended is not None:
            return True
        has_room = self._unread < self._limits.max_unread
        return has_room and self.state is not Phase.JUDGING

    @property
    @override
    def has_room_for_message(self) -> bool:
        return self._control_size < self._limits.max_unsent_messages

    @property
    @override
    def has_room_for_frame(self) -> bool:
        return self._bulk_size < self._limits.max_unsent_frames

    @property
    @override
    def all_sent(self) -> bool:
        """True if the operating system has everything that was queued."""
        return not (self._control or self._bulk or self._encrypted)

    # ------------------------------------------------------------------ receiving

    def _receive_untrusted(self, data: bytes | memoryview, now: float) -> None:
        if not self._engine.secured:
            self._engine.shake_hands_untrusted(data)
            if not self._engine.secured:
                return
            self._secured_untrusted(self._engine.peer_certificate, now)
            data = b""
        for plain in self._engine.decrypt_untrusted(data):
            for kind, content in self._decoder.records_untrusted(plain):
                if self.state is Phase.JUDGING:
                    self._held.append((kind, bytes(content)))
                elif self.ended is None:
                    self._receive_record_untrusted(kind, content, now)

    @override
    def _open_untrusted(self, now: float) -> None:
        while self._held and self.ended is None:
            self._receive_record_untrusted(*self._held.popleft(), now)

    def _receive_record_untrusted(
        self, kind: RecordType, content: bytes | memoryview, now: float
    ) -> None:
        match kind:
            case RecordType.MESSAGE:
                size = len(content) + MESSAGE_COST
                self._unread += size
                self._receive_message_untrusted(bytes(content), size)
            case RecordType.BULK if self.state is not Phase.READY:
                raise RemoteProtocolError(REFUSED)
            case RecordType.BULK:
                for frame in self._frame_decoder.receive_data_untrusted(content):
                    self._unread += HEADER_SIZE + frame.header.length
                    self._frames.append(frame)
            case RecordType.PING:
                # Only the latest: a peer that reads no answers cannot pile them up.
                self._pong_due = bytes(content)
            case RecordType.PONG:
                self._pong(int.from_bytes(content), now)
            case RecordType.CLOSE:
                self._closed_by_peer(bytes(content))
            case _:
                assert_never(kind)

    def _closed_by_peer(self, content: bytes) -> None:
        reason = printable(content.decode(errors="replace"))
        self._end(Ended(reason or "the peer closed the link", finished=True))

    @override
    def _count_read(self, size: int) -> None:
        had_enough = not self.wants_data
        self._unread -= size
        self.has_news = had_enough and self.wants_data

    # -------------------------------------------------------------------- sending

    @override
    def _queue_message(self, text: bytes) -> None:
        self._control.append(_record(RecordType.MESSAGE, text))
        self._control_size += len(self._control[-1])

    @override
    def _queue_frame(
        self, header: bytes, payload: bytes | bytearray | memoryview
    ) -> None:
        self._bulk += (memoryview(header), memoryview(payload))
        self._bulk_size += len(header) + len(payload)

    @override
    def _send_ping(self, uid: int) -> None:
        # First in line, so that it measures the network and not the queue.
        self._control.appendleft(_record(RecordType.PING, uid.to_bytes(_PING_SIZE)))
        self._control_size += len(self._control[0])

    @override
    def _send_close(self, reason: str, now: float, *, orderly: bool) -> None:
        self._close_until = now + self._limits.close_timeout
        self._control.clear()
        self._bulk.clear()
        self._control_size = self._bulk_size = 0
        self._pong_due = None
        if self._engine.secured:
            self._engine.encrypt(_record(RecordType.CLOSE, reason.encode()))

    def _next_batch(self) -> bytes:
        """Return the next records of the queues: whole ones, messages before bulk."""
        parts: list[bytes | memoryview] = []
        room = BATCH
        if self._pong_due is not None:
            parts.append(_record(RecordType.PONG, self._pong_due))
            self._pong_due = None
        while self._control and room > 0:
            parts.append(self._control.popleft())
            self._control_size -= len(parts[-1])
            room -= len(parts[-1])
        while self._bulk and room > 0:
            length = min(MAX_BULK, self._bulk_size, room)
            parts.append(encode_record_header(RecordType.BULK, length))
            parts += self._take_bulk(length)
            room -= length
        return b"".join(parts)

    def _take_bulk(self, length: int) -> list[memoryview]:
        pieces: list[memoryview] = []
        self._bulk_size -= length
        while length:
            first = self._bulk.popleft()
            pieces.append(first[:length])
            if len(first) > length:
                self._bulk.appendleft(first[length:])
            length -= len(pieces[-1])
        return pieces


def _record(kind: RecordType, content: bytes) -> bytes:
    return encode_record_header(kind, len(content)) + content
