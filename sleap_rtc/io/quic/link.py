"""One link over QUIC: how its session is connected to its socket."""

import math
from collections.abc import Callable

import trio
from typing_extensions import override

from sleap_rtc.io.link.limits import LinkLimits
from sleap_rtc.io.link.link import ReceivedT_co
from sleap_rtc.io.link.session_link import SessionLink, ignore_output
from sleap_rtc.io.quic.engine import Datagram
from sleap_rtc.io.quic.session import Output, QuicSession, RouteChange
from sleap_rtc.io.quic.socket import UdpSocket, receive_datagrams, resume_sending

SHORTEST_SLEEP = 1e-4
"""Seconds below which a deadline counts as due. A sleep takes a millisecond or more,
and a fast sender would fall behind its pace."""


class QuicLink(SessionLink[ReceivedT_co, RouteChange]):
    """A link over one QUIC connection.

    Args:
        session: The protocol.
        udp: The socket; the links of a server share it.
        limits: The limits of the link.
        on_output: Called with each output of the session.
    """

    kind = "quic"
    session: QuicSession[ReceivedT_co]

    def __init__(
        self,
        session: QuicSession[ReceivedT_co],
        udp: UdpSocket,
        limits: LinkLimits,
        on_output: Callable[[Output], None] = ignore_output,
    ) -> None:
        super().__init__(session, limits, on_output)
        self._udp = udp

    @property
    def unused(self) -> bool:
        """True if no received datagram has led to an answer."""
        return self.session.bytes_sent == 0

    def receive(self, datagrams: list[Datagram]) -> None:
        """Process the datagrams of one batch."""
        self.session.receive_datagrams(datagrams, trio.current_time())
        self.pump()

    @override
    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive_datagrams, self._udp, self.receive)
            nursery.start_soon(resume_sending, self._udp, self.pump)
            await self.run_timer()
            nursery.cancel_scope.cancel(reason="the link is finished")

    @override
    async def linger(self) -> None:
        """Do not wait: a peer that misses the close notices the silence."""
        await trio.lowlevel.checkpoint()

    @override
    def _send(self) -> None:
        if not self._udp.full:
            self._udp.send(self.session.datagrams_to_send(trio.current_time()))

    @override
    def _packets_lost(self) -> int:
        return self.session.packets_lost

    @override
    def _deadline(self) -> float | None:
        if self._udp.full:
            return None  # the socket pumps when it has room again
        deadline = super()._deadline()
        soon = trio.current_time() + SHORTEST_SLEEP
        return -math.inf if deadline is not None and deadline <= soon else deadline
