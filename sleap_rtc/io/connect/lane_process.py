"""QUIC lanes in processes of their own, so that they share no interpreter lock.

The child, ``python -m sleap_rtc.io.connect.lane_process``, has one end of a pair of
sockets as its standard input. Over it comes the task, secrets included, then the child
says where it stands, and then the sockets are a link (see
`sleap_rtc.io.connect.pipe_link`) whose other side is the QUIC connection. It ends when
either of them ends, so it never outlives its parent; and its own end is no more than
the end of a lane.

Only where a socket can be passed to a child as it is: not on Windows.
"""

import hmac
import os
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import msgspec
import trio
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from sleap_rtc.io.connect.pipe_link import open_pipe_link, relay
from sleap_rtc.io.link.addresses import describe_address
from sleap_rtc.io.link.certificates import Certificate
from sleap_rtc.io.link.link import DialError, Link, LinkKind
from sleap_rtc.io.link.session import IDLE_TIMEOUT
from sleap_rtc.io.nursery import open_background_nursery
from sleap_rtc.io.quic.driver import connect_quic, open_quic_listener
from sleap_rtc.proto.errors import RemoteProtocolError
from sleap_rtc.proto.messages import MAX_LANES, Auth
from sleap_rtc.proto.transfer.lanes import TICKET_SECONDS

CORES_FOR_PROCESSES = 4
"""With fewer of them the processes of both sides only take turns."""

START_TIMEOUT = 10.0
"""Seconds until a child has started and listens: 1 s is usual."""

DIAL_TIMEOUT = 30.0
"""Seconds until a child has started and has its connection, or knows why not."""

END_TIMEOUT = 2.0
"""Seconds that a child has to say goodbye to its peer."""

_LENGTH = struct.Struct(">I")
_MAX_TEXT = 64 * 1024


