"""QUIC links over real UDP sockets on loopback."""

import os
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio
import trio.testing
from aioquic.buffer import Buffer  # type: ignore[attr-defined] # no __all__
from aioquic.quic.packet import pull_quic_header

from sleap_rtc.io.certificates import make_certificate
from sleap_rtc.io.dial import STAGGER, dial
from sleap_rtc.io.link import DialError, Link, LinkClosedError
from sleap_rtc.io.quic import (
    QuicListener,
    connect_quic,
    dial_quic,
    open_quic_listener,
)
from sleap_rtc.io.quic_link import QuicLink
from sleap_rtc.io.session import MAX_UNPROVEN_LINKS
from sleap_rtc.proto.errors import RemoteProtocolError
from sleap_rtc.proto.frames import ChunkHeader, Frame
from sleap_rtc.proto.messages import Auth, Error, JobCancel, JobLog, Message

AUTH = Auth(session="5" * 32, proof="7" * 64)
CERTIFICATE = make_certificate()
DER = CERTIFICATE.certificate_der
MEGABYTE = 1024 * 1024
CANCEL = JobCancel("job_0123abcd")


def judge(auth: Auth) -> str:
    if auth.proof != AUTH.proof:
        raise RemoteProtocolError("the proof is wrong")
    return f"client {auth.session[:4]}"


@pytest.fixture(autouse=True)
async def deadline() -> AsyncIterator[None]:
    with trio.fail_after(60):
        yield


@pytest.fixture
async def listener() -> AsyncIterator[QuicListener]:
    async with open_quic_listener("127.0.0.1", 0, CERTIFICATE, judge) as opened:
        yield opened


@asynccontextmanager
async def pair(
    listener: QuicListener, *, idle_timeout: float = 10.0
) -> AsyncIterator[tuple[Link, Link]]:
    async with dial_quic(
        "127.0.0.1",
        listener.port,
        certificate_der=DER,
        auth=AUTH,
        idle_timeout=idle_timeout,
    ) as client:
        yield client, await listener.accept()


def make_frame(index: int, size: int = MEGABYTE) -> Frame:
    return Frame(ChunkHeader(1, index, size, bytes(32)), bytes([index % 256]) * size)


def line(number: int) -> Message:
    return JobLog("job_0123abcd", number, number, "epoch done")


# ------------------------------------------------------------------- what links carry


async def test_messages_go_both_ways_and_the_client_has_a_name(
    listener: QuicListener,
) -> None:
    async with pair(listener) as (client, worker):
        assert worker.peer == "client 5555"
        for number in range(100):
            await client.send_message(line(number))
            await worker.send_message(line(1000 + number))
        for number in range(100):
            assert await worker.receive_message() == line(number)
            assert await client.receive_message() == line(1000 + number)


