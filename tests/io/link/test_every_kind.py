"""Behaviour that links of all kinds share, over real sockets on loopback."""

import itertools
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import psutil
import pytest
import trio
import trio.testing
from msgspec.structs import replace
from trio.testing import MockClock

from sleap_rtc.io.connect.listener import Listener
from sleap_rtc.io.link.certificates import make_certificate
from sleap_rtc.io.link.endpoint import ServedLink
from sleap_rtc.io.link.limits import LIMITS
from sleap_rtc.io.link.link import DialError, Link, LinkClosedError
from sleap_rtc.io.link.session_link import SessionLink
from sleap_rtc.proto.messages import (
    Auth,
    Message,
    SharedStorageJob,
    TrainingComplete,
)
from sleap_rtc.proto.route.kinds import LINK_KINDS, LinkKindName
from tests.io.link.kinds import (
    AUTH,
    DER,
    MEGABYTE,
    VERIFIED,
    connected,
    dialed,
    jump_when_idle,
    listening,
    make_frame,
    numbered,
    open_sockets,
    pair,
    send_until_held_back,
    silent_port,
)


@pytest.fixture(autouse=True)
async def deadline() -> AsyncIterator[None]:
    with trio.fail_after(60):
        yield


@pytest.fixture(params=LINK_KINDS)
def kind(request: pytest.FixtureRequest) -> LinkKindName:
    chosen: LinkKindName = request.param
    return chosen


@pytest.fixture
async def listener() -> AsyncIterator[Listener]:
    async with listening() as opened:
        yield opened


# ------------------------------------------------------------------- what links carry


async def test_a_message_of_the_wrong_direction_ends_the_link(
    kind: LinkKindName,
    listener: Listener,
) -> None:
    async with pair(kind, listener) as (client, worker):
        await client.send_message(TrainingComplete())
        with pytest.raises(LinkClosedError, match="is not sent by clients"):
            await worker.receive_message()
    async with pair(kind, listener) as (client, worker):
        await worker.send_message(SharedStorageJob())
        with pytest.raises(LinkClosedError, match="is not sent by workers"):
            await client.receive_message()


async def test_messages_go_both_ways_and_the_client_has_a_name(
    kind: LinkKindName,
    listener: Listener,
) -> None:
    async with pair(kind, listener) as (client, worker):
        assert worker.peer == "client 5555"
        for number in range(100):
            await client.send_message(numbered(number))
            await worker.send_message(numbered(1000 + number))
        for number in range(100):
            assert await worker.receive_message() == numbered(number)
            assert await client.receive_message() == numbered(1000 + number)


async def test_frames_go_both_ways_at_once_to_a_slow_reader(
    kind: LinkKindName,
    listener: Listener,
) -> None:
    async def send(link: Link[Message]) -> None:
        for index in range(32):
            await link.send_frame(make_frame(index))

    async def receive(link: Link[Message]) -> None:
        for index in range(32):
            if index % 8 == 0:
                # The senders get ahead, up to their limits.
                await trio.testing.wait_all_tasks_blocked(0.02)
            frame = await link.receive_frame()
            assert frame.header.index == index
            assert bytes(frame.payload) == make_frame(index).payload

    async with pair(kind, listener) as (client, worker), trio.open_nursery() as nursery:
        for link in (client, worker):
            nursery.start_soon(send, link)
            nursery.start_soon(receive, link)


async def test_a_transfer_lets_other_tasks_run(
    kind: LinkKindName, listener: Listener
) -> None:
    count = 24
    moved: list[int] = []

    async def watch(links: tuple[Link[Message], Link[Message]]) -> None:
        while True:
            seen = [link.statistics() for link in links]
            moved.append(sum(one.bytes_sent + one.bytes_received for one in seen))
            await trio.lowlevel.checkpoint()

    async def send(link: Link[Message]) -> None:
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
    kind: LinkKindName,
    listener: Listener,
) -> None:
    async with pair(kind, listener) as (client, worker):
        for index in range(8):
            await client.send_frame(make_frame(index))
        await client.send_message(VERIFIED)
        assert await worker.receive_message() == VERIFIED


SHORT_QUEUES = replace(LIMITS, max_unread=2 * MEGABYTE, max_unsent_frames=MEGABYTE)


