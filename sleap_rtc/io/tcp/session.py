"""One TCP connection as a link sees it, without sockets and without an event loop.

The one stream carries records (see `sleap_rtc.proto.transfer.records`) in TLS 1.3. The
client's first message is `Auth`.
"""

import math
from collections import deque
from collections.abc import Callable

from sleap_rtc.io.link.session import (
    IDLE_TIMEOUT,
    MAX_UNREAD,
    MAX_UNSENT_FRAMES,
    MAX_UNSENT_MESSAGES,
    REFUSED,
    Ended,
    Session,
    State,
    Step,
)
from sleap_rtc.io.tcp.tls import TlsEngine
from sleap_rtc.proto.errors import RemoteProtocolError
from sleap_rtc.proto.messages import Auth, decode_message_untrusted
from sleap_rtc.proto.transfer.frames import HEADER_SIZE, FrameDecoder
from sleap_rtc.proto.transfer.records import (
    MAX_BULK,
    RecordDecoder,
    RecordType,
    encode_record_header,
)

BATCH = 96 * 1024
"""Bytes that are encrypted at once. A message overtakes what is not encrypted yet; and
memory in pieces of 128 KiB or more would come from the system anew each time."""

MESSAGE_COST = 512
"""Bytes that the shortest unread message takes beside its text."""

FAREWELL = 2.0
"""Seconds that a side which closes waits until the peer closes too. To leave earlier,
with something unread, would make TCP take back what is still on its way (RFC 1122,
4.2.2.13)."""

_PING_SIZE = 8


