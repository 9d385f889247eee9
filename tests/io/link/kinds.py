"""What the tests of links share, and the two kinds as a table."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import NamedTuple, Protocol

import trio

from sleap_rtc.io.link.certificates import make_certificate
from sleap_rtc.io.link.link import Link, LinkKind
from sleap_rtc.io.link.session_link import SessionLink
from sleap_rtc.io.quic.driver import connect_quic, dial_quic, open_quic_listener
from sleap_rtc.io.tcp.driver import connect_tcp, dial_tcp, open_tcp_listener
from sleap_rtc.proto.errors import RemoteProtocolError
from sleap_rtc.proto.messages import Auth, JobCancel, JobLog, Message
from sleap_rtc.proto.transfer.frames import ChunkHeader, Frame

AUTH = Auth(session="5" * 32, proof="7" * 64)
CERTIFICATE = make_certificate()
DER = CERTIFICATE.certificate_der
MEGABYTE = 1024 * 1024
CANCEL = JobCancel("job_0123abcd")


class AnyListener(Protocol):
    """A listener of either kind, or of both."""

    @property
    def port(self) -> int: ...

    async def accept(self) -> Link: ...


class Kind(NamedTuple):
    """How links of one kind come about."""

    name: LinkKind
    listen: Callable[..., AbstractAsyncContextManager[AnyListener]]
    connect: Callable[..., AbstractAsyncContextManager[Link]]
    dial: Callable[..., AbstractAsyncContextManager[Link]]


QUIC = Kind("quic", open_quic_listener, connect_quic, dial_quic)
TCP = Kind("tcp", open_tcp_listener, connect_tcp, dial_tcp)


def judge(auth: Auth) -> str:
    if auth.proof != AUTH.proof:
        raise RemoteProtocolError("the proof is wrong")
    return f"client {auth.session[:4]}"


@asynccontextmanager
async def pair(
    kind: Kind, listener: AnyListener, *, idle_timeout: float = 10.0
) -> AsyncIterator[tuple[SessionLink, SessionLink]]:
    """A link; the client's end first."""
    async with kind.dial(
        "127.0.0.1",
        listener.port,
        certificate_der=DER,
        auth=AUTH,
        idle_timeout=idle_timeout,
    ) as client:
        worker = await listener.accept()
        assert isinstance(client, SessionLink)
        assert isinstance(worker, SessionLink)
        yield client, worker


def make_frame(index: int, size: int = MEGABYTE) -> Frame:
    return Frame(ChunkHeader(1, index, size, bytes(32)), bytes([index % 256]) * size)


def line(number: int) -> Message:
    return JobLog("job_0123abcd", number, number, "epoch done")


async def send_until_held_back(link: Link) -> int:
    """Send frames of 100 kB until one has to wait for a second; count those before."""
    sent = 0
    while True:
        with trio.move_on_after(1) as scope:
            await link.send_frame(make_frame(sent, 100_000))
            sent += 1
        if scope.cancelled_caught:
            return sent
