"""QUIC links: listening and dialing."""

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from typing import assert_never

import msgspec
import trio
from aioquic.buffer import Buffer  # type: ignore[attr-defined] # no __all__
from aioquic.quic.packet import (
    QuicHeader,
    QuicPacketType,
    QuicProtocolVersion,
    encode_quic_version_negotiation,
    pull_quic_header,
)
from typing_extensions import override

from sleap_rtc.io.link.addresses import bind_any, describe_address, is_loopback
from sleap_rtc.io.link.certificates import Certificate
from sleap_rtc.io.link.endpoint import (
    Acceptor,
    LinkServer,
    dial_errors,
    run_client,
    run_server,
)
from sleap_rtc.io.link.limits import LinkLimits
from sleap_rtc.io.link.link import Link
from sleap_rtc.io.link.session import Client, ProofShown, Server
from sleap_rtc.io.quic.engine import (
    CONNECTION_ID_LENGTH,
    Address,
    Datagram,
    client_engine_untrusted,
    server_engine,
)
from sleap_rtc.io.quic.link import QuicLink
from sleap_rtc.io.quic.session import (
    Output,
    QuicSession,
    RouteAdded,
    RouteRemoved,
)
from sleap_rtc.io.quic.socket import (
    UdpSocket,
    bind_udp,
    receive_datagrams,
    resume_sending,
)
from sleap_rtc.proto.messages import ClientMessage, WorkerMessage
from sleap_rtc.proto.quic.mtu import SMALLEST_DATAGRAM
from sleap_rtc.proto.route.kinds import LinkKindName

LARGEST_WITH_FRAGMENTS = 1350
"""Bytes of UDP payload that datagrams may grow to where the system may fragment them:
with the headers of IPv6 and UDP 1398 bytes, which most tunnels let pass."""

_VERSIONS = [int(QuicProtocolVersion.VERSION_1), int(QuicProtocolVersion.VERSION_2)]


class QuicServer(LinkServer[QuicLink[ClientMessage]]):
    """The QUIC links of one socket.

    Args:
        udp: The socket.
        certificate: Shown to clients.
        nursery: The nursery of the links' tasks.
        acceptor: Receives the proofs of the clients.
        limits: The limits of each link.
    """

    def __init__(
        self,
        udp: UdpSocket,
        certificate: Certificate,
        nursery: trio.Nursery,
        acceptor: Acceptor,
        limits: LinkLimits,
    ) -> None:
        super().__init__(nursery, acceptor, limits)
        self._udp = udp
        self._certificate = certificate
        self._routes: dict[bytes, QuicLink[ClientMessage]] = {}
        self._unproven: set[QuicLink[ClientMessage]] = set()

    @override
    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive_datagrams, self._udp, self._receive)
            nursery.start_soon(resume_sending, self._udp, self._pump)

    def _receive(self, batch: list[Datagram]) -> None:
        """Deliver each datagram of a batch to its link."""
        touched: dict[QuicLink[ClientMessage], list[Datagram]] = {}
        for datagram in batch:
            link = self._find_link(*datagram)
            if link is not None:
                touched.setdefault(link, []).append(datagram)
        for link, datagrams in touched.items():
            link.receive(datagrams)
            if link in self._links:
                continue
            if link.unused:
                # Garbage that looked like the first packet of a client.
                self._forget(link)
            else:
                self._links.add(link)
                self._nursery.start_soon(self._serve, link)

    def _pump(self) -> None:
        """Resume sending on every link, after the socket was full."""
        for link in tuple(self._links):
            link.pump()

    def _find_link(
        self, data: bytes, address: Address
    ) -> QuicLink[ClientMessage] | None:
        is_short = bool(data) and not data[0] & 0x80
        if is_short:
            return self._routes.get(data[1 : 1 + CONNECTION_ID_LENGTH])
        try:
            header = pull_quic_header(
                Buffer(data=data), host_cid_length=CONNECTION_ID_LENGTH
            )
        except ValueError:
            return None
        link = self._routes.get(header.destination_cid)
        if link is None and len(data) >= SMALLEST_DATAGRAM:
            return self._begin(header, address)
        return link

    def _begin(
        self, header: QuicHeader, address: Address
    ) -> QuicLink[ClientMessage] | None:
        if header.packet_type == QuicPacketType.VERSION_NEGOTIATION:
            return None
        if header.version not in _VERSIONS:
            answer = encode_quic_version_negotiation(
                source_cid=header.destination_cid,
                destination_cid=header.source_cid,
                supported_versions=_VERSIONS,
            )
            self._udp.send([(answer, address)])
            return None
        is_first = header.packet_type == QuicPacketType.INITIAL
        if not is_first or len(self._unproven) >= self._limits.max_unproven:
            return None
        engine = server_engine(
            self._certificate,
            header.destination_cid,
            _limits_on(self._udp, self._limits),
        )
        session = QuicSession(
            engine,
            describe_address(address),
            Server(),
            limits=self._limits,
            now=trio.current_time(),
        )

        def handle(output: Output) -> None:
            self._handle_output(link, output)

        link = QuicLink(session, self._udp, self._limits, handle)
        self._unproven.add(link)
        self._routes[header.destination_cid] = link
        self._routes[engine.host_cid] = link
        return link

    async def _serve(self, link: QuicLink[ClientMessage]) -> None:
        await link.run_timer()
        self._forget(link)

    def _forget(self, link: QuicLink[ClientMessage]) -> None:
        self._links.discard(link)
        self._unproven.discard(link)
        for connection_id, owner in tuple(self._routes.items()):
            if owner is link:
                del self._routes[connection_id]

    def _handle_output(self, link: QuicLink[ClientMessage], output: Output) -> None:
        match output:
            case RouteAdded(connection_id):
                self._routes[connection_id] = link
            case RouteRemoved(connection_id):
                self._routes.pop(connection_id, None)
            case ProofShown(auth):
                self._unproven.discard(link)
                self._acceptor.judge(link, auth)
            case _:
                assert_never(output)


