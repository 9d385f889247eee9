"""One link over QUIC: when its session is pumped."""

import math
from collections.abc import Callable

import trio

from sleap_rtc.io.link.session_link import SessionLink
from sleap_rtc.io.quic.engine import Datagram
from sleap_rtc.io.quic.session import Output, QuicSession
from sleap_rtc.io.quic.socket import UdpSocket

SHORTEST_SLEEP = 1e-4
"""Seconds. A sleep takes a millisecond at least, in which a fast sender would fall
behind its pace: what is due so soon is done at the next turn instead."""


class QuicLink(SessionLink):
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
        super().__init__("quic", session)
        self._session = session
        self._udp = udp
        self._on_output = on_output

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
        self._wake()

    def _packets_lost(self) -> int:
        return self._session.packets_lost

    def _alarm_time(self) -> float:
        # A full socket pumps when it has room again.
        if self._udp.full and not self._session.finished:
            return math.inf
        soon = trio.current_time() + SHORTEST_SLEEP
        deadline = super()._alarm_time()
        return deadline if deadline > soon else -math.inf
