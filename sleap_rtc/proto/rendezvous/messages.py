"""The messages of the signaling server, in one table, and their JSON codec.

Each is one JSON object; ``type`` names it. Unknown keys are ignored, so that messages
can grow. `sleap_rtc.proto.rendezvous.server` and `sleap_rtc.proto.rendezvous.member`
are the two machines that speak them.
"""

from enum import StrEnum
from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, UnsetType

from sleap_rtc.proto.errors import LocalProtocolError, RemoteProtocolError

MAX_SIGNAL_BYTES = 64 * 1024
"""Bytes of the longest message of a peer; the largest sealed text is half of it."""

MAX_METADATA_BYTES = 4096
"""Bytes of the metadata of one peer as JSON, ten times those of a worker with eight
GPUs."""

MAX_PEERS_PER_ROOM = 64
"""Peers in one room: enough for the workers and terminals of a laboratory."""

MAX_LIST_BYTES = MAX_PEERS_PER_ROOM * (MAX_METADATA_BYTES + 1024)
"""Bytes of the longest message of a server, which lists a full room."""

# ------------------------------------------------------------------- field types

PeerId = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._@-]{0,127}\Z")]
"""A name that is harmless in a log line and as a file name."""

RoomId = Annotated[str, Meta(pattern=r"\A[0-9a-f]{32}\Z")]
Role = Annotated[str, Meta(pattern=r"\A[a-z]{1,32}\Z")]
Tag = Annotated[str, Meta(max_length=64)]
Tags = Annotated[tuple[Tag, ...], Meta(max_length=16)]
Key = Annotated[str, Meta(min_length=1, max_length=64)]
Integer = Annotated[int, Meta(ge=-(2**53), le=2**53)]
"""An integer that every JSON library reads back unchanged."""

