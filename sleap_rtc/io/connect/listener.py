"""Listening for links of all kinds on one port number."""

import errno
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, closing

from sleap_rtc.io.connect.kinds import KINDS, LinkKind
from sleap_rtc.io.link.addresses import reachable_addresses
from sleap_rtc.io.link.certificates import Certificate
from sleap_rtc.io.link.endpoint import Acceptor, Authenticate
from sleap_rtc.io.link.limits import LIMITS, LinkLimits
from sleap_rtc.io.link.link import Link
from sleap_rtc.proto.messages import ClientMessage
from sleap_rtc.proto.route.kinds import LinkKindName

ATTEMPTS = 50
"""Port numbers to try until one is free for all kinds. Even on a busy machine the first
one nearly always is."""

_UNAVAILABLE = (errno.EADDRINUSE, errno.EACCES)
"""Errors of a port that another program has. Windows reserves some ports for itself,
others for TCP or UDP only."""


class Listener:
    """A port number on which clients reach this machine over all kinds of link.

    Args:
        bound: One of its sockets.
        kinds: The kinds of link that it listens for.
        acceptor: Receives the proofs of the clients.

    Attributes:
        port: The port number.
        kinds: As above, the preferred ones first.
    """

    def __init__(
        self,
        bound: socket.socket,
        kinds: tuple[LinkKindName, ...],
        acceptor: Acceptor,
    ) -> None:
        self.port = int(bound.getsockname()[1])
        self.kinds = kinds
        self._bound = bound
        self._acceptor = acceptor

    def local_addresses(self) -> tuple[tuple[str, int], ...]:
        """Return the addresses under which this machine may be reached."""
        return reachable_addresses(self._bound)

    async def accept(self) -> Link[ClientMessage]:
        """Wait for the next client that has proved itself; `Link.peer` names it.

        The link lives at most as long as the listener.
        """
        return await self._acceptor.accept()


@asynccontextmanager
async def open_listener(
    host: str,
    port: int,
    certificate: Certificate,
    authenticate: Authenticate,
    *,
    limits: LinkLimits = LIMITS,
) -> AsyncIterator[Listener]:
    """Listen for links of all kinds during the body.

    Args:
        host: The literal address to bind to; an empty one means all of this machine.
        port: The port number; 0 takes one that is free for all kinds.
        certificate: Shown to clients.
        authenticate: Checks the proofs of the clients.
        limits: The limits of each link.

    Raises:
        OSError: If the address cannot be bound for all kinds; the message names the
            transport.
    """
    acceptor = Acceptor(authenticate)
    async with AsyncExitStack() as stack:
        bound = _bind_all(host, port)
        for _, one in bound:
            stack.enter_context(closing(one))
        for kind, one in bound:
            server = kind.serve(one, certificate, acceptor, limits)
            await stack.enter_async_context(server)
        yield Listener(bound[0][1], tuple(kind.name for kind, _ in bound), acceptor)


def _bind_all(host: str, port: int) -> list[tuple[LinkKind, socket.socket]]:
    """Bind a socket for each kind to the same number.

    Without a given number, try another one if the first is not free for all kinds.

    Raises:
        OSError: If the given port is taken, no number is free, or the host is not an
            address.
    """
    for attempts_left in reversed(range(ATTEMPTS)):
        bound: list[tuple[LinkKind, socket.socket]] = []
        number = port
        try:
            for kind in KINDS.values():
                bound.append((kind, _bind(kind, host, number)))
                number = bound[0][1].getsockname()[1]
        except OSError as error:
            for _, one in bound:
                one.close()
            is_half_free = bound and error.errno in _UNAVAILABLE
            if port or not is_half_free or not attempts_left:
                raise
        else:
            return bound
    raise AssertionError("the last attempt returns or raises")


def _bind(kind: LinkKind, host: str, port: int) -> socket.socket:
    try:
        return kind.bind(host, port)
    except OSError as error:
        where = f"{kind.transport} port {port}"
        raise OSError(error.errno, f"{where}: {error.strerror}") from None
