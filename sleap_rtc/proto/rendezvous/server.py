"""The signaling server as a pure machine: it introduces the peers of a room.

One machine serves all connections. It holds no secret: whoever signs its challenge with
the key that a room is named after may enter that room.
"""

from collections import deque

import msgspec
from msgspec import UNSET, UnsetType

from sleap_rtc.proto.errors import LocalProtocolError, RemoteProtocolError
from sleap_rtc.proto.rendezvous.invite import verify_registration
from sleap_rtc.proto.rendezvous.messages import (
    MAX_METADATA_BYTES,
    MAX_PEERS_PER_ROOM,
    AnswerSignal,
    Challenge,
    Comparison,
    Condition,
    DiscoverPeers,
    ErrorCode,
    ErrorSignal,
    Filters,
    Metadata,
    MetadataChange,
    MetadataUpdated,
    OfferSignal,
    PeerInfo,
    PeerList,
    PeerMessage,
    Property,
    Register,
    RegisteredAuth,
    Signal,
    UpdateMetadata,
    decode_signal_untrusted,
    encode_signal,
    metadata_fits,
)

MAX_CONNECTIONS = 1024
"""Leaves room below the usual limit of open files of one process on a server."""

MAX_ROOMS = 512
"""Anybody may open a room, but not fill the server with them."""

MESSAGES_PER_SECOND = 20.0
"""What a connection may send on average; a busy client sends a few in a minute."""

MESSAGE_BURST = 40.0
"""What it may send at once: some bursts of a busy client."""

REGISTRATION_SECONDS = 10.0
"""For the WebSocket handshake and `Register`, ten round trips of a bad line."""

PING_SECONDS = 20.0
"""Well below the 60 s after which home routers forget a silent connection."""

IDLE_SECONDS = 90.0
"""Four pings without an answer."""

# --------------------------------------------------------------- effects and events


class Deliver(msgspec.Struct, frozen=True):
    """Effect: send this text on a connection."""

    connection: int
    text: str


class Ping(msgspec.Struct, frozen=True):
    """Effect: ask a connection whether it is still there."""

    connection: int


class Drop(msgspec.Struct, frozen=True):
    """Effect: close a connection after what was delivered; it is forgotten already."""

    connection: int
    reason: str


class PeerJoined(msgspec.Struct, frozen=True):
    """Event: a peer registered, or came back on a new connection."""

    room_id: str
    peer_id: str
    role: str


class PeerLeft(msgspec.Struct, frozen=True):
    """Event: a peer is gone, and why."""

    room_id: str
    peer_id: str
    reason: str


class Refused(msgspec.Struct, frozen=True):
    """Event: a connection was told no."""

    connection: int
    code: str
    reason: str


ServerOutput = Deliver | Ping | Drop | PeerJoined | PeerLeft | Refused


class _Peer(msgspec.Struct):
    """A registered peer."""

    connection: int
    peer_id: str
    room_id: str
    role: str
    metadata: Metadata

    def info(self) -> PeerInfo:
        return PeerInfo(self.peer_id, self.role, self.metadata)


class _Connection(msgspec.Struct):
    """What the server knows of one socket."""

    nonce: bytes
    tokens: float
    tokens_at: float
    drop_at: float
    ping_at: float
    peer: _Peer | None = None

    def take_token(self, now: float) -> bool:
        """Count one message; False if there were too many (a token bucket)."""
        gained = max(0.0, now - self.tokens_at) * MESSAGES_PER_SECOND
        self.tokens = min(MESSAGE_BURST, self.tokens + gained)
        self.tokens_at = now
        if self.tokens < 1.0:
            return False
        self.tokens -= 1.0
        return True


class _Refusal(Exception):
    """Inside the machine only: the answer to one message is an `ErrorSignal`."""

    def __init__(
        self,
        code: ErrorCode,
        reason: str,
        *,
        target: str | UnsetType = UNSET,
        drop: bool = False,
    ) -> None:
        super().__init__(reason)
        self.signal = ErrorSignal(code, reason, target)
        self.drop = drop


