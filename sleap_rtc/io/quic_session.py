"""One QUIC connection as a link sees it, without sockets and without an event loop.

Stream 0, opened by the client, carries the control messages of both sides, each as
its length in four bytes (big-endian) and its text. Beside it each side has one
unidirectional stream of bulk frames. The client's first message is `Auth`.
"""

import enum
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

from sleap_rtc.io.quic_engine import Datagram, QuicEngine
from sleap_rtc.proto.errors import LocalProtocolError, RemoteProtocolError
from sleap_rtc.proto.frames import HEADER_SIZE, Frame, FrameDecoder, encode_header
from sleap_rtc.proto.messages import (
    MAX_MESSAGE_BYTES,
    Auth,
    Message,
    Unknown,
    decode_message_untrusted,
    encode_message,
)

IDLE_TIMEOUT = 10.0
"""Seconds of silence after which the peer counts as gone."""

PINGS_PER_TIMEOUT = 5
"""The engine gives a peer the whole time-out again when it first sends after a
silence: so a dead one is noticed after at most 12 s of 10."""

HANDSHAKE_TIMEOUT = 10.0
"""Seconds for the handshake and the proof together."""

MAX_UNSENT_FRAMES = 4 * 1024 * 1024
"""Bytes of frames waiting for acknowledgement: 40 ms of a gigabit line, and little
beside the 150 MiB that a process may take."""

MAX_UNSENT_MESSAGES = 1024 * 1024
"""Bytes of messages waiting for acknowledgement: 16 of the longest."""

MAX_UNREAD = 16 * 1024 * 1024
"""Bytes that a peer may send beyond what was read: twice what a receiver of chunks
grants, so that bulk that nobody reads yet never holds up the messages."""

MAX_REASON_BYTES = 512
"""A reason must fit into one packet, three times over during the handshake."""

_CONTROL = 0
_CLIENT_BULK = 2
_SERVER_BULK = 3
_LENGTH_SIZE = 4

_REFUSED = "refused"
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


class Ended(msgspec.Struct, frozen=True):
    """Why the session is over.

    Args:
        reason: What happened, for people.
        by_peer: True if the peer closed it in order and gave the reason itself.
    """

    reason: str
    by_peer: bool


# -------------------------------------------------------------------------- states


class State(enum.Enum):
    """How far a session has come."""

    HANDSHAKE = "handshake"
    UNPROVEN = "unproven"
    READY = "ready"
    ENDED = "ended"


class Step(enum.Enum):
    """What moves a session on."""

    SECURED = "the handshake is done"
    PROVEN = "the peer is who it should be"
    ENDED = "either side ended it"


TRANSITIONS: dict[tuple[State, Step], State] = {
    (State.HANDSHAKE, Step.SECURED): State.UNPROVEN,
    (State.HANDSHAKE, Step.ENDED): State.ENDED,
    (State.UNPROVEN, Step.PROVEN): State.READY,
    (State.UNPROVEN, Step.ENDED): State.ENDED,
    (State.READY, Step.ENDED): State.ENDED,
}


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


