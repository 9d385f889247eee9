"""One QUIC connection as a link sees it, without sockets and without an event loop.

Stream 0, opened by the client, carries the control messages of both sides, each as
its length in four bytes (big-endian) and its text. Beside it each side has one
unidirectional stream of bulk frames. The client's first message is `Auth`.
"""

from collections import deque
from collections.abc import Callable, Sequence

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

from sleap_rtc.io.link.session import (
    IDLE_TIMEOUT,
    MAX_UNACKNOWLEDGED_FRAMES,
    MAX_UNREAD,
    MAX_UNSENT_FRAMES,
    MAX_UNSENT_MESSAGES,
    Ended,
    Session,
    State,
    Step,
)
from sleap_rtc.io.quic.engine import Datagram, QuicEngine
from sleap_rtc.proto.errors import RemoteProtocolError
from sleap_rtc.proto.messages import (
    MAX_MESSAGE_BYTES,
    Auth,
    Message,
    decode_message_untrusted,
)
from sleap_rtc.proto.transfer.frames import FrameDecoder

_CONTROL = 0
_CLIENT_BULK = 2
_SERVER_BULK = 3
_LENGTH_SIZE = 4

_ORDERLY = 0
_VIOLATION = 1
_TLS_ALERTS = range(QuicErrorCode.CRYPTO_ERROR, QuicErrorCode.CRYPTO_ERROR + 256)


# ------------------------------------------------------------------------- outputs


class RouteAdded(msgspec.Struct, frozen=True):
    """Datagrams with this connection id belong to the session from now on."""

    connection_id: bytes


class RouteRemoved(msgspec.Struct, frozen=True):
    """They no longer do."""

    connection_id: bytes


class Established(msgspec.Struct, frozen=True):
    """Both sides are who they should be; messages and frames may flow."""

    peer: str


Output = RouteAdded | RouteRemoved | Established


class MessageDecoder:
    """Cut a control stream into messages.

    Call `receive_data` with whatever arrives, then `next_message_untrusted` until it
    returns None. At most one incomplete message is held.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()

    def receive_data(self, data: bytes) -> None:
        """Take bytes of the stream."""
        self._buffer += data

    def next_message_untrusted(self) -> tuple[Message, int] | None:
        """Take the next whole message, and how many bytes it was.

        Raises:
            RemoteProtocolError: If it is no message, or too long to be one.
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
        return decode_message_untrusted(text), end


