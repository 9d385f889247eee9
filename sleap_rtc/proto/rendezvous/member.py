"""One peer's side of the signaling server, as a pure machine that reconnects."""

from collections import deque
from collections.abc import Mapping
from enum import Enum, auto
from typing import Protocol

import msgspec

from sleap_rtc.proto.errors import LocalProtocolError, RemoteProtocolError
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
    MAX_LIST_BYTES,
    MAX_METADATA_BYTES,
    AnswerSignal,
    Challenge,
    DiscoverPeers,
    ErrorCode,
    ErrorSignal,
    Filters,
    Metadata,
    MetadataChange,
    OfferSignal,
    PeerList,
    Property,
    Register,
    RegisteredAuth,
    Signal,
    UpdateMetadata,
    decode_signal_untrusted,
    encode_signal,
    metadata_fits,
)
from sleap_rtc.proto.terminal import printable

REGISTRATION_SECONDS = 10.0
"""From the connection to the end of the registration; the server allows the same."""

SILENCE_SECONDS = 60.0
"""Three pings of the server that did not come: the connection is dead."""

STABLE_SECONDS = 30.0
"""A registration that lasted this long starts the next backoff from the beginning.
Two processes that use the same peer id push each other out, but ever more slowly."""


class Backoff(msgspec.Struct, frozen=True):
    """How long to wait between attempts to connect, in seconds.

    Args:
        first: After the first failure; it doubles with each one that follows.
        longest: At most this.
    """

    first: float = 0.5
    longest: float = 30.0

    def delay(self, failures: int, fraction: float) -> float:
        """Say how long to wait after so many failures.

        Args:
            failures: From 1.
            fraction: A random number in [0, 1). It spreads the peers of a server that
                went away over the upper half of the delay.
        """
        # No delay doubles more than 32 times: a greater power would overflow.
        whole = min(self.longest, self.first * 2.0 ** min(failures - 1, 32))
        return whole * (0.5 + fraction / 2)


class RandomSource(Protocol):
    """Such as `random.Random`."""

    def random(self) -> float:
        """Give a number in [0, 1)."""


# -------------------------------------------------------------- states, transitions


class MemberState(Enum):
    """Where a member stands."""

    CONNECTING = auto()
    """The driver connects."""

    OPENING = auto()
    """Connected; the challenge of the server has not come yet."""

    REGISTERING = auto()
    """The challenge is answered."""

    REGISTERED = auto()
    """In the room."""

    WAITING = auto()
    """Not connected; the next attempt comes with the deadline."""

    ENDED = auto()
    """Closed by the owner, or refused by the server: nothing more happens."""


class _Trigger(Enum):
    CONNECTED = "connected"
    FAILED = "connect_failed"
    CHALLENGED = "a challenge"
    ACCEPTED = "a registration"
    REFUSED = "a refusal"
    LOST = "connection_lost"
    TIMEOUT = "a timeout"
    CLOSED = "close"


_S, _T = MemberState, _Trigger

TRANSITIONS: dict[MemberState, dict[_Trigger, MemberState]] = {
    _S.CONNECTING: {
        _T.CONNECTED: _S.OPENING,
        _T.FAILED: _S.WAITING,
        _T.CLOSED: _S.ENDED,
    },
    _S.OPENING: {
        _T.CHALLENGED: _S.REGISTERING,
        _T.REFUSED: _S.ENDED,
        _T.LOST: _S.WAITING,
        _T.TIMEOUT: _S.WAITING,
        _T.CLOSED: _S.ENDED,
    },
    _S.REGISTERING: {
        _T.ACCEPTED: _S.REGISTERED,
        _T.REFUSED: _S.ENDED,
        _T.LOST: _S.WAITING,
        _T.TIMEOUT: _S.WAITING,
        _T.CLOSED: _S.ENDED,
    },
    _S.REGISTERED: {
        _T.LOST: _S.WAITING,
        _T.TIMEOUT: _S.WAITING,
        _T.CLOSED: _S.ENDED,
    },
    _S.WAITING: {
        _T.TIMEOUT: _S.CONNECTING,
        _T.CLOSED: _S.ENDED,
    },
    _S.ENDED: {
        _T.CLOSED: _S.ENDED,
    },
}
"""States down, what happens across; anything else is somebody's mistake."""

_CONNECTED = frozenset({_S.OPENING, _S.REGISTERING, _S.REGISTERED})

_PASSING = frozenset(
    {ErrorCode.ROOM_FULL, ErrorCode.SERVER_FULL, ErrorCode.TOO_MANY_MESSAGES}
)
"""Refusals that time may heal; every other one is final."""