class TcpSession(Session):
    """The messages and frames of one TCP connection.

    A driver calls, in any order, `receive_data` (while `wants_data`), `handle_timeout`,
    `connection_lost` and the commands `send_message`, `send_frame` and `close`; after
    each of them it sends what `data_to_send` returns, as far as it can, and tells
    `data_sent`; then it arms a timer for `deadline`. When an ended session has nothing
    more to send, the driver ends its direction of the stream.

    Args:
        engine: TLS; a client's side has not begun its handshake.
        address: See `Session`, also for the others.
        authenticate: The judge of the client's proof.
        certificate_der: The only certificate that a client accepts.
        idle_timeout: Seconds of silence after which the peer counts as gone.
        now: The time in seconds.
    """

    def __init__(
        self,
        engine: TlsEngine,
        address: str,
        *,
        authenticate: Callable[[Auth], str] | None = None,
        certificate_der: bytes = b"",
        idle_timeout: float = IDLE_TIMEOUT,
        now: float,
    ) -> None:
        super().__init__(
            address,
            authenticate=authenticate,
            certificate_der=certificate_der,
            idle_timeout=idle_timeout,
            now=now,
        )
        self._engine = engine
        self._decoder = RecordDecoder()
        self._frame_decoder = FrameDecoder()
        self._control: deque[bytes] = deque()
        self._control_size = 0
        self._bulk: deque[memoryview] = deque()
        self._bulk_size = 0
        self._pong_due: bytes | None = None
        self._encrypted = memoryview(b"")
        self._unread = 0
        self._silent_at = math.inf
        self._farewell_until: float | None = None
        if authenticate is None:
            engine.shake_hands_untrusted()

    # ------------------------------------------------------------------ the world

    def receive_data(self, data: bytes | memoryview, now: float) -> None:
        """Take bytes of the stream."""
        self.bytes_received += len(data)
        self._silent_at = now + self._idle_timeout
        if self.ended is not None:
            return
        try:
            self._receive_untrusted(data, now)
        except RemoteProtocolError as error:
            self._violated(error)

    def connection_lost(self, reason: str) -> None:
        """Note that the stream is gone, or that the peer ended its direction.

        Args:
            reason: What happened, for people.
        """
        if self.ended is None:
            self._move(Step.ENDED)
            self.ended = Ended(f"{self.address}: {reason}", by_peer=False)
        self.finished = True

    def handle_timeout(self, now: float) -> None:
        """Do what is due; nothing if nothing is."""
        if not self.wants_data:
            # Who does not listen can't tell whether anybody speaks.
            self._silent_at = now + self._idle_timeout
        match self.state:
            case State.HANDSHAKE | State.UNPROVEN if now >= self._proof_deadline:
                self._give_up_unproven()
            case State.READY if now >= self._silent_at:
                silence = f"for {self._idle_timeout:g} s"
                self._end(
                    f"no answer from {self.address} {silence}",
                    tell=f"no answer {silence}",
                    silent_for=self._idle_timeout,
                )
            case State.READY if now >= self._ping_at:
                self._ping(now)
            case State.ENDED:
                if self._farewell_until is None:
                    self._farewell_until = now + FAREWELL
                elif now >= self._farewell_until:
                    self.finished = True

    def deadline(self) -> float | None:
        """When to call `handle_timeout`; None once the session is finished."""
        if self.finished:
            return None
        match self.state:
            case State.HANDSHAKE | State.UNPROVEN:
                return self._proof_deadline
            case State.READY:
                return min(self._ping_at, self._silent_at)
            case State.ENDED:
                # First at once, because `close` does not know what time it is.
                return self._farewell_until or -math.inf

    def data_to_send(self) -> memoryview:
        """Return bytes to send now; the same ones until `data_sent` takes them off."""
        self.has_news = False
        if not self._encrypted:
            if batch := self._next_batch():
                self._engine.encrypt(batch)
            self._encrypted = memoryview(self._engine.take())
        return self._encrypted

    def data_sent(self, count: int) -> None:
        """Note that so many of the bytes to send are sent."""
        self.bytes_sent += count
        self._encrypted = self._encrypted[count:]

    # -------------------------------------------------------------- what is there

    @property
    def wants_data(self) -> bool:
        """True unless so much is unread that the peer has to wait."""
        return self._unread < MAX_UNREAD or self.ended is not None

    @property
    def has_room_for_message(self) -> bool:
        """True while few messages wait to be sent."""
        return self._control_size < MAX_UNSENT_MESSAGES

    @property
    def has_room_for_frame(self) -> bool:
        """True while few frames wait to be sent."""
        return self._bulk_size < MAX_UNSENT_FRAMES

    @property
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
                if self.ended is None:
                    self._receive_record_untrusted(kind, content, now)

    def _receive_record_untrusted(
        self, kind: RecordType, content: bytes | memoryview, now: float
    ) -> None:
        match kind:
            case RecordType.MESSAGE:
                size = len(content) + MESSAGE_COST
                self._unread += size
                message = decode_message_untrusted(bytes(content))
                self._receive_message_untrusted(message, size)
            case RecordType.BULK if self.state is not State.READY:
                raise RemoteProtocolError(REFUSED)
            case RecordType.BULK:
                for frame in self._frame_decoder.receive_data_untrusted(content):
                    self._unread += HEADER_SIZE + frame.header.length
                    self._frames.append(frame)
            case RecordType.PING:
                # Only the latest: a peer that reads no answers can't pile them up.
                self._pong_due = bytes(content)
            case RecordType.PONG:
                self._pong(int.from_bytes(content), now)
            case RecordType.CLOSE:
                self._closed_by_peer(bytes(content))

    def _closed_by_peer(self, content: bytes) -> None:
        text = content.decode(errors="replace")
        # What a peer wrote may reach a terminal.
        reason = "".join(c if c.isprintable() else "?" for c in text)
        self._move(Step.ENDED)
        self.ended = Ended(reason or f"{self.address} closed the link", by_peer=True)
        self.finished = True

    def _count_read(self, size: int) -> None:
        had_enough = not self.wants_data
        self._unread -= size
        self.has_news = had_enough and self.wants_data

    # -------------------------------------------------------------------- sending

    def _queue_message(self, text: bytes) -> None:
        self._control.append(_record(RecordType.MESSAGE, text))
        self._control_size += len(self._control[-1])

    def _queue_frame(
        self, header: bytes, payload: bytes | bytearray | memoryview
    ) -> None:
        self._bulk += (memoryview(header), memoryview(payload))
        self._bulk_size += len(header) + len(payload)

    def _send_ping(self, uid: int) -> None:
        # First in line, so that it measures the network and not the queue.
        self._control.appendleft(_record(RecordType.PING, uid.to_bytes(_PING_SIZE)))
        self._control_size += len(self._control[0])

    def _send_close(self, reason: str, *, orderly: bool) -> None:
        self._control.clear()
        self._bulk.clear()
        self._control_size = self._bulk_size = 0
        self._pong_due = None
        if self._engine.secured:
            self._engine.encrypt(_record(RecordType.CLOSE, reason.encode()))

    def _next_batch(self) -> bytes:
        """Take records off the queues: messages before bulk, and whole ones only."""
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
