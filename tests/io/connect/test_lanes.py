"""Links of several connections, end to end over sockets of this machine."""

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from sleap_rtc.io.connect.dial import dial
from sleap_rtc.io.connect.lanes import MAX_REQUESTS
from sleap_rtc.io.connect.listener import Listener, open_listener
from sleap_rtc.io.link.link import Link, LinkClosedError
from sleap_rtc.io.nursery import open_background_nursery
from sleap_rtc.proto.messages import (
    MAX_LANES,
    Auth,
    ChunkGrant,
    JobCancel,
    LaneRequest,
    LaneTicket,
)
from tests.io.link.kinds import (
    AUTH,
    CANCEL,
    CERTIFICATE,
    DER,
    QUIC,
    TCP,
    Kind,
    judge,
    make_frame,
)
from tests.io.transfer.sides import CHUNK_SIZE, Job, Side, send_and_receive

KINDS = pytest.mark.parametrize("kind", [TCP, QUIC], ids=["tcp", "quic"])


@pytest.fixture(autouse=True)
async def deadline() -> AsyncIterator[None]:
    with trio.fail_after(30):
        yield


@pytest.fixture(autouse=True)
def lanes_for_small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sleap_rtc.io.transfer.transfers.LANES_FROM", 4 * CHUNK_SIZE)


@pytest.fixture
async def listener() -> AsyncIterator[Listener]:
    async with open_listener("127.0.0.1", 0, CERTIFICATE, judge) as opened:
        yield opened


@asynccontextmanager
async def laned_sides(
    listener: Listener, kind: Kind, lanes: int = MAX_LANES
) -> AsyncIterator[tuple[Side, Side]]:
    """The client's side and the worker's."""
    async with (
        dial(
            [("127.0.0.1", listener.port)],
            certificate_der=DER,
            auth=AUTH,
            kinds=(kind.name,),
            lanes=lanes,
        ) as (link, _),
        open_background_nursery() as nursery,
    ):
        sides = Side(link), Side(await listener.accept())
        for side in sides:
            nursery.start_soon(side.run)
        yield sides


def lanes_of(side: Side) -> tuple[Link, ...]:
    assert side.link.lanes is not None
    return side.link.lanes.alive


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - what is awaited is on another socket
        await trio.sleep(0.001)


async def until_open(*sides: Side) -> None:
    for side in sides:
        assert side.link.lanes is not None
        side.link.lanes.want()
    await until(lambda: all(len(lanes_of(s)) == MAX_LANES - 1 for s in sides))


# ----------------------------------------------------------------------- transfers


@KINDS
@pytest.mark.parametrize("sender", ["client", "worker"])
async def test_a_large_file_goes_over_all_lanes(
    listener: Listener, kind: Kind, sender: str, tmp_path: Path
) -> None:
    job = Job(tmp_path, 300 * CHUNK_SIZE + 1)
    async with laned_sides(listener, kind) as sides:
        await until_open(*sides)
        one, other = sides if sender == "client" else reversed(sides)
        await send_and_receive(job, one, other)
        job.check_arrived()
        for lane in lanes_of(one):
            assert lane.statistics().bytes_sent > 10 * CHUNK_SIZE
        assert other.transfers.frames_dropped == 0
        assert one.link.statistics().bytes_sent > len(job.content)


async def test_lanes_are_opened_while_the_transfer_runs(
    listener: Listener, tmp_path: Path
) -> None:
    job = Job(tmp_path, 800 * CHUNK_SIZE)
    async with laned_sides(listener, TCP) as (client, worker):
        await send_and_receive(job, client, worker)
        job.check_arrived()
        assert sum(lane.statistics().bytes_sent for lane in lanes_of(client)) > 0


async def test_a_small_file_opens_no_lanes(listener: Listener, tmp_path: Path) -> None:
    job = Job(tmp_path, 3 * CHUNK_SIZE)
    async with laned_sides(listener, TCP) as (client, worker):
        await send_and_receive(job, client, worker)
        job.check_arrived()
        await client.link.send_message(CANCEL)
        assert await worker.next_message() == CANCEL
        assert not lanes_of(client)


async def test_a_link_of_one_connection_asks_for_no_lanes(
    listener: Listener, tmp_path: Path
) -> None:
    job = Job(tmp_path, 100 * CHUNK_SIZE)
    async with laned_sides(listener, TCP, lanes=1) as (client, worker):
        await send_and_receive(job, client, worker)
        job.check_arrived()
        assert not lanes_of(client)
        assert not lanes_of(worker)


