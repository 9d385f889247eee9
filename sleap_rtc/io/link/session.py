"""The common part of the sessions of all kinds of link, without sockets.

A session holds the state of one connection: its phase, the messages and frames that
have arrived, and its end. Each kind transports the bytes in its own way.
"""

import enum
from abc import ABC, abstractmethod
from collections import deque
from typing import Generic, TypeVar

import msgspec
from typing_extensions import override

from sleap_rtc.io.link.limits import LinkLimits
from sleap_rtc.io.link.link import ReceivedT_co
from sleap_rtc.proto.errors import LocalProtocolError, RemoteProtocolError
from sleap_rtc.proto.machine import Table, Trigger, move
from sleap_rtc.proto.messages import (
    Auth,
    ClientMessage,
    Message,
    Unknown,
    WorkerMessage,
    decode_client_message_untrusted,
    decode_worker_message_untrusted,
    encode_message,
)
from sleap_rtc.proto.transfer.frames import HEADER_SIZE, Frame, encode_header

ALPN = "sleap-rtc/1"
"""Name of the protocol that both sides offer in their TLS handshake (RFC 7301)."""

PINGS_PER_TIMEOUT = 5
"""Pings in an idle timeout: one or two may get lost before the peer counts as gone.
(QUIC restarts its timeout at the first packet after a silence, so a dead peer is
noticed there after 12 s.)"""

MAX_REASON_BYTES = 512
"""Bytes of a reason. It must fit into one packet of QUIC, three times over in the
handshake."""

REFUSED = "refused"
"""Reason of every refused proof: one word, which reveals nothing."""


class Role(msgspec.Struct, Generic[ReceivedT_co], frozen=True):
    """Side of a connection: `Client` or `Server`."""

    def decode_untrusted(self, text: bytes) -> ReceivedT_co:
        """Parse a message, which only the role of the peer may send.

        Raises:
            RemoteProtocolError: If it is not such a message.
        """
        raise NotImplementedError


class Client(Role[WorkerMessage], frozen=True):
    """Role of the side that dialed.

    Args:
        certificate_der: The only certificate that the server may show, DER.
    """

    certificate_der: bytes

    @override
    def decode_untrusted(self, text: bytes) -> WorkerMessage:
        return decode_worker_message_untrusted(text)


class Server(Role[ClientMessage], frozen=True):
    """Role of the side that accepted the connection; its client has to prove itself."""

    @override
    def decode_untrusted(self, text: bytes) -> ClientMessage:
        return decode_client_message_untrusted(text)


class Phase(enum.Enum):
    """Phase of an open session."""

    HANDSHAKE = "handshake"
    UNPROVEN = "unproven"
    JUDGING = "judging"
    READY = "ready"


class Ended(msgspec.Struct, frozen=True):
    """State of a session that is over.

    Args:
        reason: Why it ended, for people.
        is_fault: True if the peer or the path is to blame; false for an orderly close.
        silent_for: Seconds without traffic, if the silence was the reason.
        finished: True once the peer has received the reason, or can no longer receive
            it. The session may be dropped then.
    """

    reason: str
    is_fault: bool = False
    silent_for: float = 0.0
    finished: bool = False

    def describe(self, address: str) -> str:
        """Return the reason, with the address of the peer if it is a fault."""
        return f"{address}: {self.reason}" if self.is_fault else self.reason


class Step(enum.Enum):
    """Trigger of a transition between phases."""

    SECURED = enum.auto()
    PROVEN = enum.auto()
    ENDED = enum.auto()


TRANSITIONS: Table[Phase | type[Ended]] = {
    Phase.HANDSHAKE: {Step.SECURED: Phase.UNPROVEN, Step.ENDED: Ended},
    Phase.UNPROVEN: {
        Auth: Phase.JUDGING,  # on the server
        Step.PROVEN: Phase.READY,  # on the client, by the certificate
        Step.ENDED: Ended,
    },
    Phase.JUDGING: {Step.PROVEN: Phase.READY, Step.ENDED: Ended},
    Phase.READY: {Step.ENDED: Ended},
    Ended: {},
}
"""The phases of a session, and its end."""


