"""A peer of a room, as a pure machine that reconnects to the signaling server."""

from collections import deque
from collections.abc import Mapping
from enum import Enum, auto
from typing import Protocol, assert_never

import msgspec
from typing_extensions import override

from sleap_rtc.proto.backoff import Backoff
from sleap_rtc.proto.errors import LocalProtocolError, RemoteProtocolError
from sleap_rtc.proto.machine import (
    ReconnectingMachine,
    Table,
    Trigger,
    move,
    move_untrusted,
)
from sleap_rtc.proto.rendezvous.invite import RoomKeys
from sleap_rtc.proto.rendezvous.member_outputs import (
    AnswerReceived,
    Close,
    Connect,
    MemberOutput,
    OfferReceived,
    PeersListed,
    PeerUnreachable,
    Reconnecting,
    Registered,
    RegistrationRefused,
    SendText,
    ServerComplained,
)
from sleap_rtc.proto.rendezvous.messages import (
    MAX_METADATA_BYTES,
    AnswerSignal,
    Challenge,
    DiscoverPeers,
    ErrorCode,
    ErrorSignal,
    Filters,
    Metadata,
    MetadataChange,
    MetadataUpdated,
    OfferSignal,
    PeerList,
    PeerMessage,
    Property,
    Register,
    RegisteredAuth,
    ServerSignal,
    Signal,
    UnknownSignal,
    UpdateMetadata,
    encode_signal,
    metadata_fits,
)
from sleap_rtc.proto.terminal import printable


class MemberLimits(msgspec.Struct, frozen=True):
    """Time limits of a `RoomMember`, in seconds.

    Args:
        registration_timeout: Time from the connection to the end of the registration;
            the server has the same limit.
        silence_timeout: Time without a sign of life of the server after which the
            connection counts as dead: three missed pings.
        stable_after: A registration that lasted this long resets the backoff. So two
            processes that use one peer id replace each other ever more slowly.
        backoff: Delays between two attempts to connect.
    """

    registration_timeout: float = 10.0
    silence_timeout: float = 60.0
    stable_after: float = 30.0
    backoff: Backoff = Backoff(first=0.5, longest=30.0)


LIMITS = MemberLimits()


class RandomSource(Protocol):
    """A source of random numbers, such as `random.Random`."""

    def random(self) -> float:
        """Return a number in [0, 1)."""


# -------------------------------------------------------------- states, transitions


class MemberState(Enum):
    """State of a member."""

    CONNECTING = auto()
    """The driver connects."""

    OPENING = auto()
    """Connected; the challenge of the server has not come yet."""

    REGISTERING = auto()
    """The challenge is answered."""

    REGISTERED = auto()
    """The peer is in the room."""

    WAITING = auto()
    """Not connected; the next attempt starts at the deadline."""

    ENDED = auto()
    """Refused by the server: nothing more happens."""


class MemberTrigger(Enum):
    """Triggers that are not simply the arrival of a message."""

    CONNECTED = auto()
    CONNECT_FAILED = auto()
    REFUSED = auto()
    """An `ErrorSignal` that ends the registration for good."""

    CONNECTION_LOST = auto()
    TIMEOUT = auto()


_S, _T = MemberState, MemberTrigger

TRANSITIONS: Table[MemberState] = {
    _S.CONNECTING: {
        _T.CONNECTED: _S.OPENING,
        _T.CONNECT_FAILED: _S.WAITING,
    },
    _S.OPENING: {
        Challenge: _S.REGISTERING,
        _T.REFUSED: _S.ENDED,
        _T.CONNECTION_LOST: _S.WAITING,
        _T.TIMEOUT: _S.WAITING,
    },
    _S.REGISTERING: {
        RegisteredAuth: _S.REGISTERED,
        _T.REFUSED: _S.ENDED,
        _T.CONNECTION_LOST: _S.WAITING,
        _T.TIMEOUT: _S.WAITING,
    },
    _S.REGISTERED: {
        _T.CONNECTION_LOST: _S.WAITING,
        _T.TIMEOUT: _S.WAITING,
    },
    _S.WAITING: {
        _T.TIMEOUT: _S.CONNECTING,
    },
    _S.ENDED: {},
}
"""The transitions of `RoomMember`; other messages do not change the state."""

_CONNECTED = frozenset({_S.OPENING, _S.REGISTERING, _S.REGISTERED})

