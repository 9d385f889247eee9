"""The UDP socket beneath QUIC connections."""

import errno
import socket
import struct
import sys
from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice

import trio

from sleap_rtc.io.link.addresses import opened_socket
from sleap_rtc.io.quic.engine import Datagram

BUFFER_SIZE = 8 * 1024 * 1024
"""Bytes of buffer to ask for in each direction; the system grants what it allows."""

BATCH = 64
BATCH_BYTES = 512 * 1024
"""Datagrams, and bytes, after which other tasks run: decrypting a large datagram takes
as long as several small ones."""

GSO_DATAGRAMS = 64
GSO_BYTES = 65_000
"""Datagrams of one size, and their bytes, that Linux takes in one call (generic
segmentation offload, GSO)."""

_LARGEST = 65535
"""Bytes of the largest UDP datagram."""

_IS_LINUX = sys.platform == "linux"
_UDP_SEGMENT, _UDP_GRO = 103, 104
"""Socket options from the headers of Linux, which Python does not name."""

_SEGMENT_SIZE = struct.Struct("=H")
_GRO_SIZE = struct.Struct("=i")
_ANCILLARY_SPACE = 64

_DO_NOT_FRAGMENT: dict[str, tuple[tuple[int, int, int], ...]] = {
    # IP_MTU_DISCOVER and IPV6_MTU_DISCOVER, set to IP_PMTUDISC_PROBE
    "linux": ((socket.IPPROTO_IP, 10, 3), (socket.IPPROTO_IPV6, 23, 3)),
    # IP_DONTFRAG and IPV6_DONTFRAG
    "darwin": ((socket.IPPROTO_IP, 28, 1), (socket.IPPROTO_IPV6, 62, 1)),
    # IP_DONTFRAGMENT and IPV6_DONTFRAG
    "win32": ((socket.IPPROTO_IP, 14, 1), (socket.IPPROTO_IPV6, 14, 1)),
}
"""Socket options by platform, each with its level and value."""

_NO_GSO = (errno.EINVAL, errno.EIO, errno.ENOPROTOOPT, errno.EOPNOTSUPP)
"""Errors of a system or a network card that cannot cut a batch into datagrams."""


