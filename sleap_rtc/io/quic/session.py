"""One QUIC connection as a link sees it, without sockets and without an event loop.

Stream 0, opened by the client, carries the control messages of both sides, each as
its length in four bytes (big-endian) and its text. Beside it each side has one
unidirectional stream of bulk frames. The client's first message is `Auth`.
"""

from collections.abc import Sequence

import msgspec
from aioquic.quic.events import (
    ConnectionIdIssued,
    ConnectionIdRetired,
    ConnectionTerminated,
    HandshakeCompleted,
    PingAcknowledged,
    QuicEvent,
    StopSendingReceived,
    StreamDataReceived,
    StreamReset,
)
from aioquic.quic.packet import QuicErrorCode
from typing_extensions import override

from sleap_rtc.io.link.limits import LIMITS, LinkLimits
from sleap_rtc.io.link.link import ReceivedT_co
from sleap_rtc.io.link.session import (
    Client,
    Ended,
    Phase,
    ProofShown,
    Role,
    Session,
)
from sleap_rtc.io.quic.engine import Datagram, QuicEngine
from sleap_rtc.proto.errors import RemoteProtocolError
from sleap_rtc.proto.messages import (
    MAX_MESSAGE_BYTES,
)
from sleap_rtc.proto.terminal import printable
from sleap_rtc.proto.transfer.frames import FrameDecoder

_CONTROL = 0
_CLIENT_BULK = 2
_SERVER_BULK = 3
_LENGTH_SIZE = 4

_ORDERLY = 0
_VIOLATION = 1
_SILENCE = QuicErrorCode.INTERNAL_ERROR
"""Error code with which the engine's timer closes a connection after a silence."""

_TLS_ALERTS = range(QuicErrorCode.CRYPTO_ERROR, QuicErrorCode.CRYPTO_ERROR + 256)


# ------------------------------------------------------------------------- outputs


class RouteAdded(msgspec.Struct, frozen=True):
    """Effect: deliver datagrams with this connection id to the session."""

    connection_id: bytes


class RouteRemoved(msgspec.Struct, frozen=True):
    """Effect: stop delivering datagrams with this connection id to the session."""

    connection_id: bytes


RouteChange = RouteAdded | RouteRemoved
Output = ProofShown | RouteChange


