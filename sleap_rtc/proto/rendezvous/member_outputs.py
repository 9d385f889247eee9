"""Outputs of a member of a room: effects for its driver, and events."""

import msgspec

from sleap_rtc.proto.rendezvous.messages import PeerInfo


class Connect(msgspec.Struct, frozen=True):
    """Effect: connect to the server."""


class SendText(msgspec.Struct, frozen=True):
    """Effect: send this text on the connection."""

    text: str


class Close(msgspec.Struct, frozen=True):
    """Effect: close the connection, and do not report its end to the machine."""

    reason: str


class Registered(msgspec.Struct, frozen=True):
    """Event: this peer is in its room, for the first time or again."""


class RegistrationRefused(msgspec.Struct, frozen=True):
    """Event: the server refused the registration; the machine has ended."""

    reason: str


class Reconnecting(msgspec.Struct, frozen=True):
    """Event: the connection is lost; the next attempt follows after ``delay`` s."""

    delay: float
    reason: str


class PeersListed(msgspec.Struct, frozen=True):
    """Event: the peers found by the discovery with this number."""

    request: int
    peers: tuple[PeerInfo, ...]


class OfferReceived(msgspec.Struct, frozen=True):
    """Event: a sealed offer came; only the server vouches for the sender's name."""

    sender: str
    sealed: str


class AnswerReceived(msgspec.Struct, frozen=True):
    """Event: a sealed answer came; only the server vouches for the sender's name."""

    sender: str
    sealed: str


class PeerUnreachable(msgspec.Struct, frozen=True):
    """Event: the server could not deliver something to this peer."""

    target: str


class ServerComplained(msgspec.Struct, frozen=True):
    """Event: the server could not do something; the connection continues."""

    code: str
    reason: str


MemberOutput = (
    Connect
    | SendText
    | Close
    | Registered
    | RegistrationRefused
    | Reconnecting
    | PeersListed
    | OfferReceived
    | AnswerReceived
    | PeerUnreachable
    | ServerComplained
)
