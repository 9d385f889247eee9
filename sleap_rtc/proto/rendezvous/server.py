"""The signaling server as a pure machine: it introduces the peers of a room.

One machine serves all connections. It holds no secret: a peer that signs the challenge
with the key that a room is named after may enter that room.
"""

from collections import deque
from enum import Enum, auto
from typing import assert_never

import msgspec
from msgspec import UNSET, UnsetType
from typing_extensions import override

from sleap_rtc.proto.errors import LocalProtocolError
from sleap_rtc.proto.machine import ServerMachine, Table, move
from sleap_rtc.proto.rendezvous.filters import matches
from sleap_rtc.proto.rendezvous.invite import verify_registration
from sleap_rtc.proto.rendezvous.messages import (
    MAX_METADATA_BYTES,
    MAX_PEERS_PER_ROOM,
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
    PeerInfo,
    PeerList,
    PeerMessage,
    PeerSignal,
    Register,
    RegisteredAuth,
    Signal,
    UnknownSignal,
    UpdateMetadata,
    encode_signal,
    metadata_fits,
)


class ServerLimits(msgspec.Struct, frozen=True):
    """Limits of a `RoomServer`; times are in seconds.

    Args:
        max_connections: Connections at once, below the usual limit of open files of a
            process.
        max_rooms: Rooms at once. Any peer may open a room, so one peer could fill the
            server.
        messages_per_second: Messages of one connection, on average; a busy client sends
            a few in a minute.
        message_burst: Messages of one connection at once, as from a client that asks
            several workers.
        registration_timeout: Time for the WebSocket handshake and `Register`: ten round
            trips of a bad line.
        ping_interval: Time between two pings, well below the 60 s after which home
            routers forget a silent connection.
        idle_timeout: Time without a message or pong of a peer: four unanswered pings.
    """

    max_connections: int = 1024
    max_rooms: int = 512
    messages_per_second: float = 20.0
    message_burst: float = 40.0
    registration_timeout: float = 10.0
    ping_interval: float = 20.0
    idle_timeout: float = 90.0


LIMITS = ServerLimits()

# --------------------------------------------------------------- effects and events


class Deliver(msgspec.Struct, frozen=True):
    """Effect: send this text on a connection."""

    connection: int
    text: str


class Ping(msgspec.Struct, frozen=True):
    """Effect: send a ping on a connection."""

    connection: int


class Drop(msgspec.Struct, frozen=True):
    """Effect: close a forgotten connection once all its texts are sent."""

    connection: int
    reason: str


class PeerJoined(msgspec.Struct, frozen=True):
    """Event: a peer registered, or came back on a new connection."""

    room_id: str
    peer_id: str
    role: str


class PeerLeft(msgspec.Struct, frozen=True):
    """Event: a peer left its room; the reason is for people."""

    room_id: str
    peer_id: str
    reason: str


class Refused(msgspec.Struct, frozen=True):
    """Event: a request of a connection was refused."""

    connection: int
    code: str
    reason: str


ServerOutput = Deliver | Ping | Drop | PeerJoined | PeerLeft | Refused

# -------------------------------------------------------------- states, transitions


class ConnectionState(Enum):
    """State of one connection."""

    CHALLENGED = auto()
    """The peer has not registered yet."""

    REGISTERED = auto()
    """The peer is in its room."""


_S = ConnectionState

TRANSITIONS: Table[ConnectionState] = {
    _S.CHALLENGED: {
        Register: _S.REGISTERED,
    },
    _S.REGISTERED: {
        Register: _S.REGISTERED,
        DiscoverPeers: _S.REGISTERED,
        UpdateMetadata: _S.REGISTERED,
        OfferSignal: _S.REGISTERED,
        AnswerSignal: _S.REGISTERED,
        PeerMessage: _S.REGISTERED,
        UnknownSignal: _S.REGISTERED,
    },
}
"""The transitions of a connection; any other message of its peer is refused."""


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
    """One connection of a peer."""

    nonce: bytes
    tokens: float
    tokens_at: float
    drop_at: float
    ping_at: float
    state: ConnectionState = ConnectionState.CHALLENGED

    def spend_token(self, now: float, limits: ServerLimits) -> bool:
        """Count one message in a token bucket; False if no token is left."""
        gained = max(0.0, now - self.tokens_at) * limits.messages_per_second
        self.tokens = min(limits.message_burst, self.tokens + gained)
        self.tokens_at = now
        if self.tokens < 1.0:
            return False
        self.tokens -= 1.0
        return True


