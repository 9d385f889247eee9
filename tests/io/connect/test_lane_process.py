"""QUIC lanes in processes of their own."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import trio

from sleap_rtc.io.connect.lane_process import (
    connect_quic_in_process,
    default_lanes,
    listen_in_process,
    processes_pay,
)
from sleap_rtc.io.connect.listener import Listener, open_listener
from sleap_rtc.io.connect.pipe_link import open_pipe_link
from sleap_rtc.io.link.link import DialError, Link, LinkClosedError
from sleap_rtc.proto.messages import Auth
from tests.io.connect.test_lanes import laned_sides, lanes_of, until
from tests.io.link.kinds import CANCEL, CERTIFICATE, DER, QUIC, judge, make_frame
from tests.io.transfer.sides import CHUNK_SIZE, Job, send_and_receive

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="NOT CHECKED ON WINDOWS: lanes stay in one process"
)

SESSION = "1" * 32
PROOF = "a" * 64


@pytest.fixture(autouse=True)
def processes_for_small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sleap_rtc.io.transfer.transfers.LANES_FROM", 4 * CHUNK_SIZE)
    monkeypatch.setattr("sleap_rtc.io.connect.lane_process.CORES_FOR_PROCESSES", 1)


@pytest.fixture
async def listener() -> AsyncIterator[Listener]:
    async with open_listener("127.0.0.1", 0, CERTIFICATE, judge) as opened:
        yield opened


@pytest.mark.parametrize(
    ("cores", "tcp", "quic"),
    [(1, 1, 1), (2, 1, 1), (3, 1, 1), (4, 1, 2), (6, 1, 3), (8, 1, 4), (128, 1, 4)],
)
def test_links_have_lanes_where_there_are_cores(
    cores: int, tcp: int, quic: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr("sleap_rtc.io.connect.lane_process.usable_cores", lambda: cores)
    assert (default_lanes("tcp"), default_lanes("quic")) == (tcp, quic)
    assert processes_pay() == (cores >= 4)


def children() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children():
        try:
            if "sleap_rtc.io.connect.lane_process" in child.cmdline():
                found.append(child)
        except psutil.NoSuchProcess:
            pass  # it has just ended
    return found


@pytest.mark.parametrize("sender", ["client", "worker"])
async def test_a_file_goes_over_lanes_in_processes(
    listener: Listener, sender: str, tmp_path: Path
) -> None:
    job = Job(tmp_path, 200 * CHUNK_SIZE + 1)
    with trio.fail_after(30):
        async with laned_sides(listener, QUIC, lanes=2) as sides:
            one, other = sides if sender == "client" else reversed(sides)
            for side in sides:
                assert side.link.lanes is not None
                side.link.lanes.want()
            await until(lambda: len(lanes_of(one)) == len(lanes_of(other)) == 1)
            assert len(children()) == 2
            await send_and_receive(job, one, other)
            job.check_arrived()
            assert lanes_of(one)[0].statistics().bytes_sent > 10 * CHUNK_SIZE
            assert lanes_of(other)[0].statistics().bytes_received > 10 * CHUNK_SIZE
        await until(lambda: not children())


async def test_a_lane_process_that_is_killed_is_a_dead_lane(
    listener: Listener, tmp_path: Path
) -> None:
    job = Job(tmp_path, 300 * CHUNK_SIZE)
    with trio.fail_after(60):
        async with laned_sides(listener, QUIC, lanes=2) as (client, worker):
            assert client.link.lanes is not None
            client.link.lanes.want()
            await until(lambda: len(lanes_of(client)) == len(lanes_of(worker)) == 1)

            async def kill_in_the_middle() -> None:
                await until(lambda: job.stored > 50 * CHUNK_SIZE)
                for child in children():
                    child.kill()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(kill_in_the_middle)
                await send_and_receive(job, client, worker)
            job.check_arrived()
            await until(lambda: not lanes_of(client) and not lanes_of(worker))


async def test_a_lane_that_is_stuck_does_not_stall_a_transfer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Only the client's end of the lane is a process of its own.
    monkeypatch.setattr("sleap_rtc.io.connect.lanes.processes_pay", lambda: False)
    job = Job(tmp_path, 300 * CHUNK_SIZE)
    with trio.fail_after(60):
        async with (
            open_listener("127.0.0.1", 0, CERTIFICATE, judge, idle_timeout=1.0) as one,
            laned_sides(one, QUIC, lanes=2) as (client, worker),
        ):
            assert client.link.lanes is not None
            client.link.lanes.want()
            await until(lambda: len(lanes_of(client)) == len(lanes_of(worker)) == 1)

            async def stop_in_the_middle() -> None:
                await until(lambda: job.stored > 50 * CHUNK_SIZE)
                children()[0].suspend()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(stop_in_the_middle)
                await send_and_receive(job, client, worker)
            job.check_arrived()
            assert not lanes_of(worker)


async def test_a_child_listens_for_its_ticket_and_no_other() -> None:
    with trio.fail_after(30):
        async with listen_in_process(
            "127.0.0.1", CERTIFICATE, SESSION, PROOF
        ) as listening:
            for wrong in (Auth(SESSION, "b" * 64), Auth("2" * 32, PROOF)):
                async with QUIC.dial(
                    "127.0.0.1", listening.port, certificate_der=DER, auth=wrong
                ) as refused:
                    with pytest.raises(LinkClosedError, match="refused"):
                        await refused.receive_message()
            async with connect_quic_in_process(
                "127.0.0.1", listening.port, certificate_der=DER
            ) as client:
                await client.send_message(Auth(SESSION, PROOF))
                async with listening.accept() as worker:
                    await check_both_ways(client, worker)
                    await client.aclose("enough")
                    with pytest.raises(LinkClosedError, match="enough"):
                        await worker.receive_frame()


async def check_both_ways(one: Link, other: Link) -> None:
    for source, target in ((one, other), (other, one)):
        await source.send_message(CANCEL)
        await source.send_frame(make_frame(3))
        assert await target.receive_message() == CANCEL
        assert bytes((await target.receive_frame()).payload) == make_frame(3).payload


async def test_a_child_that_reaches_nobody_says_why(listener: Listener) -> None:
    with trio.fail_after(30):
        with pytest.raises(DialError, match=r"no\.such\.invalid:1"):
            async with connect_quic_in_process(
                "no.such.invalid", 1, certificate_der=DER
            ):
                pytest.fail("it must not open")
        with pytest.raises(DialError, match="no certificate"):
            async with connect_quic_in_process(
                "127.0.0.1", listener.port, certificate_der=b"nonsense"
            ):
                pytest.fail("it must not open")
        with pytest.raises(OSError, match="known"):
            async with listen_in_process("no address", CERTIFICATE, SESSION, PROOF):
                pytest.fail("it must not open")
        assert not children()


PARENT = """
import sys, trio
from sleap_rtc.io.connect.lane_process import listen_in_process
from sleap_rtc.io.link.certificates import make_certificate

