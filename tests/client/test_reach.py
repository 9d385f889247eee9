"""Finding a worker, and opening links to it, in a room of this process."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from bench.ports import reserved_port
from sleap_rtc import client
from sleap_rtc.client.events import LinkOpened, WorkerChosen
from sleap_rtc.client.reach import ANSWER_TIMEOUT, Reach, WorkerGoneError
from sleap_rtc.errors import NoWorkerError, RefusedError, UsageError
from sleap_rtc.io.link.link import LinkClosedError
from sleap_rtc.proto import messages
from sleap_rtc.proto.rendezvous.messages import Challenge, ErrorSignal, encode_signal
from sleap_rtc.proto.rendezvous.workers import WorkerCard
from sleap_rtc.proto.route.routes import RoutePreference
from tests.client.room_lab import environ_of, invite_to, worker_in
from tests.io.signaling.lab import (
    DEADLINE,
    HOST,
    Server,
    lying_server,
    running_server,
)


class Client:
    """A reach, and the events that it reported."""

    def __init__(self, url: str, route: RoutePreference = "auto") -> None:
        self.events: list[WorkerChosen | LinkOpened] = []
        self.reach = Reach(invite_to(url), route, self.events.append)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    with trio.fail_after(DEADLINE):
        async with running_server() as server:
            yield server


@pytest.fixture
def dead_port() -> Iterator[int]:
    """A port on which nothing listens."""
    with reserved_port() as port:
        yield port


@pytest.fixture
def nowhere(dead_port: int) -> str:
    """The address of a server that does not run."""
    return f"ws://{HOST}:{dead_port}"


# ------------------------------------------------------------------------- the workers


async def test_the_workers_of_a_room_are_listed(tmp_path: Path, server: Server) -> None:
    environ = environ_of(tmp_path, server.url)
    assert await client.list_workers(environ=environ) == []
    async with worker_in(server, card=WorkerCard(name="Maja's GPU")):
        (worker,) = await client.list_workers(environ=environ)
    assert (worker.peer_id, worker.card.name) == ("worker-1", "Maja's GPU")


async def test_a_machine_without_an_invite_has_no_workers(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="room"):
        await client.list_workers(environ={"SLEAP_RTC_STATE_DIR": str(tmp_path)})


async def test_a_server_that_cannot_be_reached_is_named(
    tmp_path: Path, nowhere: str, autojump_clock: trio.testing.MockClock
) -> None:
    began = trio.current_time()
    with pytest.raises(
        NoWorkerError, match=f"Cannot reach the signaling server at {nowhere}"
    ):
        await client.list_workers(timeout=30, environ=environ_of(tmp_path, nowhere))
    assert trio.current_time() - began == 30


async def test_a_server_that_refuses_is_named(tmp_path: Path) -> None:
    refusal = ErrorSignal("BAD_SIGNATURE", "the signature is wrong")
    texts = (encode_signal(Challenge(b"n" * 16)), encode_signal(refusal))
    async with lying_server(*texts) as url:
        with pytest.raises(RefusedError, match="the signature is wrong"):
            await client.list_workers(environ=environ_of(tmp_path, url))


# ----------------------------------------------------------------------- the first link


async def test_a_link_to_the_chosen_worker_is_opened(server: Server) -> None:
    mine = Client(server.url)
    async with (
        worker_in(server) as listener,
        mine.reach.open_first(None) as (worker_id, link),
    ):
        its = await listener.accept()
        await link.send_message(messages.Error("hello"))
        assert await its.receive_message() == messages.Error("hello")
        assert worker_id == "worker-1"
        chosen, opened = mine.events
        assert isinstance(chosen, WorkerChosen)
        assert chosen.worker.peer_id == "worker-1"
        assert isinstance(opened, LinkOpened)
        assert opened.address == f"{HOST}:{listener.port}"


@pytest.mark.parametrize("kind", ["tcp", "quic"])
async def test_the_route_chooses_the_kind_of_link(server: Server, kind: str) -> None:
    route: RoutePreference = "tcp" if kind == "tcp" else "quic"
    mine = Client(server.url, route)
    async with worker_in(server), mine.reach.open_first(None):
        pass
    opened = mine.events[-1]
    assert isinstance(opened, LinkOpened)
    assert opened.kind == kind


async def test_the_reason_for_a_known_worker_is_reported(server: Server) -> None:
    mine = Client(server.url)
    async with (
        worker_in(server, "worker-1"),
        worker_in(server, "worker-2"),
        mine.reach.open_first("worker-2", "it has the job") as (worker_id, _),
    ):
        assert worker_id == "worker-2"
    assert isinstance(mine.events[0], WorkerChosen)
    assert mine.events[0].reason == "it has the job"


async def test_a_room_without_a_worker_is_an_error(server: Server) -> None:
    with pytest.raises(NoWorkerError, match="no worker is in the room") as caught:
        async with Client(server.url).reach.open_first(None):
            pass
    assert "daemon --role worker" in caught.value.hint


async def test_an_error_of_the_body_is_not_wrapped(server: Server) -> None:
    async with worker_in(server):
        with pytest.raises(LinkClosedError, match="mine"):
            async with Client(server.url).reach.open_first(None):
                raise LinkClosedError("mine")


async def test_a_worker_that_does_not_answer_is_given_up(
    server: Server, mock_clock: trio.testing.MockClock
) -> None:
    async with worker_in(server, on_offer=lambda: mock_clock.jump(ANSWER_TIMEOUT)):
        with pytest.raises(NoWorkerError, match="did not answer for 10 s"):
            async with Client(server.url).reach.open_first(None):
                pass


async def test_a_worker_that_cannot_be_dialled_is_an_error(
    server: Server, dead_port: int
) -> None:
    async with worker_in(server, at=(HOST, dead_port)):
        words = f"Cannot reach the worker: tcp to {HOST}:{dead_port}: .*refused"
        with pytest.raises(NoWorkerError, match=words) as caught:
            async with Client(server.url, "tcp").reach.open_first(None):
                pass
    assert "port" in caught.value.hint


async def test_workers_have_time_to_return_to_a_server_that_restarted(
    server: Server, mock_clock: trio.testing.MockClock
) -> None:
    await server.stop()
    mine = Client(server.url)

    async def pass_time() -> None:
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(0.5)

    async with trio.open_nursery() as nursery:

        async def send() -> None:
            async with mine.reach.open_first(None) as (worker_id, _):
                assert worker_id == "worker-1"
            nursery.cancel_scope.cancel()

        nursery.start_soon(send)
        await trio.testing.wait_all_tasks_blocked()  # the first attempt has failed
        await server.start()
        for _ in range(8):
            await pass_time()  # the client is back before the worker
        async with worker_in(server):
            for _ in range(20):
                await pass_time()
    assert isinstance(mine.events[0], WorkerChosen)


# ---------------------------------------------------------------------- the next links


async def test_another_link_goes_to_the_same_worker(server: Server) -> None:
    mine = Client(server.url)
    async with (
        worker_in(server, "worker-1"),
        worker_in(server, "worker-2"),
        mine.reach.open_again("worker-2") as link,
    ):
        assert link.statistics().kind in ("tcp", "quic")
    (opened,) = mine.events
    assert isinstance(opened, LinkOpened)


async def test_a_worker_that_left_the_room_is_gone(server: Server) -> None:
    async with worker_in(server, "worker-1"):
        with pytest.raises(WorkerGoneError, match="worker-2"):
            async with Client(server.url).reach.open_again("worker-2"):
                pass


async def test_a_worker_whose_server_is_gone_counts_as_gone(nowhere: str) -> None:
    with pytest.raises(WorkerGoneError, match="Cannot reach"):
        async with Client(nowhere).reach.open_again("worker-1"):
            pass


async def test_a_server_that_breaks_the_protocol_does_not_count_as_gone() -> None:
    async with lying_server("garbage") as url:
        with pytest.raises(NoWorkerError) as caught:
            async with Client(url).reach.open_again("worker-1"):
                pass
    assert not isinstance(caught.value, WorkerGoneError)


async def test_a_server_that_refuses_ends_the_attempt() -> None:
    refusal = ErrorSignal("BAD_SIGNATURE", "the signature is wrong")
    texts = (encode_signal(Challenge(b"n" * 16)), encode_signal(refusal))
    async with lying_server(*texts) as url:
        with pytest.raises(RefusedError):
            async with Client(url).reach.open_again("worker-1"):
                pass


async def test_a_silent_server_does_not_block_forever(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with lying_server() as url:
        with pytest.raises(NoWorkerError):
            async with Client(url).reach.open_again("worker-1"):
                pass