class UdpSocket:
    """A UDP socket that receives in batches and never blocks when it sends.

    Args:
        bound: A bound, non-blocking datagram socket, owned from now on.

    Attributes:
        never_fragments: True if a datagram arrives in one piece or not at all.
    """

    def __init__(self, bound: socket.socket) -> None:
        self._socket = bound
        self._unsent: deque[Datagram] = deque()
        self._full = trio.Event()
        self._has_gro = _enable_gro(bound)
        self._has_gso = self._has_gro  # older systems may lack both
        self.never_fragments = _forbid_fragments(bound)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    @property
    def full(self) -> bool:
        """True while the operating system takes no more datagrams."""
        return self._full.is_set()

    async def receive_batch(self) -> list[Datagram]:
        """Wait for datagrams, and return those that have arrived, up to a batch."""
        await trio.lowlevel.wait_readable(self._socket)
        batch: list[Datagram] = []
        size = 0
        while len(batch) < BATCH and size < BATCH_BYTES:
            try:
                received = self._receive()
                batch += received
                size += sum(len(data) for data, _ in received)
            except BlockingIOError:
                break
            except ConnectionError:
                # An ICMP error about an earlier datagram. It is easily forged, and
                # QUIC detects by itself that its peer is gone.
                continue
        return batch

    def send(self, datagrams: Iterable[Datagram]) -> None:
        """Send datagrams in order; keep those for which the system has no room."""
        self._unsent.extend(datagrams)
        while self._unsent:
            batch = self._next_batch()
            try:
                self._send_batch(batch)
            except BlockingIOError:
                self._full.set()
                return
            except OSError as error:
                if error.errno == errno.EBADF:
                    raise
                if len(batch) > 1 and error.errno in _NO_GSO:
                    self._has_gso = False
                    continue
                # No route, a firewall, an ICMP error, or too large for the next hop:
                # the same as a loss on the way. QUIC retransmits the content.
            for _ in batch:
                self._unsent.popleft()

    def _receive(self) -> list[Datagram]:
        """Return a datagram, or several of one sender that arrived together."""
        if not self._has_gro:
            return [self._socket.recvfrom(_LARGEST)]
        data, ancillary, _, address = self._socket.recvmsg(_LARGEST, _ANCILLARY_SPACE)
        for level, kind, value in ancillary:
            if (level, kind) == (socket.IPPROTO_UDP, _UDP_GRO):
                (size,) = _GRO_SIZE.unpack(value[: _GRO_SIZE.size])
                return [
                    (data[at : at + size], address) for at in range(0, len(data), size)
                ]
        return [(data, address)]

    def _next_batch(self) -> list[bytes]:
        """Return the next datagrams to send: of one size, the last may be shorter."""
        first, target = self._unsent[0]
        batch = [first]
        if self._has_gso and len(self._unsent) > 1:
            longest = min(GSO_DATAGRAMS, GSO_BYTES // len(first)) if first else 1
            for data, address in islice(self._unsent, 1, longest):
                if address != target or not 0 < len(data) <= len(first):
                    break
                batch.append(data)
                if len(data) < len(first):
                    break
        return batch

    def _send_batch(self, batch: list[bytes]) -> None:
        target = self._unsent[0][1]
        if len(batch) == 1:
            self._socket.sendto(batch[0], target)
            return
        size = _SEGMENT_SIZE.pack(len(batch[0]))
        cut = (socket.IPPROTO_UDP, _UDP_SEGMENT, size)
        self._socket.sendmsg(batch, [cut], 0, target)

    async def wait_until_sent(self) -> None:
        """Wait until the socket has been full and has room again."""
        await self._full.wait()
        while self._unsent:
            await trio.lowlevel.wait_writable(self._socket)
            self.send(())
        self._full = trio.Event()


async def receive_datagrams(
    udp: UdpSocket, deliver: Callable[[list[Datagram]], None]
) -> None:
    """Pass on every batch of datagrams until cancelled."""
    while True:
        deliver(await udp.receive_batch())


async def resume_sending(udp: UdpSocket, pump: Callable[[], None]) -> None:
    """Call `pump` each time that a full socket has room again, until cancelled."""
    while True:
        await udp.wait_until_sent()
        pump()


def bind_udp(family: socket.AddressFamily, host: str, port: int) -> socket.socket:
    """Open and bind a UDP socket with large buffers.

    Args:
        family: The address family of the host.
        host: The literal address to bind to.
        port: The port; 0 takes any.

    Raises:
        OSError: If the address cannot be bound.
    """
    with opened_socket(family, socket.SOCK_DGRAM, host) as opened:
        _enlarge_buffers(opened)
        opened.bind((host, port))
    return opened


def _enlarge_buffers(opened: socket.socket) -> None:
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        size = BUFFER_SIZE
        # Linux silently grants less; other systems refuse a size that is too large.
        while size > 64 * 1024:
            try:
                opened.setsockopt(socket.SOL_SOCKET, option, size)
                break
            except OSError:
                size //= 2


def _enable_gro(opened: socket.socket) -> bool:
    """Ask Linux for generic receive offload (GRO); return True if it has it.

    It delivers datagrams that arrived together in one call.
    """
    if not _IS_LINUX:
        return False
    try:
        opened.setsockopt(socket.IPPROTO_UDP, _UDP_GRO, 1)
    except OSError:
        return False  # Linux before 5.0
    return True


def _forbid_fragments(opened: socket.socket) -> bool:
    """Forbid the fragmentation of datagrams (RFC 9000, 14); return True if possible."""
    done = False
    for level, option, value in _DO_NOT_FRAGMENT.get(sys.platform, ()):
        if level == socket.IPPROTO_IPV6 and opened.family != socket.AF_INET6:
            continue
        try:
            opened.setsockopt(level, option, value)
        except OSError:
            # An IPv6 socket may lack the option of IPv4; every other refusal counts.
            if level == socket.IPPROTO_IPV6 or opened.family != socket.AF_INET6:
                return False
        else:
            done = True
    return done