async def main():
    async with listen_in_process("127.0.0.1", make_certificate(), "1" * 32, "a" * 64):
        print("up", flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


async def test_a_child_ends_with_its_parent_and_shows_no_secrets() -> None:
    with trio.fail_after(30):
        parent = await trio.lowlevel.open_process(
            [sys.executable, "-c", PARENT], stdout=subprocess.PIPE
        )
        assert parent.stdout is not None
        async with parent.stdout:
            assert (await parent.stdout.receive_some()).startswith(b"up")
        (child,) = psutil.Process(parent.pid).children()
        assert PROOF not in " ".join(child.cmdline())
        assert PROOF not in str(child.environ())
        os.kill(parent.pid, signal.SIGKILL)
        await parent.wait()
        await until(lambda: not child.is_running())


# ----------------------------------------------------------------------------- pipes


def stream_of(one: socket.socket) -> trio.SocketStream:
    return trio.SocketStream(trio.socket.from_stdlib_socket(one))


async def test_garbage_in_a_pipe_ends_the_link() -> None:
    ours, theirs = socket.socketpair()
    with theirs, trio.fail_after(10):
        async with open_pipe_link(stream_of(ours), "") as link:
            theirs.send(b"\xff" * 100)
            with pytest.raises(LinkClosedError, match="no record type 255"):
                await link.receive_message()
            with pytest.raises(LinkClosedError):
                await link.send_message(CANCEL)


async def test_a_pipe_holds_its_sender_back() -> None:
    ours, theirs = socket.socketpair()
    with trio.fail_after(10):
        async with (
            open_pipe_link(stream_of(ours), "") as one,
            open_pipe_link(stream_of(theirs), "") as other,
        ):
            sent = 0
            with trio.move_on_after(0.5):
                while True:
                    await one.send_frame(make_frame(sent))
                    sent += 1
            assert sent < 8
            for index in range(sent):
                assert (await other.receive_frame()).header.index == index


async def test_what_arrived_in_a_pipe_is_there_after_its_end() -> None:
    ours, theirs = socket.socketpair()
    with trio.fail_after(10):
        async with open_pipe_link(stream_of(theirs), "") as other:
            async with open_pipe_link(stream_of(ours), "") as one:
                await one.send_message(CANCEL)
                await one.send_frame(make_frame(0, 10))
                await one.aclose("enough")
            assert await other.receive_message() == CANCEL
            assert (await other.receive_frame()).header.length == 10
            with pytest.raises(LinkClosedError, match="enough") as caught:
                await other.receive_frame()
            assert caught.value.by_peer
