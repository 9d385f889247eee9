"""What links of both kinds have to do, over real sockets on loopback."""

import itertools
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import psutil
import pytest
import trio
import trio.testing

from sleap_rtc.io.link.certificates import make_certificate
from sleap_rtc.io.link.link import DialError, Link, LinkClosedError
from sleap_rtc.io.link.session import MAX_UNPROVEN_LINKS
from sleap_rtc.io.link.session_link import SessionLink
from sleap_rtc.proto.messages import Auth, Error, Message
from tests.io.link.kinds import (
    AUTH,
    CANCEL,
    CERTIFICATE,
    DER,
    MEGABYTE,
    QUIC,
    TCP,
    AnyListener,
    Kind,
    judge,
    line,
    make_frame,
    pair,
    send_until_held_back,
)


@pytest.fixture(autouse=True)
async def deadline() -> AsyncIterator[None]:
    with trio.fail_after(60):
        yield


@pytest.fixture(params=[TCP, QUIC], ids=["tcp", "quic"])
def kind(request: pytest.FixtureRequest) -> Kind:
    chosen: Kind = request.param
    return chosen


@pytest.fixture
async def listener(kind: Kind) -> AsyncIterator[AnyListener]:
    async with kind.listen("127.0.0.1", 0, CERTIFICATE, judge) as opened:
        yield opened


# ------------------------------------------------------------------- what links carry


async def test_messages_go_both_ways_and_the_client_has_a_name(
    kind: Kind,
    listener: AnyListener,
) -> None:
    async with pair(kind, listener) as (client, worker):
        assert worker.peer == "client 5555"
        for number in range(100):
            await client.send_message(line(number))
            await worker.send_message(line(1000 + number))
        for number in range(100):
            assert await worker.receive_message() == line(number)
            assert await client.receive_message() == line(1000 + number)


async def test_frames_go_both_ways_at_once_to_a_slow_reader(
    kind: Kind,
    listener: AnyListener,
) -> None:
    async def send(link: Link) -> None:
        for index in range(32):
            await link.send_frame(make_frame(index))

    async def receive(link: Link) -> None:
        for index in range(32):
            if index % 8 == 0:
                # Longer than a frame takes: the senders get ahead.
                await trio.sleep(0.2)
            frame = await link.receive_frame()
            assert frame.header.index == index
            assert bytes(frame.payload) == make_frame(index).payload

    async with pair(kind, listener) as (client, worker), trio.open_nursery() as nursery:
        for link in (client, worker):
            nursery.start_soon(send, link)
            nursery.start_soon(receive, link)


async def test_a_transfer_lets_others_have_their_turn(
    kind: Kind, listener: AnyListener
) -> None:
    count = 24
    moved: list[int] = []

    async def watch(links: tuple[Link, Link]) -> None:
        while True:
            seen = [link.statistics() for link in links]
            moved.append(sum(one.bytes_sent + one.bytes_received for one in seen))
            await trio.lowlevel.checkpoint()

    async def send(link: Link) -> None:
        for index in range(count):
            await link.send_frame(make_frame(index))

    async with pair(kind, listener) as links, trio.open_nursery() as nursery:
        nursery.start_soon(watch, links)
        nursery.start_soon(send, links[0])
        for _ in range(count):
            await links[1].receive_frame()
        nursery.cancel_scope.cancel()
    assert moved[-1] - moved[0] > 2 * (count - 4) * MEGABYTE
    # In one round of the event loop each side sends and receives a few times.
    longest = max(after - before for before, after in itertools.pairwise(moved))
    assert longest < 8 * MEGABYTE


async def test_a_message_does_not_wait_for_a_reader_of_frames(
    kind: Kind,
    listener: AnyListener,
) -> None:
    async with pair(kind, listener) as (client, worker):
        for index in range(8):
            await client.send_frame(make_frame(index))
        await client.send_message(CANCEL)
        assert await worker.receive_message() == CANCEL