async def test_frames_go_both_ways_at_once_to_a_slow_reader(
    listener: QuicListener,
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

    async with pair(listener) as (client, worker), trio.open_nursery() as nursery:
        for link in (client, worker):
            nursery.start_soon(send, link)
            nursery.start_soon(receive, link)


async def test_a_message_does_not_wait_for_a_reader_of_frames(
    listener: QuicListener,
) -> None:
    async with pair(listener) as (client, worker):
        for index in range(8):
            await client.send_frame(make_frame(index))
        await client.send_message(CANCEL)
        assert await worker.receive_message() == CANCEL


@pytest.fixture
def short_queues(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sleap_rtc.io.quic_session.MAX_UNREAD", 2 * MEGABYTE)
    monkeypatch.setattr("sleap_rtc.io.quic_session.MAX_UNSENT_FRAMES", MEGABYTE)


async def send_until_held_back(link: Link) -> int:
    """Send frames of 100 kB until one has to wait for a second; count those before."""
    sent = 0
    while True:
        with trio.move_on_after(1) as scope:
            await link.send_frame(make_frame(sent, 100_000))
            sent += 1
        if scope.cancelled_caught:
            return sent


@pytest.mark.usefixtures("short_queues")
async def test_sending_frames_waits_for_a_reader(listener: QuicListener) -> None:
    async with pair(listener) as (client, worker):
        sent = await send_until_held_back(client)
        assert 20 <= sent <= 33
        for index in range(sent):
            assert (await worker.receive_frame()).header.index == index


async def test_statistics_tell_what_happened(listener: QuicListener) -> None:
    async with pair(listener) as (client, worker):
        await client.send_frame(make_frame(1))
        await worker.receive_frame()
        sent, received = client.statistics(), worker.statistics()
        assert sent.kind == "quic"
        assert sent.address == f"127.0.0.1:{listener.port}"
        assert sent.bytes_sent > MEGABYTE
        assert received.bytes_received > MEGABYTE
        assert 0 < sent.rtt < 1


async def test_many_links_share_one_socket(listener: QuicListener) -> None:
    done = 0

    async def talk(number: int) -> None:
        nonlocal done
        auth = Auth(session=f"{number:032x}", proof=AUTH.proof)
        async with dial_quic(
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
    listener: QuicListener,
) -> None:
    async with pair(listener) as (client, worker):
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
    listener: QuicListener,
) -> None:
    async with pair(listener) as (client, worker), trio.open_nursery() as nursery:
        received: list[Message] = []

        async def receive() -> None:
            received.append(await worker.receive_message())
            with pytest.raises(LinkClosedError, match="bye"):
                await worker.receive_message()

        nursery.start_soon(receive)
        await trio.testing.wait_all_tasks_blocked()
        assert isinstance(client, QuicLink)
        await client.send_message(CANCEL)
        client.close_now("bye")
        nursery.cancel_scope.deadline = trio.current_time() + 10
    assert received == [CANCEL]


async def test_a_worker_can_close_too(listener: QuicListener) -> None:
    async with pair(listener) as (client, worker):
        await worker.aclose("no room left")
        await worker.aclose("again")
        with pytest.raises(LinkClosedError, match="no room left"):
            await client.receive_frame()


@pytest.mark.usefixtures("short_queues")
async def test_everything_that_waits_hears_of_the_end(listener: QuicListener) -> None:
    reasons: list[str] = []

    async def expect_end(wait: Callable[[], Awaitable[object]]) -> None:
        try:
            while True:
                await wait()
        except LinkClosedError as error:
            reasons.append(error.reason)

    async with pair(listener) as (client, worker):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(expect_end, client.receive_message)
            nursery.start_soon(expect_end, client.receive_frame)
            nursery.start_soon(expect_end, lambda: client.send_frame(make_frame(1)))
            await trio.testing.wait_all_tasks_blocked(0.05)
            with trio.CancelScope() as scope:
                scope.cancel()
                await worker.aclose("bye")
        assert reasons == ["bye"] * 3


async def test_a_link_ends_with_its_listener() -> None:
    async def listen(
        stop: trio.Event, task_status: trio.TaskStatus[QuicListener]
    ) -> None:
        async with open_quic_listener("127.0.0.1", 0, CERTIFICATE, judge) as opened:
            task_status.started(opened)
            await stop.wait()

    async with trio.open_nursery() as nursery:
        stop = trio.Event()
        listener: QuicListener = await nursery.start(listen, stop)
        async with pair(listener) as (client, _):
            stop.set()
            with pytest.raises(LinkClosedError, match="listener was closed"):
                await client.receive_message()


async def test_what_the_body_raises_leaves_as_it_is(listener: QuicListener) -> None:
    with pytest.raises(KeyError):
        async with pair(listener) as (_, worker):
            raise KeyError
    with pytest.raises(LinkClosedError):
        await worker.receive_message()


KILLED = """
import sys, trio
from sleap_rtc.io.quic import dial_quic
from sleap_rtc.proto.messages import Auth

async def main():
    port, der = int(sys.argv[1]), bytes.fromhex(sys.argv[2])
    auth = Auth(session="5" * 32, proof="7" * 64)
    async with dial_quic("127.0.0.1", port, certificate_der=der, auth=auth):
        await trio.sleep_forever()

trio.run(main)
"""


async def test_a_peer_that_is_killed_is_noticed() -> None:
    async with (
        open_quic_listener(
            "127.0.0.1", 0, CERTIFICATE, judge, idle_timeout=1.0
        ) as listener,
        trio.open_nursery() as nursery,
    ):
        command = [sys.executable, "-c", KILLED, str(listener.port), DER.hex()]
        process: trio.Process = await nursery.start(
            partial(trio.run_process, command, check=False)
        )
        worker = await listener.accept()
        process.kill()
        begin = trio.current_time()
        with pytest.raises(LinkClosedError, match=r"no answer from 127.*for 1 s"):
            await worker.receive_message()
        assert trio.current_time() - begin < 3


async def test_a_close_does_not_wait_long_for_a_dead_peer(
    listener: QuicListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sleap_rtc.io.session_link.FLUSH_TIMEOUT", 0.3)
    async with trio.open_nursery() as nursery:
        command = [sys.executable, "-c", KILLED, str(listener.port), DER.hex()]
        process: trio.Process = await nursery.start(
            partial(trio.run_process, command, check=False)
        )
        worker = await listener.accept()
        process.kill()
        await process.wait()
        await worker.send_frame(make_frame(1))
        begin = trio.current_time()
        await worker.aclose("bye")
        assert 0.3 <= trio.current_time() - begin < 2


async def test_an_idle_link_lives_on() -> None:
    async with (
        open_quic_listener(
            "127.0.0.1", 0, CERTIFICATE, judge, idle_timeout=0.25
        ) as listener,
        pair(listener, idle_timeout=0.25) as (client, worker),
    ):
        await trio.sleep(1)
        await client.send_message(CANCEL)
        assert await worker.receive_message() == CANCEL


# ------------------------------------------------------------------------- bad peers


async def test_a_wrong_certificate_is_refused(listener: QuicListener) -> None:
    other = make_certificate().certificate_der
    with pytest.raises(DialError, match="not who it should be"):
        async with dial_quic(
            "127.0.0.1", listener.port, certificate_der=other, auth=AUTH
        ):
            pytest.fail("it must not open")


async def test_what_is_no_certificate_is_refused(listener: QuicListener) -> None:
    with pytest.raises(DialError, match="no certificate"):
        async with dial_quic(
            "127.0.0.1", listener.port, certificate_der=b"?", auth=AUTH
        ):
            pytest.fail("it must not open")


async def test_a_wrong_proof_is_refused_with_a_reason(listener: QuicListener) -> None:
    wrong = Auth(session="5" * 32, proof="8" * 64)
    async with dial_quic(
        "127.0.0.1", listener.port, certificate_der=DER, auth=wrong
    ) as link:
        with pytest.raises(LinkClosedError, match=r"\Arefused\Z"):
            await link.receive_message()


async def test_a_client_must_prove_itself_in_time(
    listener: QuicListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sleap_rtc.io.session.HANDSHAKE_TIMEOUT", 0.5)
    async with connect_quic("127.0.0.1", listener.port, certificate_der=DER) as link:
        with pytest.raises(LinkClosedError, match="no proof"):
            await link.receive_message()


async def test_only_so_many_clients_may_be_unproven(listener: QuicListener) -> None:
    async with trio.open_nursery() as nursery:
        blocked = trio.Event()

        async def connect() -> None:
            async with connect_quic("127.0.0.1", listener.port, certificate_der=DER):
                connected.release()
                await trio.sleep_forever()

        connected = trio.Semaphore(0)
        for _ in range(MAX_UNPROVEN_LINKS):
            nursery.start_soon(connect)
        for _ in range(MAX_UNPROVEN_LINKS):
            await connected.acquire()
        with trio.move_on_after(0.5):
            async with pair(listener):
                blocked.set()
        assert not blocked.is_set()
        nursery.cancel_scope.cancel()
    async with pair(listener) as (client, worker):
        await client.send_message(CANCEL)
        assert await worker.receive_message() == CANCEL


@pytest.mark.parametrize("first", [0x00, 0x40, 0x80, 0xC0, 0xFF])
async def test_garbage_datagrams_are_counted_and_ignored(
    listener: QuicListener, first: int
) -> None:
    async with pair(listener) as (client, worker):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            for size in (0, 1, 6, 20, 1199, 1200, 1400):
                data = bytes([first]) + os.urandom(size)
                stranger.sendto(data, ("127.0.0.1", listener.port))
            # A client's first packet, but for the encrypted part.
            stranger.sendto(
                b"\xc0\x00\x00\x00\x01\x08" + bytes(8) + b"\x00\x00\x44\xb0"
                + os.urandom(1200),
                ("127.0.0.1", listener.port),
            )  # fmt: skip
        await client.send_message(CANCEL)
        assert await worker.receive_message() == CANCEL
        assert listener.ignored >= 7


async def test_an_unknown_version_is_answered_with_the_known_ones(
    listener: QuicListener,
) -> None:
    with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        first = b"\xc0\x0a\x1a\x2a\x3a\x08" + bytes(range(8)) + b"\x00" + bytes(1200)
        await stranger.sendto(first, ("127.0.0.1", listener.port))
        answer, _ = await stranger.recvfrom(2000)
    header = pull_quic_header(Buffer(data=answer), host_cid_length=8)
    assert header.version == 0
    assert header.supported_versions == [1, 0x6B3343CF]


async def test_garbage_on_one_link_leaves_the_others_alone(
    listener: QuicListener,
) -> None:
    async with pair(listener) as (bad, worker), pair(listener) as (good, other):
        assert isinstance(bad, QuicLink)
        bad._session._engine.send(0, b"\x00\x00\x00\x05hello")
        bad.pump()
        with pytest.raises(LinkClosedError, match="no NAME") as here:
            await worker.receive_message()
        assert not here.value.by_peer
        with pytest.raises(LinkClosedError, match="no NAME") as there:
            await bad.receive_message()
        assert there.value.by_peer
        await good.send_message(CANCEL)
        assert await other.receive_message() == CANCEL


async def test_unknown_messages_are_skipped(listener: QuicListener) -> None:
    async with pair(listener) as (client, worker):
        assert isinstance(client, QuicLink)
        client._session._engine.send(0, b"\x00\x00\x00\x0aNEWER::yes")
        await client.send_message(CANCEL)
        assert await worker.receive_message() == CANCEL
        assert worker.statistics().ignored_messages == 1


# ----------------------------------------------------------------------- cancellation


async def test_cancelled_calls_leave_the_link_usable(listener: QuicListener) -> None:
    async def send_frame(link: Link) -> None:
        await link.send_frame(make_frame(1, 1000))

    async def send_message(link: Link) -> None:
        await link.send_message(CANCEL)

    async def receive_frame(link: Link) -> None:
        await link.receive_frame()

    async def receive_message(link: Link) -> None:
        await link.receive_message()

    async with pair(listener) as (client, worker):
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
    listener: QuicListener,
) -> None:
    async with pair(listener) as (client, worker):
        sent = await send_until_held_back(client)
        await client.send_message(line(sent))
        for index in range(sent):
            assert (await worker.receive_frame()).header.index == index
        await client.send_frame(make_frame(99))
        assert (await worker.receive_frame()).header.index == 99
        assert await worker.receive_message() == line(sent)


async def test_a_cancelled_dial_leaves_nothing_behind(listener: QuicListener) -> None:
    for _ in range(20):
        with trio.move_on_after(0.002):
            async with dial_quic(
                "127.0.0.1", listener.port, certificate_der=DER, auth=AUTH
            ):
                pass
    async with pair(listener) as (client, _):
        await client.send_message(Error("still here"))


# --------------------------------------------------------------------------- dialing


@asynccontextmanager
async def dead_port() -> AsyncIterator[tuple[str, int]]:
    """An address that takes datagrams and never answers."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as dead:
        dead.bind(("127.0.0.1", 0))
        yield dead.getsockname()


async def test_a_dead_address_costs_a_quarter_of_a_second(
    listener: QuicListener,
) -> None:
    async with dead_port() as dead:
        begin = trio.current_time()
        async with dial(
            [dead, ("127.0.0.1", listener.port)], certificate_der=DER, auth=AUTH
        ) as client:
            assert STAGGER <= trio.current_time() - begin < 10 * STAGGER
            worker = await listener.accept()
            await client.send_message(CANCEL)
            assert await worker.receive_message() == CANCEL
        with pytest.raises(LinkClosedError):
            await worker.receive_message()


async def test_the_proof_is_used_once_whoever_wins(listener: QuicListener) -> None:
    address = ("127.0.0.1", listener.port)
    async with dial([address] * 5, certificate_der=DER, auth=AUTH) as client:
        await listener.accept()
        with trio.move_on_after(3 * STAGGER):
            await listener.accept()
            pytest.fail("a second link used the proof")
        await client.send_message(CANCEL)


async def test_a_stranger_at_one_address_does_not_stop_the_dial(
    listener: QuicListener,
) -> None:
    async with (
        open_quic_listener("127.0.0.1", 0, make_certificate(), judge) as stranger,
        dial(
            [("127.0.0.1", stranger.port), ("127.0.0.1", listener.port)],
            certificate_der=DER,
            auth=AUTH,
        ),
    ):
        await listener.accept()


async def test_a_failed_dial_says_what_happened_at_each_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sleap_rtc.io.session.HANDSHAKE_TIMEOUT", 1.0)
    async with (
        open_quic_listener("127.0.0.1", 0, make_certificate(), judge) as stranger,
        dead_port() as dead,
    ):
        other = ("127.0.0.1", stranger.port)
        addresses = [dead, other, ("no.such.invalid", 1)]
        with pytest.raises(DialError) as caught:
            async with dial(addresses, certificate_der=DER, auth=AUTH):
                pytest.fail("it must not open")
    reasons = dict(caught.value.failures)
    assert "no answer" in reasons[f"127.0.0.1:{dead[1]}"]
    assert "not who it should be" in reasons[f"127.0.0.1:{other[1]}"]
    assert "no.such.invalid:1" in str(caught.value)


async def test_a_peer_without_addresses_cannot_be_dialed() -> None:
    with pytest.raises(DialError, match="no address"):
        async with dial([], certificate_der=DER, auth=AUTH):
            pytest.fail("it must not open")


# ------------------------------------------------------------------------- addresses


async def test_a_loopback_listener_is_reachable_only_there(
    listener: QuicListener,
) -> None:
    assert listener.local_addresses() == (("127.0.0.1", listener.port),)
