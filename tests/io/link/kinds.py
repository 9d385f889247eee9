"""Helpers of the tests of links."""

import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager
from typing import Any

import psutil
import trio
import trio.testing
from trio.testing import MockClock

from sleap_rtc.io.connect.dial import dial
from sleap_rtc.io.connect.kinds import KINDS
from sleap_rtc.io.connect.listener import Listener, open_listener
from sleap_rtc.io.link.certificates import make_certificate
from sleap_rtc.io.link.endpoint import Acceptor, DialedLink, LinkServer, ServedLink
from sleap_rtc.io.link.limits import LIMITS, LinkLimits
from sleap_rtc.io.link.link import Link, LinkClosedError
from sleap_rtc.io.link.session_link import SessionLink
from sleap_rtc.proto.errors import RemoteProtocolError
from sleap_rtc.proto.messages import (
    Auth,
    FileError,
    FileVerified,
    Message,
    WorkerMessage,
)
from sleap_rtc.proto.route.kinds import LinkKindName
from sleap_rtc.proto.transfer.frames import ChunkHeader, Frame

AUTH = Auth(session="5" * 32, proof="7" * 64)
CERTIFICATE = make_certificate()
DER = CERTIFICATE.certificate_der
MEGABYTE = 1024 * 1024
VERIFIED = FileVerified(7)
LOOPBACK = "127.0.0.1"


def judge(auth: Auth) -> str:
    if auth.proof != AUTH.proof:
        raise RemoteProtocolError("the proof is wrong")
    return f"client {auth.session[:4]}"


def jump_when_idle(clock: MockClock) -> None:
    """Move a clock to the next deadline whenever nothing has happened for 50 ms.

    A clock cannot see threads at work. So call this after the last of them has ended,
    such as the one that loads the certificate of a listener.
    """
    clock.autojump_threshold = 0.05


@contextmanager
def one_number() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A TCP and a UDP socket that are bound to the same number.

    The TCP socket does not listen, so connections to it are refused. On Linux a
    listener can still bind to the number.
    """
    with ExitStack() as stack:
        while True:
            tcp = stack.enter_context(socket.socket())
            udp = stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
            tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, True)
            udp.bind((LOOPBACK, 0))
            try:
                tcp.bind(udp.getsockname())
            except OSError:  # that number is free for UDP only
                continue
            for one in (tcp, udp):
                one.setblocking(False)
            yield tcp, udp
            return


@contextmanager
def silent_port() -> Iterator[int]:
    """A port that takes connections and datagrams, and never answers."""
    with one_number() as (tcp, _):
        tcp.listen()
        yield tcp.getsockname()[1]


def open_sockets() -> int:
    """Count the sockets of this process."""
    return len(psutil.Process().net_connections("inet"))


@asynccontextmanager
async def listening(limits: LinkLimits = LIMITS) -> AsyncIterator[Listener]:
    """A listener of all kinds on loopback."""
    async with open_listener(LOOPBACK, 0, CERTIFICATE, judge, limits=limits) as opened:
        yield opened


class OneKind:
    """A listener of one kind, such as another version may have."""

    def __init__(self, port: int, acceptor: Acceptor, server: LinkServer[Any]) -> None:
        self.port = port
        self.server = server
        self.accept = acceptor.accept


@asynccontextmanager
async def listening_for_one(
    kind: LinkKindName, bound: socket.socket | None = None
) -> AsyncIterator[OneKind]:
    acceptor = Acceptor(judge)
    with closing(bound or KINDS[kind].bind(LOOPBACK, 0)) as own:
        async with KINDS[kind].serve(own, CERTIFICATE, acceptor, LIMITS) as server:
            yield OneKind(own.getsockname()[1], acceptor, server)


@asynccontextmanager
async def dialed(
    kind: LinkKindName,
    port: int,
    *,
    host: str = LOOPBACK,
    auth: Auth = AUTH,
    certificate_der: bytes = DER,
    limits: LinkLimits = LIMITS,
) -> AsyncIterator[Link[WorkerMessage]]:
    """A link of one kind, dialed over loopback."""
    async with dial(
        {kind: [(host, port)]},
        certificate_der=certificate_der,
        auth=auth,
        limits=limits,
    ) as (link, _):
        yield link


@asynccontextmanager
async def connected(
    kind: LinkKindName, port: int
) -> AsyncIterator[Link[WorkerMessage]]:
    """A link of one kind that has not shown a proof yet."""
    async with KINDS[kind].connect((LOOPBACK, port), DER, LIMITS) as link:
        yield link


@asynccontextmanager
async def pair(
    kind: LinkKindName, listener: Listener | OneKind, limits: LinkLimits = LIMITS
) -> AsyncIterator[tuple[DialedLink, ServedLink]]:
    """A link; the client's end first."""
    async with dialed(kind, listener.port, limits=limits) as client:
        worker = await listener.accept()
        assert isinstance(client, SessionLink)
        assert isinstance(worker, SessionLink)
        yield client, worker


def make_frame(index: int, size: int = MEGABYTE) -> Frame:
    return Frame(ChunkHeader(1, index, size, bytes(32)), bytes([index % 256]) * size)


def numbered(number: int) -> Message:
    return FileError(number, "epoch done")


async def send_until_held_back(link: Link[Message], cushion: float = 0.3) -> int:
    """Send frames of 100 kB until nothing moves for a while; count them."""
    sent = 0
    ended: list[LinkClosedError] = []

    async def send() -> None:
        nonlocal sent
        try:
            while True:
                await link.send_frame(make_frame(sent, 100_000))
                sent += 1
        except LinkClosedError as error:
            ended.append(error)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        await trio.testing.wait_all_tasks_blocked(cushion)
        nursery.cancel_scope.cancel()
    if ended:
        raise ended[0]
    return sent
