"""TCP links: listening for them, and dialing."""

import math
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager

import trio

from sleap_rtc.io.link.addresses import describe_address
from sleap_rtc.io.link.certificates import Certificate
from sleap_rtc.io.link.link import DialError, Link, LinkClosedError
from sleap_rtc.io.link.session import (
    HANDSHAKE_TIMEOUT,
    IDLE_TIMEOUT,
    MAX_UNPROVEN_LINKS,
)
from sleap_rtc.io.nursery import open_background_nursery
from sleap_rtc.io.tcp.link import TcpLink
from sleap_rtc.io.tcp.session import TcpSession
from sleap_rtc.io.tcp.socket import (
    TcpSocket,
    accept_tcp,
    bind_tcp_listener,
    open_tcp_socket,
)
from sleap_rtc.io.tcp.tls import TlsEngine, client_context_untrusted, server_context
from sleap_rtc.proto.errors import RemoteProtocolError
from sleap_rtc.proto.messages import Auth


class TcpListener:
    """A TCP port on which clients reach this machine.

    Args:
        listening: The socket.
        context: Settings of TLS, with the certificate.
        authenticate: Judge of the clients' proofs.
        nursery: Where the links' tasks live.
        idle_timeout: Seconds of silence after which a client counts as gone.
    """

    def __init__(
        self,
        listening: socket.socket,
        context: ssl.SSLContext,
        authenticate: Callable[[Auth], str],
        nursery: trio.Nursery,
        idle_timeout: float,
    ) -> None:
        self._listening = listening
        self._context = context
        self._authenticate = authenticate
        self._nursery = nursery
        self._idle_timeout = idle_timeout
        self._links: set[TcpLink] = set()
        self._places = trio.Semaphore(MAX_UNPROVEN_LINKS)
        # Without a bound: each link in it has used up a proof of its own.
        self._ready, self._accepted = trio.open_memory_channel[TcpLink](math.inf)

    @property
    def port(self) -> int:
        """The TCP port."""
        return int(self._listening.getsockname()[1])

    async def accept(self) -> Link:
        """Wait for the next client that has proved itself; `Link.peer` names it.

        The link lives at most as long as the listener.
        """
        return await self._accepted.receive()

    # --------------------------------------------------------------------- inside

    async def run(self) -> None:
        """Take connections for ever; who comes while all places are taken waits."""
        while True:
            await self._places.acquire()
            tcp, address = await accept_tcp(self._listening)
            self._nursery.start_soon(self._serve, tcp, describe_address(address))

    def close_all(self, reason: str) -> None:
        """End all links at once."""
        for link in tuple(self._links):
            link.close_now(reason)

    def drop_all(self) -> None:
        """Close all connections, after their tasks have ended."""
        for link in self._links:
            link.drop()

    async def _serve(self, tcp: TcpSocket, address: str) -> None:
        session = TcpSession(
            TlsEngine(self._context, server_side=True),
            address,
            authenticate=self._authenticate,
            idle_timeout=self._idle_timeout,
            now=trio.current_time(),
        )
        link = TcpLink(session, tcp)
        self._links.add(link)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.run)
            try:
                await link.wait_ready()
                link.peer = session.peer
                self._ready.send_nowait(link)
            except LinkClosedError:
                pass  # it was told why
            finally:
                self._places.release()
        self._links.discard(link)


@asynccontextmanager
async def open_tcp_listener(
    host: str,
    port: int,
    certificate: Certificate,
    authenticate: Callable[[Auth], str],
    *,
    idle_timeout: float = IDLE_TIMEOUT,
) -> AsyncIterator[TcpListener]:
    """Listen for TCP links.

    Args:
        host: The literal address to bind to; an empty one means all of this machine.
        port: The TCP port; 0 takes any.
        certificate: What to show to clients.
        authenticate: Returns the name of the client that a proof belongs to, or raises
            `RemoteProtocolError`; then the client is told no more than that it is
            refused.
        idle_timeout: Seconds of silence after which a client counts as gone.

    Raises:
        OSError: If the address cannot be bound.
    """
    with bind_tcp_listener(host, port) as listening:
        async with serve_tcp(
            listening, certificate, authenticate, idle_timeout=idle_timeout
        ) as listener:
            yield listener


@asynccontextmanager
async def serve_tcp(
    listening: socket.socket,
    certificate: Certificate,
    authenticate: Callable[[Auth], str],
    *,
    idle_timeout: float = IDLE_TIMEOUT,
) -> AsyncIterator[TcpListener]:
    """Take TCP links on a socket that listens; see `open_tcp_listener`."""
    context = await trio.to_thread.run_sync(server_context, certificate)
    with ExitStack() as stack:
        async with open_background_nursery() as nursery:
            listener = TcpListener(
                listening, context, authenticate, nursery, idle_timeout
            )
            stack.callback(listener.drop_all)
            nursery.start_soon(listener.run)
            try:
                yield listener
            finally:
                listener.close_all("the listener was closed")


@asynccontextmanager
async def connect_tcp(
    host: str,
    port: int,
    *,
    certificate_der: bytes,
    idle_timeout: float = IDLE_TIMEOUT,
) -> AsyncIterator[Link]:
    """Reach a listener, without a proof yet: the first message must be `Auth`.

    Args:
        host: Where the listener is.
        port: Its TCP port.
        certificate_der: The only certificate that it may show.
        idle_timeout: Seconds of silence after which it counts as gone.

    Raises:
        DialError: If it cannot be reached, or is not the one that was asked for.
    """
    shown = describe_address((host, port))
    try:
        context = client_context_untrusted(certificate_der)
        with trio.fail_after(HANDSHAKE_TIMEOUT):
            tcp = await open_tcp_socket(host, port)
    except RemoteProtocolError as error:
        raise DialError([(shown, error.reason)]) from None
    except trio.TooSlowError:
        late = f"no answer for {HANDSHAKE_TIMEOUT:g} s"
        raise DialError([(shown, late)]) from None
    except OSError as error:
        raise DialError([(shown, error.strerror or str(error))]) from None
    session = TcpSession(
        TlsEngine(context, server_side=False),
        shown,
        certificate_der=certificate_der,
        idle_timeout=idle_timeout,
        now=trio.current_time(),
    )
    link = TcpLink(session, tcp)
    with tcp:
        async with open_background_nursery() as nursery:
            nursery.start_soon(link.run)
            link.pump()
            try:
                try:
                    await link.wait_ready()
                except LinkClosedError as error:
                    raise DialError([(shown, error.reason)]) from None
                yield link
                await link.aclose()
                await link.wait_done()
            finally:
                link.close_now("the client went away")


@asynccontextmanager
async def dial_tcp(
    host: str,
    port: int,
    *,
    certificate_der: bytes,
    auth: Auth,
    idle_timeout: float = IDLE_TIMEOUT,
) -> AsyncIterator[Link]:
    """Open a link to a listener, and close it after the body.

    Args:
        host: Where the listener is.
        port: Its TCP port.
        certificate_der: The only certificate that it may show.
        auth: The proof, which can be used once.
        idle_timeout: Seconds of silence after which it counts as gone.

    Raises:
        DialError: If it cannot be reached, or is not the one that was asked for.
    """
    async with connect_tcp(
        host, port, certificate_der=certificate_der, idle_timeout=idle_timeout
    ) as link:
        await link.send_message(auth)
        yield link
