"""What may go wrong on the socket: garbage, floods, silence, and other servers."""

import random
from collections.abc import AsyncIterator
from itertools import count

import pytest
import structlog
import trio
import trio.testing
from trio.testing import MockClock
from wsproto import ConnectionType
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Event,
    Ping,
    Pong,
    Request,
    TextMessage,
)

from sleap_rtc.io import websocket
from sleap_rtc.io.nursery import open_background_nursery
from sleap_rtc.io.signaling import open_room
from sleap_rtc.io.websocket import (
    CLOSE_SECONDS,
    HANDSHAKE_SECONDS,
    MAX_QUEUED_BYTES,
    PONG_SECONDS,
    WRITE_SECONDS,
    WebSocket,
)
from sleap_rtc.proto.rendezvous import (
    MAX_SIGNAL_BYTES,
    Challenge,
    Metadata,
    OfferSignal,
    RegisteredAuth,
    encode_signal,
)
from sleap_rtc.proto.room_member import SILENCE_SECONDS
from sleap_rtc.proto.room_server import PING_SECONDS, REGISTRATION_SECONDS
from tests.io.signaling_lab import (
    DEADLINE,
    HOST,
    KEYS,
    LOG,
    RawPeer,
    Server,
    lying_server,
    plain_server,
    running_server,
    until,
)

CHALLENGE = encode_signal(Challenge(b"n" * 16))


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with running_server() as server:
        yield server


async def test_a_slow_reader_stalls_nobody_and_is_dropped(server: Server) -> None:
    """One peer never reads; others flood it until the server gives it up."""
    with structlog.testing.capture_logs() as logs:
        await flood_a_slow_reader(server)
    assert {"peer": "slow", "reason": "it does not read what it is sent"}.items() <= {
        key: value
        for entry in logs
        if entry["event"] == "peer left" and entry["peer"] == "slow"
        for key, value in entry.items()
    }.items()


async def flood_a_slow_reader(server: Server) -> None:
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
        # From here on it takes in one message more, and nothing else.
        async with open_background_nursery() as floods:
            for number in range(4):
                floods.start_soon(flood, number)
            there = True
            while there:
                await trio.sleep(0.06)
                with trio.fail_after(2):
                    found = await client.discover()
                there = "slow" in [peer.peer_id for peer in found]


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
    await server.works()


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
    await server.works()


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
    await server.works()


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
    await server.works()


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
    await server.works()


