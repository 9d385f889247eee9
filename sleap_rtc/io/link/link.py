"""One interface over every kind of link."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import msgspec

from sleap_rtc.proto.messages import Message
from sleap_rtc.proto.route.kinds import LinkKindName
from sleap_rtc.proto.transfer.frames import Frame

LinkKind = LinkKindName


class LinkClosedError(Exception):
    """The link is gone, and with it whatever was on the way.

    Args:
        reason: What happened, for people.
        by_peer: True if the peer closed it in order and gave the reason itself.
        silent_for: Seconds for which nothing had come, if that was the reason.
    """

    def __init__(
        self, reason: str, *, by_peer: bool = False, silent_for: float = 0.0
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.by_peer = by_peer
        self.silent_for = silent_for


class DialError(Exception):
    """No link came about.

    Args:
        failures: Each attempt, as an address or a kind of link to an address, and what
            happened.
    """

    def __init__(self, failures: Sequence[tuple[str, str]]) -> None:
        tried = "; ".join(f"{address}: {reason}" for address, reason in failures)
        super().__init__(f"cannot reach the peer ({tried or 'it has no address'})")
        self.failures = tuple(failures)


class LinkStatistics(msgspec.Struct, frozen=True):
    """What a link has done so far.

    Args:
        kind: The transport.
        address: The peer's ``host:port``.
        rtt: Smoothed round-trip time in seconds, 0 before the first sample.
        bytes_sent: Bytes handed to the network, headers of the transport included.
        bytes_received: Bytes taken from the network.
        packets_lost: Packets that the transport had to send again.
        ignored_messages: Control messages of names that this version does not know.
    """

    kind: LinkKind
    address: str
    rtt: float
    bytes_sent: int
    bytes_received: int
    packets_lost: int
    ignored_messages: int


class Link(ABC):
    """An authenticated, encrypted connection between two peers.

    It carries ordered control messages and, beside them, bulk frames. Any number of
    tasks may send; one task may receive messages, and one may receive frames. Whatever
    ends the link makes every pending and later call raise `LinkClosedError`; what had
    arrived before can still be received.

    Attributes:
        peer: The name under which the peer proved itself; empty on its own side.
    """

    peer: str = ""

    @abstractmethod
    async def send_message(self, message: Message) -> None:
        """Send a control message, whole or not at all.

        Raises:
            LinkClosedError: If the link is gone.
        """

    @abstractmethod
    async def receive_message(self) -> Message:
        """Wait for the next control message of a known name.

        Raises:
            LinkClosedError: If the link ends first, also if the peer sent garbage.
        """

    @abstractmethod
    async def send_frame(self, frame: Frame) -> None:
        """Send a bulk frame; waits while the transport has enough to send.

        Its payload must not change any more.

        Raises:
            LinkClosedError: If the link is gone.
        """

    @abstractmethod
    async def receive_frame(self) -> Frame:
        """Wait for the next bulk frame, of whichever transfer.

        Raises:
            LinkClosedError: If the link ends first, also if the peer sent garbage.
        """

    @abstractmethod
    def statistics(self) -> LinkStatistics:
        """Say what the link has done so far."""

    @abstractmethod
    async def aclose(self, reason: str = "") -> None:
        """Send what was accepted for sending, tell the peer the reason, and end.

        It takes at most a few seconds, and is safe to call again and when cancelled.
        """

    @abstractmethod
    def close_now(self, reason: str = "") -> None:
        """End it without waiting for what is on its way."""
