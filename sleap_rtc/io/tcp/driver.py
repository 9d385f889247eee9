"""TCP links: listening and dialing."""

import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing

import trio
from typing_extensions import override

from sleap_rtc.io.link.addresses import bind_any, describe_address
from sleap_rtc.io.link.certificates import Certificate
from sleap_rtc.io.link.endpoint import (
    Acceptor,
    LinkServer,
    dial_errors,
    run_client,
    run_server,
)
from sleap_rtc.io.link.limits import LinkLimits
from sleap_rtc.io.link.link import Link, LinkClosedError
from sleap_rtc.io.link.session import Client, ProofShown, Server
from sleap_rtc.io.tcp.link import TcpLink
from sleap_rtc.io.tcp.session import TcpSession
from sleap_rtc.io.tcp.socket import (
    TcpSocket,
    accept_tcp,
    bind_tcp,
    open_tcp_socket,
)
from sleap_rtc.io.tcp.tls import TlsEngine, client_context_untrusted, server_context
from sleap_rtc.proto.messages import ClientMessage, WorkerMessage
from sleap_rtc.proto.route.kinds import LinkKindName


class TcpServer(LinkServer[TcpLink[ClientMessage]]):
    """The TCP links of one listening socket.

    Args:
        listening: The socket.
        context: Settings of TLS, with the certificate.
        nursery: The nursery of the links' tasks.
        acceptor: Receives the proofs of the clients.
        limits: The limits of each link.
    """

    def __init__(
        self,
        listening: socket.socket,
        context: ssl.SSLContext,
        nursery: trio.Nursery,
        acceptor: Acceptor,
        limits: LinkLimits,
    ) -> None:
        super().__init__(nursery, acceptor, limits)
        self._listening = listening
        self._context = context
        self._places = trio.Semaphore(limits.max_unproven)

    @override
    async def run(self) -> None:
        """Accept connections until cancelled; further ones wait for a free place."""
        while True:
            await self._places.acquire()
            tcp, address = await accept_tcp(self._listening)
            self._nursery.start_soon(self._serve, tcp, describe_address(address))

    async def _serve(self, tcp: TcpSocket, address: str) -> None:
        session = TcpSession(
            TlsEngine(self._context, server_side=True),
            address,
            Server(),
            limits=self._limits,
            now=trio.current_time(),
        )

        def judge(output: ProofShown) -> None:
            self._acceptor.judge(link, output.auth)

        link = TcpLink(session, tcp, self._limits, judge)
        self._links.add(link)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.run)
            try:
                await link.wait_ready()
            except LinkClosedError:
                pass  # the client has received the reason
            finally:
                self._places.release()
        self._links.discard(link)


class TcpKind:
    """Links over TCP."""

    name: LinkKindName = TcpLink.kind
    transport = "TCP"

    def bind(self, host: str, port: int) -> socket.socket:
        """Open a listening socket."""
        return bind_any(host, port, bind_tcp)

    @asynccontextmanager
    async def serve(
        self,
        bound: socket.socket,
        certificate: Certificate,
        acceptor: Acceptor,
        limits: LinkLimits,
    ) -> AsyncIterator[TcpServer]:
        """Accept links on a socket of `bind` during the body."""
        context = await trio.to_thread.run_sync(server_context, certificate)
        async with run_server(
            lambda nursery: TcpServer(bound, context, nursery, acceptor, limits)
        ) as server:
            yield server

    @asynccontextmanager
    async def connect(
        self, target: tuple[str, int], certificate_der: bytes, limits: LinkLimits
    ) -> AsyncIterator[Link[WorkerMessage]]:
        """Open a link without a proof."""
        address = describe_address(target)
        with dial_errors(self.name, address, limits):
            context = client_context_untrusted(certificate_der)
            with trio.fail_after(limits.handshake_timeout):
                tcp = await open_tcp_socket(*target)
        session = TcpSession(
            TlsEngine(context, server_side=False),
            address,
            Client(certificate_der),
            limits=limits,
            now=trio.current_time(),
        )
        link = TcpLink(session, tcp, limits)
        with closing(tcp):
            async with run_client(link) as opened:
                yield opened