@pytest.fixture
def short_queues(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    session = f"sleap_rtc.io.{kind.name}.session"
    monkeypatch.setattr(f"{session}.MAX_UNREAD", 2 * MEGABYTE)
    monkeypatch.setattr(f"{session}.MAX_UNSENT_FRAMES", MEGABYTE)


@pytest.mark.usefixtures("short_queues")
async def test_sending_frames_waits_for_a_reader(
    kind: Kind, listener: AnyListener
) -> None:
    async with pair(kind, listener) as (client, worker):
        sent = await send_until_held_back(client)
        # With TCP the kernels keep some MiB more.
        assert 20 <= sent <= (33 if kind is QUIC else 300)
        for index in range(sent):
            assert (await worker.receive_frame()).header.index == index


async def test_statistics_tell_what_happened(kind: Kind, listener: AnyListener) -> None:
    async with pair(kind, listener) as (client, worker):
        await client.send_frame(make_frame(1))
        await worker.receive_frame()
        sent, received = client.statistics(), worker.statistics()
        assert sent.kind == kind.name
        assert sent.address == f"127.0.0.1:{listener.port}"
        assert sent.bytes_sent > MEGABYTE
        assert received.bytes_received > MEGABYTE
        assert 0 < sent.rtt < 1


async def test_many_links_share_one_socket(kind: Kind, listener: AnyListener) -> None:
    done = 0

    async def talk(number: int) -> None:
        nonlocal done
        auth = Auth(session=f"{number:032x}", proof=AUTH.proof)
        async with kind.dial(
            "127.0.0.1", listener.port, certificate_der=DER, auth=auth
        ) as link:
            await link.send_message(line(number))
            await link.send_frame(make_frame(number, 50_000))
            assert await link.receive_message() == line(number)
            done += 1

    async def answer(link: Link) -> None:
        message = await link.receive_message()
        frame = await link.receive_frame()
        assert message == line(frame.header.index)
        await link.send_message(message)

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(talk, number)
        for _ in range(20):
            nursery.start_soon(answer, await listener.accept())
    assert done == 20


# --------------------------------------------------------------------- how links end


async def test_a_close_carries_its_reason_and_all_that_was_sent(
    kind: Kind,
    listener: AnyListener,
) -> None:
    async with pair(kind, listener) as (client, worker):
        for index in range(4):
            await client.send_frame(make_frame(index))
        await client.send_message(CANCEL)
        await client.aclose("enough for today")
        assert await worker.receive_message() == CANCEL
        for index in range(4):
            assert (await worker.receive_frame()).header.index == index
        with pytest.raises(LinkClosedError) as caught:
            await worker.receive_message()
        assert caught.value.reason == "enough for today"
        assert caught.value.by_peer
        with pytest.raises(LinkClosedError) as caught:
            await client.send_message(CANCEL)
        assert not caught.value.by_peer


async def test_what_comes_together_with_the_end_is_received(
    kind: Kind,
    listener: AnyListener,
) -> None:
    async with pair(kind, listener) as (client, worker), trio.open_nursery() as nursery:
        received: list[Message] = []

        async def receive() -> None:
            received.append(await worker.receive_message())
            with pytest.raises(LinkClosedError, match="bye"):
                await worker.receive_message()

        nursery.start_soon(receive)
        await trio.testing.wait_all_tasks_blocked()
        await client.send_message(CANCEL)
        client.close_now("bye")
        nursery.cancel_scope.deadline = trio.current_time() + 10
    assert received == [CANCEL]


async def test_a_worker_can_close_too(kind: Kind, listener: AnyListener) -> None:
    async with pair(kind, listener) as (client, worker):
        await worker.aclose("no room left")
        await worker.aclose("again")
        with pytest.raises(LinkClosedError, match="no room left"):
            await client.receive_frame()


@pytest.mark.usefixtures("short_queues")
async def test_everything_that_waits_hears_of_the_end(
    kind: Kind, listener: AnyListener
) -> None:
    reasons: list[str] = []

    async def expect_end(wait: Callable[[], Awaitable[object]]) -> None:
        try:
            while True:
                await wait()
        except LinkClosedError as error:
            reasons.append(error.reason)

    async with pair(kind, listener) as (client, worker):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(expect_end, client.receive_message)
            nursery.start_soon(expect_end, client.receive_frame)
            nursery.start_soon(expect_end, lambda: client.send_frame(make_frame(1)))
            await trio.testing.wait_all_tasks_blocked(0.05)
            with trio.CancelScope() as scope:
                scope.cancel()
                await worker.aclose("bye")
        assert reasons == ["bye"] * 3


async def test_a_link_ends_with_its_listener(kind: Kind) -> None:
    async def listen(
        stop: trio.Event, task_status: trio.TaskStatus[AnyListener]
    ) -> None:
        async with kind.listen("127.0.0.1", 0, CERTIFICATE, judge) as opened:
            task_status.started(opened)
            await stop.wait()

    async with trio.open_nursery() as nursery:
        stop = trio.Event()
        listener: AnyListener = await nursery.start(listen, stop)
        async with pair(kind, listener) as (client, _):
            stop.set()
            with pytest.raises(LinkClosedError, match="listener was closed"):
                await client.receive_message()


async def test_a_last_word_can_be_said_when_everything_is_cancelled(
    kind: Kind,
) -> None:
    async def serve(task_status: trio.TaskStatus[AnyListener]) -> None:
        async with kind.listen("127.0.0.1", 0, CERTIFICATE, judge) as opened:
            task_status.started(opened)
            link = await opened.accept()
            try:
                await trio.sleep_forever()
            finally:
                await trio.lowlevel.cancel_shielded_checkpoint()
                with trio.CancelScope(shield=True):
                    await link.aclose("the power went away")

    async with trio.open_nursery() as clients, trio.open_nursery() as servers:
        listener: AnyListener = await servers.start(serve)
        opened = trio.Event()

        async def hear() -> None:
            async with kind.dial(
                "127.0.0.1", listener.port, certificate_der=DER, auth=AUTH
            ) as link:
                opened.set()
                with pytest.raises(LinkClosedError, match="the power went away"):
                    await link.receive_message()

        clients.start_soon(hear)
        await opened.wait()
        await trio.testing.wait_all_tasks_blocked(0.05)
        servers.cancel_scope.cancel()


async def test_what_the_body_raises_leaves_as_it_is(
    kind: Kind, listener: AnyListener
) -> None:
    with pytest.raises(KeyError):
        async with pair(kind, listener) as (_, worker):
            raise KeyError
    with pytest.raises(LinkClosedError):
        await worker.receive_message()


SILENT = """
import sys, trio
from tests.io.link.kinds import AUTH, QUIC, TCP

async def main():
    kind = TCP if sys.argv[1] == "tcp" else QUIC
    port, der = int(sys.argv[2]), bytes.fromhex(sys.argv[3])
    async with kind.dial("127.0.0.1", port, certificate_der=der, auth=AUTH):
        await trio.sleep_forever()

trio.run(main)
"""


@asynccontextmanager
async def vanished_client(
    kind: Kind, listener: AnyListener
) -> AsyncIterator[SessionLink]:
    """The worker's end of a link whose client has stopped to do anything."""
    command = [sys.executable, "-c", SILENT, kind.name, str(listener.port), DER.hex()]
    async with trio.open_nursery() as nursery:
        process: trio.Process = await nursery.start(
            partial(trio.run_process, command, check=False)
        )
        worker = await listener.accept()
        assert isinstance(worker, SessionLink)
        psutil.Process(process.pid).suspend()
        try:
            yield worker
        finally:
            process.kill()


async def test_a_peer_that_vanishes_is_noticed(kind: Kind) -> None:
    async with (
        kind.listen("127.0.0.1", 0, CERTIFICATE, judge, idle_timeout=1.0) as listener,
        vanished_client(kind, listener) as worker,
    ):
        begin = trio.current_time()
        with pytest.raises(LinkClosedError, match=r"no answer from 127.*for 1 s"):
            await worker.receive_message()
        assert trio.current_time() - begin < 3


async def test_a_close_does_not_wait_long_for_a_vanished_peer(
    kind: Kind, listener: AnyListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sleap_rtc.io.link.session_link.FLUSH_TIMEOUT", 0.3)
    async with vanished_client(kind, listener) as worker:
        await send_until_held_back(worker)
        begin = trio.current_time()
        await worker.aclose("bye")
        assert 0.3 <= trio.current_time() - begin < 2


async def test_an_idle_link_lives_on(kind: Kind) -> None:
    async with (
        kind.listen("127.0.0.1", 0, CERTIFICATE, judge, idle_timeout=0.25) as listener,
        pair(kind, listener, idle_timeout=0.25) as (client, worker),
    ):
        await trio.sleep(1)
        await client.send_message(CANCEL)
        assert await worker.receive_message() == CANCEL


# ------------------------------------------------------------------------- bad peers


async def test_a_wrong_certificate_is_refused(
    kind: Kind, listener: AnyListener
) -> None:
    other = make_certificate().certificate_der
    with pytest.raises(DialError, match="not who it should be"):
        async with kind.dial(
            "127.0.0.1", listener.port, certificate_der=other, auth=AUTH
        ):
            pytest.fail("it must not open")


async def test_what_is_no_certificate_is_refused(
    kind: Kind, listener: AnyListener
) -> None:
    with pytest.raises(DialError, match="no certificate"):
        async with kind.dial(
            "127.0.0.1", listener.port, certificate_der=b"?", auth=AUTH
        ):
            pytest.fail("it must not open")


async def test_a_wrong_proof_is_refused_with_a_reason(
    kind: Kind, listener: AnyListener
) -> None:
    wrong = Auth(session="5" * 32, proof="8" * 64)
    async with kind.dial(
        "127.0.0.1", listener.port, certificate_der=DER, auth=wrong
    ) as link:
        with pytest.raises(LinkClosedError, match=r"\Arefused\Z"):
            await link.receive_message()


async def test_a_client_must_prove_itself_in_time(
    kind: Kind, listener: AnyListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sleap_rtc.io.link.session.HANDSHAKE_TIMEOUT", 0.5)
    async with kind.connect("127.0.0.1", listener.port, certificate_der=DER) as link:
        with pytest.raises(LinkClosedError, match="no proof"):
            await link.receive_message()


async def test_only_so_many_clients_may_be_unproven(
    kind: Kind, listener: AnyListener
) -> None:
    async with trio.open_nursery() as nursery:
        blocked = trio.Event()

        async def connect() -> None:
            async with kind.connect("127.0.0.1", listener.port, certificate_der=DER):
                connected.release()
                await trio.sleep_forever()

        connected = trio.Semaphore(0)
        for _ in range(MAX_UNPROVEN_LINKS):
            nursery.start_soon(connect)
        for _ in range(MAX_UNPROVEN_LINKS):
            await connected.acquire()
        with trio.move_on_after(0.5):
            async with pair(kind, listener):
                blocked.set()
        assert not blocked.is_set()
        nursery.cancel_scope.cancel()
    async with pair(kind, listener) as (client, worker):
        await client.send_message(CANCEL)
        assert await worker.receive_message() == CANCEL


async def test_garbage_on_one_link_leaves_the_others_alone(
    kind: Kind,
    listener: AnyListener,
) -> None:
    async with (
        pair(kind, listener) as (bad, worker),
        pair(kind, listener) as (good, other),
    ):
        bad._core._queue_message(b"hello")
        bad.pump()
        with pytest.raises(LinkClosedError, match="no NAME") as here:
            await worker.receive_message()
        assert not here.value.by_peer
        with pytest.raises(LinkClosedError, match="no NAME") as there:
            await bad.receive_message()
        assert there.value.by_peer
        await good.send_message(CANCEL)
        assert await other.receive_message() == CANCEL


async def test_unknown_messages_are_skipped(kind: Kind, listener: AnyListener) -> None:
    async with pair(kind, listener) as (client, worker):
        client._core._queue_message(b"NEWER::yes")
        client._core._queue_message(b"LANE_REQUEST::3::any")  # of an older client
        await client.send_message(CANCEL)
        assert await worker.receive_message() == CANCEL
        assert worker.statistics().ignored_messages == 2


# ----------------------------------------------------------------------- cancellation


async def test_cancelled_calls_leave_the_link_usable(
    kind: Kind, listener: AnyListener
) -> None:
    async def send_frame(link: Link) -> None:
        await link.send_frame(make_frame(1, 1000))

    async def send_message(link: Link) -> None:
        await link.send_message(CANCEL)

    async def receive_frame(link: Link) -> None:
        await link.receive_frame()

    async def receive_message(link: Link) -> None:
        await link.receive_message()

    async with pair(kind, listener) as (client, worker):
        for call in (send_frame, send_message, receive_frame, receive_message):
            with trio.CancelScope() as scope:
                scope.cancel()
                await call(client)
            assert scope.cancelled_caught
            async with trio.open_nursery() as nursery:
                nursery.start_soon(call, client)
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
        # The ones that were not cancelled too early went out whole.
        await worker.send_message(line(1))
        assert await client.receive_message() == line(1)
        assert await worker.receive_message() == CANCEL
        assert (await worker.receive_frame()).header.length == 1000


@pytest.mark.usefixtures("short_queues")
async def test_a_sender_cancelled_while_it_waits_sent_nothing(
    kind: Kind,
    listener: AnyListener,
) -> None:
    async with pair(kind, listener) as (client, worker):
        sent = await send_until_held_back(client)
        await client.send_message(line(sent))
        for index in range(sent):
            assert (await worker.receive_frame()).header.index == index
        await client.send_frame(make_frame(99))
        assert (await worker.receive_frame()).header.index == 99
        assert await worker.receive_message() == line(sent)


async def test_a_cancelled_dial_leaves_nothing_behind(
    kind: Kind, listener: AnyListener
) -> None:
    for _ in range(20):
        with trio.move_on_after(0.002):
            async with kind.dial(
                "127.0.0.1", listener.port, certificate_der=DER, auth=AUTH
            ):
                pass
    async with pair(kind, listener) as (client, _):
        await client.send_message(Error("still here"))
