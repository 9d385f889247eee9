"""What the sessions of both kinds of link have in common, without sockets.

A session is one connection as a link sees it: who may talk, what has arrived, and how
it ends. How its bytes travel is up to the kind.
"""

import enum
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable

import msgspec

from sleap_rtc.proto.errors import LocalProtocolError, RemoteProtocolError
from sleap_rtc.proto.messages import Auth, Message, Unknown, encode_message
from sleap_rtc.proto.transfer.frames import HEADER_SIZE, Frame, encode_header

ALPN = "sleap-rtc/1"
"""What both sides name in their TLS handshake (RFC 7301)."""

IDLE_TIMEOUT = 10.0
"""Seconds of silence after which the peer counts as gone."""

PINGS_PER_TIMEOUT = 5
"""A lost ping or two are no reason to give a peer up. (QUIC gives it the whole time-out
again when it first sends after a silence: there a dead one is noticed after 12 s.)"""

HANDSHAKE_TIMEOUT = 10.0
"""Seconds for the handshake and the proof together."""

MAX_UNPROVEN_LINKS = 64
"""Clients that may be in their handshake at once: more than a room has peers, and 64
times the few 100 KiB that one of them may take is little."""

MAX_UNSENT_FRAMES = 4 * 1024 * 1024
"""Bytes of frames that wait to be sent: 40 ms of a gigabit line, and little beside the
150 MiB that a process may take."""

MAX_UNSENT_MESSAGES = 1024 * 1024
"""Bytes of messages that wait to be sent: 16 of the longest."""

MAX_UNACKNOWLEDGED_FRAMES = 32 * 1024 * 1024
"""Bytes of frames that may be on the way: a gigabyte per second over 30 ms, or 150 MB
over 200 ms. Those who send them again have to keep them."""

MAX_UNREAD = 32 * 1024 * 1024
"""Bytes that a peer may send beyond what was read: twice what a receiver of chunks
grants, so that bulk that nobody reads yet never holds up the messages."""

MAX_REASON_BYTES = 512
"""A reason must fit into one packet of QUIC, three times over in the handshake."""

REFUSED = "refused"
"""One word for every fault of a proof: it must not help to guess."""


class Ended(msgspec.Struct, frozen=True):
    """Why the session is over.

    Args:
        reason: What happened, for people.
        by_peer: True if the peer closed it in order and gave the reason itself.
        silent_for: Seconds for which nothing had come, if that was the reason.
    """

    reason: str
    by_peer: bool
    silent_for: float = 0.0


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


