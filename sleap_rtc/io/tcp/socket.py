"""The sockets beneath TCP links."""

import errno
import os
import socket
import struct
import sys

import trio

from sleap_rtc.io.causes import innermost
from sleap_rtc.io.link.addresses import opened_socket

RECEIVE_SIZE = 256 * 1024
"""Bytes received at once, before other tasks run."""

UNSENT_IN_KERNEL = 128 * 1024
"""Bytes that the kernel keeps unsent, a tenth of a second on a line of 10 Mbit/s. No
message can overtake them."""

ACCEPT_PAUSE = 0.1
"""Seconds to wait when the system has run out of file descriptors or memory."""

_OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_BACKLOG = 128

# linux/tcp.h: tcpi_total_retrans, after 8 bytes and 23 words.
_TCP_INFO = struct.Struct("=100xI")


class TcpSocket:
    """A TCP connection that never blocks when it sends.

    Args:
        connected: Its socket, owned from now on.
    """

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._buffer = memoryview(bytearray(RECEIVE_SIZE))
        self._is_full = False
        self._waits = trio.Event()
        self._sending = True
        connected.setblocking(False)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        # Not on Windows.
        if option := getattr(socket, "TCP_NOTSENT_LOWAT", None):
            connected.setsockopt(socket.IPPROTO_TCP, option, UNSENT_IN_KERNEL)

    def close(self) -> None:
        """Close the connection; no task may be waiting for it."""
        self._socket.close()

    @property
    def full(self) -> bool:
        """True while the operating system takes no more."""
        return self._is_full

    @property
    def retransmissions(self) -> int:
        """Packets that were sent again; always 0 outside Linux."""
        if sys.platform != "linux" or self._socket.fileno() < 0:
            return 0
        info = self._socket.getsockopt(
            socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size
        )
        retransmissions: int = _TCP_INFO.unpack(info)[0]
        return retransmissions

    async def receive(self) -> memoryview:
        """Wait for bytes, and return them; empty at the end of the stream.

        The next call overwrites them.

        Raises:
            OSError: If the connection is lost.
        """
        await trio.lowlevel.checkpoint()
        while (data := self.receive_now()) is None:
            await trio.lowlevel.wait_readable(self._socket)
        return data

    def receive_now(self) -> memoryview | None:
        """Return bytes that have arrived, as `receive` does; None if there are none.

        Raises:
            OSError: If the connection is lost.
        """
        try:
            return self._buffer[: self._socket.recv_into(self._buffer)]
        except BlockingIOError:
            return None

    def send(self, data: memoryview) -> int:
        """Send as much as the system has room for; return the number of bytes.

        Raises:
            OSError: If the connection is lost.
        """
        try:
            return self._socket.send(data)
        except BlockingIOError:
            self._is_full = True
            self._waits.set()
            return 0

    def pause(self) -> None:
        """Make `wait_until_writable` return after the other tasks have run."""
        self._waits.set()

    async def wait_until_writable(self) -> None:
        """Wait until the socket has been full or paused, and has room again."""
        await self._waits.wait()
        await trio.lowlevel.wait_writable(self._socket)
        self._is_full = False
        self._waits = trio.Event()

    def end_sending(self) -> None:
        """End this direction of the stream.

        Raises:
            OSError: If the connection is lost.
        """
        if self._sending:
            self._sending = False
            self._socket.shutdown(socket.SHUT_WR)


async def open_tcp_socket(host: str, port: int) -> TcpSocket:
    """Connect to the first address of a host name that answers.

    Raises:
        OSError: If none does.
    """
    try:
        stream = await trio.open_tcp_stream(host, port)
    except OSError as error:
        # The error only reports that all addresses failed; the causes are inside.
        cause = innermost(error)
        if cause is error or not isinstance(cause, OSError) or cause.errno is None:
            raise
        raise OSError(cause.errno, os.strerror(cause.errno)) from None
    return TcpSocket(socket.socket(fileno=stream.socket.detach()))


async def accept_tcp(listening: socket.socket) -> tuple[TcpSocket, tuple[object, ...]]:
    """Wait for the next connection, and return it with the peer's address."""
    while True:
        await trio.lowlevel.wait_readable(listening)
        try:
            connected, address = listening.accept()
            return TcpSocket(connected), address
        except BlockingIOError:
            continue
        except OSError as error:
            if error.errno == errno.EBADF:
                raise
            if error.errno in _OUT_OF_RESOURCES:
                await trio.sleep(ACCEPT_PAUSE)
            # Any other error concerns a connection that is gone already.


def bind_tcp(family: socket.AddressFamily, host: str, port: int) -> socket.socket:
    """Open a listening socket.

    Args:
        family: The address family of the host.
        host: The literal address to bind to.
        port: The port; 0 takes any.

    Raises:
        OSError: If the address cannot be bound.
    """
    with opened_socket(family, socket.SOCK_STREAM, host) as opened:
        if sys.platform == "win32":
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, True)
        else:
            # Connections of an earlier listener must not block this one.
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, True)
        opened.bind((host, port))
        opened.listen(_BACKLOG)
    return opened
