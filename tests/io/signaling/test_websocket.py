"""One end of a WebSocket, with a raw peer at the other."""

import pytest
import trio
import trio.testing
from trio.testing import MockClock
from typing_extensions import override
from wsproto import ConnectionType
from wsproto.events import (
    AcceptConnection,
    CloseConnection,
    Ping,
    Pong,
    Request,
    TextMessage,
)

from sleap_rtc.io.signaling.websocket import WebSocket, WebSocketLimits
from sleap_rtc.proto.rendezvous.messages import MAX_SIGNAL_BYTES
from tests.io.signaling.lab import DEADLINE, HOST, RawPeer, pass_time

LIMITS = WebSocketLimits(MAX_SIGNAL_BYTES)


class Recorder:
    """A user that records its input."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.signs = 0

    def received_text(self, text: str) -> None:
        self.texts.append(text)

    def heard(self) -> None:
        self.signs += 1


class OneEnd:
    """A `WebSocket` of a server that runs, and a raw peer at its other end."""

    def __init__(self, limits: WebSocketLimits = LIMITS) -> None:
        ours, theirs = trio.testing.lockstep_stream_pair()
        self.socket = WebSocket(ours, limits)
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
    await trio.testing.wait_all_tasks_blocked()
    return one_end


async def test_a_cancelled_owner_cuts_no_frame(end: OneEnd) -> None:
    """The peer gets whole frames, even if most of a frame is still unwritten."""
    end.socket.send_text("x" * 50_000)
    await trio.testing.wait_all_tasks_blocked()
    end.scope.cancel()
    with trio.fail_after(DEADLINE):
        received = await end.peer.rest()
    texts = [event for event in received if isinstance(event, TextMessage)]
    assert sum(len(event.data) for event in texts) == 50_000
    assert texts[-1].message_finished


async def test_queued_messages_are_sent_before_the_close(end: OneEnd) -> None:
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


async def test_messages_during_the_close_are_ignored(end: OneEnd) -> None:
    end.socket.close("enough")
    with trio.fail_after(DEADLINE):
        await end.peer.send(TextMessage("late"), Pong(), Ping(), TextMessage("later"))
        assert await end.peer.event() == CloseConnection(1000, "enough")
        await end.peer.stream.aclose()
        await end.ended.wait()
    assert (end.reason, end.user.texts) == ("enough", [])


async def test_the_reason_of_the_peer_is_returned(end: OneEnd) -> None:
    with trio.fail_after(DEADLINE):
        await end.peer.send(TextMessage("last"))
        await end.peer.send(CloseConnection(1000, "done\n\x1b[31m"))
        assert await end.peer.event() == CloseConnection(1000, "done\n\x1b[31m")
        await end.peer.stream.aclose()
        await end.ended.wait()
    assert end.reason == "the connection was closed: done"
    assert end.user.texts == ["last"]


async def test_a_pong_is_heard(end: OneEnd) -> None:
    end.socket.send_ping()
    with trio.fail_after(DEADLINE):
        ping = await end.peer.event()
        assert isinstance(ping, Ping)
        assert end.user.signs == 0
        await end.peer.send(ping.response())
        await trio.testing.wait_all_tasks_blocked()
    assert end.user.signs == 1


async def test_a_ping_is_heard(end: OneEnd) -> None:
    with trio.fail_after(DEADLINE):
        for _ in range(3):
            await end.peer.send(Ping())
            assert await end.peer.event() == Pong()
        await trio.testing.wait_all_tasks_blocked()
    assert end.user.signs == 3


@pytest.mark.timeout(60)
async def test_a_peer_that_does_not_read_is_dropped(
    mock_clock: MockClock, end: OneEnd
) -> None:
    end.socket.send_text("x" * 50_000)
    await pass_time(mock_clock, 0)
    assert end.reason is None
    await pass_time(mock_clock, LIMITS.write_timeout)
    assert end.reason == "it does not read what it is sent"


@pytest.mark.timeout(60)
async def test_a_peer_that_lets_too_much_wait_is_dropped(
    mock_clock: MockClock, end: OneEnd
) -> None:
    """It is dropped at once: the clock does not move here."""
    for _ in range(LIMITS.max_queued // 50_000 + 2):
        end.socket.send_text("x" * 50_000)
    await pass_time(mock_clock, 0)
    assert end.reason == "it does not read what it is sent"


# ---------------------------------------------------------- bytes without a message

SMALL = WebSocketLimits(MAX_SIGNAL_BYTES, max_unfinished=10_000)


@pytest.fixture
async def small(nursery: trio.Nursery) -> OneEnd:
    one_end = OneEnd(SMALL)
    nursery.start_soon(one_end.run)
    await one_end.shake_hands()
    return one_end


async def test_parts_that_never_make_a_message_are_cut_off(small: OneEnd) -> None:

    async def send_parts() -> None:
        while True:
            await small.peer.send(TextMessage("", message_finished=False))

    with trio.fail_after(DEADLINE):
        with pytest.raises(trio.BrokenResourceError):
            await send_parts()
        await small.ended.wait()
    assert small.reason == "it sends no whole message"


async def test_the_number_of_whole_messages_is_not_limited(small: OneEnd) -> None:
    with trio.fail_after(DEADLINE):
        for _ in range(20):
            await small.peer.send_text("x" * 4000)
        await small.peer.send(Ping(b"end"))
        assert await small.peer.event() == Pong(b"end")
    assert len(small.user.texts) == 20


@pytest.mark.parametrize("is_page", [True, False])
async def test_an_endless_page_is_cut_off(is_page: bool) -> None:
    """A client asks a web server that sends a page, or headers, without an end."""
    ours, theirs = trio.testing.lockstep_stream_pair()
    reason = ""

    async def run() -> None:
        nonlocal reason
        socket = WebSocket(ours, SMALL, f"ws://{HOST}/")
        reason = await socket.run(Recorder())

    async def send_page() -> None:
        await theirs.receive_some()  # the request
        end = b"\r\n" if is_page else b""
        await theirs.send_all(b"HTTP/1.1 200 OK\r\nX: y\r\n" + end)
        while True:
            await theirs.send_all(b"x" * 1000)

    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as client:
            client.start_soon(run)
            with pytest.raises(trio.BrokenResourceError):
                await send_page()
    assert reason == "it sends no whole message"


@pytest.mark.timeout(60)
async def test_a_peer_that_never_shakes_hands_is_dropped(
    mock_clock: MockClock, nursery: trio.Nursery
) -> None:
    end = OneEnd()
    nursery.start_soon(end.run)
    await pass_time(mock_clock, 0)
    await pass_time(mock_clock, LIMITS.handshake_timeout)
    await pass_time(mock_clock, LIMITS.close_timeout)
    assert end.reason == "it did not open a WebSocket"


@pytest.mark.timeout(60)
async def test_a_server_that_is_gone_before_the_request_is_noticed_at_once(
    autojump_clock: MockClock,
) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    await theirs.aclose()
    socket = WebSocket(ours, LIMITS, f"ws://{HOST}/")
    began = trio.current_time()
    assert await socket.run(Recorder()) == "it did not open a WebSocket"
    assert trio.current_time() - began < 1


async def test_a_close_does_not_wait_for_the_handshake(
    mock_clock: MockClock, nursery: trio.Nursery
) -> None:
    end = OneEnd()
    nursery.start_soon(end.run)
    await pass_time(mock_clock, 0)
    end.socket.close("enough")
    assert await end.peer.rest() == []
    await pass_time(mock_clock, LIMITS.close_timeout)
    assert end.reason == "enough"


@pytest.mark.timeout(60)
async def test_a_peer_that_answers_no_ping_is_dropped(
    mock_clock: MockClock, end: OneEnd
) -> None:
    end.socket.send_ping()
    assert isinstance(await end.peer.event(), Ping)
    await pass_time(mock_clock, 0)
    await pass_time(mock_clock, LIMITS.pong_timeout)
    assert end.reason == "it does not answer pings"


async def test_an_exception_of_the_user_is_raised() -> None:
    class Broken(Recorder):
        @override
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
