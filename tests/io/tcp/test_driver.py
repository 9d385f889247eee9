"""Behaviour of TCP links alone, over real sockets on loopback."""

import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing

import pytest
import trio
import trio.testing
from msgspec.structs import replace
from trio.testing import MockClock

from sleap_rtc.io.connect.listener import Listener
from sleap_rtc.io.link.certificates import SERVER_NAME
from sleap_rtc.io.link.limits import LIMITS
from sleap_rtc.io.link.link import DialError, LinkClosedError
from sleap_rtc.io.link.session import ALPN
from sleap_rtc.io.tcp.socket import (
    TcpSocket,
    accept_tcp,
    bind_tcp,
    open_tcp_socket,
)
from sleap_rtc.io.tcp.tls import client_context_untrusted
from sleap_rtc.proto.messages import Error
from tests.io.link.kinds import (
    DER,
    LOOPBACK,
    MEGABYTE,
    VERIFIED,
    connected,
    dialed,
    jump_when_idle,
    listening,
    make_frame,
    numbered,
    pair,
    send_until_held_back,
)


@pytest.fixture(autouse=True)
async def deadline() -> AsyncIterator[None]:
    with trio.fail_after(60):
        yield


@pytest.fixture
async def listener() -> AsyncIterator[Listener]:
    async with listening() as opened:
        yield opened


def bound_listener() -> closing[socket.socket]:
    return closing(bind_tcp(socket.AF_INET, LOOPBACK, 0))


async def read_to_end(stream: trio.abc.ReceiveStream) -> bytes:
    found = b""
    try:
        while data := await stream.receive_some():
            found += data
    except trio.BrokenResourceError:
        pass  # an end as well
    return found


# ------------------------------------------------------------------------- strangers


@pytest.mark.parametrize(
    "words",
    [
        b"GET / HTTP/1.1\r\nHost: worker\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"\x16\x03\x01\x02\x00" + b"\xff" * 512,
        b"",
    ],
    ids=["http", "ssh", "nearly tls", "nothing"],
)
async def test_a_stranger_is_sent_away_and_disturbs_no_other_link(
    listener: Listener, words: bytes
) -> None:
    async with pair("tcp", listener) as (client, worker):
        stranger = await trio.open_tcp_stream("127.0.0.1", listener.port)
        async with stranger:
            await stranger.send_all(words)
            await stranger.send_eof()
            answer = await read_to_end(stranger)
        # At most an alert of TLS; nothing of ours.
        assert len(answer) <= 7
        await client.send_message(VERIFIED)
        assert await worker.receive_message() == VERIFIED


async def test_a_stranger_that_only_connects_is_sent_away(
    listener: Listener, jumping_clock: MockClock
) -> None:
    jump_when_idle(jumping_clock)
    begin = trio.current_time()
    stranger = await trio.open_tcp_stream("127.0.0.1", listener.port)
    async with stranger:
        assert await read_to_end(stranger) == b""
    took = trio.current_time() - begin
    assert took >= LIMITS.handshake_timeout


async def talk_until_the_end(stream: trio.SSLStream[trio.SocketStream]) -> None:
    await stream.send_all(b"hello")
    while await stream.receive_some():
        pass


def old_version(context: ssl.SSLContext) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = ssl.TLSVersion.TLSv1_2


def other_protocol(context: ssl.SSLContext) -> None:
    context.set_alpn_protocols(["h2"])


@pytest.mark.parametrize("change", [old_version, other_protocol])
async def test_other_versions_and_protocols_of_tls_are_refused(
    listener: Listener, change: Callable[[ssl.SSLContext], None]
) -> None:
    context = client_context_untrusted(DER)
    change(context)
    stream = trio.SSLStream(
        await trio.open_tcp_stream("127.0.0.1", listener.port),
        context,
        server_hostname=SERVER_NAME,
    )
    # TLS 1.3 may let the client finish its handshake before the refusal arrives.
    with pytest.raises(trio.BrokenResourceError):
        await talk_until_the_end(stream)
    await trio.aclose_forcefully(stream)