# -------------------------------------------------------------------- lanes that die


@KINDS
@pytest.mark.parametrize("killer", ["sender", "receiver"])
async def test_a_lane_that_dies_gives_its_chunks_back(
    listener: Listener, kind: Kind, killer: str, tmp_path: Path
) -> None:
    job = Job(tmp_path, 400 * CHUNK_SIZE)
    async with laned_sides(listener, kind) as (client, worker):
        await until_open(client, worker)
        victim = lanes_of(client if killer == "sender" else worker)[1]

        async def kill_in_the_middle() -> None:
            await until(lambda: job.stored > 100 * CHUNK_SIZE)
            victim.close_now("the test kills it")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(kill_in_the_middle)
            await send_and_receive(job, client, worker)
        job.check_arrived()
        await until(lambda: len(lanes_of(client)) == len(lanes_of(worker)) == 2)
        # The link goes on, and so do the other lanes.
        other = Job(tmp_path, 100 * CHUNK_SIZE, "other.zip")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other.send, worker, 9)
            nursery.start_soon(other.receive, client, 9)
        other.check_arrived()


@KINDS
async def test_a_file_arrives_though_all_lanes_die(
    listener: Listener, kind: Kind, tmp_path: Path
) -> None:
    job = Job(tmp_path, 200 * CHUNK_SIZE)
    async with laned_sides(listener, kind) as (client, worker):
        await until_open(client, worker)

        async def kill_all() -> None:
            await until(lambda: job.stored > 50 * CHUNK_SIZE)
            for lane in lanes_of(worker):
                lane.close_now("the test kills it")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(kill_all)
            await send_and_receive(job, client, worker)
        job.check_arrived()


@pytest.mark.parametrize("who", ["client", "worker"])
async def test_lanes_end_with_their_link(listener: Listener, who: str) -> None:
    async with laned_sides(listener, TCP) as sides:
        await until_open(*sides)
        lanes = [lane for side in sides for lane in lanes_of(side)]
        side = sides[0] if who == "client" else sides[1]
        await side.link.aclose("enough")
        await until(lambda: not lanes_of(sides[0]) and not lanes_of(sides[1]))
        for lane in lanes:
            with pytest.raises(LinkClosedError):
                await lane.send_frame(make_frame(1, 10))


@KINDS
async def test_a_message_ends_only_the_lane_it_came_over(
    listener: Listener, kind: Kind
) -> None:
    async with laned_sides(listener, kind) as (client, worker):
        await until_open(client, worker)
        await lanes_of(client)[0].send_message(JobCancel("job_0123abcd"))
        await until(lambda: len(lanes_of(worker)) == len(lanes_of(client)) == 2)
        await client.link.send_message(CANCEL)
        assert await worker.next_message() == CANCEL


async def test_a_grant_for_no_transfer_is_ignored_on_a_lane(listener: Listener) -> None:
    async with laned_sides(listener, TCP) as (client, worker):
        await until_open(client, worker)
        lane = lanes_of(client)[0]
        await lane.send_message(ChunkGrant(99, 0, 1))
        await client.link.send_message(CANCEL)
        assert await worker.next_message() == CANCEL
        assert len(lanes_of(worker)) == 3


# ------------------------------------------------------------------- hostile tickets


@asynccontextmanager
async def tickets_of(
    listener: Listener, kind: Kind, count: int
) -> AsyncIterator[tuple[Link, list[LaneTicket]]]:
    """A link whose client holds tickets, and its other end, which hears all."""
    async with (
        kind.dial("127.0.0.1", listener.port, certificate_der=DER, auth=AUTH) as client,
        open_background_nursery() as nursery,
    ):
        worker = Side(await listener.accept())
        nursery.start_soon(worker.run)
        await client.send_message(LaneRequest(count, "same"))
        tickets = []
        for _ in range(count):
            ticket = await client.receive_message()
            assert isinstance(ticket, LaneTicket)
            tickets.append(ticket)
        yield client, tickets


@asynccontextmanager
async def lane_with(listener: Listener, kind: Kind, auth: Auth) -> AsyncIterator[Link]:
    async with kind.connect("127.0.0.1", listener.port, certificate_der=DER) as lane:
        await lane.send_message(auth)
        yield lane


async def check_refused(listener: Listener, kind: Kind, auth: Auth) -> None:
    async with lane_with(listener, kind, auth) as lane:
        with pytest.raises(LinkClosedError, match="refused"):
            await lane.receive_message()