async def test_sending_frames_waits_for_a_reader(kind: LinkKindName) -> None:
    async with (
        listening(SHORT_QUEUES) as listener,
        pair(kind, listener, SHORT_QUEUES) as (client, worker),
    ):
        sent = await send_until_held_back(client)
        # With TCP the kernels keep some MiB more.
        assert 20 <= sent <= (33 if kind == "quic" else 300)
        for index in range(sent):
            assert (await worker.receive_frame()).header.index == index


async def test_statistics_count_the_traffic(
    kind: LinkKindName, listener: Listener
) -> None:
    async with pair(kind, listener) as (client, worker):
        await client.send_frame(make_frame(1))
        await worker.receive_frame()
        sent, received = client.statistics(), worker.statistics()
        assert sent.kind == kind
        assert sent.address == f"127.0.0.1:{listener.port}"
        assert sent.bytes_sent > MEGABYTE
        assert received.bytes_received > MEGABYTE
        assert 0 < sent.rtt < 1


async def test_many_links_share_one_socket(
    kind: LinkKindName, listener: Listener
) -> None:
    done = 0

    async def talk(number: int) -> None:
        nonlocal done
        auth = Auth(session=f"{number:032x}", proof=AUTH.proof)
        async with dialed(kind, listener.port, auth=auth) as link:
            await link.send_message(numbered(number))
            await link.send_frame(make_frame(number, 50_000))
            assert await link.receive_message() == numbered(number)
            done += 1

    async def answer(link: Link[Message]) -> None:
        message = await link.receive_message()
        frame = await link.receive_frame()
        assert message == numbered(frame.header.index)
        await link.send_message(message)

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(talk, number)
        for _ in range(20):
            nursery.start_soon(answer, await listener.accept())
    assert done == 20


# --------------------------------------------------------------------- how links end


async def test_a_close_carries_its_reason_and_all_sent_data(
    kind: LinkKindName,
    listener: Listener,
) -> None:
    async with pair(kind, listener) as (client, worker):
        for index in range(4):
            await client.send_frame(make_frame(index))
        await client.send_message(VERIFIED)
        await client.aclose("enough for today")
        assert await worker.receive_message() == VERIFIED
        for index in range(4):
            assert (await worker.receive_frame()).header.index == index
        with pytest.raises(LinkClosedError) as caught:
            await worker.receive_message()
        assert caught.value.reason == "enough for today"
        with pytest.raises(LinkClosedError) as caught:
            await client.send_message(VERIFIED)
        assert caught.value.reason == "closed: enough for today"


async def test_data_that_comes_together_with_the_end_is_received(
    kind: LinkKindName,
    listener: Listener,
) -> None:
    async with pair(kind, listener) as (client, worker), trio.open_nursery() as nursery:
        received: list[Message] = []

        async def receive() -> None:
            received.append(await worker.receive_message())
            with pytest.raises(LinkClosedError, match="bye"):
                await worker.receive_message()

        nursery.start_soon(receive)
        await trio.testing.wait_all_tasks_blocked()
        await client.send_message(VERIFIED)
        client.close_now("bye")
        nursery.cancel_scope.deadline = trio.current_time() + 10
    assert received == [VERIFIED]


async def test_a_worker_can_close_as_well(
    kind: LinkKindName, listener: Listener
) -> None:
    async with pair(kind, listener) as (client, worker):
        await worker.aclose("no room left")
        await worker.aclose("again")
        with pytest.raises(LinkClosedError, match="no room left"):
            await client.receive_frame()


async def test_every_waiting_call_raises_at_the_end(kind: LinkKindName) -> None:
    reasons: list[str] = []

    async def expect_end(wait: Callable[[], Awaitable[object]]) -> None:
        try:
            while True:
                await wait()
        except LinkClosedError as error:
            reasons.append(error.reason)

    async with (
        listening(SHORT_QUEUES) as listener,
        pair(kind, listener, SHORT_QUEUES) as (client, worker),
    ):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(expect_end, client.receive_message)
            nursery.start_soon(expect_end, client.receive_frame)
            nursery.start_soon(expect_end, lambda: client.send_frame(make_frame(1)))
            await trio.testing.wait_all_tasks_blocked(0.05)
            with trio.CancelScope() as scope:
                scope.cancel()
                await worker.aclose("bye")
        assert reasons == ["bye"] * 3


