"""The UDP socket beneath QUIC connections."""

import errno
import socket
from collections import deque
from collections.abc import Iterable
from types import TracebackType
from typing import Self

import trio

from sleap_rtc.io.quic_engine import Datagram

BUFFER_SIZE = 8 * 1024 * 1024
"""Asked for in each direction; the operating system grants what it allows."""

BATCH = 64
"""Datagrams taken at most before anything else gets its turn."""

_LARGEST = 65535


class UdpSocket:
    """A UDP socket that receives in batches and never blocks when it sends.

    Args:
        bound: A bound, non-blocking datagram socket, owned from now on.

    Attributes:
        dropped: Datagrams that the operating system refused to send. QUIC sends
            their content again.
    """

    def __init__(self, bound: socket.socket) -> None:
        self.dropped = 0
        self._socket = bound
        self._unsent: deque[Datagram] = deque()
        self._full = trio.Event()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the socket."""
        self.close()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    @property
    def family(self) -> socket.AddressFamily:
        """The address family; `socket.AF_INET6` also reaches IPv4 if `dual_stack`."""
        return self._socket.family

    @property
    def dual_stack(self) -> bool:
        """True if an IPv6 socket takes IPv4 too."""
        return self.family == socket.AF_INET6 and not self._socket.getsockopt(
            socket.IPPROTO_IPV6, socket.IPV6_V6ONLY
        )

    @property
    def host(self) -> str:
        """The address it is bound to."""
        return str(self._socket.getsockname()[0])

    @property
    def port(self) -> int:
        """The port it is bound to."""
        return int(self._socket.getsockname()[1])

    @property
    def full(self) -> bool:
        """True while the operating system takes no more datagrams."""
        return self._full.is_set()

    async def receive_batch(self) -> list[Datagram]:
        """Wait for datagrams, and take those that are there, up to `BATCH`."""
        await trio.lowlevel.wait_readable(self._socket)
        batch: list[Datagram] = []
        while len(batch) < BATCH:
            try:
                batch.append(self._socket.recvfrom(_LARGEST))
            except BlockingIOError:
                break
            except ConnectionError:
                # An ICMP error about something sent before. Anybody can forge one,
                # and QUIC finds out by itself whether its peer is there.
                continue
        return batch

    def send(self, datagrams: Iterable[Datagram]) -> None:
        """Send in order; what the operating system has no room for waits here."""
        self._unsent.extend(datagrams)
        while self._unsent:
            data, address = self._unsent[0]
            try:
                self._socket.sendto(data, address)
            except BlockingIOError:
                self._full.set()
                return
            except OSError as error:
                if error.errno == errno.EBADF:
                    raise
                # No route, a firewall, an ICMP error: as good as lost on the way.
                self.dropped += 1
            self._unsent.popleft()

    async def wait_until_sent(self) -> None:
        """Wait until the socket was full, and has room again."""
        await self._full.wait()
        while self._unsent:
            await trio.lowlevel.wait_writable(self._socket)
            self.send(())
        self._full = trio.Event()


def open_udp_socket(host: str, port: int, family: socket.AddressFamily) -> UdpSocket:
    """Open and bind a UDP socket with large buffers.

    Args:
        host: The address to bind to.
        port: The port; 0 takes any.
        family: The address family of the host.

    Raises:
        OSError: If the address cannot be bound.
    """
    opened = socket.socket(family, socket.SOCK_DGRAM)
    try:
        opened.setblocking(False)
        if family == socket.AF_INET6:
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, host != "::")
        _enlarge_buffers(opened)
        opened.bind((host, port))
    except OSError:
        opened.close()
        raise
    return UdpSocket(opened)


def open_udp_listener(host: str, port: int) -> UdpSocket:
    """Open the socket of a listener: an empty host takes IPv6 and IPv4 where it can.

    Raises:
        OSError: If the address cannot be bound, or is none.
    """
    if host in ("", "::"):
        try:
            return open_udp_socket("::", port, socket.AF_INET6)
        except OSError as error:
            if host or error.errno == errno.EADDRINUSE:
                raise
            # A machine without IPv6.
            return open_udp_socket("0.0.0.0", port, socket.AF_INET)
    found = socket.getaddrinfo(
        host, port, type=socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST
    )
    family, _, _, _, address = found[0]
    return open_udp_socket(str(address[0]), port, family)


def _enlarge_buffers(opened: socket.socket) -> None:
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        size = BUFFER_SIZE
        # Linux grants what it may and says nothing; others refuse what is too much.
        while size > 64 * 1024:
            try:
                opened.setsockopt(socket.SOL_SOCKET, option, size)
                break
            except OSError:
                size //= 2
