"""Listening for links of both kinds on one port number."""

import errno
import math
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio

from sleap_rtc.io.link.certificates import Certificate
from sleap_rtc.io.link.link import Link
from sleap_rtc.io.link.session import IDLE_TIMEOUT
from sleap_rtc.io.nursery import open_background_nursery
from sleap_rtc.io.quic.driver import QuicListener, serve_quic
from sleap_rtc.io.quic.socket import UdpSocket, open_udp_listener
from sleap_rtc.io.tcp.driver import serve_tcp
from sleap_rtc.io.tcp.socket import bind_tcp_listener
from sleap_rtc.proto.messages import Auth

ATTEMPTS = 50
"""Free ports to try until one is free for both; even on a busy machine the first one
nearly always is."""

_UNAVAILABLE = (errno.EADDRINUSE, errno.EACCES)
"""Windows keeps some ports for itself, others for one of the two only."""


class Listener:
    """A port number, TCP and UDP, on which clients reach this machine.

    Args:
        quic: The listener of one kind; it also knows the addresses.
    """

    def __init__(self, quic: QuicListener) -> None:
        self._quic = quic
        # Without a bound: each link in it has used up a proof of its own.
        self._ready, self._accepted = trio.open_memory_channel[Link](math.inf)

    @property
    def port(self) -> int:
        """The port number."""
        return self._quic.port

    def local_addresses(self) -> tuple[tuple[str, int], ...]:
        """List the addresses under which this machine may be reached."""
        return self._quic.local_addresses()

    async def accept(self) -> Link:
        """Wait for the next client that has proved itself; `Link.peer` names it.

        The link lives at most as long as the listener.
        """
        return await self._accepted.receive()

    async def collect(self, accept: Callable[[], Awaitable[Link]]) -> None:
        """Take the links of one kind, for ever."""
        while True:
            self._ready.send_nowait(await accept())


@asynccontextmanager
async def open_listener(
    host: str,
    port: int,
    certificate: Certificate,
    authenticate: Callable[[Auth], str],
    *,
    idle_timeout: float = IDLE_TIMEOUT,
) -> AsyncIterator[Listener]:
    """Listen for links of both kinds.

    Args:
        host: The literal address to bind to; an empty one means all of this machine.
        port: The port number; 0 takes one that is free for TCP and UDP.
        certificate: What to show to clients.
        authenticate: Returns the name of the client that a proof belongs to, or raises
            `RemoteProtocolError`; then the client is told no more than that it is
            refused.
        idle_timeout: Seconds of silence after which a client counts as gone.

    Raises:
        OSError: If the address cannot be bound for both; it says for which.
    """
    udp, tcp = _bind_both(host, port)
    with udp, tcp:
        async with (
            open_background_nursery() as nursery,
            serve_quic(
                udp, certificate, authenticate, idle_timeout=idle_timeout
            ) as quic_links,
            serve_tcp(
                tcp, certificate, authenticate, idle_timeout=idle_timeout
            ) as tcp_links,
        ):
            listener = Listener(quic_links)
            nursery.start_soon(listener.collect, quic_links.accept)
            nursery.start_soon(listener.collect, tcp_links.accept)
            yield listener


def _bind_both(host: str, port: int) -> tuple[UdpSocket, socket.socket]:
    """Bind both sockets; a free port is sought again if only one of them can have it.

    Raises:
        OSError: If a named port can't be had, or the host is no address.
    """
    for attempt in range(ATTEMPTS):
        try:
            udp = open_udp_listener(host, port)
        except OSError as error:
            raise OSError(error.errno, f"UDP port {port}: {error.strerror}") from None
        try:
            return udp, bind_tcp_listener(host, udp.port)
        except OSError as error:
            taken = udp.port
            udp.close()
            last = attempt == ATTEMPTS - 1
            if port or last or error.errno not in _UNAVAILABLE:
                raise OSError(
                    error.errno, f"TCP port {taken}: {error.strerror}"
                ) from None
    raise AssertionError("the last attempt returns or raises")