_LATE = {
    ConnectionState.CHALLENGED: "it did not register in time",
    ConnectionState.REGISTERED: "silent",
}
"""Reasons to drop a connection whose time is over."""


class _Refusal(Exception):
    """Raised inside the machine only; the reply to the message is an `ErrorSignal`."""

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


class RoomServer(ServerMachine[PeerSignal, ServerOutput]):
    """All rooms of one signaling server.

    It serves many connections (see `ServerMachine`). A driver calls

    * `connection_opened`, with fresh random bytes, when a socket is accepted;
    * `receive_message` for each message, `reject_message` for each that cannot be
      decoded, and `heard_from` for each ping and pong;
    * `connection_lost` when the socket is gone;
    * `handle_timeout` at `deadline`,

    and after each of them drains `next_output`. ``now`` is a monotonic clock, seconds.

    Args:
        limits: How many peers it serves, and how long it waits for them.
    """

    def __init__(self, limits: ServerLimits = LIMITS) -> None:
        self._limits = limits
        self._connections: dict[int, _Connection] = {}
        self._peers: dict[int, _Peer] = {}
        self._rooms: dict[str, dict[str, _Peer]] = {}
        self._outputs: deque[ServerOutput] = deque()

    # ---------------------------------------------------------------------- inputs

    def connection_opened(self, connection: int, nonce: bytes, now: float) -> None:
        """Add a connection and challenge its peer.

        Raises:
            LocalProtocolError: If the number is in use.
        """
        if connection in self._connections:
            raise LocalProtocolError(f"connection {connection} is open already")
        self._connections[connection] = _Connection(
            nonce=nonce,
            tokens=self._limits.message_burst,
            tokens_at=now,
            drop_at=now + self._limits.registration_timeout,
            ping_at=now + self._limits.ping_interval,
        )
        if len(self._connections) > self._limits.max_connections:
            full = _Refusal(ErrorCode.SERVER_FULL, "this server is full: try later")
            self._refuse(connection, full)
            self._drop(connection, "the server is full")
            return
        self._deliver(connection, Challenge(nonce))

    @override
    def receive_message(self, connection: int, message: PeerSignal, now: float) -> None:
        """Handle a message; a fault in it becomes a reply to the peer."""
        if not self.heard_from(connection, now):
            return
        try:
            self._receive(connection, message, now)
        except _Refusal as refusal:
            self._refuse(connection, refusal)
            if refusal.drop:
                self._drop(connection, refusal.signal.reason)

    def reject_message(self, connection: int, reason: str, now: float) -> None:
        """Handle a message that cannot be decoded: reply, and drop the connection."""
        if self.heard_from(connection, now):
            self._refuse(connection, _Refusal(ErrorCode.INVALID_MESSAGE, reason))
            self._drop(connection, reason)

    def heard_from(self, connection: int, now: float) -> bool:
        """Record a sign of life, which counts as a message.

        Returns:
            Whether the connection is still served.
        """
        source = self._connections.get(connection)
        if source is None:
            return False
        if not source.spend_token(now, self._limits):
            rate = self._limits.messages_per_second
            reason = f"more than {rate:.0f} messages per second"
            self._refuse(connection, _Refusal(ErrorCode.TOO_MANY_MESSAGES, reason))
            self._drop(connection, reason)
            return False
        if source.state is ConnectionState.REGISTERED:
            source.drop_at = now + self._limits.idle_timeout
        return True

    @override
    def connection_lost(self, connection: int, reason: str) -> None:
        self._forget(connection, reason)

    @override
    def handle_timeout(self, now: float) -> None:
        """Ping and drop the connections that are due; nothing before `deadline`."""
        for number, connection in list(self._connections.items()):
            if now >= connection.drop_at:
                self._drop(number, _LATE[connection.state])
            elif now >= connection.ping_at:
                connection.ping_at = now + self._limits.ping_interval
                self._outputs.append(Ping(number))

    # --------------------------------------------------------------------- outputs

    @override
    def deadline(self) -> float | None:
        return min(
            (min(each.drop_at, each.ping_at) for each in self._connections.values()),
            default=None,
        )

    @override
    def next_output(self) -> ServerOutput | None:
        return self._outputs.popleft() if self._outputs else None

    # ------------------------------------------------------------------- messages

    def _receive(self, connection: int, signal: PeerSignal, now: float) -> None:
        if type(signal) not in TRANSITIONS[self._connections[connection].state]:
            raise _Refusal(ErrorCode.NOT_IN_ROOM, "register first")
        if isinstance(signal, Register):
            self._register(connection, signal, now)
            return
        peer = self._peers[connection]
        match signal:
            case DiscoverPeers(from_peer_id=claimed, filters=filters):
                _check_sender(peer, claimed)
                self._list_peers(peer, filters)
            case UpdateMetadata(peer_id=claimed, metadata=change):
                _check_sender(peer, claimed)
                self._update(peer, change)
            case OfferSignal(sender=claimed, target=target):
                _check_sender(peer, claimed)
                self._forward(peer, target, signal)
            case AnswerSignal(sender=claimed, target=target):
                _check_sender(peer, claimed)
                self._forward(peer, target, signal)
            case PeerMessage(from_peer_id=claimed, to_peer_id=target):
                _check_sender(peer, claimed)
                self._forward(peer, target, signal)
            case UnknownSignal():
                pass
            case _:
                assert_never(signal)

    def _register(self, connection: int, register: Register, now: float) -> None:
        self._check_registration(connection, register)
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
        source = self._connections[connection]
        is_new = source.state is ConnectionState.CHALLENGED
        source.state = move(TRANSITIONS, source.state, Register)
        source.drop_at = now + self._limits.idle_timeout
        self._peers[connection] = room[register.peer_id] = peer
        self._deliver(connection, RegisteredAuth(peer.room_id, peer.peer_id))
        if is_new:
            self._outputs.append(PeerJoined(peer.room_id, peer.peer_id, peer.role))

    def _check_registration(self, connection: int, register: Register) -> None:
        """Check that a registration is proven and that the server has room for it."""
        peer = self._peers.get(connection)
        if peer is not None and (peer.room_id, peer.peer_id) != (
            register.room_id,
            register.peer_id,
        ):
            raise _Refusal(ErrorCode.NOT_YOU, "this connection belongs to another peer")
        if not verify_registration(
            register.public_key,
            register.room_id,
            self._connections[connection].nonce,
            register.peer_id,
            register.signature,
        ):
            reason = "the signature does not fit the room: is the invite the right one?"
            raise _Refusal(ErrorCode.REGISTRATION_REFUSED, reason, drop=True)
        _check_size(register.metadata)
        room = self._rooms.get(register.room_id)
        if room is None and len(self._rooms) >= self._limits.max_rooms:
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
        self._connections.pop(connection, None)
        peer = self._peers.pop(connection, None)
        if peer is None:
            return
        room = self._rooms[peer.room_id]
        del room[peer.peer_id]
        if not room:
            del self._rooms[peer.room_id]
        self._outputs.append(PeerLeft(peer.room_id, peer.peer_id, reason))


def _check_sender(peer: _Peer, claimed: str) -> None:
    if peer.peer_id != claimed:
        raise _Refusal(ErrorCode.NOT_YOU, f"this connection is not {claimed}")


def _check_size(metadata: Metadata) -> None:
    if not metadata_fits(metadata):
        reason = f"metadata of more than {MAX_METADATA_BYTES} bytes"
        raise _Refusal(ErrorCode.METADATA_TOO_LARGE, reason)