async def test_a_link_ends_with_its_listener(kind: LinkKindName) -> None:
    async def listen(stop: trio.Event, task_status: trio.TaskStatus[Listener]) -> None:
        async with listening() as opened:
            task_status.started(opened)
            await stop.wait()

    async with trio.open_nursery() as nursery:
        stop = trio.Event()
        listener: Listener = await nursery.start(listen, stop)
        async with pair(kind, listener) as (client, _):
            stop.set()
            with pytest.raises(LinkClosedError, match="listener was closed"):
                await client.receive_message()


async def test_a_reason_can_be_sent_when_everything_is_cancelled(
    kind: LinkKindName,
) -> None:
    async def serve(task_status: trio.TaskStatus[Listener]) -> None:
        async with listening() as opened:
            task_status.started(opened)
            link = await opened.accept()
            try:
                await trio.sleep_forever()
            finally:
                await trio.lowlevel.cancel_shielded_checkpoint()
                with trio.CancelScope(shield=True):
                    await link.aclose("the power went away")

    async with trio.open_nursery() as clients, trio.open_nursery() as servers:
        listener: Listener = await servers.start(serve)
        opened = trio.Event()

        async def expect_reason() -> None:
            async with dialed(kind, listener.port) as link:
                opened.set()
                with pytest.raises(LinkClosedError, match="the power went away"):
                    await link.receive_message()

        clients.start_soon(expect_reason)
        await opened.wait()
        await trio.testing.wait_all_tasks_blocked(0.05)
        servers.cancel_scope.cancel()


async def test_an_exception_of_the_body_is_not_wrapped(
    kind: LinkKindName, listener: Listener
) -> None:
    with pytest.raises(KeyError):
        async with pair(kind, listener) as (_, worker):
            raise KeyError
    with pytest.raises(LinkClosedError):
        await worker.receive_message()


SILENT = """
import sys, trio
from tests.io.link.kinds import dialed

async def main():
    kind, port, der = sys.argv[1], int(sys.argv[2]), bytes.fromhex(sys.argv[3])
    async with dialed(kind, port, certificate_der=der):
        await trio.sleep_forever()

trio.run(main)
"""


@asynccontextmanager
async def vanished_client(
    kind: LinkKindName, listener: Listener
) -> AsyncIterator[ServedLink]:
    """The worker's end of a link whose client has stopped running."""
    command = [sys.executable, "-c", SILENT, kind, str(listener.port), DER.hex()]
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


async def test_a_peer_that_vanishes_is_detected(kind: LinkKindName) -> None:
    async with (
        listening(replace(LIMITS, idle_timeout=1.0)) as listener,
        vanished_client(kind, listener) as worker,
    ):
        with pytest.raises(LinkClosedError, match=r"127.*: no answer for 1 s") as found:
            await worker.receive_message()
        assert found.value.silent_for == 1.0


async def test_a_close_does_not_wait_long_for_a_vanished_peer(
    kind: LinkKindName,
) -> None:
    limits = replace(LIMITS, flush_timeout=0.3, idle_timeout=1000.0)
    async with (
        listening(limits) as listener,
        vanished_client(kind, listener) as worker,
    ):
        await send_until_held_back(worker)
        begin = trio.current_time()
        await worker.aclose("bye")
        assert trio.current_time() - begin >= 0.3
        assert not worker.session.all_sent


async def test_an_idle_link_stays_open(
    kind: LinkKindName, listener: Listener, jumping_clock: MockClock
) -> None:
    jump_when_idle(jumping_clock)
    async with pair(kind, listener) as (client, worker):
        await trio.sleep(3 * LIMITS.idle_timeout)
        await client.send_message(VERIFIED)
        assert await worker.receive_message() == VERIFIED


# ------------------------------------------------------------------------- bad peers


async def test_a_wrong_certificate_is_refused(
    kind: LinkKindName, listener: Listener
) -> None:
    other = make_certificate().certificate_der
    with pytest.raises(DialError, match="not the expected peer"):
        async with dialed(kind, listener.port, certificate_der=other):
            pytest.fail("it must not open")


async def test_garbage_instead_of_a_certificate_is_refused(
    kind: LinkKindName, listener: Listener
) -> None:
    with pytest.raises(DialError, match="not a certificate"):
        async with dialed(kind, listener.port, certificate_der=b"?"):
            pytest.fail("it must not open")


async def test_a_wrong_proof_is_refused_with_a_reason(
    kind: LinkKindName, listener: Listener
) -> None:
    wrong = Auth(session="5" * 32, proof="8" * 64)
    async with dialed(kind, listener.port, auth=wrong) as link:
        with pytest.raises(LinkClosedError, match=r"\Arefused\Z"):
            await link.receive_message()