async def test_a_client_of_tls_alone_gets_no_further(listener: Listener) -> None:
    context = client_context_untrusted(DER)
    stream = trio.SSLStream(
        await trio.open_tcp_stream("127.0.0.1", listener.port),
        context,
        server_hostname=SERVER_NAME,
        https_compatible=True,
    )
    async with stream:
        await stream.send_all(b"GET / HTTP/1.1\r\n\r\n")
        assert b"record type 71 does not exist" in await read_to_end(stream)
        assert stream.selected_alpn_protocol() == ALPN


async def test_a_port_without_a_listener_refuses() -> None:
    with socket.socket() as unused:
        # Bound, so that no other program can take the number; but it does not listen.
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with pytest.raises(DialError, match=rf"127.0.0.1:{port}: Connection refused"):
            async with connected("tcp", port):
                pytest.fail("it must not open")


async def test_a_listener_that_hangs_up_is_described() -> None:
    with bound_listener() as bound:

        async def hang_up() -> None:
            tcp, _ = await accept_tcp(bound)
            with closing(tcp):
                await tcp.receive()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(hang_up)
            with pytest.raises(DialError, match="closed the connection without"):
                async with connected("tcp", bound.getsockname()[1]):
                    pytest.fail("it must not open")


class Relay:
    """A line between a client and a listener that carries single bytes."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._ends: list[trio.SocketStream] = []

    async def carry(self, near: trio.SocketStream) -> None:
        far = await trio.open_tcp_stream("127.0.0.1", self._port)
        self._ends += [near, far]
        async with near, far, trio.open_nursery() as nursery:
            nursery.start_soon(self._carry_one_way, near, far)
            nursery.start_soon(self._carry_one_way, far, near)

    async def _carry_one_way(
        self, source: trio.SocketStream, target: trio.SocketStream
    ) -> None:
        try:
            async for data in source:
                for n in range(len(data)):
                    await target.send_all(data[n : n + 1])
            await target.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # it was reset

    def reset(self) -> None:
        """Reset both connections."""
        for end in self._ends:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            end.socket.close()


@asynccontextmanager
async def through_a_relay(port: int) -> AsyncIterator[tuple[int, Relay]]:
    relay = Relay(port)
    async with trio.open_nursery() as nursery:
        [outside] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, relay.carry, [outside])
        yield outside.socket.getsockname()[1], relay
        nursery.cancel_scope.cancel()


async def test_a_link_survives_a_line_that_carries_single_bytes(
    listener: Listener,
) -> None:
    async with (
        through_a_relay(listener.port) as (port, _),
        dialed("tcp", port) as client,
    ):
        worker = await listener.accept()
        await client.send_frame(make_frame(1, 3000))
        await worker.send_message(VERIFIED)
        assert (await worker.receive_frame()).payload == make_frame(1, 3000).payload
        assert await client.receive_message() == VERIFIED


# ------------------------------------------------------------------- under pressure


async def test_messages_overtake_the_bulk_of_a_slow_reader(
    listener: Listener,
) -> None:
    frames = 32
    async with (
        pair("tcp", listener) as (client, worker),
        trio.open_nursery() as nursery,
    ):

        async def send() -> None:
            for index in range(frames):
                await client.send_frame(make_frame(index))
                await client.send_message(numbered(index))

        nursery.start_soon(send)
        # The frames are not read: 16 MiB and the buffers of the kernels are on the way.
        for index in range(12):
            assert await worker.receive_message() == numbered(index)
        for index in range(frames):
            assert (await worker.receive_frame()).header.index == index
        for index in range(12, frames):
            assert await worker.receive_message() == numbered(index)


async def test_a_link_whose_frames_are_not_read_stays_open(
    listener: Listener, jumping_clock: MockClock
) -> None:
    jump_when_idle(jumping_clock)
    async with pair("tcp", listener) as (client, worker):
        # Shorter than the clock waits before it jumps.
        sent = await send_until_held_back(client, cushion=0.02)
        await trio.sleep(3 * LIMITS.idle_timeout)
        for index in range(sent):
            assert (await worker.receive_frame()).header.index == index
        await worker.send_message(VERIFIED)
        assert await client.receive_message() == VERIFIED


async def test_a_reason_arrives_though_much_is_unread(listener: Listener) -> None:
    async with pair("tcp", listener) as (client, worker):
        for index in range(3):
            await client.send_frame(make_frame(index))
        worker.close_now("no room")
        with pytest.raises(LinkClosedError, match=r"\Ano room\Z"):
            await send_until_held_back(client)


# --------------------------------------------------------------------- rough endings


async def test_a_connection_that_is_reset_is_lost(listener: Listener) -> None:
    async with (
        through_a_relay(listener.port) as (port, relay),
        dialed("tcp", port) as client,
    ):
        worker = await listener.accept()
        relay.reset()
        for link in (client, worker):
            with pytest.raises(LinkClosedError, match=r"127.*connection"):
                await link.receive_message()


async def test_statistics_outlive_the_link(listener: Listener) -> None:
    async with pair("tcp", listener) as (client, worker):
        await client.send_frame(make_frame(1))
        await worker.receive_frame()
    found = client.statistics()
    assert found.kind == "tcp"
    assert found.bytes_sent > MEGABYTE
    assert 0 <= found.packets_lost < 10


async def test_a_message_right_before_the_end_arrives_with_the_proof(
    listener: Listener,
) -> None:
    async with dialed("tcp", listener.port) as client:
        await client.send_message(Error("that was all"))
        await client.aclose("bye")
    worker = await listener.accept()
    assert await worker.receive_message() == Error("that was all")
    with pytest.raises(LinkClosedError, match="bye"):
        await worker.receive_message()


# -------------------------------------------------------------------------- sockets


async def test_a_socket_reports_whether_it_is_full() -> None:
    with bound_listener() as bound:
        near = await open_tcp_socket(*bound.getsockname())
        far, _ = await accept_tcp(bound)
        with closing(near), closing(far):
            data = memoryview(bytes(MEGABYTE))
            sent = 0
            while not near.full:
                sent += near.send(data)
            with trio.move_on_after(0.05):
                await near.wait_until_writable()
                pytest.fail("the peer has not read")
            received = 0
            while received < sent:
                received += len(await far.receive())
            await near.wait_until_writable()
            assert not near.full
            assert near.send(data) > 0


async def test_a_pause_ends_after_the_other_tasks_have_run() -> None:
    with bound_listener() as bound:
        near = await open_tcp_socket(*bound.getsockname())
        far, _ = await accept_tcp(bound)
        with closing(near), closing(far):
            near.pause()
            assert not near.full
            await near.wait_until_writable()
            with trio.move_on_after(0.05):
                await near.wait_until_writable()
                pytest.fail("it neither pauses nor is full")


async def test_a_link_that_ends_with_its_turn_still_sends_the_reason() -> None:
    turn = 32 * 1024
    limits = replace(LIMITS, bytes_per_turn=turn)
    async with (
        listening(limits) as listener,
        pair("tcp", listener, limits) as (client, worker),
    ):
        await client.send_frame(make_frame(1, turn))
        client.close_now("enough")
        # Its owner may drop the connection now, without another turn.
        assert client.session.all_sent
        assert (await worker.receive_frame()).header.index == 1
        with pytest.raises(LinkClosedError, match="enough"):
            await worker.receive_message()


async def test_the_end_of_a_stream_is_sent_once() -> None:
    with bound_listener() as bound:
        near = await open_tcp_socket(*bound.getsockname())
        far, _ = await accept_tcp(bound)
        with closing(near), closing(far):
            assert far.receive_now() is None
            near.send(memoryview(b"last"))
            near.end_sending()
            near.end_sending()
            assert bytes(await far.receive()) == b"last"
            assert len(await far.receive()) == 0
            found = far.receive_now()
            assert found is not None
            assert len(found) == 0


async def test_a_name_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(OSError):  # noqa: PT011 - the text differs between systems
        await open_tcp_socket("no.such.invalid", 1)


async def test_a_connection_that_is_gone_before_it_is_accepted_is_skipped() -> None:
    with bound_listener() as bound:
        with socket.create_connection(bound.getsockname()) as gone:
            gone.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )
        near = await open_tcp_socket(*bound.getsockname())
        with closing(near):
            near.send(memoryview(b"here"))
            found = b""
            while not found:
                tcp, _ = await accept_tcp(bound)
                assert isinstance(tcp, TcpSocket)
                with closing(tcp):
                    try:
                        found = bytes(await tcp.receive())
                    except ConnectionResetError:
                        continue
            assert found == b"here"