class LaneTask(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a child shall do.

    Args:
        host: Where to dial, or the address to listen at.
        port: The UDP port to dial.
        certificate: The only one to accept, or the one to show; DER.
        private_key: Its key if the child shall listen, DER (PKCS #8).
        session: Of the ticket that it accepts.
        proof: Of the same ticket.
        idle_timeout: Seconds of silence after which the peer counts as gone.
    """

    host: str
    port: int
    certificate: bytes
    private_key: bytes = b""
    session: str = ""
    proof: str = ""
    idle_timeout: float = IDLE_TIMEOUT


class Standing(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where a child stands.

    Args:
        port: The port that it listens on; 0 if it has its connection.
        error: Why it gives up.
    """

    port: int = 0
    error: str = ""


def processes_pay() -> bool:
    """Tell whether this machine is one where lanes have processes of their own."""
    return sys.platform != "win32" and usable_cores() >= CORES_FOR_PROCESSES


def default_lanes(kind: LinkKind) -> int:
    """Say how many connections a link shall have, the first one included.

    More TCP connections were no faster than one: a single stream already keeps both
    interpreters busy. QUIC connections need a core each, on either side.
    """
    if kind == "tcp" or not processes_pay():
        return 1
    return min(MAX_LANES, usable_cores() // 2)


def usable_cores() -> int:
    """Count the cores that this process may run on."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# ----------------------------------------------------------------------- the parent


@asynccontextmanager
async def connect_quic_in_process(
    host: str, port: int, *, certificate_der: bytes
) -> AsyncIterator[Link]:
    """Do as `sleap_rtc.io.quic.driver.connect_quic`, in a child.

    Raises:
        DialError: If the child can't be started, or did not get through.
    """
    shown = describe_address((host, port))
    task = LaneTask(host, port, certificate_der)
    async with AsyncExitStack() as stack:
        try:
            stream = await stack.enter_async_context(_open_child(task))
            standing = await _hear(stream, DIAL_TIMEOUT)
        except OSError as error:
            raise DialError([(shown, str(error))]) from None
        if standing.error:
            raise DialError([(shown, standing.error)])
        yield await stack.enter_async_context(open_pipe_link(stream, shown))


class LaneListener:
    """A child that waits for the holder of one ticket.

    Args:
        stream: The way to it.
        port: Its UDP port.
    """

    def __init__(self, stream: trio.SocketStream, port: int) -> None:
        self.port = port
        self._stream = stream

    @asynccontextmanager
    async def accept(self) -> AsyncIterator[Link]:
        """Wait for the client, once; the lane is closed after the body.

        Raises:
            OSError: If it does not come, or the child has ended.
        """
        standing = await _hear(self._stream, TICKET_SECONDS)
        if standing.error:
            raise OSError(standing.error)
        async with open_pipe_link(self._stream, f"port {self.port}") as lane:
            yield lane


@asynccontextmanager
async def listen_in_process(
    host: str, certificate: Certificate, session: str, proof: str
) -> AsyncIterator[LaneListener]:
    """Listen in a child, at a port of its own, for one lane.

    Args:
        host: The literal address to bind to; an empty one means all of this machine.
        certificate: What to show.
        session: Of the ticket that is accepted.
        proof: Of the same ticket.

    Raises:
        OSError: If the child can't be started, or can't listen.
    """
    private_key = certificate.private_key.private_bytes(
        serialization.Encoding.DER,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    task = LaneTask(host, 0, certificate.certificate_der, private_key, session, proof)
    async with _open_child(task) as stream:
        standing = await _hear(stream, START_TIMEOUT)
        if standing.error:
            raise OSError(standing.error)
        yield LaneListener(stream, standing.port)


@asynccontextmanager
async def _open_child(task: LaneTask) -> AsyncIterator[trio.SocketStream]:
    """Start a child with a task, and see it end after the body.

    Raises:
        OSError: If there is no more room for a process or for sockets.
    """
    ours, theirs = socket.socketpair()
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
    try:
        with theirs:
            child = await trio.lowlevel.open_process(
                [sys.executable, "-m", "sleap_rtc.io.connect.lane_process"],
                stdin=theirs,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        try:
            await _tell(stream, task)
            yield stream
        finally:
            stream.socket.close()
            with trio.CancelScope(shield=True):
                with trio.move_on_after(END_TIMEOUT):
                    await child.wait()
                child.kill()
                await child.wait()
    finally:
        stream.socket.close()


async def _tell(stream: trio.SocketStream, value: LaneTask | Standing) -> None:
    text = msgspec.msgpack.encode(value)
    try:
        await stream.send_all(_LENGTH.pack(len(text)) + text)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        raise OSError("the process of the lane has ended") from None


async def _hear(stream: trio.SocketStream, timeout: float) -> Standing:
    """Wait until a child says where it stands.

    Raises:
        OSError: If it ends or takes longer than that.
    """
    with trio.move_on_after(timeout):
        return msgspec.msgpack.decode(await _read_text(stream), type=Standing)
    raise OSError(f"no answer for {timeout:g} s")


async def _read_text(stream: trio.SocketStream) -> bytes:
    size: int = _LENGTH.unpack(await _read_exactly(stream, _LENGTH.size))[0]
    return await _read_exactly(stream, min(size, _MAX_TEXT))


async def _read_exactly(stream: trio.SocketStream, size: int) -> bytes:
    """Read so much and no more: a link may follow."""
    read = b""
    while len(read) < size:
        try:
            piece = await stream.receive_some(size - len(read))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            piece = b""
        if not piece:
            raise OSError("the process of the lane has ended")
        read += piece
    return read


# ------------------------------------------------------------------------ the child


async def main() -> None:
    """Do the task that comes over standard input."""
    ours = socket.socket(fileno=os.dup(0))
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
    try:
        task = msgspec.msgpack.decode(await _read_text(stream), type=LaneTask)
        if task.private_key:
            await _listen(stream, task)
        else:
            await _dial(stream, task)
    except OSError:
        pass  # the parent is gone, so nobody wants to know


async def _dial(stream: trio.SocketStream, task: LaneTask) -> None:
    try:
        async with connect_quic(
            task.host,
            task.port,
            certificate_der=task.certificate,
            idle_timeout=task.idle_timeout,
        ) as link:
            await _tell(stream, Standing())
            await _join(stream, link)
    except DialError as error:
        reason = "; ".join(why for _, why in error.failures)
        await _tell(stream, Standing(error=reason))


async def _listen(stream: trio.SocketStream, task: LaneTask) -> None:
    key = serialization.load_der_private_key(task.private_key, None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise TypeError("a worker's key is on an elliptic curve")
    used: list[Auth] = []

    def judge(auth: Auth) -> str:
        shown, expected = auth.session + auth.proof, task.session + task.proof
        if used or not hmac.compare_digest(shown.encode(), expected.encode()):
            raise RemoteProtocolError("that is no ticket")
        used.append(auth)
        return "lane"

    try:
        async with open_quic_listener(
            task.host,
            0,
            Certificate(task.certificate, key),
            judge,
            idle_timeout=task.idle_timeout,
        ) as listener:
            await _tell(stream, Standing(port=listener.port))
            with trio.move_on_after(TICKET_SECONDS) as waiting:
                async with open_background_nursery() as nursery:
                    nursery.start_soon(_watch_parent, stream, waiting)
                    link = await listener.accept()
            if waiting.cancelled_caught:
                await _tell(stream, Standing(error="the client did not come"))
                return
            await _tell(stream, Standing())
            await _join(stream, link)
    except OSError as error:
        await _tell(stream, Standing(error=str(error)))


async def _watch_parent(stream: trio.SocketStream, scope: trio.CancelScope) -> None:
    """Cancel a wait when the parent ends, which has nothing to say meanwhile."""
    try:
        await stream.socket.recv(1, socket.MSG_PEEK)
    except OSError:
        pass  # that is an end, too
    scope.cancel(reason="the parent has ended")


async def _join(stream: trio.SocketStream, link: Link) -> None:
    async with open_pipe_link(stream, "") as pipe:
        reason = await relay(pipe, link)
        await link.aclose(reason)
        await pipe.aclose(reason)


if __name__ == "__main__":
    trio.run(main)