class ProofShown(msgspec.Struct, frozen=True):
    """Event: the client showed this proof; answer with `admit` or `refuse`.

    Until then no other data of the client is read.
    """

    auth: Auth


OutputT_co = TypeVar("OutputT_co", covariant=True)


class Session(ABC, Generic[ReceivedT_co, OutputT_co]):
    """The messages and frames of one connection.

    After each input and command the driver sends waiting data, drains
    `next_output`, and arms a timer for `deadline`. Received messages and frames wait in
    `next_message` and `next_frame`. Taking one may allow the peer to send more;
    `has_news` then asks for another turn of the driver. An ended session still informs
    the peer: serve it until `finished` is true.

    Args:
        address: The peer's ``host:port``, for people.
        role: Which side of the connection this is.
        limits: The limits of the link.
        now: The time in seconds, of any monotonic clock.
    """

    def __init__(
        self, address: str, role: Role[ReceivedT_co], limits: LinkLimits, now: float
    ) -> None:
        self.address = address
        self.state: Phase | Ended = Phase.HANDSHAKE
        self.peer = ""
        self.rtt = 0.0
        self.bytes_sent = 0
        self.bytes_received = 0
        self.ignored_messages = 0
        self.has_news = False
        self._role = role
        self._limits = limits
        self._messages: deque[tuple[ReceivedT_co, int]] = deque()
        self._frames: deque[Frame] = deque()
        self._outputs: deque[ProofShown | OutputT_co] = deque()
        self._proof_deadline = now + limits.handshake_timeout
        self._ping_at = now
        self._ping_sent = (0, now)

    @property
    def ended(self) -> Ended | None:
        """The end of the session; None while it is open."""
        return self.state if isinstance(self.state, Ended) else None

    @property
    def finished(self) -> bool:
        """True if the session has ended and may be dropped."""
        return isinstance(self.state, Ended) and self.state.finished

    # ------------------------------------------------------------------ the world

    @abstractmethod
    def handle_timeout(self, now: float) -> None:
        """Handle every deadline that has passed."""

    @abstractmethod
    def deadline(self) -> float | None:
        """Return when `handle_timeout` is due; None once the session is finished."""

    def next_output(self) -> ProofShown | OutputT_co | None:
        """Remove and return the oldest output; None if none is left."""
        return self._outputs.popleft() if self._outputs else None

    # ------------------------------------------------------------------- commands

    def send_message(self, message: Message) -> None:
        """Queue a control message.

        Raises:
            LocalProtocolError: If it cannot be encoded, or the session is not ready.
        """
        self._check_ready()
        self._queue_message(encode_message(message).encode())

    def send_frame(self, frame: Frame) -> None:
        """Queue a bulk frame, whose payload must not change from now on.

        Raises:
            LocalProtocolError: If its header does not describe its payload, or the
                session is not ready.
        """
        self._check_ready()
        if frame.header.length != len(frame.payload):
            raise LocalProtocolError("the header gives another length than the payload")
        self._queue_frame(encode_header(frame.header), frame.payload)

    def admit(self, peer: str, now: float) -> None:
        """Accept the proof of `ProofShown`; ignored if the session has ended.

        Args:
            peer: The name of the client.
            now: The time.
        """
        if self.ended is None:
            self._move(Step.PROVEN)
            self.peer = peer
            try:
                self._open_untrusted(now)
            except RemoteProtocolError as error:
                self._violated(error, now)

    def refuse(self, now: float) -> None:
        """Reject the proof of `ProofShown`; ignored if the session has ended."""
        if self.ended is None:
            self._violated(RemoteProtocolError(REFUSED), now)

    def close(self, reason: str, now: float) -> None:
        """End the session and inform the peer. Nothing that is queued is sent."""
        if self.ended is None:
            why = f"closed: {reason}" if reason else "closed"
            self._end(Ended(why))
            self._send_close(_shortened(reason), now, orderly=True)

    # -------------------------------------------------------------------- queries

    @property
    def has_message(self) -> bool:
        """True if `next_message` has one."""
        return bool(self._messages)

    @property
    def has_frame(self) -> bool:
        """True if `next_frame` has one."""
        return bool(self._frames)

    def next_message(self) -> ReceivedT_co | None:
        """Remove and return the oldest control message; None if none is left."""
        if not self._messages:
            return None
        message, size = self._messages.popleft()
        self._count_read(size)
        return message

    def next_frame(self) -> Frame | None:
        """Remove and return the oldest bulk frame; None if none is left."""
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
        """True if no queued data needs this side any longer."""

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
        """Record that bytes of the peer have left the queues."""

    @abstractmethod
    def _open_untrusted(self, now: float) -> None:
        """Start the flow of messages and frames; process what arrived early."""

    @abstractmethod
    def _send_ping(self, uid: int) -> None:
        """Queue a ping."""

    @abstractmethod
    def _send_close(self, reason: str, now: float, *, orderly: bool) -> None:
        """Replace everything that is queued by the close."""

    # --------------------------------------------------------------------- inside

    def _move(self, trigger: Trigger) -> None:
        """Enter the next phase; do nothing after the end."""
        if isinstance(self.state, Phase):
            target = move(TRANSITIONS, self.state, trigger)
            if isinstance(target, Phase):  # `_end` makes the only other state
                self.state = target

    def _end(self, ended: Ended) -> None:
        """End the session; do nothing after the end."""
        if isinstance(self.state, Phase):
            move(TRANSITIONS, self.state, Step.ENDED)
            self.state = ended

    def _finish(self) -> None:
        if isinstance(self.state, Ended):
            self.state = msgspec.structs.replace(self.state, finished=True)

    def _check_ready(self) -> None:
        if self.state is not Phase.READY:
            name = self.state.value if isinstance(self.state, Phase) else "ended"
            raise LocalProtocolError(f"the link is not ready: {name}")

    def _secured_untrusted(self, shown: bytes | None, now: float) -> None:
        """Continue after the handshake.

        Args:
            shown: The server's certificate, DER.
            now: The time.
        """
        self._move(Step.SECURED)
        if isinstance(self._role, Client):
            if shown != self._role.certificate_der:
                raise RemoteProtocolError("not the expected peer: another certificate")
            self._move(Step.PROVEN)
            self._open_untrusted(now)
        self._ping(now)

    def _receive_message_untrusted(self, text: bytes, size: int) -> None:
        """Handle the text of a message.

        Args:
            text: The text as it arrived.
            size: The bytes to count once the message is read.
        """
        message = self._role.decode_untrusted(text)
        match self.state, message:
            case Phase.UNPROVEN, Auth():
                self._count_read(size)
                self._move(Auth)
                self._outputs.append(ProofShown(message))
            case Phase.READY, Unknown():
                self._count_read(size)
                self.ignored_messages += 1
            case Phase.READY, _:
                self._messages.append((message, size))
            case _:
                raise RemoteProtocolError(REFUSED)

    def _give_up_unproven(self, now: float) -> None:
        late = f"for {self._limits.handshake_timeout:g} s"
        self._fail(Ended(f"no answer {late}", is_fault=True), f"no proof {late}", now)

    def _ping(self, now: float) -> None:
        self._ping_at = now + self._limits.idle_timeout / PINGS_PER_TIMEOUT
        self._ping_sent = (self._ping_sent[0] + 1, now)
        self._send_ping(self._ping_sent[0])

    def _pong(self, uid: int, now: float) -> None:
        latest, sent = self._ping_sent
        if uid == latest:
            # The smoothing of RFC 9002, 5.3.
            self.rtt += (now - sent - self.rtt) / (8 if self.rtt else 1)

    def _silence(self) -> Ended:
        """Return the end of a session whose peer has been silent for too long."""
        timeout = self._limits.idle_timeout
        reason = f"no answer for {timeout:g} s"
        return Ended(reason, is_fault=True, silent_for=timeout)

    def _violated(self, error: RemoteProtocolError, now: float) -> None:
        self._fail(Ended(error.reason, is_fault=True), error.reason, now)

    def _fail(self, ended: Ended, told: str, now: float) -> None:
        """End the session for a fault, and inform the peer."""
        self._end(ended)
        self._send_close(_shortened(told), now, orderly=False)


def _shortened(reason: str) -> str:
    """Cut a reason to the length that a close can carry."""
    phrase = reason.encode(errors="replace")[:MAX_REASON_BYTES]
    return phrase.decode(errors="ignore")