class RoomMember:
    """One peer in one room.

    It starts in `MemberState.CONNECTING`, with a `Connect` to drain. A driver reports

    * `connected` or `connect_failed` for each `Connect`;
    * `receive_text_untrusted` for each message, `heard_from` for each ping;
    * `connection_lost` when the socket is gone, unless the machine said `Close`;
    * `handle_timeout` at `deadline`,

    and after each of them, and after each command, drains `next_output`. ``now`` is a
    monotonic clock, seconds.

    Args:
        keys: The room's.
        peer_id: The name of this peer, its own in the whole room.
        role: Such as ``worker`` or ``client``.
        metadata: What the others shall know.
        random: For the jitter of the backoff.
        backoff: How long to wait between attempts.

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
        backoff: Backoff = Backoff(),  # noqa: B008 - it is frozen
    ) -> None:
        _check_size(metadata)
        self._keys = keys
        self._peer_id = peer_id
        self._role = role
        self._metadata = metadata
        self._random = random
        self._backoff = backoff
        self._state = MemberState.CONNECTING
        self._outputs: deque[MemberOutput] = deque([Connect()])
        self._deadline: float | None = None
        self._failures = 0
        self._registered_at: float | None = None
        self._sent_metadata = metadata
        self._next_request = 0
        self._requests: deque[int] = deque()
        self._complaint = ""

    @property
    def state(self) -> MemberState:
        """Where the machine stands."""
        return self._state

    @property
    def is_connected(self) -> bool:
        """True while the machine uses the connection that the driver gave it."""
        return self._state in _CONNECTED

    # ---------------------------------------------------------------------- inputs

    def connected(self, now: float) -> None:
        """Take the connection that was asked for.

        Raises:
            LocalProtocolError: If none was.
        """
        self._move(_T.CONNECTED)
        self._complaint = ""
        self._deadline = now + REGISTRATION_SECONDS

    def connect_failed(self, now: float, reason: str) -> None:
        """Note that there is no connection.

        Raises:
            LocalProtocolError: If none was asked for.
        """
        self._move(_T.FAILED)
        self._wait(now, reason)

    def connection_lost(self, now: float, reason: str) -> None:
        """Note that the connection is gone.

        Raises:
            LocalProtocolError: If there was none.
        """
        self._move(_T.LOST)
        self._wait(now, self._complaint or reason)

    def heard_from(self, now: float) -> None:
        """Note a ping of the server."""
        if self._state is MemberState.REGISTERED:
            self._deadline = now + SILENCE_SECONDS

    def receive_text_untrusted(self, text: str, now: float) -> None:
        """Handle a message of the server.

        Raises:
            RemoteProtocolError: If the server broke the protocol. The state is what it
                was; the driver closes the connection and reports it as lost.
        """
        if not self.is_connected:
            return
        signal = decode_signal_untrusted(text, MAX_LIST_BYTES)
        self.heard_from(now)
        match signal:
            case Challenge(nonce=nonce):
                self._move_untrusted(_T.CHALLENGED)
                self._register(nonce)
            case RegisteredAuth():
                self._move_untrusted(_T.ACCEPTED)
                self._enter(now)
            case PeerList(peers=peers):
                if not self._requests:
                    raise RemoteProtocolError("a list of peers that nobody asked for")
                self._outputs.append(PeersListed(self._requests.popleft(), peers))
            case OfferSignal(sender=sender, sdp=sealed):
                self._outputs.append(OfferReceived(sender, sealed))
            case AnswerSignal(sender=sender, sdp=sealed):
                self._outputs.append(AnswerReceived(sender, sealed))
            case ErrorSignal():
                self._receive_error(signal)
            case _:
                # Of a newer version, or of no interest to this peer.
                pass

    def handle_timeout(self, now: float) -> None:
        """Do what it is time for; nothing happens before `deadline`."""
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
            else "the signaling server did not let us register in time"
        )
        self._outputs.append(Close(reason))
        self._wait(now, reason)

    # -------------------------------------------------------------------- commands

    def discover(self, filters: Filters) -> int:
        """Ask who is in the room; `PeersListed` with the returned number follows.

        It does not follow if the connection is lost first.

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
            LocalProtocolError: If they are too many; nothing changed.
        """
        metadata = Metadata(
            self._metadata.tags, self._metadata.properties | dict(properties)
        )
        _check_size(metadata)
        self._metadata = metadata
        self._publish()

    def close(self) -> None:
        """End; it may be called at any time, and again."""
        if self.is_connected:
            self._outputs.append(Close("done"))
        self._move(_T.CLOSED)
        self._deadline = None

    # --------------------------------------------------------------------- outputs

    def deadline(self) -> float | None:
        """When `handle_timeout` has something to do."""
        return self._deadline

    def next_output(self) -> MemberOutput | None:
        """Take the oldest effect or event, or None if there is none."""
        return self._outputs.popleft() if self._outputs else None

    # -------------------------------------------------------------------- internals

    def _move(self, trigger: _Trigger) -> None:
        target = TRANSITIONS[self._state].get(trigger)
        if target is None:
            raise LocalProtocolError(f"no {trigger.value} in state {self._state.name}")
        self._state = target

    def _move_untrusted(self, trigger: _Trigger) -> None:
        if trigger not in TRANSITIONS[self._state]:
            raise RemoteProtocolError(
                f"the server sent {trigger.value} in state {self._state.name}"
            )
        self._move(trigger)

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

    def _enter(self, now: float) -> None:
        self._registered_at = now
        self._deadline = now + SILENCE_SECONDS
        self._outputs.append(Registered())
        self._publish()

    def _publish(self) -> None:
        """Send the metadata if the room knows an older one."""
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
        elif error.code in _PASSING:
            self._complaint = reason
        else:
            self._move_untrusted(_T.REFUSED)
            self._deadline = None
            self._outputs.append(Close(reason))
            self._outputs.append(RegistrationRefused(reason))

    def _wait(self, now: float, reason: str) -> None:
        """Arm the next attempt."""
        since = self._registered_at
        stable = since is not None and now - since >= STABLE_SECONDS
        self._failures = 1 if stable else self._failures + 1
        self._registered_at = None
        self._requests.clear()
        delay = self._backoff.delay(self._failures, self._random.random())
        self._deadline = now + delay
        self._outputs.append(Reconnecting(delay, reason))


def _check_size(metadata: Metadata) -> None:
    if not metadata_fits(metadata):
        raise LocalProtocolError(f"metadata of more than {MAX_METADATA_BYTES} bytes")
