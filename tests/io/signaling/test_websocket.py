"""One end of a WebSocket, with a raw peer at the other."""

import pytest
import trio
import trio.testing
from trio.testing import MockClock
from wsproto import ConnectionType
from wsproto.events import (
    AcceptConnection,
    CloseConnection,
    Ping,
    Pong,
    Request,
    TextMessage,
)

from sleap_rtc.io.signaling.websocket import (
    CLOSE_SECONDS,
    HANDSHAKE_SECONDS,
    MAX_QUEUED_BYTES,
    PONG_SECONDS,
    WRITE_SECONDS,
    WebSocket,
)
from sleap_rtc.proto.rendezvous.messages import MAX_SIGNAL_BYTES
from tests.io.signaling.lab import DEADLINE, HOST, RawPeer, pass_time, until


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
    await trio.testing.wait_all_tasks_blocked()
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
        for _ in range(3):
            await end.peer.send(Ping())
            assert await end.peer.event() == Pong()
        await until(lambda: end.user.signs == 3)


@pytest.mark.timeout(20)
async def test_who_does_not_read_is_dropped(mock_clock: MockClock, end: OneEnd) -> None:
    end.socket.send_text("x" * 50_000)
    await pass_time(mock_clock, 0)
    assert end.reason is None
    await pass_time(mock_clock, WRITE_SECONDS)
    assert end.reason == "it does not read what it is sent"


@pytest.mark.timeout(20)
async def test_who_lets_too_much_wait_is_dropped(
    mock_clock: MockClock, end: OneEnd
) -> None:
    """It is not waited for: the time stands still here."""
    for _ in range(MAX_QUEUED_BYTES // 50_000 + 2):
        end.socket.send_text("x" * 50_000)
    await pass_time(mock_clock, 0)
    assert end.reason == "it does not read what it is sent"


@pytest.mark.timeout(20)
async def test_who_never_shakes_hands_is_dropped(
    mock_clock: MockClock, nursery: trio.Nursery
) -> None:
    end = OneEnd()
    nursery.start_soon(end.run)
    await pass_time(mock_clock, 0)
    await pass_time(mock_clock, HANDSHAKE_SECONDS)
    await pass_time(mock_clock, CLOSE_SECONDS)
    assert end.reason == "it did not open a WebSocket"


@pytest.mark.timeout(20)
async def test_a_server_that_is_gone_before_the_request_is_noticed_at_once(
    autojump_clock: MockClock,
) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    await theirs.aclose()
    socket = WebSocket(ours, MAX_SIGNAL_BYTES, f"ws://{HOST}/")
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
    await pass_time(mock_clock, CLOSE_SECONDS)
    assert end.reason == "enough"


@pytest.mark.timeout(20)
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
