"""QUIC links: listening for them, and dialing."""

import math
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import assert_never

import trio
from aioquic.buffer import Buffer  # type: ignore[attr-defined] # no __all__
from aioquic.quic.packet import (
    QuicHeader,
    QuicPacketType,
    QuicProtocolVersion,
    encode_quic_version_negotiation,
    pull_quic_header,
)

from sleap_rtc.io.link.addresses import (
    describe_address,
    is_loopback,
    reachable_hosts,
)
from sleap_rtc.io.link.certificates import Certificate
from sleap_rtc.io.link.link import DialError, Link, LinkClosedError
from sleap_rtc.io.link.session import IDLE_TIMEOUT, MAX_UNPROVEN_LINKS
from sleap_rtc.io.nursery import open_background_nursery
from sleap_rtc.io.quic.engine import (
    CONNECTION_ID_LENGTH,
    DATAGRAM_SIZE,
    Address,
    Datagram,
    client_engine_untrusted,
    server_engine,
)
from sleap_rtc.io.quic.link import QuicLink
from sleap_rtc.io.quic.session import (
    Established,
    Output,
    QuicSession,
    RouteAdded,
    RouteRemoved,
)
from sleap_rtc.io.quic.socket import (
    UdpSocket,
    open_udp_listener,
    open_udp_socket,
)
from sleap_rtc.proto.errors import RemoteProtocolError
from sleap_rtc.proto.messages import Auth
from sleap_rtc.proto.mtu import LARGEST_DATAGRAM, SMALLEST_DATAGRAM

_VERSIONS = [int(QuicProtocolVersion.VERSION_1), int(QuicProtocolVersion.VERSION_2)]


class QuicListener:
    """A UDP port on which clients reach this machine.

    Args:
        udp: The socket.
        certificate: What to show to clients.
        authenticate: Judge of their proofs.
        nursery: Where the links' tasks live.
        idle_timeout: Seconds of silence after which a client counts as gone.
        largest_datagram: UDP payload in bytes that is sent at most.

    Attributes:
        ignored: Datagrams that belong to no link and began none.
    """

    def __init__(
        self,
        udp: UdpSocket,
        certificate: Certificate,
        authenticate: Callable[[Auth], str],
        nursery: trio.Nursery,
        idle_timeout: float,
        largest_datagram: int,
    ) -> None:
        self.ignored = 0
        self._udp = udp
        self._certificate = certificate
        self._authenticate = authenticate
        self._nursery = nursery
        self._idle_timeout = idle_timeout
        self._largest_datagram = largest_datagram
        self._routes: dict[bytes, QuicLink] = {}
        self._links: set[QuicLink] = set()
        self._unproven: set[QuicLink] = set()
        # Without a bound: each link in it has used up a proof of its own.
        self._ready, self._accepted = trio.open_memory_channel[QuicLink](math.inf)

    @property
    def port(self) -> int:
        """The UDP port."""
        return self._udp.port

    def local_addresses(self) -> tuple[tuple[str, int], ...]:
        """List the addresses under which this machine may be reached."""
        bound = self._udp.host
        if bound not in ("0.0.0.0", "::"):
            return ((bound, self.port),)
        ipv6 = self._udp.family == socket.AF_INET6
        hosts = reachable_hosts(ipv4=not ipv6 or self._udp.dual_stack, ipv6=ipv6)
        return tuple((host, self.port) for host in hosts)

    async def accept(self) -> Link:
        """Wait for the next client that has proved itself; `Link.peer` names it.

        The link lives at most as long as the listener.
        """
        return await self._accepted.receive()

    # --------------------------------------------------------------------- inside

    def receive(self, batch: list[Datagram]) -> None:
        """Bring each datagram of a batch to its link."""
        touched: dict[QuicLink, list[Datagram]] = {}
        for datagram in batch:
            link = self._find_link(*datagram)
            if link is None:
                self.ignored += 1
            else:
                touched.setdefault(link, []).append(datagram)
        for link, datagrams in touched.items():
            link.receive(datagrams)
            if link in self._links:
                continue
            if link.unused:
                # What looked like a client's first packet was garbage.
                self._forget(link)
                self.ignored += len(datagrams)
            else:
                self._links.add(link)
                self._nursery.start_soon(self._serve, link)

    def pump(self) -> None:
        """Let every link send, after the socket was full."""
        for link in tuple(self._links):
            link.pump()

    def close_all(self, reason: str) -> None:
        """End all links at once."""
        for link in tuple(self._links):
            link.close_now(reason)

    def _find_link(self, data: bytes, address: Address) -> QuicLink | None:
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

    def _begin(self, header: QuicHeader, address: Address) -> QuicLink | None:
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
        if not is_first or len(self._unproven) >= MAX_UNPROVEN_LINKS:
            return None
        engine = server_engine(
            self._certificate,
            header.destination_cid,
            idle_timeout=self._idle_timeout,
            datagram_size=SMALLEST_DATAGRAM,
            largest_datagram=_largest_for(self._udp, self._largest_datagram),
        )
        session = QuicSession(
            engine,
            describe_address(address),
            authenticate=self._authenticate,
            idle_timeout=self._idle_timeout,
            now=trio.current_time(),
        )
        link = QuicLink(session, self._udp, self._on_output)
        self._unproven.add(link)
        self._routes[header.destination_cid] = link
        self._routes[engine.host_cid] = link
        return link

    async def _serve(self, link: QuicLink) -> None:
        await link.run_timer()
        self._forget(link)

    def _forget(self, link: QuicLink) -> None:
        self._links.discard(link)
        self._unproven.discard(link)
        for connection_id, owner in tuple(self._routes.items()):
            if owner is link:
                del self._routes[connection_id]

    def _on_output(self, link: QuicLink, output: Output) -> None:
        match output:
            case RouteAdded(connection_id):
                self._routes[connection_id] = link
            case RouteRemoved(connection_id):
                self._routes.pop(connection_id, None)
            case Established(peer):
                link.peer = peer
                self._unproven.discard(link)
                self._ready.send_nowait(link)
            case _:
                assert_never(output)