class MessageDecoder:
    """Splits a control stream into the texts of its messages.

    Call `receive_data` with the bytes that arrive, then `next_text_untrusted` until it
    returns None. At most one incomplete message is held.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()

    def receive_data(self, data: bytes) -> None:
        """Add bytes of the stream."""
        self._buffer += data

    def next_text_untrusted(self) -> tuple[bytes, int] | None:
        """Remove and return the text of the next whole message, and its size.

        Raises:
            RemoteProtocolError: If it is too long.
        """
        if len(self._buffer) < _LENGTH_SIZE:
            return None
        length = int.from_bytes(self._buffer[:_LENGTH_SIZE])
        if length > MAX_MESSAGE_BYTES:
            raise RemoteProtocolError(
                f"a control message of {length} bytes is too long"
            )
        end = _LENGTH_SIZE + length
        if len(self._buffer) < end:
            return None
        text = bytes(self._buffer[_LENGTH_SIZE:end])
        del self._buffer[:end]
        return text, end


class QuicSession(Session[ReceivedT_co, RouteChange]):
    """The messages and frames of one QUIC connection.

    A driver calls, in any order, `receive_datagrams`, `handle_timeout` and the
    commands; after each of them it sends what `datagrams_to_send` returns.

    Args:
        engine: The QUIC connection; a client's has begun to connect.
        address: The peer's ``host:port``, for people.
        role: Which side of the connection this is.
        limits: The limits of the link.
        now: The time in seconds.
    """

    def __init__(
        self,
        engine: QuicEngine,
        address: str,
        role: Role[ReceivedT_co],
        *,
        limits: LinkLimits = LIMITS,
        now: float,
    ) -> None:
        super().__init__(address, role, limits, now)
        self._engine = engine
        bulk = (_CLIENT_BULK, _SERVER_BULK)
        self._our_bulk, self._their_bulk = (
            bulk if isinstance(role, Client) else bulk[::-1]
        )
        self._decoder = MessageDecoder()
        self._frame_decoder = FrameDecoder()
        self._early_bulk = bytearray()
        self._read = 0
        self._granted_at = 0
        self._close_datagrams: list[Datagram] = []
        self._close_due = False

    # ------------------------------------------------------------------ the world

    def receive_datagrams(self, datagrams: Sequence[Datagram], now: float) -> None:
        """Handle datagrams that arrived; garbage among them is ignored."""
        self.bytes_received += sum(len(data) for data, _ in datagrams)
        if self.ended is not None:
            self._close_due = True
        self._engine.receive_datagrams(datagrams, now)
        self._drain_engine(now)

    @override
    def handle_timeout(self, now: float) -> None:
        was_open = self._engine.close_event is None
        self._engine.handle_timeout(now)
        closing = self._engine.close_event
        # A timer closes a connection after a silence or if no path works.
        if was_open and closing and closing.error_code == _SILENCE:
            self._end(self._silence())
        self._drain_engine(now)
        match self.state:
            case Phase.READY if now >= self._ping_at:
                self._ping(now)
            case Phase() if self.state is not Phase.READY:
                if now >= self._proof_deadline:
                    self._give_up_unproven(now)

    def datagrams_to_send(self, now: float) -> list[Datagram]:
        """Return what to send now, in order."""
        self.has_news = False
        closing = self.ended is not None
        datagrams = self._engine.datagrams_to_send(now)
        if closing and datagrams:
            self._close_datagrams = datagrams
        elif closing and self._close_due and not self.finished:
            datagrams = self._close_datagrams
        self._close_due = False
        self._drain_engine(now)
        self.bytes_sent += sum(len(data) for data, _ in datagrams)
        return datagrams

    @override
    def deadline(self) -> float | None:
        engine_deadline = self._engine.deadline()
        deadlines = [] if engine_deadline is None else [engine_deadline]
        match self.state:
            case Phase.READY:
                deadlines.append(self._ping_at)
            case Phase():
                deadlines.append(self._proof_deadline)
        return min(deadlines, default=None)

    @override
    def admit(self, peer: str, now: float) -> None:
        """Accept the proof, and process the data that the engine has kept."""
        super().admit(peer, now)
        self._drain_engine(now)

    # -------------------------------------------------------------------- queries

    @property
    @override
    def has_room_for_message(self) -> bool:
        """True while few messages wait for acknowledgement."""
        return self._engine.unacknowledged(_CONTROL) < self._limits.max_unsent_messages

    @property
    @override
    def has_room_for_frame(self) -> bool:
        """True while few frames wait to be sent, and not too many are on the way."""
        engine, bulk, limits = self._engine, self._our_bulk, self._limits
        return (
            engine.unsent(bulk) < limits.max_unsent_frames
            and engine.unacknowledged(bulk) < limits.max_unacknowledged_frames
        )

    @property
    @override
    def all_sent(self) -> bool:
        """True if the peer has acknowledged everything that was queued."""
        streams = (_CONTROL, self._our_bulk)
        return not any(self._engine.unacknowledged(stream) for stream in streams)

    @property
    def packets_lost(self) -> int:
        """Packets that had to be sent again."""
        return self._engine.packets_lost

    # --------------------------------------------------------------------- inside

    @override
    def _queue_message(self, text: bytes) -> None:
        self._engine.send(_CONTROL, len(text).to_bytes(_LENGTH_SIZE) + text)

    @override
    def _queue_frame(
        self, header: bytes, payload: bytes | bytearray | memoryview
    ) -> None:
        self._engine.send_bulk(self._our_bulk, header)
        self._engine.send_bulk(self._our_bulk, payload)

    @override
    def _send_ping(self, uid: int) -> None:
        self._engine.send_ping(uid)

    @override
    def _send_close(self, reason: str, now: float, *, orderly: bool) -> None:
        code = _ORDERLY if orderly else _VIOLATION
        self._engine.close(code, reason)

    @override
    def _count_read(self, size: int) -> None:
        self._read += size
        if self._read - self._granted_at > self._limits.max_unread // 4:
            self._granted_at = self._read
            self._engine.grant(self._read + self._limits.max_unread)
            self.has_news = True

    def _drain_engine(self, now: float) -> None:
        """Process the events of the engine; it keeps them while a proof is checked."""
        try:
            while self.state is not Phase.JUDGING:
                event = self._engine.next_event()
                if event is None:
                    self._end_with_engine()
                    break
                self._receive_event_untrusted(event, now)
        except RemoteProtocolError as error:
            self._violated(error, now)

    def _end_with_engine(self) -> None:
        """End the session if the engine has ended the connection."""
        if (closing := self._engine.close_event) is not None:
            self._end(_explain(closing))

    def _receive_event_untrusted(self, event: QuicEvent, now: float) -> None:
        match event:
            case StreamDataReceived() if self.ended is None:
                self._receive_stream_untrusted(event)
            case StreamReset() | StopSendingReceived() if self.ended is None:
                raise RemoteProtocolError("a stream of the link was broken off")
            case HandshakeCompleted() if self.ended is None:
                self._secured_untrusted(self._engine.peer_certificate, now)
            case PingAcknowledged():
                self._pong(event.uid, now)
            case ConnectionIdIssued():
                self._outputs.append(RouteAdded(event.connection_id))
            case ConnectionIdRetired():
                self._outputs.append(RouteRemoved(event.connection_id))
            case ConnectionTerminated():
                self._end_with_engine()
                self._finish()

    @override
    def _open_untrusted(self, now: float) -> None:
        self._engine.grant(self._read + self._limits.max_unread)
        early, self._early_bulk = self._early_bulk, bytearray()
        self._frames += self._frame_decoder.receive_data_untrusted(memoryview(early))
        self._read_messages_untrusted()

    def _receive_stream_untrusted(self, event: StreamDataReceived) -> None:
        if event.stream_id == self._their_bulk:
            if self.state is Phase.READY:
                frames = self._frame_decoder.receive_data_untrusted(event.data)
                self._frames += frames
            else:
                self._early_bulk += event.data
        elif event.stream_id == _CONTROL:
            self._decoder.receive_data(event.data)
            self._read_messages_untrusted()
        else:
            raise RemoteProtocolError(f"the link has no stream {event.stream_id}")
        if event.end_stream:
            raise RemoteProtocolError("a stream of the link was broken off")

    def _read_messages_untrusted(self) -> None:
        while self.state is not Phase.JUDGING:
            framed = self._decoder.next_text_untrusted()
            if framed is None:
                return
            text, size = framed
            self._receive_message_untrusted(text, size)


def _explain(event: ConnectionTerminated) -> Ended:
    """Describe the end of a connection that this side did not end."""
    phrase = printable(event.reason_phrase)
    if event.frame_type is None:
        return Ended(phrase or "the peer closed the link")
    if event.error_code in _TLS_ALERTS:
        return Ended(f"not the expected peer: {phrase}", is_fault=True)
    if event.error_code == QuicErrorCode.FLOW_CONTROL_ERROR:
        return Ended("the peer sends more than it may", is_fault=True)
    return Ended(f"the peer broke the protocol of QUIC: {phrase}", is_fault=True)