async def test_a_client_must_prove_itself_in_time(
    kind: LinkKindName, listener: Listener, jumping_clock: MockClock
) -> None:
    jump_when_idle(jumping_clock)
    async with connected(kind, listener.port) as link:
        with pytest.raises(LinkClosedError, match=r"\Ano proof for 10 s\Z"):
            await link.receive_message()


async def test_the_number_of_unproven_clients_is_limited(kind: LinkKindName) -> None:
    opened = trio.Event()

    async def prove(listener: Listener) -> None:
        async with pair(kind, listener) as (client, worker):
            await client.send_message(VERIFIED)
            assert await worker.receive_message() == VERIFIED
            opened.set()

    async with (
        listening(replace(LIMITS, max_unproven=2)) as listener,
        connected(kind, listener.port),
        trio.open_nursery() as nursery,
    ):
        async with connected(kind, listener.port):
            nursery.start_soon(prove, listener)
            await trio.testing.wait_all_tasks_blocked(0.3)
            assert not opened.is_set()
        await opened.wait()


async def test_garbage_on_one_link_leaves_the_others_alone(
    kind: LinkKindName,
    listener: Listener,
) -> None:
    async with (
        pair(kind, listener) as (bad, worker),
        pair(kind, listener) as (good, other),
    ):
        bad.session._queue_message(b"hello")
        bad.pump()
        with pytest.raises(LinkClosedError, match=r"127\.0\.0\.1:\d+: .*no NAME"):
            await worker.receive_message()
        with pytest.raises(LinkClosedError, match=r"\A(?!127).*no NAME"):
            await bad.receive_message()
        await good.send_message(VERIFIED)
        assert await other.receive_message() == VERIFIED


async def test_unknown_messages_are_skipped(
    kind: LinkKindName, listener: Listener
) -> None:
    async with pair(kind, listener) as (client, worker):
        client.session._queue_message(b"NEWER::yes")
        client.session._queue_message(b"LANE_REQUEST::3::any")  # of an older client
        await client.send_message(VERIFIED)
        assert await worker.receive_message() == VERIFIED
        assert worker.statistics().ignored_messages == 2


# ----------------------------------------------------------------------- cancellation


async def test_cancelled_calls_leave_the_link_usable(
    kind: LinkKindName, listener: Listener
) -> None:
    async def send_frame(link: Link[Message]) -> None:
        await link.send_frame(make_frame(1, 1000))

    async def send_message(link: Link[Message]) -> None:
        await link.send_message(VERIFIED)

    async def receive_frame(link: Link[Message]) -> None:
        await link.receive_frame()

    async def receive_message(link: Link[Message]) -> None:
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
        await worker.send_message(numbered(1))
        assert await client.receive_message() == numbered(1)
        assert await worker.receive_message() == VERIFIED
        assert (await worker.receive_frame()).header.length == 1000


async def test_a_sender_cancelled_while_it_waits_sent_nothing(
    kind: LinkKindName,
) -> None:
    async with (
        listening(SHORT_QUEUES) as listener,
        pair(kind, listener, SHORT_QUEUES) as (client, worker),
    ):
        sent = await send_until_held_back(client)
        await client.send_message(numbered(sent))
        for index in range(sent):
            assert (await worker.receive_frame()).header.index == index
        await client.send_frame(make_frame(99))
        assert (await worker.receive_frame()).header.index == 99
        assert await worker.receive_message() == numbered(sent)


async def test_a_cancelled_dial_leaves_nothing_behind(kind: LinkKindName) -> None:
    async def open_link(port: int) -> None:
        async with dialed(kind, port):
            pytest.fail("it must not open")

    most = 0
    with silent_port() as port:
        before = open_sockets()
        for turns in range(40):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(open_link, port)
                for _ in range(turns):
                    await trio.lowlevel.checkpoint()
                most = max(most, open_sockets())
                nursery.cancel_scope.cancel()
            assert open_sockets() == before
    assert most > before


async def test_a_cancelled_client_informs_its_peer(
    kind: LinkKindName, listener: Listener
) -> None:
    with trio.CancelScope() as scope:
        async with pair(kind, listener) as (_, worker):
            scope.cancel()
    with pytest.raises(LinkClosedError, match=r"\Athe client went away\Z"):
        await worker.receive_message()
