"""One link over QUIC: what its users await, and when its session is pumped."""

import math
from collections.abc import Callable

import trio

from sleap_rtc.io.link import Link, LinkClosedError, LinkStatistics
from sleap_rtc.io.quic_engine import Datagram
from sleap_rtc.io.quic_session import Output, QuicSession, State
from sleap_rtc.io.quic_socket import UdpSocket
from sleap_rtc.proto.frames import Frame
from sleap_rtc.proto.messages import Message

FLUSH_TIMEOUT = 3.0
"""Seconds that `aclose` waits for the peer to acknowledge what was sent."""

SHORTEST_SLEEP = 1e-4
"""Seconds. A sleep takes a millisecond at least, in which a fast sender would fall
behind its pace: what is due so soon is done at the next turn instead."""


class QuicLink(Link):
    """A link over one QUIC connection.

    Args:
        session: The protocol.
        udp: The socket that it shares with the other links of its endpoint.
        on_output: Called with each output of the session.
    """

    def __init__(
        self,
        session: QuicSession,
        udp: UdpSocket,
        on_output: Callable[["QuicLink", Output], None],
    ) -> None:
        self._session = session
        self._udp = udp
        self._on_output = on_output
        self._waiting: dict[trio.Event, Callable[[], bool]] = {}
        self._alarm = trio.CancelScope()

    # ------------------------------------------------------------ what users call

    async def send_message(self, message: Message) -> None:
        """Send a control message, whole or not at all."""
        session = self._session
        await trio.lowlevel.checkpoint()
        await self._until(lambda: session.has_room_for_message)
        session.send_message(message)
        self.pump()

    async def receive_message(self) -> Message:
        """Wait for the next control message of a known name."""
        session = self._session
        await trio.lowlevel.checkpoint()
        while (message := session.next_message()) is None:
            await self._until_arrived(lambda: session.has_message)
        if session.has_news:
            self.pump()
        return message

    async def send_frame(self, frame: Frame) -> None:
        """Send a bulk frame; waits while enough is on its way."""
        session = self._session
        await trio.lowlevel.checkpoint()
        await self._until(lambda: session.has_room_for_frame)
        session.send_frame(frame)
        self.pump()

    async def receive_frame(self) -> Frame:
        """Wait for the next bulk frame, of whichever transfer."""
        session = self._session
        await trio.lowlevel.checkpoint()
        while (frame := session.next_frame()) is None:
            await self._until_arrived(lambda: session.has_frame)
        if session.has_news:
            self.pump()
        return frame

    def statistics(self) -> LinkStatistics:
        """Say what the link has done so far."""
        return LinkStatistics(
            kind="quic",
            address=self._session.address,
            rtt=self._session.rtt,
            bytes_sent=self._session.bytes_sent,
            bytes_received=self._session.bytes_received,
            packets_lost=self._session.packets_lost,
            ignored_messages=self._session.ignored_messages,
        )

    async def aclose(self, reason: str = "") -> None:
        """Send what was accepted for sending, tell the peer the reason, and end."""
        session = self._session
        try:
            with trio.move_on_after(FLUSH_TIMEOUT):
                await self._until(lambda: session.all_acknowledged)
        except LinkClosedError:
            pass
        finally:
            self.close_now(reason)

    # --------------------------------------------------------- what endpoints call

    def close_now(self, reason: str) -> None:
        """End it without waiting for what is on its way."""
        self._session.close(reason)
        self.pump()

    async def wait_ready(self) -> None:
        """Wait until the handshake is done.

        Raises:
            LinkClosedError: If it fails.
        """
        await self._until(lambda: self._session.state is State.READY)

    @property
    def unused(self) -> bool:
        """True if nothing that arrived was worth an answer."""
        return self._session.bytes_sent == 0

    def receive(self, datagrams: list[Datagram]) -> None:
        """Take the datagrams of one batch."""
        self._session.receive_datagrams(datagrams, trio.current_time())
        self.pump()

    def pump(self) -> None:
        """Send what is to be sent, and wake whoever can go on."""
        session = self._session
        if not self._udp.full:
            self._udp.send(session.datagrams_to_send(trio.current_time()))
        while (output := session.next_output()) is not None:
            self._on_output(self, output)
        for event, condition in self._waiting.items():
            if session.ended is not None or condition():
                event.set()
        self._alarm.deadline = self._alarm_time()

    async def run_timer(self) -> None:
        """Serve the deadlines of the session until it is finished."""
        while not self._session.finished:
            with trio.CancelScope(deadline=self._alarm_time()) as self._alarm:
                await trio.sleep_forever()
            self._session.handle_timeout(trio.current_time())
            self.pump()

    # --------------------------------------------------------------------- inside

    def _alarm_time(self) -> float:
        if self._session.finished:
            return -math.inf
        deadline = self._session.deadline()
        # A full socket pumps when it has room again.
        if deadline is None or self._udp.full:
            return math.inf
        soon = trio.current_time() + SHORTEST_SLEEP
        return deadline if deadline > soon else -math.inf

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
        while (ended := self._session.ended) is None and not condition():
            event = trio.Event()
            self._waiting[event] = condition
            try:
                await event.wait()
            finally:
                del self._waiting[event]
        if ended is not None:
            raise LinkClosedError(ended.reason, by_peer=ended.by_peer)
