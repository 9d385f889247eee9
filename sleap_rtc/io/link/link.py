"""One interface over every kind of link."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

import msgspec

from sleap_rtc.proto.messages import Message
from sleap_rtc.proto.route.kinds import LinkKindName
from sleap_rtc.proto.transfer.frames import Frame

ReceivedT_co = TypeVar("ReceivedT_co", bound=Message, covariant=True)
"""The messages that the peer may send: `WorkerMessage` or `ClientMessage`."""


class LinkClosedError(Exception):
    """The link is gone, and everything on its way is lost.

    Args:
        reason: The cause, for people.
        silent_for: Seconds without traffic, if the silence was the reason.
    """

    def __init__(self, reason: str, *, silent_for: float = 0.0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.silent_for = silent_for


class DialFailure(msgspec.Struct, frozen=True):
    """One failed attempt to open a link.

    Args:
        kind: The transport.
        address: The peer's ``host:port``.
        reason: The cause, for people.
    """

    kind: LinkKindName
    address: str
    reason: str


class DialError(Exception):
    """No link could be opened.

    Args:
        failures: Every attempt.

    Attributes:
        reason: All of them, for people.
    """

    def __init__(self, failures: Sequence[DialFailure]) -> None:
        tried = "; ".join(f"{f.kind} to {f.address}: {f.reason}" for f in failures)
        self.reason = tried or "it has no address"
        super().__init__(f"cannot reach the peer ({self.reason})")
        self.failures = tuple(failures)


class LinkStatistics(msgspec.Struct, frozen=True):
    """Traffic of a link so far.

    Args:
        kind: The transport.
        address: The peer's ``host:port``.
        rtt: Smoothed round-trip time in seconds, 0 before the first sample.
        bytes_sent: Bytes handed to the network, headers of the transport included.
        bytes_received: Bytes taken from the network.
        packets_lost: Packets that the transport had to send again.
        ignored_messages: Control messages with names that are unknown here.
    """

    kind: LinkKindName
    address: str
    rtt: float
    bytes_sent: int
    bytes_received: int
    packets_lost: int
    ignored_messages: int


class Link(ABC, Generic[ReceivedT_co]):
    """An authenticated, encrypted connection between two peers.

    It carries ordered control messages and, beside them, bulk frames. Any number of
    tasks may send; one task may receive messages, and one may receive frames. When the
    link ends, for any reason, every pending and later call raises `LinkClosedError`;
    data that arrived before can still be received. A cancelled call to send has sent
    nothing, a cancelled call to receive has taken nothing.
    """

    @property
    def peer(self) -> str:
        """The name under which the client proved itself; empty on its own side."""
        return ""

    @abstractmethod
    async def send_message(self, message: Message) -> None:
        """Send a control message, whole or not at all.

        Raises:
            LinkClosedError: If the link is gone.
        """

    @abstractmethod
    async def receive_message(self) -> ReceivedT_co:
        """Wait for the next control message of a known name.

        Raises:
            LinkClosedError: If the link ends first, or the peer sent garbage.
        """

    @abstractmethod
    async def send_frame(self, frame: Frame) -> None:
        """Send a bulk frame; wait while the transport has enough to send.

        Its payload must not change from now on.

        Raises:
            LinkClosedError: If the link is gone.
        """

    @abstractmethod
    async def receive_frame(self) -> Frame:
        """Wait for the next bulk frame of any transfer.

        Raises:
            LinkClosedError: If the link ends first, or the peer sent garbage.
        """

    @abstractmethod
    def statistics(self) -> LinkStatistics:
        """Return the traffic so far."""

    @abstractmethod
    async def aclose(self, reason: str = "") -> None:
        """Send all accepted data, then end the link with a reason for the peer.

        It takes at most `LinkLimits.flush_timeout`, and may be called again. When
        cancelled, it ends the link at once.
        """

    @abstractmethod
    def close_now(self, reason: str = "") -> None:
        """End the link without waiting for data on its way."""