class QuicKind:
    """Links over QUIC."""

    name: LinkKindName = QuicLink.kind
    transport = "UDP"

    def bind(self, host: str, port: int) -> socket.socket:
        """Open a socket for a listener."""
        return bind_any(host, port, bind_udp)

    @asynccontextmanager
    async def serve(
        self,
        bound: socket.socket,
        certificate: Certificate,
        acceptor: Acceptor,
        limits: LinkLimits,
    ) -> AsyncIterator[QuicServer]:
        """Accept links on a socket of `bind` during the body."""
        udp = UdpSocket(bound)
        async with run_server(
            lambda nursery: QuicServer(udp, certificate, nursery, acceptor, limits)
        ) as server:
            yield server

    @asynccontextmanager
    async def connect(
        self, target: tuple[str, int], certificate_der: bytes, limits: LinkLimits
    ) -> AsyncIterator[Link[WorkerMessage]]:
        """Open a link without a proof."""
        shown = describe_address(target)
        with dial_errors(self.name, shown, limits):
            family, address = await _resolve(*target)
            udp = UdpSocket(bind_udp(family, _local_host(address), 0))
        with closing(udp):
            with dial_errors(self.name, shown, limits):
                limits = _limits_on(udp, limits)
                engine = client_engine_untrusted(certificate_der, limits)
            now = trio.current_time()
            engine.connect(address, now)
            session = QuicSession(
                engine, shown, Client(certificate_der), limits=limits, now=now
            )
            link = QuicLink(session, udp, limits)
            async with run_client(link) as opened:
                yield opened


async def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, Address]:
    found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    family, _, _, _, address = found[0]
    return family, address


def _limits_on(udp: UdpSocket, limits: LinkLimits) -> LinkLimits:
    """Return the limits for a socket: a probe that may be fragmented proves nothing."""
    if udp.never_fragments:
        return limits
    largest = min(LARGEST_WITH_FRAGMENTS, limits.largest_datagram)
    return msgspec.structs.replace(limits, largest_datagram=largest)


def _local_host(remote: Address) -> str:
    """Return the local address to bind to: only loopback for a peer on loopback."""
    host = str(remote[0])
    if is_loopback(host):
        return host
    return "::" if ":" in host else "0.0.0.0"