class RoomServer:
    """All rooms of one signaling server.

    A driver numbers its connections, never twice the same, and calls

    * `connection_opened`, with fresh random bytes, when a socket comes;
    * `receive_text_untrusted` for each message, `heard_from` for each ping and pong;
    * `connection_lost` when the socket is gone;
    * `handle_timeout` at `deadline`,

    and after each of them drains `next_output`. ``now`` is a monotonic clock, seconds.
    Input for a connection that was dropped is ignored.
    """

    def __init__(self) -> None:
        self._connections: dict[int, _Connection] = {}
        self._rooms: dict[str, dict[str, _Peer]] = {}
        self._outputs: deque[ServerOutput] = deque()

    # ---------------------------------------------------------------------- inputs

    def connection_opened(self, connection: int, nonce: bytes, now: float) -> None:
        """Take a new connection and challenge it.

        Raises:
            LocalProtocolError: If the number is in use.
        """
        if connection in self._connections:
            raise LocalProtocolError(f"connection {connection} is open already")
        self._connections[connection] = _Connection(
            nonce=nonce,
            tokens=MESSAGE_BURST,
            tokens_at=now,
            drop_at=now + REGISTRATION_SECONDS,
            ping_at=now + PING_SECONDS,
        )
        if len(self._connections) > MAX_CONNECTIONS:
            full = _Refusal(ErrorCode.SERVER_FULL, "this server is full: try later")
            self._refuse(connection, full)
            self._drop(connection, "the server is full")
            return
        self._deliver(connection, Challenge(nonce))

    def receive_text_untrusted(self, connection: int, text: str, now: float) -> None:
        """Handle a message; whatever is wrong with it becomes an answer to the peer."""
        if not self.heard_from(connection, now):
            return
        try:
            try:
                self._receive(connection, decode_signal_untrusted(text), now)
            except RemoteProtocolError as error:
                raise _Refusal(
                    ErrorCode.INVALID_MESSAGE, error.reason, drop=True
                ) from None
        except _Refusal as refusal:
            self._refuse(connection, refusal)
            if refusal.drop:
                self._drop(connection, refusal.signal.reason)

    def heard_from(self, connection: int, now: float) -> bool:
        """Note a sign of life; it counts as a message. False if the peer is dropped."""
        state = self._connections.get(connection)
        if state is None:
            return False
        if not state.take_token(now):
            reason = f"more than {MESSAGES_PER_SECOND:.0f} messages per second"
            self._refuse(connection, _Refusal(ErrorCode.TOO_MANY_MESSAGES, reason))
            self._drop(connection, reason)
            return False
        if state.peer is not None:
            state.drop_at = now + IDLE_SECONDS
        return True

    def connection_lost(self, connection: int, reason: str) -> None:
        """Forget a connection whose socket is gone."""
        self._forget(connection, reason)

    def handle_timeout(self, now: float) -> None:
        """Ping and drop whoever it is time for; nothing happens before `deadline`."""
        for connection, state in list(self._connections.items()):
            if now >= state.drop_at:
                late = "it did not register in time" if state.peer is None else "silent"
                self._drop(connection, late)
            elif now >= state.ping_at:
                state.ping_at = now + PING_SECONDS
                self._outputs.append(Ping(connection))

    # --------------------------------------------------------------------- outputs

    def deadline(self) -> float | None:
        """When `handle_timeout` has something to do."""
        return min(
            (min(state.drop_at, state.ping_at) for state in self._connections.values()),
            default=None,
        )

    def next_output(self) -> ServerOutput | None:
        """Take the oldest effect or event, or None if there is none."""
        return self._outputs.popleft() if self._outputs else None

    # ------------------------------------------------------------------- messages

    def _receive(self, connection: int, signal: Signal, now: float) -> None:
        if isinstance(signal, Register):
            self._register(connection, signal, now)
            return
        peer = self._connections[connection].peer
        if peer is None:
            raise _Refusal(ErrorCode.NOT_IN_ROOM, "register first")
        match signal:
            case DiscoverPeers(from_peer_id=claimed, filters=filters):
                _check_is(peer, claimed)
                self._list_peers(peer, filters)
            case UpdateMetadata(peer_id=claimed, metadata=change):
                _check_is(peer, claimed)
                self._update(peer, change)
            case OfferSignal(sender=claimed, target=target):
                _check_is(peer, claimed)
                self._forward(peer, target, signal)
            case AnswerSignal(sender=claimed, target=target):
                _check_is(peer, claimed)
                self._forward(peer, target, signal)
            case PeerMessage(from_peer_id=claimed, to_peer_id=target):
                _check_is(peer, claimed)
                self._forward(peer, target, signal)
            case _:
                # A message of a newer version, or one that only servers send.
                pass

    def _register(self, connection: int, register: Register, now: float) -> None:
        state = self._connections[connection]
        self._check_registration(state, register)
        room = self._rooms.setdefault(register.room_id, {})
        old = room.get(register.peer_id)
        if old is not None and old.connection != connection:
            self._drop(old.connection, "this peer registered on another connection")
            # The room may have been removed with its last peer.
            room = self._rooms.setdefault(register.room_id, {})
        peer = _Peer(
            connection,
            register.peer_id,
            register.room_id,
            register.role,
            register.metadata,
        )
        is_new = state.peer is None
        state.peer = room[register.peer_id] = peer
        state.drop_at = now + IDLE_SECONDS
        self._deliver(connection, RegisteredAuth(peer.room_id, peer.peer_id))
        if is_new:
            self._outputs.append(PeerJoined(peer.room_id, peer.peer_id, peer.role))

    def _check_registration(self, state: _Connection, register: Register) -> None:
        """Refuse a registration that is not proven, or for which there is no room."""
        names = (register.room_id, register.peer_id)
        if state.peer and (state.peer.room_id, state.peer.peer_id) != names:
            raise _Refusal(ErrorCode.NOT_YOU, "this connection is another peer's")
        if not verify_registration(
            register.public_key, names[0], state.nonce, names[1], register.signature
        ):
            reason = "the signature does not fit the room: is the invite the right one?"
            raise _Refusal(ErrorCode.REGISTRATION_REFUSED, reason, drop=True)
        _check_size(register.metadata)
        room = self._rooms.get(register.room_id)
        if room is None and len(self._rooms) >= MAX_ROOMS:
            reason = "this server has no room left: try later"
            raise _Refusal(ErrorCode.SERVER_FULL, reason, drop=True)
        if room and register.peer_id not in room and len(room) >= MAX_PEERS_PER_ROOM:
            reason = f"the room is full ({MAX_PEERS_PER_ROOM} peers): try later"
            raise _Refusal(ErrorCode.ROOM_FULL, reason, drop=True)

    def _list_peers(self, asker: _Peer, filters: Filters) -> None:
        peers = tuple(
            peer.info()
            for peer in self._rooms[asker.room_id].values()
            if peer is not asker and matches(peer.info(), filters)
        )
        self._deliver(asker.connection, PeerList(asker.peer_id, peers, len(peers)))

    def _update(self, peer: _Peer, change: MetadataChange) -> None:
        tags = peer.metadata.tags if change.tags is UNSET else change.tags
        metadata = Metadata(tags, peer.metadata.properties | change.properties)
        _check_size(metadata)
        peer.metadata = metadata
        self._deliver(peer.connection, MetadataUpdated(peer.peer_id, metadata))

    def _forward(self, sender: _Peer, target: str, signal: Signal) -> None:
        receiver = self._rooms[sender.room_id].get(target)
        if receiver is None:
            raise _Refusal(
                ErrorCode.PEER_NOT_FOUND, f"{target} is not in the room", target=target
            )
        self._deliver(receiver.connection, signal)

    # ----------------------------------------------------------------------- ends

    def _deliver(self, connection: int, signal: Signal) -> None:
        self._outputs.append(Deliver(connection, encode_signal(signal)))

    def _refuse(self, connection: int, refusal: _Refusal) -> None:
        signal = refusal.signal
        self._outputs.append(Refused(connection, signal.code, signal.reason))
        self._deliver(connection, signal)

    def _drop(self, connection: int, reason: str) -> None:
        self._outputs.append(Drop(connection, reason))
        self._forget(connection, reason)

    def _forget(self, connection: int, reason: str) -> None:
        state = self._connections.pop(connection, None)
        if state is None or state.peer is None:
            return
        peer = state.peer
        room = self._rooms[peer.room_id]
        del room[peer.peer_id]
        if not room:
            del self._rooms[peer.room_id]
        self._outputs.append(PeerLeft(peer.room_id, peer.peer_id, reason))