async def test_parts_that_never_make_a_message_are_cut_off(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(websocket, "MAX_UNFINISHED_BYTES", 10_000)
    async with server.socket() as socket:
        await socket.text()
        with pytest.raises(trio.BrokenResourceError):  # noqa: PT012
            for _ in range(10_000):
                await socket.send(TextMessage("", message_finished=False))
            await socket.event()
    await server.works()


async def test_whole_messages_may_be_any_number(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(websocket, "MAX_UNFINISHED_BYTES", 10_000)
    async with server.socket() as socket:
        await socket.register("peer")
        assert (await socket.reply())["type"] == "registered_auth"
        for _ in range(20):
            await socket.send_text('{"type":"unknown","x":"' + "x" * 4000 + '"}')
        await socket.send(Ping(b"end"))
        assert await socket.event() == Pong(b"end")


async def test_a_flood_of_messages_is_cut_off(server: Server) -> None:
    async with server.socket() as socket:
        await socket.register("flood")
        for _ in range(60):
            await socket.send_text('{"type":"unknown"}')
        assert (await socket.reply())["type"] == "registered_auth"
        assert (await socket.reply())["code"] == "TOO_MANY_MESSAGES"
        assert "messages per second" in (await socket.closing())[1]
    await server.works()


async def test_a_port_without_a_server_says_so() -> None:
    with trio.fail_after(DEADLINE), structlog.testing.capture_logs() as logs:
        [listener] = await trio.open_tcp_listeners(0, host=HOST)
        port = listener.socket.getsockname()[1]
        await listener.aclose()
        log = structlog.get_logger()
        async with open_room(
            f"ws://{HOST}:{port}", KEYS, "a", "client", Metadata(), log=log
        ):
            await until(lambda: bool(logs))
    assert "refused" in logs[0]["reason"]
    assert str(port) in logs[0]["reason"]


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
    """It is noticed at once: the time stands still here."""

    async def handle(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        if answer:
            await stream.send_all(answer)

    with structlog.testing.capture_logs() as logs:
        async with plain_server(handle) as port:
            url = f"ws://{HOST}:{port}"
            async with open_room(url, KEYS, "a", "client", Metadata(), log=LOG):
                while not logs:
                    await trio.testing.wait_all_tasks_blocked(0.01)
    assert reason in logs[0]["reason"]


async def test_an_endless_page_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket, "MAX_UNFINISHED_BYTES", 10_000)

    async def handle(stream: trio.SocketStream) -> None:
        await stream.send_all(b"HTTP/1.1 200 OK\r\n\r\n")
        try:
            while True:
                await stream.send_all(bytes(1000))
        except trio.BrokenResourceError:
            pass

    with trio.fail_after(DEADLINE), structlog.testing.capture_logs() as logs:
        async with plain_server(handle) as port:
            url = f"ws://{HOST}:{port}"
            async with open_room(url, KEYS, "a", "client", Metadata(), log=LOG):
                await until(lambda: bool(logs))
    assert "no whole message" in logs[0]["reason"]


# ----------------------------------------------------- deadlines, on a clock of its own


@pytest.mark.timeout(20)
async def test_who_says_nothing_is_dropped(mock_clock: MockClock) -> None:
    async with open_background_nursery() as nursery:
        server = Server(nursery)
        await server.start()
        async with await trio.open_tcp_stream(HOST, server.port) as stream:
            await trio.testing.wait_all_tasks_blocked(0.05)
            mock_clock.jump(REGISTRATION_SECONDS)
            assert await stream.receive_some() == b""


async def pass_time(clock: MockClock, seconds: float) -> None:
    """Let time pass, and whatever happens then happen."""
    clock.jump(seconds)
    await trio.testing.wait_all_tasks_blocked(0.05)


@pytest.mark.timeout(20)
async def test_pings_tell_who_is_there(mock_clock: MockClock) -> None:
    """Of two silent peers, the one that does not answer pings is dropped."""
    async with open_background_nursery() as nursery:
        server = Server(nursery)
        await server.start()
        async with server.room("healthy") as healthy, server.socket() as deaf:
            await healthy.wait_registered()
            await deaf.register("deaf")
            assert (await deaf.reply())["type"] == "registered_auth"
            for _ in range(5):
                await pass_time(mock_clock, PING_SECONDS)
            await pass_time(mock_clock, CLOSE_SECONDS)
            kinds = [type(event) for event in await deaf.rest()]
            assert kinds == [Ping, Ping, Ping, Ping, CloseConnection]
            assert await healthy.discover() == []


@pytest.mark.timeout(20)
async def test_a_stop_of_the_server_waits_for_nobody(mock_clock: MockClock) -> None:
    async with open_background_nursery() as nursery:
        server = Server(nursery)
        await server.start()
        async with (
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


@pytest.mark.timeout(20)
async def test_a_server_that_falls_silent_is_left(mock_clock: MockClock) -> None:
    """Its pings do not come, though the connection looks open."""
    welcome = RegisteredAuth(KEYS.room_id, "a")
    with structlog.testing.capture_logs() as logs:
        async with (
            lying_server(CHALLENGE, encode_signal(welcome)) as url,
            open_room(url, KEYS, "a", "client", Metadata(), log=LOG) as room,
        ):
            await room.wait_registered()
            await trio.testing.wait_all_tasks_blocked(0.05)
            await pass_time(mock_clock, SILENCE_SECONDS)
            await pass_time(mock_clock, CLOSE_SECONDS)
    events = [entry["event"] for entry in logs]
    assert events[:2] == ["registered", "no signaling server"]
    assert logs[1]["reason"] == "the signaling server fell silent"


# ---------------------------------------------------------- one end, and a raw peer


class Recorder:
    """Takes note of what comes in."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.signs = 0

    def received_text(self, text: str) -> None:
        self.texts.append(text)

    def heard(self) -> None:
        self.signs += 1


class OneEnd:
    """A `WebSocket` of a server that runs, and a raw peer at its other end."""

    def __init__(self) -> None:
        ours, theirs = trio.testing.lockstep_stream_pair()
        self.socket = WebSocket(ours, MAX_SIGNAL_BYTES)
        self.peer = RawPeer(theirs, ConnectionType.CLIENT)
        self.user = Recorder()
        self.scope = trio.CancelScope()
        self.reason: str | None = None
        self.ended = trio.Event()

    async def run(self) -> None:
        with self.scope:
            self.reason = await self.socket.run(self.user)
        self.ended.set()

    async def shake_hands(self) -> None:
        await self.peer.send(Request(host=HOST, target="/"))
        assert isinstance(await self.peer.event(), AcceptConnection)


@pytest.fixture
async def end(nursery: trio.Nursery) -> OneEnd:
    one_end = OneEnd()
    nursery.start_soon(one_end.run)
    await one_end.shake_hands()
    return one_end


async def test_a_cancelled_owner_cuts_no_frame(end: OneEnd) -> None:
    """What the other end gets is whole, however much of it is on the way."""
    end.socket.send_text("x" * 50_000)
    await trio.testing.wait_all_tasks_blocked()
    end.scope.cancel()
    with trio.fail_after(DEADLINE):
        received = await end.peer.rest()
    texts = [event for event in received if isinstance(event, TextMessage)]
    assert sum(len(event.data) for event in texts) == 50_000
    assert texts[-1].message_finished


async def test_what_was_queued_is_sent_before_the_close(end: OneEnd) -> None:
    for number in range(20):
        end.socket.send_text(str(number))
    end.socket.close("enough")
    end.socket.send_text("late")
    with trio.fail_after(DEADLINE):
        assert [await end.peer.text() for _ in range(20)] == [
            str(number) for number in range(20)
        ]
        assert await end.peer.closing() == (1000, "enough")
        assert await end.peer.rest() == []
        await end.peer.stream.aclose()
        await end.ended.wait()
    assert end.reason == "enough"


async def test_what_comes_during_the_close_is_ignored(end: OneEnd) -> None:
    end.socket.close("enough")
    with trio.fail_after(DEADLINE):
        await end.peer.send(TextMessage("late"), Pong(), Ping(), TextMessage("later"))
        assert await end.peer.event() == CloseConnection(1000, "enough")
        await end.peer.stream.aclose()
        await end.ended.wait()
    assert (end.reason, end.user.texts) == ("enough", [])


async def test_the_reason_of_the_other_end_is_told(end: OneEnd) -> None:
    with trio.fail_after(DEADLINE):
        await end.peer.send(TextMessage("last"))
        await end.peer.send(CloseConnection(1000, "done\n\x1b[31m"))
        assert await end.peer.event() == CloseConnection(1000, "done\n\x1b[31m")
        await end.peer.stream.aclose()
        await end.ended.wait()
    assert end.reason == "the connection was closed: done[31m"
    assert end.user.texts == ["last"]


async def test_a_pong_is_heard(end: OneEnd) -> None:
    end.socket.send_ping()
    with trio.fail_after(DEADLINE):
        ping = await end.peer.event()
        assert isinstance(ping, Ping)
        assert end.user.signs == 0
        await end.peer.send(ping.response())
        await until(lambda: end.user.signs == 1)


async def test_a_ping_is_heard(end: OneEnd) -> None:
    with trio.fail_after(DEADLINE):
        for number in count(1):
            await end.peer.send(Ping())
            assert await end.peer.event() == Pong()
            await until(lambda number=number: end.user.signs == number)  # type: ignore[misc]
            if number == 3:
                break


async def test_who_does_not_read_is_dropped(mock_clock: MockClock, end: OneEnd) -> None:
    end.socket.send_text("x" * 50_000)
    await pass_time(mock_clock, WRITE_SECONDS)
    assert end.reason == "it does not read what it is sent"


async def test_who_lets_too_much_wait_is_dropped(
    mock_clock: MockClock, end: OneEnd
) -> None:
    """It is not waited for: the time stands still here."""
    for _ in range(MAX_QUEUED_BYTES // 50_000 + 2):
        end.socket.send_text("x" * 50_000)
    await pass_time(mock_clock, 0)
    assert end.reason == "it does not read what it is sent"


async def test_who_never_shakes_hands_is_dropped(
    mock_clock: MockClock, nursery: trio.Nursery
) -> None:
    end = OneEnd()
    nursery.start_soon(end.run)
    await pass_time(mock_clock, 0)
    await pass_time(mock_clock, HANDSHAKE_SECONDS)
    await pass_time(mock_clock, CLOSE_SECONDS)
    assert end.reason == "it did not open a WebSocket"


async def test_a_close_does_not_wait_for_the_handshake(
    mock_clock: MockClock, nursery: trio.Nursery
) -> None:
    end = OneEnd()
    nursery.start_soon(end.run)
    await pass_time(mock_clock, 0)
    end.socket.close("enough")
    assert await end.peer.rest() == []
    await pass_time(mock_clock, CLOSE_SECONDS)
    assert end.reason == "enough"


async def test_who_answers_no_ping_is_dropped(
    mock_clock: MockClock, end: OneEnd
) -> None:
    end.socket.send_ping()
    assert isinstance(await end.peer.event(), Ping)
    await pass_time(mock_clock, 0)
    await pass_time(mock_clock, PONG_SECONDS)
    assert end.reason == "it does not answer pings"


async def test_a_fault_of_the_user_is_not_taken_for_the_peers() -> None:
    class Broken(Recorder):
        def received_text(self, text: str) -> None:
            raise ValueError(text)

    end = OneEnd()
    end.user = Broken()
    with (
        trio.fail_after(DEADLINE),
        pytest.RaisesGroup(ValueError, flatten_subgroups=True),
    ):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(end.run)
            await end.shake_hands()
            await end.peer.send_text("mine")
