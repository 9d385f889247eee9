"""Trouble on the socket: garbage, floods, silence, and other servers."""

import random
from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing
from trio.testing import MockClock
from wsproto.events import (
    BytesMessage,
    CloseConnection,
    Event,
    Ping,
    Pong,
    TextMessage,
)

from sleap_rtc.io.nursery import open_background_nursery
from sleap_rtc.io.signaling.client import open_room
from sleap_rtc.io.signaling.websocket import WebSocketLimits
from sleap_rtc.proto.rendezvous import server as room_server
from sleap_rtc.proto.rendezvous.member import LIMITS
from sleap_rtc.proto.rendezvous.messages import (
    MAX_SIGNAL_BYTES,
    Challenge,
    Metadata,
    OfferSignal,
    RegisteredAuth,
    encode_signal,
)
from tests.io.signaling.lab import (
    DEADLINE,
    HOST,
    KEYS,
    LOG,
    Server,
    lying_server,
    pass_time,
    plain_server,
    running_server,
)

CHALLENGE = encode_signal(Challenge(b"n" * 16))
CLOSE_TIMEOUT = WebSocketLimits(MAX_SIGNAL_BYTES).close_timeout


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    with trio.fail_after(DEADLINE):
        async with running_server() as server:
            yield server


async def test_a_slow_reader_stalls_no_other_peer_and_is_dropped(
    server: Server,
) -> None:
    """One peer never reads; others flood it until the server gives it up."""
    big = "x" * 30_000

    async def flood(number: int) -> None:
        while True:
            async with server.socket() as sender:
                await sender.register(f"flood-{number}")
                await sender.text()
                for _ in range(25):
                    signal = OfferSignal(f"flood-{number}", "slow", big)
                    await sender.send_text(encode_signal(signal))

    async with server.room("client") as client, server.socket() as slow:
        await slow.register("slow")
        assert (await slow.reply())["type"] == "registered_auth"
        # From here on it reads nothing.
        async with open_background_nursery() as floods:
            for number in range(4):
                floods.start_soon(flood, number)
            reason = "it does not read what it is sent"
            await server.logs.wait_for("peer left", peer="slow", reason=reason)
            assert "slow" not in [peer.peer_id for peer in await client.discover()]


GARBAGE = [
    b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc",
    b"GET / HTTP/1.1\r\nHost: \xff\xfe\r\nUpgrade: websocket\r\n"
    b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 8\r\nSec-WebSocket-Key: x\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    b"\x00" * 100_000,
    b"\r\n\r\n",
    b"SSH-2.0-OpenSSH\r\n\r\n",
]


@pytest.mark.parametrize("data", GARBAGE)
async def test_garbage_closes_its_own_connection_only(
    server: Server, data: bytes
) -> None:
    async with server.room("client") as client:
        await client.wait_registered()
        stream = await trio.open_tcp_stream(HOST, server.port)
        async with stream:
            answer = b""
            try:
                await stream.send_all(data)
                async for part in stream:
                    answer += part
            except trio.BrokenResourceError:
                pass
        assert not answer or answer.startswith(b"HTTP/1.1 4")
        assert await client.discover() == []
    await server.check()


HANDSHAKE = (
    b"GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)


async def test_random_bytes_never_hurt_the_server(server: Server) -> None:
    """Garbage before and after the handshake, and handshakes with a wrong byte."""
    source = random.Random(20)
    for number in range(150):
        noise = source.randbytes(source.randrange(1, 200))
        broken = bytearray(HANDSHAKE)
        for _ in range(source.randrange(1, 4)):
            broken[source.randrange(len(broken))] = source.randrange(256)
        data = [noise, HANDSHAKE + noise, bytes(broken) + noise][number % 3]
        stream = await trio.open_tcp_stream(HOST, server.port)
        async with stream:
            try:
                await stream.send_all(data)
                await stream.send_eof()
                async for _ in stream:
                    pass
            except trio.BrokenResourceError:
                pass
    await server.check()


@pytest.mark.parametrize(
    "message",
    ["garbage", "[]", "{}", '{"type":"register"}', "[" * 20_000, "\x00"],
)
async def test_a_broken_message_closes_with_a_reason(
    server: Server, message: str
) -> None:
    async with server.socket() as socket:
        await socket.text()
        await socket.send_text(message)
        error = await socket.reply()
        assert (error["type"], error["code"]) == ("error", "INVALID_MESSAGE")
        assert await socket.closing() == (1000, str(error["reason"])[:120])
    await server.check()


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (BytesMessage(b"binary"), 1003),
        (TextMessage("x" * (MAX_SIGNAL_BYTES + 1)), 1009),
        (TextMessage("x" * (3 * MAX_SIGNAL_BYTES)), 1009),
    ],
)
async def test_an_unsuitable_message_closes_with_a_reason(
    server: Server, message: Event, code: int
) -> None:
    async with server.socket() as socket:
        await socket.text()
        await socket.send(message)
        said, reason = await socket.closing()
        assert said == code
        assert reason
    await server.check()