@KINDS
async def test_a_ticket_is_good_once(listener: Listener, kind: Kind) -> None:
    async with tickets_of(listener, kind, 1) as (_, [ticket]):
        auth = Auth(ticket.session, ticket.proof)
        async with lane_with(listener, kind, auth):
            await check_refused(listener, kind, auth)


@KINDS
async def test_a_wrong_ticket_is_refused_like_a_wrong_proof(
    listener: Listener, kind: Kind
) -> None:
    async with tickets_of(listener, kind, 2) as (client, [ticket, other]):
        await check_refused(listener, kind, Auth(ticket.session, other.proof))
        await check_refused(listener, kind, Auth(ticket.session, ticket.proof))
        await check_refused(listener, kind, Auth("f" * 32, other.proof))
        await client.send_message(CANCEL)  # the link itself has not suffered


async def test_a_ticket_dies_with_its_link(listener: Listener) -> None:
    async with (
        TCP.dial("127.0.0.1", listener.port, certificate_der=DER, auth=AUTH) as client,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(Side(await listener.accept()).run)
        await client.send_message(LaneRequest(1, "same"))
        ticket = await client.receive_message()
        assert isinstance(ticket, LaneTicket)
        await client.aclose("enough")
    await check_refused(listener, TCP, Auth(ticket.session, ticket.proof))


async def test_a_client_that_asks_again_and_again_gets_no_more_lanes(
    listener: Listener,
) -> None:
    async with tickets_of(listener, TCP, 3) as (client, tickets):
        for _ in range(MAX_REQUESTS - 2):
            await client.send_message(LaneRequest(3, "same"))
        auths = [Auth(ticket.session, ticket.proof) for ticket in tickets]
        await check_refused(listener, TCP, Auth(auths[0].session, auths[1].proof))
        await check_refused(listener, TCP, Auth(auths[1].session, auths[0].proof))
        # Two tickets are used up, and one more request is answered.
        for _ in range(10):
            await client.send_message(LaneRequest(3, "same"))
        for _ in range(2):
            assert isinstance(await client.receive_message(), LaneTicket)
        with trio.move_on_after(0.1) as scope:
            await client.receive_message()
        assert scope.cancelled_caught


async def test_a_worker_that_sends_tickets_unasked_opens_nothing() -> None:
    async with (
        TCP.listen("127.0.0.1", 0, CERTIFICATE, judge) as strange,
        dial(
            [("127.0.0.1", strange.port)], certificate_der=DER, auth=AUTH, lanes=2
        ) as (link, _),
    ):
        worker = await strange.accept()
        for number in range(20):
            await worker.send_message(LaneTicket(f"{number:032}", "a" * 64, 1))
        await worker.send_message(CANCEL)
        assert await link.receive_message() == CANCEL
        assert link.lanes is not None
        assert not link.lanes.alive


async def test_a_lane_whose_port_is_out_of_reach_is_asked_for_again(
    tmp_path: Path,
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        async with (
            TCP.listen("127.0.0.1", 0, CERTIFICATE, judge) as strange,
            dial(
                [("127.0.0.1", strange.port)], certificate_der=DER, auth=AUTH, lanes=2
            ) as (link, _),
            open_background_nursery() as nursery,
        ):
            nursery.start_soon(Side(link).run)
            worker = await strange.accept()
            assert link.lanes is not None
            link.lanes.want()
            assert await worker.receive_message() == LaneRequest(1, "any")
            port = unused.getsockname()[1]
            await worker.send_message(LaneTicket("1" * 32, AUTH.proof, port))
            assert await worker.receive_message() == LaneRequest(1, "same")
            await worker.send_message(LaneTicket("2" * 32, AUTH.proof, 0))
            assert (await strange.accept()).peer == "client 2222"


async def test_a_worker_that_knows_no_lanes_is_no_hindrance(tmp_path: Path) -> None:
    job = Job(tmp_path, 100 * CHUNK_SIZE)
    async with (
        TCP.listen("127.0.0.1", 0, CERTIFICATE, judge) as old,
        dial([("127.0.0.1", old.port)], certificate_der=DER, auth=AUTH, lanes=4) as (
            link,
            _,
        ),
        open_background_nursery() as nursery,
    ):
        client, worker = Side(link), Side(await old.accept())
        nursery.start_soon(client.run)
        nursery.start_soon(worker.run)
        async with trio.open_nursery() as both:
            both.start_soon(job.send, client)
            messages = [await worker.next_message(), await worker.next_message()]
            assert LaneRequest(3, "any") in messages
            both.start_soon(job.receive, worker)
        job.check_arrived()