class QuicSession:
    """The messages and frames of one QUIC connection.

    A driver calls, in any order, `receive_datagrams`, `handle_timeout` and the
    commands `send_message`, `send_frame` and `close`; after each of them it sends what
    `datagrams_to_send` returns, drains `next_output`, and arms a timer for `deadline`.
    What arrived waits in `next_message` and `next_frame`; taking it may open the peer's
    window, and `has_news` then asks for another sending. The session is over when
    `ended` is set, and may be forgotten when `finished` is true: until then it tells a
    peer that missed the end about it.

    Args:
        engine: The QUIC connection; a client's has been told to connect.
        address: The peer's ``host:port``, for people.
        authenticate: A server's judge of the client's proof: it returns the client's
            name or raises `RemoteProtocolError`. A client has None.
        certificate_der: The only certificate that a client accepts.
        idle_timeout: Seconds of silence after which the peer counts as gone.
        now: The time in seconds, of any clock that only goes forward.
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
        self.address = address
        self.state = State.HANDSHAKE
        self.ended: Ended | None = None
        self.finished = False
        self.rtt = 0.0
        self.bytes_sent = 0
        self.bytes_received = 0
        self.ignored_messages = 0
        self.has_news = False
        self._engine = engine
        self._authenticate = authenticate
        self._certificate_der = certificate_der
        self._idle_timeout = idle_timeout
        is_client = authenticate is None
        self._our_bulk = _CLIENT_BULK if is_client else _SERVER_BULK
        self._their_bulk = _SERVER_BULK if is_client else _CLIENT_BULK
        self._decoder = MessageDecoder()
        self._frame_decoder = FrameDecoder()
        self._early_bulk = bytearray()
        self._messages: deque[tuple[Message, int]] = deque()
        self._frames: deque[Frame] = deque()
        self._outputs: deque[Output] = deque()
        self._read = 0
        self._granted_at = 0
        self._farewell: list[Datagram] = []
        self._farewell_due = False
        self._engine_deadline: float | None = None
        self._proof_deadline = now + HANDSHAKE_TIMEOUT
        self._ping_at = now
        self._ping_sent = (0, now)

    # ------------------------------------------------------------------ the world

    def receive_datagrams(self, datagrams: Sequence[Datagram], now: float) -> None:
        """Take datagrams that arrived; garbage among them is ignored."""
        self.bytes_received += sum(len(data) for data, _ in datagrams)
        if self.ended is not None:
            self._farewell_due = True
        for data, address in datagrams:
            self._engine.receive_datagram(data, address, now)
        self._drain_engine(now)

    def handle_timeout(self, now: float) -> None:
        """Do what is due; nothing if nothing is."""
        if self._engine_deadline is not None and now >= self._engine_deadline:
            self._engine.handle_timer(now)
            self._drain_engine(now)
        match self.state:
            case State.HANDSHAKE | State.UNPROVEN if now >= self._proof_deadline:
                late = f"for {HANDSHAKE_TIMEOUT:g} s"
                self._end(
                    f"no answer from {self.address} {late}", tell=f"no proof {late}"
                )
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

    # ------------------------------------------------------------------- commands

    def send_message(self, message: Message) -> None:
        """Queue a control message.

        Raises:
            LocalProtocolError: If it cannot be encoded, or the session is not ready.
        """
        self._check_ready()
        text = encode_message(message).encode()
        data = len(text).to_bytes(_LENGTH_SIZE) + text
        self._engine.send(_CONTROL, data)

    def send_frame(self, frame: Frame) -> None:
        """Queue a bulk frame.

        Raises:
            LocalProtocolError: If its header does not describe its payload, or the
                session is not ready.
        """
        self._check_ready()
        if frame.header.length != len(frame.payload):
            raise LocalProtocolError("the header gives another length than the payload")
        header = encode_header(frame.header)
        self._engine.send(self._our_bulk, header)
        self._engine.send(self._our_bulk, frame.payload)

    def close(self, reason: str) -> None:
        """End the session and tell the peer why. Nothing that is queued is sent."""
        if self.ended is None:
            self._end(f"closed: {reason}" if reason else "closed", tell=reason)

    # -------------------------------------------------------------- what is there

    @property
    def has_message(self) -> bool:
        """True if `next_message` has one."""
        return bool(self._messages)

    @property
    def has_frame(self) -> bool:
        """True if `next_frame` has one."""
        return bool(self._frames)

    def next_message(self) -> Message | None:
        """Take the next control message, if there is one."""
        if not self._messages:
            return None
        message, size = self._messages.popleft()
        self._count_read(size)
        return message

    def next_frame(self) -> Frame | None:
        """Take the next bulk frame, if there is one."""
        if not self._frames:
            return None
        frame = self._frames.popleft()
        self._count_read(HEADER_SIZE + frame.header.length)
        return frame

    @property
    def has_room_for_message(self) -> bool:
        """True while few messages wait for acknowledgement."""
        return self._engine.unacknowledged(_CONTROL) < MAX_UNSENT_MESSAGES

    @property
    def has_room_for_frame(self) -> bool:
        """True while few frames wait for acknowledgement."""
        return self._engine.unacknowledged(self._our_bulk) < MAX_UNSENT_FRAMES

    @property
    def all_acknowledged(self) -> bool:
        """True if the peer has everything that was queued."""
        streams = (_CONTROL, self._our_bulk)
        return not any(self._engine.unacknowledged(stream) for stream in streams)

    @property
    def packets_lost(self) -> int:
        """Packets that had to be sent again."""
        return self._engine.packets_lost

    # --------------------------------------------------------------------- inside

    def _move(self, step: Step) -> None:
        self.state = TRANSITIONS[self.state, step]

    def _count_read(self, size: int) -> None:
        self._read += size
        if self._read - self._granted_at > MAX_UNREAD // 4:
            self._granted_at = self._read
            self._engine.grant(self._read + MAX_UNREAD)
            self.has_news = True

    def _check_ready(self) -> None:
        if self.state is not State.READY:
            raise LocalProtocolError(f"the link is not ready: {self.state.value}")

    def _drain_engine(self, now: float) -> None:
        try:
            while (event := self._engine.next_event()) is not None:
                self._receive_event_untrusted(event, now)
        except RemoteProtocolError as error:
            self._end(f"{self.address}: {error.reason}", _VIOLATION, tell=error.reason)
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
                self._secured_untrusted(now)
            case PingAcknowledged():
                self._pong(event.uid, now)
            case ConnectionIdIssued():
                self._outputs.append(RouteAdded(event.connection_id))
            case ConnectionIdRetired():
                self._outputs.append(RouteRemoved(event.connection_id))
            case ConnectionTerminated():
                self.finished = True

    def _secured_untrusted(self, now: float) -> None:
        self._move(Step.SECURED)
        if self._authenticate is None:
            if self._engine.peer_certificate != self._certificate_der:
                raise RemoteProtocolError("the certificate is not the expected one")
            self._proven("")
        self._ping(now)

    def _proven(self, peer: str) -> None:
        self._move(Step.PROVEN)
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

    def _receive_message_untrusted(self, message: Message, size: int) -> None:
        match message:
            case Auth() if self.state is State.UNPROVEN and self._authenticate:
                self._count_read(size)
                try:
                    peer = self._authenticate(message)
                except RemoteProtocolError:
                    # One word for every fault: it must not help to guess.
                    raise RemoteProtocolError(_REFUSED) from None
                self._proven(peer)
            case _ if self.state is not State.READY:
                raise RemoteProtocolError(_REFUSED)
            case Unknown():
                self._count_read(size)
                self.ignored_messages += 1
            case _:
                self._messages.append((message, size))

    def _ping(self, now: float) -> None:
        self._ping_at = now + self._idle_timeout / PINGS_PER_TIMEOUT
        self._ping_sent = (self._ping_sent[0] + 1, now)
        self._engine.send_ping(self._ping_sent[0])

    def _pong(self, uid: int, now: float) -> None:
        latest, sent = self._ping_sent
        if uid == latest:
            # The smoothing of RFC 9002, 5.3.
            self.rtt += (now - sent - self.rtt) / (8 if self.rtt else 1)

    def _end(self, reason: str, code: int = _VIOLATION, *, tell: str = "") -> None:
        self._move(Step.ENDED)
        self.ended = Ended(reason, by_peer=False)
        phrase = tell.encode(errors="replace")[:MAX_REASON_BYTES]
        self._engine.close(code, reason_phrase=phrase.decode(errors="ignore"))


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
        return Ended(f"no answer from {address} for {idle_timeout:g} s", by_peer=False)
    return Ended(f"{address} broke the protocol of QUIC: {phrase}", by_peer=False)