async def test_pings_are_answered(server: Server) -> None:
    async with server.socket() as socket:
        await socket.text()
        await socket.send(Ping(b"payload"))
        assert await socket.event() == Pong(b"payload")


async def test_a_flood_of_pings_is_cut_off(server: Server) -> None:
    async with server.socket() as socket:
        await socket.text()
        for _ in range(60):
            await socket.send(Ping())
        while isinstance(event := await socket.event(), Pong):
            pass
        assert isinstance(event, TextMessage)
        assert "TOO_MANY_MESSAGES" in event.data
        assert "messages per second" in (await socket.closing())[1]
    await server.check()


async def test_a_flood_of_messages_is_cut_off(server: Server) -> None:
    async with server.socket() as socket:
        await socket.register("flood")
        for _ in range(60):
            await socket.send_text('{"type":"unknown"}')
        assert (await socket.reply())["type"] == "registered_auth"
        assert (await socket.reply())["code"] == "TOO_MANY_MESSAGES"
        assert "messages per second" in (await socket.closing())[1]
    await server.check()


async def test_a_port_without_a_server_refuses() -> None:
    with trio.fail_after(DEADLINE), trio.socket.socket() as reserved:
        # The port belongs to this test, and no connection is accepted.
        await reserved.bind((HOST, 0))
        port = reserved.getsockname()[1]
        url = f"ws://{HOST}:{port}"
        async with open_room(url, KEYS, "a", "client", Metadata(), log=LOG) as room:
            await room.failed.wait()
            assert room.is_refused
    assert "refused" in room.trouble
    assert str(port) in room.trouble


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "HTTP 404"),
        (b"HTTP/1.1 403 No\r\nContent-Length: 4\r\n\r\npage", "HTTP 403"),
        (b"HTTP/1.1 400 No\r\n\r\na page that ends with", "did not open"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "does not speak WebSocket"),
        (b"HTTP/1.1 101 Go\r\n\r\n", "does not speak WebSocket"),
        (b"HTTP/1.1 101 Go\r\nConnection: \xff\r\n\r\n", "not speak WebSocket"),
        (b"", "did not open a WebSocket"),
    ],
)
async def test_another_server_is_named_as_such(
    answer: bytes, reason: str, mock_clock: MockClock
) -> None:
    """It is noticed at once: the clock does not move here."""

    async def handle(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        if answer:
            await stream.send_all(answer)

    async with plain_server(handle) as port:
        url = f"ws://{HOST}:{port}"
        async with open_room(url, KEYS, "a", "client", Metadata(), log=LOG) as room:
            await room.failed.wait()
    assert reason in room.trouble


# ----------------------------------------------------- deadlines, on a clock of its own


@pytest.mark.timeout(60)
async def test_a_silent_connection_is_dropped(mock_clock: MockClock) -> None:
    async with (
        running_server() as server,
        await trio.open_tcp_stream(HOST, server.port) as stream,
    ):
        await trio.testing.wait_all_tasks_blocked(0.05)
        mock_clock.jump(room_server.LIMITS.registration_timeout)
        assert await stream.receive_some() == b""


@pytest.mark.timeout(60)
async def test_a_peer_that_answers_no_pings_is_dropped(mock_clock: MockClock) -> None:
    """Of two silent peers, the one that does not answer pings is dropped."""
    async with (
        running_server() as server,
        server.room("healthy") as healthy,
        server.socket() as deaf,
    ):
        await healthy.wait_registered()
        await deaf.register("deaf")
        assert (await deaf.reply())["type"] == "registered_auth"
        for _ in range(5):
            await pass_time(mock_clock, room_server.LIMITS.ping_interval)
        await pass_time(mock_clock, CLOSE_TIMEOUT)
        kinds = [type(event) for event in await deaf.rest()]
        assert kinds == [Ping, Ping, Ping, Ping, CloseConnection]
        assert await healthy.discover() == []


@pytest.mark.timeout(60)
async def test_a_stop_of_the_server_waits_for_no_peer(mock_clock: MockClock) -> None:
    async with (
        running_server() as server,
        await trio.open_tcp_stream(HOST, server.port) as fresh,
        server.socket() as unknown,
        server.socket() as known,
    ):
        await known.register("known")
        assert (await known.reply())["type"] == "registered_auth"
        await server.stop()
        assert await fresh.receive_some() == b""
        assert [type(event) for event in await unknown.rest()] == [TextMessage]
        assert await known.rest() == []


@pytest.mark.timeout(60)
async def test_the_connection_to_a_silent_server_is_closed(
    mock_clock: MockClock,
) -> None:
    """Its pings stop, though the connection looks open."""
    welcome = RegisteredAuth(KEYS.room_id, "a")
    async with (
        lying_server(CHALLENGE, encode_signal(welcome)) as url,
        open_room(url, KEYS, "a", "client", Metadata(), log=LOG) as room,
    ):
        await room.wait_registered()
        assert not room.failed.is_set()
        await pass_time(mock_clock, 0)
        await pass_time(mock_clock, LIMITS.silence_timeout)
        assert room.failed.is_set()
    assert room.trouble == "the signaling server fell silent"