def _check_is(peer: _Peer, claimed: str) -> None:
    if peer.peer_id != claimed:
        raise _Refusal(ErrorCode.NOT_YOU, f"this connection is not {claimed}")


def _check_size(metadata: Metadata) -> None:
    if not metadata_fits(metadata):
        reason = f"metadata of more than {MAX_METADATA_BYTES} bytes"
        raise _Refusal(ErrorCode.METADATA_TOO_LARGE, reason)


# ----------------------------------------------------------------------- discovery


def matches(peer: PeerInfo, filters: Filters) -> bool:
    """Tell whether a peer is one of those that are looked for."""
    if filters.role is not UNSET and peer.role != filters.role:
        return False
    if filters.tags and not set(filters.tags) & set(peer.metadata.tags):
        return False
    properties = peer.metadata.properties
    return all(
        key in properties and _holds(properties[key], condition)
        for key, condition in filters.properties.items()
    )


def _holds(value: Property, condition: Condition) -> bool:
    if not isinstance(condition, Comparison):
        return _equal(value, condition)
    return (
        (condition.equal is UNSET or _equal(value, condition.equal))
        and (condition.at_least is UNSET or _number(value) >= condition.at_least)
        and (condition.at_most is UNSET or _number(value) <= condition.at_most)
    )


def _equal(value: Property, wanted: Property) -> bool:
    # In JSON, unlike in Python, true is not 1.
    return value == wanted and isinstance(value, bool) == isinstance(wanted, bool)


def _number(value: Property) -> float:
    """Give a value for a comparison; what is no number compares as false."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return float("nan")
    return value