_TEMPORARY = frozenset(
    {ErrorCode.ROOM_FULL, ErrorCode.SERVER_FULL, ErrorCode.TOO_MANY_MESSAGES}
)
"""Codes of refusals that may pass with time; every other refusal is final."""


class RoomMember(ReconnectingMachine[ServerSignal, MemberOutput]):
    """One peer in one room.

    It starts in `MemberState.CONNECTING`, with a `Connect` to drain. A driver reports

    * `connected` or `connect_failed` for each `Connect`;
    * `receive_message` for each message, `heard_from` for each ping;
    * `connection_lost` when the socket is gone, unless the machine returned `Close`;
    * `handle_timeout` at `deadline`,

    and after each of them, and after each command, drains `next_output`. ``now`` is a
    monotonic clock, seconds.

    Args:
        keys: Keys of the room.
        peer_id: The name of this peer, unique in the room.
        role: The role of this peer, such as ``worker`` or ``client``.
        metadata: Metadata that the other peers of the room can read.
        random: Source of the jitter of the backoff.
        limits: Time limits.

    Raises:
        LocalProtocolError: If the metadata is too large.
    """

    def __init__(
        self,
        keys: RoomKeys,
        peer_id: str,
        role: str,
        metadata: Metadata,
        random: RandomSource,
        limits: MemberLimits = LIMITS,
    ) -> None:
        _check_size(metadata)
        self._keys = keys
        self._peer_id = peer_id
        self._role = role
        self._metadata = metadata
        self._random = random
        self._limits = limits
        self._state = MemberState.CONNECTING
        self._outputs: deque[MemberOutput] = deque([Connect()])
        self._deadline: float | None = None
        self._failures = 0
        self._registered_at: float | None = None
        self._sent_metadata = metadata
        self._next_request = 0
        self._requests: deque[int] = deque()
        self._complaint = ""
        self._refusal = ""

    @property
    def state(self) -> MemberState:
        """The state of the machine."""
        return self._state

    @property
    def refusal(self) -> str:
        """The reason of the server in `MemberState.ENDED`; empty in other states."""
        return self._refusal

    @property
    def is_connected(self) -> bool:
        """True while the machine uses the connection that the driver reported."""
        return self._state in _CONNECTED

    # ---------------------------------------------------------------------- inputs

    @override
    def connected(self, now: float) -> None:
        self._move(_T.CONNECTED)
        self._complaint = ""
        self._deadline = now + self._limits.registration_timeout

    @override
    def connect_failed(self, reason: str, now: float) -> None:
        self._move(_T.CONNECT_FAILED)
        self._schedule_attempt(reason, now)

    @override
    def connection_lost(self, reason: str, now: float) -> None:
        self._move(_T.CONNECTION_LOST)
        self._schedule_attempt(self._complaint or reason, now)

    def heard_from(self, now: float) -> None:
        """Record a sign of life of the server, such as a ping."""
        if self._state is MemberState.REGISTERED:
            self._deadline = now + self._limits.silence_timeout

    @override
    def receive_message(self, message: ServerSignal, now: float) -> None:
        """Handle a message of the server.

        A message of a connection that the machine has given up is ignored.

        Raises:
            RemoteProtocolError: If the server broke the protocol. The state does not
                change; the driver closes the connection and reports it as lost.
        """
        if not self.is_connected:
            return
        self.heard_from(now)
        match message:
            case Challenge(nonce=nonce):
                self._move_untrusted(Challenge)
                self._register(nonce)
            case RegisteredAuth():
                self._move_untrusted(RegisteredAuth)
                self._start_membership(now)
            case PeerList(peers=peers):
                if not self._requests:
                    raise RemoteProtocolError("PeerList came without a request")
                self._outputs.append(PeersListed(self._requests.popleft(), peers))
            case OfferSignal(sender=sender, sdp=sealed):
                self._outputs.append(OfferReceived(sender, sealed))
            case AnswerSignal(sender=sender, sdp=sealed):
                self._outputs.append(AnswerReceived(sender, sealed))
            case ErrorSignal():
                self._receive_error(message)
            case MetadataUpdated() | PeerMessage() | UnknownSignal():
                pass
            case _:
                assert_never(message)

    @override
    def handle_timeout(self, now: float) -> None:
        if self._deadline is None or now < self._deadline:
            return
        state = self._state
        self._move(_T.TIMEOUT)
        if state is MemberState.WAITING:
            self._deadline = None
            self._outputs.append(Connect())
            return
        reason = (
            "the signaling server fell silent"
            if state is MemberState.REGISTERED
            else "the signaling server did not complete the registration in time"
        )
        self._outputs.append(Close(reason))
        self._schedule_attempt(reason, now)

    # -------------------------------------------------------------------- commands

    def discover(self, filters: Filters) -> int:
        """Ask for the other peers of the room.

        Returns:
            The number of the request. `PeersListed` with this number follows, unless
            the connection is lost first.

        Raises:
            LocalProtocolError: Unless registered.
        """
        self._require_registered()
        request = self._next_request
        self._next_request += 1
        self._requests.append(request)
        self._send(DiscoverPeers(self._peer_id, filters))
        return request

    def send_offer(self, target: str, sealed: str) -> None:
        """Send a sealed offer to a peer of the room.

        Raises:
            LocalProtocolError: Unless registered.
        """
        self._require_registered()
        self._send(OfferSignal(self._peer_id, target, sealed))

    def send_answer(self, target: str, sealed: str) -> None:
        """Send a sealed answer to a peer of the room.

        Raises:
            LocalProtocolError: Unless registered.
        """
        self._require_registered()
        self._send(AnswerSignal(self._peer_id, target, sealed))

    def update_metadata(self, properties: Mapping[str, Property]) -> None:
        """Change some properties, at any time; they are sent as soon as possible.

        Raises:
            LocalProtocolError: If they are too large; nothing changed.
        """
        metadata = Metadata(
            self._metadata.tags, self._metadata.properties | dict(properties)
        )
        _check_size(metadata)
        self._metadata = metadata
        self._publish()

    # --------------------------------------------------------------------- outputs

    @override
    def deadline(self) -> float | None:
        return self._deadline

    @override
    def next_output(self) -> MemberOutput | None:
        return self._outputs.popleft() if self._outputs else None

    # -------------------------------------------------------------------- internals

    def _move(self, trigger: MemberTrigger) -> None:
        self._state = move(TRANSITIONS, self._state, trigger)

    def _move_untrusted(self, trigger: Trigger) -> None:
        self._state = move_untrusted(TRANSITIONS, self._state, trigger)

    def _send(self, signal: Signal) -> None:
        self._outputs.append(SendText(encode_signal(signal)))

    def _require_registered(self) -> None:
        if self._state is not MemberState.REGISTERED:
            raise LocalProtocolError(f"not registered but {self._state.name}")

    def _register(self, nonce: bytes) -> None:
        self._sent_metadata = self._metadata
        self._send(
            Register(
                self._peer_id,
                self._keys.room_id,
                self._role,
                self._keys.public_key,
                self._keys.sign_registration(nonce, self._peer_id),
                self._metadata,
            )
        )

    def _start_membership(self, now: float) -> None:
        self._registered_at = now
        self._deadline = now + self._limits.silence_timeout
        self._outputs.append(Registered())
        self._publish()

    def _publish(self) -> None:
        """Send the metadata if it has changed since the room received it."""
        if self._state is not MemberState.REGISTERED:
            return
        if self._metadata != self._sent_metadata:
            self._sent_metadata = self._metadata
            change = MetadataChange(self._metadata.properties, self._metadata.tags)
            self._send(UpdateMetadata(self._peer_id, change))

    def _receive_error(self, error: ErrorSignal) -> None:
        reason = printable(error.reason)
        if isinstance(error.target, str) and error.code == ErrorCode.PEER_NOT_FOUND:
            self._outputs.append(PeerUnreachable(error.target))
        elif self._state is MemberState.REGISTERED:
            self._outputs.append(ServerComplained(printable(error.code), reason))
        elif error.code in _TEMPORARY:
            self._complaint = reason
        else:
            self._move_untrusted(_T.REFUSED)
            self._deadline = None
            self._refusal = reason
            self._outputs.append(Close(reason))
            self._outputs.append(RegistrationRefused(reason))

    def _schedule_attempt(self, reason: str, now: float) -> None:
        """Set the time of the next attempt to connect."""
        since = self._registered_at
        stable = since is not None and now - since >= self._limits.stable_after
        self._failures = 1 if stable else self._failures + 1
        self._registered_at = None
        self._requests.clear()
        delay = self._limits.backoff.delay(self._failures, self._random.random())
        self._deadline = now + delay
        self._outputs.append(Reconnecting(delay, reason))


def _check_size(metadata: Metadata) -> None:
    if not metadata_fits(metadata):
        raise LocalProtocolError(f"metadata of more than {MAX_METADATA_BYTES} bytes")