Scalar = str | bool | Integer | float | None
Property = Scalar | list[Scalar]
Properties = dict[Key, Property]
Sealed = Annotated[str, Meta(max_length=MAX_SIGNAL_BYTES // 2)]
"""An offer or answer that only peers of the room can read."""


class Metadata(msgspec.Struct, frozen=True):
    """The description that a peer gives of itself to its room."""

    tags: Tags = ()
    properties: Properties = {}


class MetadataChange(msgspec.Struct, frozen=True, omit_defaults=True):
    """Properties to merge into the old ones. Tags, if given, replace the old tags."""

    properties: Properties = {}
    tags: Tags | UnsetType = UNSET


class Comparison(
    msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True
):
    """Conditions on one property; all that are set must hold."""

    at_least: Integer | float | UnsetType = msgspec.field(default=UNSET, name="$gte")
    at_most: Integer | float | UnsetType = msgspec.field(default=UNSET, name="$lte")
    equal: Scalar | UnsetType = msgspec.field(default=UNSET, name="$eq")


Condition = Scalar | Comparison


class Filters(msgspec.Struct, frozen=True, omit_defaults=True):
    """The peers to list: of this role, with any of these tags, with these properties.

    A field that is not set matches every peer.
    """

    role: Role | UnsetType = UNSET
    tags: Tags = ()
    properties: dict[Key, Condition] = {}


class PeerInfo(msgspec.Struct, frozen=True):
    """One peer of the room, as it describes itself."""

    peer_id: PeerId
    role: Role
    metadata: Metadata


# ----------------------------------------------------------------------- messages


class Signal(msgspec.Struct, frozen=True, tag_field="type"):
    """One message between a peer and the signaling server."""


class Challenge(Signal, frozen=True, tag="challenge"):
    """Server, first on every connection: the nonce to sign for a registration."""

    nonce: Annotated[bytes, Meta(min_length=16, max_length=64)]


class Register(Signal, frozen=True, tag="register"):
    """Peer: enter this room. Sent again, it replaces the metadata."""

    peer_id: PeerId
    room_id: RoomId
    role: Role
    public_key: Annotated[bytes, Meta(max_length=64)]
    signature: Annotated[bytes, Meta(max_length=128)]
    metadata: Metadata = Metadata()


class RegisteredAuth(Signal, frozen=True, tag="registered_auth"):
    """Server: the registration is accepted."""

    room_id: RoomId
    peer_id: PeerId


class DiscoverPeers(Signal, frozen=True, tag="discover_peers"):
    """Peer: list the other peers of the room. Exactly one `PeerList` follows."""

    from_peer_id: PeerId
    filters: Filters = Filters()


class PeerList(Signal, frozen=True, tag="peer_list"):
    """Server: the other peers of the room."""

    to_peer_id: PeerId
    peers: Annotated[tuple[PeerInfo, ...], Meta(max_length=MAX_PEERS_PER_ROOM)]
    count: int


class OfferSignal(Signal, frozen=True, tag="offer"):
    """Peer to peer: a sealed offer."""

    sender: PeerId
    target: PeerId
    sdp: Sealed


class AnswerSignal(Signal, frozen=True, tag="answer"):
    """Peer to peer: the sealed answer."""

    sender: PeerId
    target: PeerId
    sdp: Sealed


class PeerMessage(Signal, frozen=True, tag="peer_message"):
    """Peer to peer: other content, which the server does not read."""

    from_peer_id: PeerId
    to_peer_id: PeerId
    payload: msgspec.Raw


class UpdateMetadata(Signal, frozen=True, tag="update_metadata"):
    """Peer: a change of its metadata."""

    peer_id: PeerId
    metadata: MetadataChange


class MetadataUpdated(Signal, frozen=True, tag="metadata_updated"):
    """Server: the metadata of the peer after its change."""

    peer_id: PeerId
    metadata: Metadata


class ErrorSignal(Signal, frozen=True, tag="error"):
    """Server: a request failed; with a code for programs and a reason for people."""

    code: Annotated[str, Meta(max_length=64)]
    reason: Annotated[str, Meta(max_length=1024)]
    target: PeerId | UnsetType = UNSET


class UnknownSignal(Signal, frozen=True):
    """A message that its receiver ignores, such as one of a newer version."""

    name: str


class ErrorCode(StrEnum):
    """The codes of `ErrorSignal`."""

    INVALID_MESSAGE = "INVALID_MESSAGE"
    NOT_IN_ROOM = "NOT_IN_ROOM"
    NOT_YOU = "NOT_YOU"
    REGISTRATION_REFUSED = "REGISTRATION_REFUSED"
    METADATA_TOO_LARGE = "METADATA_TOO_LARGE"
    ROOM_FULL = "ROOM_FULL"
    SERVER_FULL = "SERVER_FULL"
    PEER_NOT_FOUND = "PEER_NOT_FOUND"
    TOO_MANY_MESSAGES = "TOO_MANY_MESSAGES"


PeerSignal = (
    Register
    | DiscoverPeers
    | OfferSignal
    | AnswerSignal
    | PeerMessage
    | UpdateMetadata
    | UnknownSignal
)
"""Messages that a peer sends to the server."""

ServerSignal = (
    Challenge
    | RegisteredAuth
    | PeerList
    | OfferSignal
    | AnswerSignal
    | PeerMessage
    | MetadataUpdated
    | ErrorSignal
    | UnknownSignal
)
"""Messages that the server sends to a peer, those of other peers included."""


# -------------------------------------------------------------------------- codec

TABLE: dict[str, type[Signal]] = {
    "challenge": Challenge,
    "register": Register,
    "registered_auth": RegisteredAuth,
    "discover_peers": DiscoverPeers,
    "peer_list": PeerList,
    "offer": OfferSignal,
    "answer": AnswerSignal,
    "peer_message": PeerMessage,
    "update_metadata": UpdateMetadata,
    "metadata_updated": MetadataUpdated,
    "error": ErrorSignal,
}

_MAX_REASON = 300


class _Head(msgspec.Struct, frozen=True):
    """The part of a message that is decoded first."""

    type: Annotated[str, Meta(min_length=1, max_length=64)]


def encode_signal(signal: Signal) -> str:
    """Encode a message as JSON.

    Raises:
        LocalProtocolError: If it cannot be expressed in JSON.
    """
    try:
        return msgspec.json.encode(signal).decode()
    except (ValueError, OverflowError, TypeError) as error:
        raise LocalProtocolError(f"{type(signal).__name__}: {error}") from None


def decode_peer_signal_untrusted(text: str) -> PeerSignal:
    """Decode a message that a peer sent to the server.

    Returns:
        The message; `UnknownSignal` if it is not one that peers send.

    Raises:
        RemoteProtocolError: For all other texts; the reason names message and field.
    """
    signal = decode_signal_untrusted(text)
    return signal if isinstance(signal, PeerSignal) else _ignored(signal)


def decode_server_signal_untrusted(text: str) -> ServerSignal:
    """Decode a message that the server sent to a peer.

    Returns:
        The message; `UnknownSignal` if it is not one that servers send.

    Raises:
        RemoteProtocolError: For all other texts; the reason names message and field.
    """
    signal = decode_signal_untrusted(text, MAX_LIST_BYTES)
    return signal if isinstance(signal, ServerSignal) else _ignored(signal)


def _ignored(signal: Signal) -> UnknownSignal:
    return UnknownSignal(str(signal.__struct_config__.tag))


def decode_signal_untrusted(text: str, limit: int = MAX_SIGNAL_BYTES) -> Signal:
    """Decode a message whose sender may be a peer or a server.

    Args:
        text: The text that arrived.
        limit: Bytes of the longest message to accept.

    Returns:
        A message of `TABLE`, or `UnknownSignal` if the name is not in it.

    Raises:
        RemoteProtocolError: For all other texts; the reason names message and field.
    """
    name = "a signaling message"
    try:
        raw = text.encode()
        if len(raw) > limit:
            raise RemoteProtocolError(f"{name} of {len(raw)} bytes is too long")
        head = msgspec.json.decode(raw, type=_Head)
        name = head.type
        cls = TABLE.get(name)
        if cls is None:
            return UnknownSignal(name)
        return msgspec.json.decode(raw, type=cls)
    except (ValueError, RecursionError) as error:
        raise RemoteProtocolError(f"{name}: {error}"[:_MAX_REASON]) from None


def metadata_fits(metadata: Metadata) -> bool:
    """Return whether a server accepts metadata of this size."""
    return len(msgspec.json.encode(metadata)) <= MAX_METADATA_BYTES
