"""A link over a session: what its users await, and who wakes them."""

import math
from abc import abstractmethod
from collections.abc import Callable

import trio

from sleap_rtc.io.link.link import Link, LinkClosedError, LinkKind, LinkStatistics
from sleap_rtc.io.link.session import Session
from sleap_rtc.proto.messages import Message
from sleap_rtc.proto.transfer.frames import Frame

FLUSH_TIMEOUT = 3.0
"""Seconds that `aclose` waits until what was accepted has been sent."""


class SessionLink(Link):
    """A link whose protocol is a session; the kinds differ in how they `pump` it.

    Args:
        kind: The transport.
        session: The protocol.
    """

    def __init__(self, kind: LinkKind, session: Session) -> None:
        self._kind = kind
        self._core = session
        self._waiting: dict[trio.Event, Callable[[], bool]] = {}
        self._alarm = trio.CancelScope()

    # ------------------------------------------------------------ what users call

    async def send_message(self, message: Message) -> None:
        """Send a control message, whole or not at all."""
        session = self._core
        await trio.lowlevel.checkpoint()
        await self._until(lambda: session.has_room_for_message)
        session.send_message(message)
        self.pump()

    async def receive_message(self) -> Message:
        """Wait for the next control message of a known name."""
        session = self._core
        await trio.lowlevel.checkpoint()
        while (message := session.next_message()) is None:
            await self._until_arrived(lambda: session.has_message)
        if session.has_news:
            self.pump()
        return message

    async def send_frame(self, frame: Frame) -> None:
        """Send a bulk frame; waits while enough is on its way."""
        session = self._core
        await trio.lowlevel.checkpoint()
        await self._until(lambda: session.has_room_for_frame)
        session.send_frame(frame)
        self.pump()

    async def receive_frame(self) -> Frame:
        """Wait for the next bulk frame, of whichever transfer."""
        session = self._core
        await trio.lowlevel.checkpoint()
        while (frame := session.next_frame()) is None:
            await self._until_arrived(lambda: session.has_frame)
        if session.has_news:
            self.pump()
        return frame

    def statistics(self) -> LinkStatistics:
        """Say what the link has done so far."""
        return LinkStatistics(
            kind=self._kind,
            address=self._core.address,
            rtt=self._core.rtt,
            bytes_sent=self._core.bytes_sent,
            bytes_received=self._core.bytes_received,
            packets_lost=self._packets_lost(),
            ignored_messages=self._core.ignored_messages,
        )

    async def aclose(self, reason: str = "") -> None:
        """Send what was accepted for sending, tell the peer the reason, and end."""
        session = self._core
        try:
            with trio.move_on_after(FLUSH_TIMEOUT):
                await self._until(lambda: session.all_sent)
        except LinkClosedError:
            pass
        finally:
            self.close_now(reason)

    def close_now(self, reason: str = "") -> None:
        """End it without waiting for what is on its way."""
        self._core.close(reason)
        self.pump()

    # --------------------------------------------------------- what endpoints call

    @abstractmethod
    def pump(self) -> None:
        """Send what is to be sent, and wake whoever can go on."""

    async def wait_ready(self) -> None:
        """Wait until the handshake, and on a server the proof, are done.

        Raises:
            LinkClosedError: If they fail.
        """
        await self._until_arrived(lambda: self._core.proven)

    async def run_timer(self) -> None:
        """Serve the deadlines of the session until it is finished."""
        while not self._core.finished:
            with trio.CancelScope(deadline=self._alarm_time()) as self._alarm:
                await trio.sleep_forever()
            self._core.handle_timeout(trio.current_time())
            self.pump()

    # --------------------------------------------------------------------- inside

    @abstractmethod
    def _packets_lost(self) -> int:
        """Count the packets that had to be sent again."""

    def _wake(self) -> None:
        """Let go on whoever can, and set the alarm anew; the last step of `pump`."""
        for event, condition in self._waiting.items():
            if self._core.ended is not None or condition():
                event.set()
        self._alarm.deadline = self._alarm_time()

    def _alarm_time(self) -> float:
        if self._core.finished:
            return -math.inf
        deadline = self._core.deadline()
        return math.inf if deadline is None else deadline

    async def _until_arrived(self, condition: Callable[[], bool]) -> None:
        """Wait for something to take; it may have come together with the end.

        Raises:
            LinkClosedError: If the session has ended, and nothing more is there.
        """
        try:
            await self._until(condition)
        except LinkClosedError:
            if not condition():
                raise

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Wait until the session is open and the condition is true.

        Nothing else happens between that and the return, so the caller may act on it.

        Raises:
            LinkClosedError: If the session has ended.
        """
        while (ended := self._core.ended) is None and not condition():
            event = trio.Event()
            self._waiting[event] = condition
            try:
                await event.wait()
            finally:
                del self._waiting[event]
        if ended is not None:
            raise LinkClosedError(
                ended.reason, by_peer=ended.by_peer, silent_for=ended.silent_for
            )
