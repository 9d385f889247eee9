"""Dialing a peer at all of its addresses, over both kinds of link."""

import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import pytest
import trio
import trio.testing

from sleap_rtc.io.connect.dial import dial
from sleap_rtc.io.connect.listener import Listener, open_listener
from sleap_rtc.io.link.certificates import make_certificate
from sleap_rtc.io.link.link import DialError, LinkClosedError
from sleap_rtc.proto.route.routes import STAGGER_INTERVAL
from tests.io.link.kinds import AUTH, CANCEL, CERTIFICATE, DER, QUIC, TCP, Kind, judge


@pytest.fixture(autouse=True)
async def deadline() -> AsyncIterator[None]:
    with trio.fail_after(30):
        yield


@pytest.fixture
async def listener() -> AsyncIterator[Listener]:
    async with open_listener("127.0.0.1", 0, CERTIFICATE, judge) as opened:
        yield opened


@contextmanager
def dead_port() -> Iterator[tuple[str, int]]:
    """An address that takes what comes, over TCP and UDP, and never answers."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
        socket.socket() as tcp,
    ):
        udp.bind(("127.0.0.1", 0))
        tcp.bind(udp.getsockname())
        tcp.listen()
        yield udp.getsockname()


async def test_tcp_is_preferred_when_both_kinds_work(listener: Listener) -> None:
    async with dial([("127.0.0.1", listener.port)], certificate_der=DER, auth=AUTH) as (
        client,
        reason,
    ):
        assert client.statistics().kind == "tcp"
        assert reason == "it answered first"
        worker = await listener.accept()
        assert worker.statistics().kind == "tcp"
        await client.send_message(CANCEL)
        assert await worker.receive_message() == CANCEL
    with pytest.raises(LinkClosedError) as caught:
        await worker.receive_message()
    assert caught.value.by_peer


@pytest.mark.parametrize("kind", [TCP, QUIC], ids=["tcp", "quic"])
async def test_a_kind_can_be_named(listener: Listener, kind: Kind) -> None:
    async with dial(
        [("127.0.0.1", listener.port)],
        certificate_der=DER,
        auth=AUTH,
        kinds=(kind.name,),
    ) as (client, _):
        await listener.accept()
        assert client.statistics().kind == kind.name


@pytest.mark.parametrize("kind", [TCP, QUIC], ids=["tcp", "quic"])
async def test_a_worker_may_listen_for_one_kind_only(kind: Kind) -> None:
    async with (
        kind.listen("127.0.0.1", 0, CERTIFICATE, judge) as listener,
        dial([("127.0.0.1", listener.port)], certificate_der=DER, auth=AUTH) as found,
    ):
        client, reason = found
        assert (await listener.accept()).statistics().kind == kind.name
        assert client.statistics().kind == kind.name
        if kind is QUIC:
            assert reason == "TCP was not reachable: Connection refused"


async def test_quic_is_kept_when_tcp_is_silent() -> None:
    async with QUIC.listen("127.0.0.1", 0, CERTIFICATE, judge) as listener:
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", listener.port))
            silent.listen()
            async with dial(
                [("127.0.0.1", listener.port)], certificate_der=DER, auth=AUTH
            ) as (client, reason):
                await listener.accept()
                assert client.statistics().kind == "quic"
                assert reason.startswith("TCP did not answer within 0.")


async def test_a_dead_address_costs_a_quarter_of_a_second(listener: Listener) -> None:
    with dead_port() as dead:
        begin = trio.current_time()
        async with dial(
            [dead, ("127.0.0.1", listener.port)], certificate_der=DER, auth=AUTH
        ):
            assert (
                STAGGER_INTERVAL <= trio.current_time() - begin < 10 * STAGGER_INTERVAL
            )
            await listener.accept()


async def test_the_proof_is_used_once_whoever_wins(listener: Listener) -> None:
    addresses = [("127.0.0.1", listener.port), ("localhost", listener.port)]
    async with dial(addresses, certificate_der=DER, auth=AUTH) as (client, _):
        await listener.accept()
        with trio.move_on_after(3 * STAGGER_INTERVAL):
            await listener.accept()
            pytest.fail("a second link used the proof")
        await client.send_message(CANCEL)


async def test_a_stranger_at_one_address_does_not_stop_the_dial(
    listener: Listener,
) -> None:
    async with (
        open_listener("127.0.0.1", 0, make_certificate(), judge) as stranger,
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
    monkeypatch.setattr("sleap_rtc.io.link.session.HANDSHAKE_TIMEOUT", 1.0)
    async with open_listener("127.0.0.1", 0, make_certificate(), judge) as stranger:
        other = ("127.0.0.1", stranger.port)
        with dead_port() as dead:
            addresses = [dead, other, ("no.such.invalid", 1)]
            with pytest.raises(DialError) as caught:
                async with dial(addresses, certificate_der=DER, auth=AUTH):
                    pytest.fail("it must not open")
    reasons = dict(caught.value.failures)
    assert len(reasons) == 6
    for kind in ("tcp", "quic"):
        assert "no answer" in reasons[f"{kind} to 127.0.0.1:{dead[1]}"]
        assert "not who it should be" in reasons[f"{kind} to 127.0.0.1:{other[1]}"]
        assert f"{kind} to no.such.invalid:1" in str(caught.value)


async def test_a_peer_that_refuses_is_described(listener: Listener) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(
            DialError, match=r"tcp to 127.0.0.1:\d+: Connection refused"
        ):
            async with dial(
                [unused.getsockname()],
                certificate_der=DER,
                auth=AUTH,
                kinds=("tcp",),
            ):
                pytest.fail("it must not open")


async def test_a_peer_without_addresses_cannot_be_dialed() -> None:
    with pytest.raises(DialError, match="no address"):
        async with dial([], certificate_der=DER, auth=AUTH):
            pytest.fail("it must not open")


async def test_what_the_body_raises_leaves_as_it_is(listener: Listener) -> None:
    async def fail() -> None:
        async with dial([("127.0.0.1", listener.port)], certificate_der=DER, auth=AUTH):
            raise KeyError

    with pytest.raises(KeyError):
        await fail()


async def test_a_cancelled_dial_leaves_nothing_behind(listener: Listener) -> None:
    address = ("127.0.0.1", listener.port)
    for _ in range(20):
        with trio.move_on_after(0.004):
            async with dial([address], certificate_der=DER, auth=AUTH):
                pass
    async with dial([address], certificate_der=DER, auth=AUTH) as (client, _):
        await client.send_message(CANCEL)