class QuicSession(Session):
    """The messages and frames of one QUIC connection.

    A driver calls, in any order, `receive_datagrams`, `handle_timeout` and the
    commands `send_message`, `send_frame` and `close`; after each of them it sends what
    `datagrams_to_send` returns, drains `next_output`, and arms a timer for `deadline`.

    Args:
        engine: The QUIC connection; a client's has been told to connect.
        address: See `Session`, also for the others.
        authenticate: The judge of the client's proof.
        certificate_der: The only certificate that a client accepts.
        idle_timeout: Seconds of silence after which the peer counts as gone.
        now: The time in seconds.
    """

    def __init__(
        self,
        engine: QuicEngine,
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
        is_client = authenticate is None
        self._our_bulk = _CLIENT_BULK if is_client else _SERVER_BULK
        self._their_bulk = _SERVER_BULK if is_client else _CLIENT_BULK
        self._decoder = MessageDecoder()
        self._frame_decoder = FrameDecoder()
        self._early_bulk = bytearray()
        self._outputs: deque[Output] = deque()
        self._read = 0
        self._granted_at = 0
        self._farewell: list[Datagram] = []
        self._farewell_due = False
        self._engine_deadline: float | None = None

    # ------------------------------------------------------------------ the world

    def receive_datagrams(self, datagrams: Sequence[Datagram], now: float) -> None:
        """Take datagrams that arrived; garbage among them is ignored."""
        self.bytes_received += sum(len(data) for data, _ in datagrams)
        if self.ended is not None:
            self._farewell_due = True
        self._engine.receive_datagrams(datagrams, now)
        self._drain_engine(now)

    def handle_timeout(self, now: float) -> None:
        """Do what is due; nothing if nothing is."""
        if self._engine_deadline is not None and now >= self._engine_deadline:
            self._engine.handle_timer(now)
            self._drain_engine(now)
        match self.state:
            case State.HANDSHAKE | State.UNPROVEN if now >= self._proof_deadline:
                self._give_up_unproven()
            case State.READY if now >= self._ping_at:
                self._ping(now)

    def datagrams_to_send(self, now: float) -> list[Datagram]:
        """Return what to send now, in order."""
        self.has_news = False
        closing = self.ended is not None
        datagrams = self._engine.datagrams_to_send(now)
        if closing and datagrams:
            self._farewell = datagrams
        elif closing and self._farewell_due and not self.finished:
            datagrams = self._farewell
        self._farewell_due = False
        # Asking for the timer also arms it, so it is asked after every sending.
        timer = self._engine.get_timer()
        # The engine may find at its deadline that a rounding error is missing.
        self._engine_deadline = None if timer is None else max(timer, now + 1e-6)
        self._drain_engine(now)
        self.bytes_sent += sum(len(data) for data, _ in datagrams)
        return datagrams

    def deadline(self) -> float | None:
        """When to call `handle_timeout`; None once the session is finished."""
        deadlines = [] if self._engine_deadline is None else [self._engine_deadline]
        match self.state:
            case State.HANDSHAKE | State.UNPROVEN:
                deadlines.append(self._proof_deadline)
            case State.READY:
                deadlines.append(self._ping_at)
        return min(deadlines, default=None)

    def next_output(self) -> Output | None:
        """Take the next output, if there is one."""
        return self._outputs.popleft() if self._outputs else None

    # -------------------------------------------------------------- what is there

    @property
    def has_room_for_message(self) -> bool:
        """True while few messages wait for acknowledgement."""
        return self._engine.unacknowledged(_CONTROL) < MAX_UNSENT_MESSAGES

    @property
    def has_room_for_frame(self) -> bool:
        """True while few frames wait to be sent, and not too many are on the way."""
        engine, bulk = self._engine, self._our_bulk
        return (
            engine.unsent(bulk) < MAX_UNSENT_FRAMES
            and engine.unacknowledged(bulk) < MAX_UNACKNOWLEDGED_FRAMES
        )

    @property
    def all_sent(self) -> bool:
        """True if the peer has acknowledged everything that was queued."""
        streams = (_CONTROL, self._our_bulk)
        return not any(self._engine.unacknowledged(stream) for stream in streams)

    @property
    def packets_lost(self) -> int:
        """Packets that had to be sent again."""
        return self._engine.packets_lost

    # --------------------------------------------------------------------- inside

    def _queue_message(self, text: bytes) -> None:
        self._engine.send(_CONTROL, len(text).to_bytes(_LENGTH_SIZE) + text)

    def _queue_frame(
        self, header: bytes, payload: bytes | bytearray | memoryview
    ) -> None:
        self._engine.send_bulk(self._our_bulk, header)
        self._engine.send_bulk(self._our_bulk, payload)

    def _send_ping(self, uid: int) -> None:
        self._engine.send_ping(uid)

    def _send_close(self, reason: str, *, orderly: bool) -> None:
        code = _ORDERLY if orderly else _VIOLATION
        self._engine.close(code, reason)

    def _count_read(self, size: int) -> None:
        self._read += size
        if self._read - self._granted_at > MAX_UNREAD // 4:
            self._granted_at = self._read
            self._engine.grant(self._read + MAX_UNREAD)
            self.has_news = True

    def _drain_engine(self, now: float) -> None:
        try:
            while (event := self._engine.next_event()) is not None:
                self._receive_event_untrusted(event, now)
        except RemoteProtocolError as error:
            self._violated(error)
        closing = self._engine.close_event
        if self.ended is None and closing is not None:
            self._move(Step.ENDED)
            self.ended = _explain(closing, self.address, self._idle_timeout)

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
                self.finished = True

    def _proven(self, peer: str) -> None:
        super()._proven(peer)
        self._outputs.append(Established(peer))
        self._engine.grant(self._read + MAX_UNREAD)
        early, self._early_bulk = self._early_bulk, bytearray()
        self._frames += self._frame_decoder.receive_data_untrusted(memoryview(early))

    def _receive_stream_untrusted(self, event: StreamDataReceived) -> None:
        if event.stream_id == self._their_bulk:
            if self.state is State.READY:
                frames = self._frame_decoder.receive_data_untrusted(event.data)
                self._frames += frames
            else:
                self._early_bulk += event.data
        elif event.stream_id == _CONTROL:
            self._decoder.receive_data(event.data)
            while (decoded := self._decoder.next_message_untrusted()) is not None:
                self._receive_message_untrusted(*decoded)
        else:
            raise RemoteProtocolError(f"the link has no stream {event.stream_id}")
        if event.end_stream:
            raise RemoteProtocolError("a stream of the link was broken off")


def _explain(event: ConnectionTerminated, address: str, idle_timeout: float) -> Ended:
    """Say what ended a connection that we did not end."""
    # What a peer wrote may reach a terminal.
    phrase = "".join(c if c.isprintable() else "?" for c in event.reason_phrase)
    if event.frame_type is None:
        return Ended(phrase or f"{address} closed the link", by_peer=True)
    if event.error_code in _TLS_ALERTS:
        return Ended(f"{address} is not who it should be: {phrase}", by_peer=False)
    if event.error_code == QuicErrorCode.FLOW_CONTROL_ERROR:
        return Ended(f"{address} sends more than it may", by_peer=False)
    if event.reason_phrase == "Idle timeout":
        silence = f"no answer from {address} for {idle_timeout:g} s"
        return Ended(silence, by_peer=False, silent_for=idle_timeout)
    return Ended(f"{address} broke the protocol of QUIC: {phrase}", by_peer=False)