@asynccontextmanager
async def open_quic_listener(
    host: str,
    port: int,
    certificate: Certificate,
    authenticate: Callable[[Auth], str],
    *,
    idle_timeout: float = IDLE_TIMEOUT,
    largest_datagram: int = LARGEST_DATAGRAM,
) -> AsyncIterator[QuicListener]:
    """Listen for QUIC links.

    Args:
        host: The literal address to bind to; an empty one means all of this machine.
        port: The UDP port; 0 takes any.
        certificate: What to show to clients.
        authenticate: Returns the name of the client that a proof belongs to, or raises
            `RemoteProtocolError`; then the client is told no more than that it is
            refused.
        idle_timeout: Seconds of silence after which a client counts as gone.
        largest_datagram: UDP payload in bytes that is sent at most; up to that, it
            grows as far as the path allows.

    Raises:
        OSError: If the address cannot be bound.
    """
    with open_udp_listener(host, port) as udp:
        async with serve_quic(
            udp,
            certificate,
            authenticate,
            idle_timeout=idle_timeout,
            largest_datagram=largest_datagram,
        ) as listener:
            yield listener


@asynccontextmanager
async def serve_quic(
    udp: UdpSocket,
    certificate: Certificate,
    authenticate: Callable[[Auth], str],
    *,
    idle_timeout: float = IDLE_TIMEOUT,
    largest_datagram: int = LARGEST_DATAGRAM,
) -> AsyncIterator[QuicListener]:
    """Take QUIC links on a bound socket; see `open_quic_listener`."""
    async with open_background_nursery() as nursery:
        listener = QuicListener(
            udp, certificate, authenticate, nursery, idle_timeout, largest_datagram
        )
        nursery.start_soon(_receive, udp, listener.receive)
        nursery.start_soon(_resume, udp, listener.pump)
        try:
            yield listener
        finally:
            listener.close_all("the listener was closed")