class Session(ABC):
    """The messages and frames of one connection.

    What arrived waits in `next_message` and `next_frame`; taking it may let the peer
    send more, and `has_news` then asks for another turn of the driver. The session is
    over when `ended` is set, and may be forgotten when `finished` is true: until then
    it sees to it that the peer learns of the end.

    Args:
        address: The peer's ``host:port``, for people.
        authenticate: A server's judge of the client's proof: it returns the client's
            name or raises `RemoteProtocolError`. A client has None.
        certificate_der: The only certificate that a client accepts.
        idle_timeout: Seconds of silence after which the peer counts as gone.
        now: The time in seconds, of any clock that only goes forward.
    """

    def __init__(
        self,
        address: str,
        *,
        authenticate: Callable[[Auth], str] | None,
        certificate_der: bytes,
        idle_timeout: float,
        now: float,
    ) -> None:
        self.address = address
        self.state = State.HANDSHAKE
        self.ended: Ended | None = None
        self.finished = False
        self.proven = False
        self.peer = ""
        self.rtt = 0.0
        self.bytes_sent = 0
        self.bytes_received = 0
        self.ignored_messages = 0
        self.has_news = False
        self._authenticate = authenticate
        self._certificate_der = certificate_der
        self._idle_timeout = idle_timeout
        self._messages: deque[tuple[Message, int]] = deque()
        self._frames: deque[Frame] = deque()
        self._proof_deadline = now + HANDSHAKE_TIMEOUT
        self._ping_at = now
        self._ping_sent = (0, now)

    # ------------------------------------------------------------------ the world

    @abstractmethod
    def handle_timeout(self, now: float) -> None:
        """Do what is due; nothing if nothing is."""

    @abstractmethod
    def deadline(self) -> float | None:
        """When to call `handle_timeout`; None once the session is finished."""

    # ------------------------------------------------------------------- commands

    def send_message(self, message: Message) -> None:
        """Queue a control message.

        Raises:
            LocalProtocolError: If it cannot be encoded, or the session is not ready.
        """
        self._check_ready()
        self._queue_message(encode_message(message).encode())

    def send_frame(self, frame: Frame) -> None:
        """Queue a bulk frame; its payload must not change any more.

        Raises:
            LocalProtocolError: If its header does not describe its payload, or the
                session is not ready.
        """
        self._check_ready()
        if frame.header.length != len(frame.payload):
            raise LocalProtocolError("the header gives another length than the payload")
        self._queue_frame(encode_header(frame.header), frame.payload)

    def close(self, reason: str) -> None:
        """End the session and tell the peer why. Nothing that is queued is sent."""
        if self.ended is None:
            why = f"closed: {reason}" if reason else "closed"
            self._end(why, tell=reason, orderly=True)

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
    @abstractmethod
    def has_room_for_message(self) -> bool:
        """True while few messages wait to be sent."""

    @property
    @abstractmethod
    def has_room_for_frame(self) -> bool:
        """True while few frames wait to be sent."""

    @property
    @abstractmethod
    def all_sent(self) -> bool:
        """True if nothing that was queued needs this side any more."""

    # ------------------------------------------------------------ inside, by kind

    @abstractmethod
    def _queue_message(self, text: bytes) -> None:
        """Queue the text of a message."""

    @abstractmethod
    def _queue_frame(
        self, header: bytes, payload: bytes | bytearray | memoryview
    ) -> None:
        """Queue a frame."""

    @abstractmethod
    def _count_read(self, size: int) -> None:
        """Note that bytes of the peer are off the queues."""

    @abstractmethod
    def _send_ping(self, uid: int) -> None:
        """Ask for a sign of life."""

    @abstractmethod
    def _send_close(self, reason: str, *, orderly: bool) -> None:
        """Tell the peer that the session is over."""

    def _proven(self, peer: str) -> None:
        """Let messages and frames flow."""
        self._move(Step.PROVEN)
        self.proven = True
        self.peer = peer

    # --------------------------------------------------------------------- inside

    def _move(self, step: Step) -> None:
        self.state = TRANSITIONS[self.state, step]

    def _check_ready(self) -> None:
        if self.state is not State.READY:
            raise LocalProtocolError(f"the link is not ready: {self.state.value}")

    def _secured_untrusted(self, shown: bytes | None, now: float) -> None:
        """Go on after the handshake.

        Args:
            shown: The server's certificate, DER.
            now: The time.
        """
        self._move(Step.SECURED)
        if self._authenticate is None:
            if shown != self._certificate_der:
                raise RemoteProtocolError("not who it should be: another certificate")
            self._proven("")
        self._ping(now)

    def _receive_message_untrusted(self, message: Message, size: int) -> None:
        match message:
            case Auth() if self.state is State.UNPROVEN and self._authenticate:
                self._count_read(size)
                try:
                    peer = self._authenticate(message)
                except RemoteProtocolError:
                    raise RemoteProtocolError(REFUSED) from None
                self._proven(peer)
            case _ if self.state is not State.READY:
                raise RemoteProtocolError(REFUSED)
            case Unknown():
                self._count_read(size)
                self.ignored_messages += 1
            case _:
                self._messages.append((message, size))

    def _give_up_unproven(self) -> None:
        late = f"for {HANDSHAKE_TIMEOUT:g} s"
        self._end(f"no answer from {self.address} {late}", tell=f"no proof {late}")

    def _ping(self, now: float) -> None:
        self._ping_at = now + self._idle_timeout / PINGS_PER_TIMEOUT
        self._ping_sent = (self._ping_sent[0] + 1, now)
        self._send_ping(self._ping_sent[0])

    def _pong(self, uid: int, now: float) -> None:
        latest, sent = self._ping_sent
        if uid == latest:
            # The smoothing of RFC 9002, 5.3.
            self.rtt += (now - sent - self.rtt) / (8 if self.rtt else 1)

    def _violated(self, error: RemoteProtocolError) -> None:
        self._end(f"{self.address}: {error.reason}", tell=error.reason)

    def _end(
        self, reason: str, *, tell: str, orderly: bool = False, silent_for: float = 0.0
    ) -> None:
        self._move(Step.ENDED)
        self.ended = Ended(reason, by_peer=False, silent_for=silent_for)
        phrase = tell.encode(errors="replace")[:MAX_REASON_BYTES]
        self._send_close(phrase.decode(errors="ignore"), orderly=orderly)
