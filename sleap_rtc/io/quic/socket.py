"""The UDP socket beneath QUIC connections."""

import errno
import socket
import struct
import sys
from collections import deque
from collections.abc import Iterable
from itertools import islice

import trio

from sleap_rtc.io.closing import Closing
from sleap_rtc.io.quic.engine import Datagram

BUFFER_SIZE = 8 * 1024 * 1024
"""Asked for in each direction; the operating system grants what it allows."""

BATCH = 64
BATCH_BYTES = 512 * 1024
"""Datagrams, and bytes, after which anything else gets its turn: large ones take as
many microseconds to decrypt as several small ones."""

LONGEST_TRAIN = 64
LARGEST_TRAIN = 65_000
"""Datagrams of one size, and their bytes, that Linux takes in one call."""

_LARGEST = 65535

_IS_LINUX = sys.platform == "linux"
_UDP_SEGMENT, _UDP_GRO = 103, 104
"""From the headers of Linux, as Python does not name them."""

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
"""By platform: level, option and value."""

_NO_TRAINS = (errno.EINVAL, errno.EIO, errno.ENOPROTOOPT, errno.EOPNOTSUPP)
"""What an operating system or a network card says that cannot cut trains."""


class UdpSocket(Closing):
    """A UDP socket that receives in batches and never blocks when it sends.

    Args:
        bound: A bound, non-blocking datagram socket, owned from now on.

    Attributes:
        dropped: Datagrams that the operating system refused to send. QUIC sends
            their content again.
        never_fragments: True if a datagram arrives in one piece or not at all.
        never_fragments: True if a datagram arrives in one piece or not at all.
    """

    def __init__(self, bound: socket.socket) -> None:
        self.dropped = 0
        self._socket = bound
        self._unsent: deque[Datagram] = deque()
        self._full = trio.Event()
        self._receives_trains = _ask_for_trains(bound)
        self._sends_trains = self._receives_trains  # older systems may not cut
        self.never_fragments = _forbid_fragments(bound)

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
        """Wait for datagrams, and take those that are there, until it is a batch."""
        await trio.lowlevel.wait_readable(self._socket)
        batch: list[Datagram] = []
        size = 0
        while len(batch) < BATCH and size < BATCH_BYTES:
            try:
                train = self._receive()
                batch += train
                size += sum(len(data) for data, _ in train)
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
            train = self._next_train()
            try:
                self._send_train(train)
            except BlockingIOError:
                self._full.set()
                return
            except OSError as error:
                if error.errno == errno.EBADF:
                    raise
                if len(train) > 1 and error.errno in _NO_TRAINS:
                    self._sends_trains = False
                    continue
                # No route, a firewall, an ICMP error, or more than fits through the
                # next hop: as good as lost on the way.
                self.dropped += len(train)
            for _ in train:
                self._unsent.popleft()

    def _receive(self) -> list[Datagram]:
        """Take a datagram, or several of one sender that came together."""
        if not self._receives_trains:
            return [self._socket.recvfrom(_LARGEST)]
        data, ancillary, _, address = self._socket.recvmsg(_LARGEST, _ANCILLARY_SPACE)
        for level, kind, value in ancillary:
            if (level, kind) == (socket.IPPROTO_UDP, _UDP_GRO):
                (size,) = _GRO_SIZE.unpack(value[: _GRO_SIZE.size])
                return [
                    (data[at : at + size], address) for at in range(0, len(data), size)
                ]
        return [(data, address)]

    def _next_train(self) -> list[bytes]:
        """Return what goes out next: datagrams of one size, the last may be shorter."""
        first, target = self._unsent[0]
        train = [first]
        if self._sends_trains and len(self._unsent) > 1:
            longest = min(LONGEST_TRAIN, LARGEST_TRAIN // len(first)) if first else 1
            for data, address in islice(self._unsent, 1, longest):
                if address != target or not 0 < len(data) <= len(first):
                    break
                train.append(data)
                if len(data) < len(first):
                    break
        return train

    def _send_train(self, train: list[bytes]) -> None:
        target = self._unsent[0][1]
        if len(train) == 1:
            self._socket.sendto(train[0], target)
            return
        size = _SEGMENT_SIZE.pack(len(train[0]))
        cut = (socket.IPPROTO_UDP, _UDP_SEGMENT, size)
        self._socket.sendmsg(train, [cut], 0, target)

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


def _ask_for_trains(opened: socket.socket) -> bool:
    """Let Linux hand over datagrams that came together as one; True if it will."""
    if not _IS_LINUX:
        return False
    try:
        opened.setsockopt(socket.IPPROTO_UDP, _UDP_GRO, 1)
    except OSError:
        return False  # Linux before 5.0
    return True


def _forbid_fragments(opened: socket.socket) -> bool:
    """Keep routers and this machine from cutting datagrams (RFC 9000, 14)."""
    done = False
    for level, option, value in _DO_NOT_FRAGMENT.get(sys.platform, ()):
        if level == socket.IPPROTO_IPV6 and opened.family != socket.AF_INET6:
            continue
        try:
            opened.setsockopt(level, option, value)
        except OSError:
            # An IPv6 socket may not care about IPv4; every other refusal counts.
            if level == socket.IPPROTO_IPV6 or opened.family != socket.AF_INET6:
                return False
        else:
            done = True
    return done