@asynccontextmanager
async def connect_quic(
    host: str,
    port: int,
    *,
    certificate_der: bytes,
    idle_timeout: float = IDLE_TIMEOUT,
    largest_datagram: int = LARGEST_DATAGRAM,
) -> AsyncIterator[Link]:
    """Reach a listener, without a proof yet: the first message must be `Auth`.

    Args:
        host: Where the listener is.
        port: Its UDP port.
        certificate_der: The only certificate that it may show.
        idle_timeout: Seconds of silence after which it counts as gone.
        largest_datagram: UDP payload in bytes that is sent at most; up to that, it
            grows as far as the path allows.

    Raises:
        DialError: If it cannot be reached, or is not the one that was asked for.
    """
    shown = describe_address((host, port))
    try:
        family, address = await _resolve(host, port)
        udp = open_udp_socket(_local_host(address), 0, family)
    except OSError as error:
        raise DialError([(shown, str(error))]) from None
    with udp:
        try:
            engine = client_engine_untrusted(
                certificate_der,
                idle_timeout=idle_timeout,
                datagram_size=SMALLEST_DATAGRAM,
                largest_datagram=_largest_for(udp, largest_datagram),
            )
        except RemoteProtocolError as error:
            raise DialError([(shown, error.reason)]) from None
        now = trio.current_time()
        engine.connect(address, now)
        session = QuicSession(
            engine,
            shown,
            certificate_der=certificate_der,
            idle_timeout=idle_timeout,
            now=now,
        )
        link = QuicLink(session, udp, _ignore_output)
        async with open_background_nursery() as nursery:
            nursery.start_soon(_receive, udp, link.receive)
            nursery.start_soon(_resume, udp, link.pump)
            nursery.start_soon(link.run_timer)
            link.pump()
            try:
                try:
                    await link.wait_ready()
                except LinkClosedError as error:
                    raise DialError([(shown, error.reason)]) from None
                yield link
                await link.aclose()
            finally:
                link.close_now("the client went away")


@asynccontextmanager
async def dial_quic(
    host: str,
    port: int,
    *,
    certificate_der: bytes,
    auth: Auth,
    idle_timeout: float = IDLE_TIMEOUT,
    largest_datagram: int = LARGEST_DATAGRAM,
) -> AsyncIterator[Link]:
    """Open a link to a listener, and close it after the body.

    Args:
        host: Where the listener is.
        port: Its UDP port.
        certificate_der: The only certificate that it may show.
        auth: The proof, which can be used once.
        idle_timeout: Seconds of silence after which it counts as gone.
        largest_datagram: UDP payload in bytes that is sent at most; up to that, it
            grows as far as the path allows.

    Raises:
        DialError: If it cannot be reached, or is not the one that was asked for.
    """
    async with connect_quic(
        host,
        port,
        certificate_der=certificate_der,
        idle_timeout=idle_timeout,
        largest_datagram=largest_datagram,
    ) as link:
        await link.send_message(auth)
        yield link


async def _receive(udp: UdpSocket, deliver: Callable[[list[Datagram]], None]) -> None:
    while True:
        deliver(await udp.receive_batch())


async def _resume(udp: UdpSocket, pump: Callable[[], None]) -> None:
    while True:
        await udp.wait_until_sent()
        pump()


async def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, Address]:
    found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    family, _, _, _, address = found[0]
    return family, address


def _largest_for(udp: UdpSocket, largest: int) -> int:
    """Return how large datagrams may grow: what gets cut on the way proves nothing."""
    return largest if udp.never_fragments else min(DATAGRAM_SIZE, largest)


def _local_host(remote: Address) -> str:
    """Return the local address to bind to: only loopback for a peer on loopback."""
    host = str(remote[0])
    if is_loopback(host):
        return host
    return "::" if ":" in host else "0.0.0.0"


def _ignore_output(link: QuicLink, output: Output) -> None:
    """A client has its socket for itself, so it needs no routes."""
