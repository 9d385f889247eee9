"""Dialing a peer at all of its addresses, over all kinds of link."""

import socket
from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from sleap_rtc.io.connect.dial import dial
from sleap_rtc.io.connect.kinds import KINDS
from sleap_rtc.io.connect.listener import Listener, open_listener
from sleap_rtc.io.link.addresses import describe_address
from sleap_rtc.io.link.certificates import make_certificate
from sleap_rtc.io.link.link import DialError, DialFailure, LinkClosedError
from sleap_rtc.proto.messages import Auth
from sleap_rtc.proto.route.kinds import LINK_KINDS, LinkKindName
from sleap_rtc.proto.route.race import STAGGER_INTERVAL
from tests.io.link.kinds import (
    AUTH,
    CERTIFICATE,
    DER,
    VERIFIED,
    dialed,
    judge,
    jump_when_idle,
    listening,
    listening_for_one,
    one_number,
    open_sockets,
    silent_port,
)


def address_of(bound: socket.socket) -> tuple[str, int]:
    host, port = bound.getsockname()
    return host, port


def everywhere(
    addresses: list[tuple[str, int]],
) -> dict[LinkKindName, list[tuple[str, int]]]:
    """The addresses as targets of every kind of link."""
    return dict.fromkeys(LINK_KINDS, addresses)


@pytest.fixture(autouse=True)
async def deadline() -> AsyncIterator[None]:
    with trio.fail_after(30):
        yield


@pytest.fixture
async def listener() -> AsyncIterator[Listener]:
    async with listening() as opened:
        yield opened


async def test_tcp_is_preferred_when_both_kinds_work(listener: Listener) -> None:
    async with dial(
        everywhere([("127.0.0.1", listener.port)]), certificate_der=DER, auth=AUTH
    ) as (
        client,
        reason,
    ):
        assert client.statistics().kind == "tcp"
        assert reason == "it answered first"
        worker = await listener.accept()
        assert worker.statistics().kind == "tcp"
        await client.send_message(VERIFIED)
        assert await worker.receive_message() == VERIFIED
    with pytest.raises(LinkClosedError, match="the peer closed the link"):
        await worker.receive_message()


async def test_every_kind_is_in_the_table_under_its_name() -> None:
    assert {kind: row.name for kind, row in KINDS.items()} == {
        kind: kind for kind in LINK_KINDS
    }


@pytest.mark.parametrize("kind", LINK_KINDS)
async def test_a_kind_can_be_named(listener: Listener, kind: LinkKindName) -> None:
    async with dialed(kind, listener.port) as client:
        await listener.accept()
        assert client.statistics().kind == kind


async def test_a_worker_that_listens_for_tcp_only_is_reached() -> None:
    with one_number() as (tcp, _):
        tcp.listen()
        async with (
            listening_for_one("tcp", tcp) as listener,
            dial(everywhere([address_of(tcp)]), certificate_der=DER, auth=AUTH) as (
                client,
                _,
            ),
        ):
            assert (await listener.accept()).statistics().kind == "tcp"
            assert client.statistics().kind == "tcp"


async def test_a_worker_that_listens_for_quic_only_is_reached() -> None:
    with one_number() as (tcp, udp):
        async with (
            listening_for_one("quic", udp) as listener,
            dial(everywhere([address_of(tcp)]), certificate_der=DER, auth=AUTH) as (
                client,
                reason,
            ),
        ):
            assert (await listener.accept()).statistics().kind == "quic"
            assert client.statistics().kind == "quic"
            assert reason == "TCP was not reachable: Connection refused"


async def test_quic_is_kept_when_tcp_is_silent() -> None:
    with one_number() as (tcp, udp):
        tcp.listen()
        async with (
            listening_for_one("quic", udp) as listener,
            dial(everywhere([address_of(tcp)]), certificate_der=DER, auth=AUTH) as (
                client,
                reason,
            ),
        ):
            await listener.accept()
            assert client.statistics().kind == "quic"
            assert reason.startswith("TCP did not answer within ")


async def test_the_next_address_is_tried_while_one_is_silent(
    listener: Listener, frozen_clock: MockClock
) -> None:
    jump_when_idle(frozen_clock)
    with silent_port() as silent:
        begin = trio.current_time()
        addresses = [("127.0.0.1", silent), ("127.0.0.1", listener.port)]
        async with dial({"tcp": addresses}, certificate_der=DER, auth=AUTH):
            assert trio.current_time() - begin == pytest.approx(STAGGER_INTERVAL)
            await listener.accept()


async def test_the_proof_is_used_once_by_the_link_that_wins() -> None:
    shown: list[Auth] = []

    def authenticate(auth: Auth) -> str:
        shown.append(auth)
        return judge(auth)

    async with open_listener("127.0.0.1", 0, CERTIFICATE, authenticate) as listener:
        addresses = [("127.0.0.1", listener.port), ("localhost", listener.port)]
        async with dial(everywhere(addresses), certificate_der=DER, auth=AUTH) as (
            client,
            _,
        ):
            worker = await listener.accept()
            await trio.testing.wait_all_tasks_blocked(2 * STAGGER_INTERVAL)
            await client.send_message(VERIFIED)
            assert await worker.receive_message() == VERIFIED
        assert shown == [AUTH]


async def test_a_stranger_at_one_address_does_not_stop_the_dial(
    listener: Listener,
) -> None:
    async with (
        open_listener("127.0.0.1", 0, make_certificate(), judge) as stranger,
        dial(
            everywhere([("127.0.0.1", stranger.port), ("127.0.0.1", listener.port)]),
            certificate_der=DER,
            auth=AUTH,
        ),
    ):
        await listener.accept()


async def test_a_failed_dial_reports_the_failure_of_each_address(
    jumping_clock: MockClock,
) -> None:
    async with open_listener("127.0.0.1", 0, make_certificate(), judge) as stranger:
        jump_when_idle(jumping_clock)
        other = ("127.0.0.1", stranger.port)
        with silent_port() as silent:
            addresses = [("127.0.0.1", silent), other]
            with pytest.raises(DialError) as caught:
                async with dial(everywhere(addresses), certificate_der=DER, auth=AUTH):
                    pytest.fail("it must not open")
    reasons = {(f.kind, f.address): f.reason for f in caught.value.failures}
    assert len(reasons) == 2 * len(LINK_KINDS)
    for kind in LINK_KINDS:
        assert reasons[kind, f"127.0.0.1:{silent}"] == "no answer for 10 s"
        assert "not the expected peer" in reasons[kind, f"127.0.0.1:{stranger.port}"]
        assert f"{kind} to 127.0.0.1:{silent}: no answer for 10 s" in str(caught.value)


@pytest.mark.parametrize("kind", LINK_KINDS)
async def test_a_name_that_does_not_exist_is_described(kind: LinkKindName) -> None:
    with pytest.raises(DialError, match=f"{kind} to no.such.invalid:1: "):
        async with dialed(kind, 1, host="no.such.invalid"):
            pytest.fail("it must not open")


async def test_a_peer_that_refuses_is_described() -> None:
    with one_number() as (tcp, _):
        with pytest.raises(DialError) as caught:
            async with dialed("tcp", tcp.getsockname()[1]):
                pytest.fail("it must not open")
        where = describe_address(tcp.getsockname())
    failure = DialFailure("tcp", where, "Connection refused")
    assert caught.value.failures == (failure,)
    shown = f"cannot reach the peer (tcp to {where}: Connection refused)"
    assert str(caught.value) == shown


async def test_a_peer_without_addresses_cannot_be_dialed() -> None:
    with pytest.raises(DialError, match="no address"):
        async with dial(everywhere([]), certificate_der=DER, auth=AUTH):
            pytest.fail("it must not open")


async def test_an_exception_of_the_body_is_not_wrapped(listener: Listener) -> None:
    async def fail() -> None:
        async with dial(
            everywhere([("127.0.0.1", listener.port)]), certificate_der=DER, auth=AUTH
        ):
            raise KeyError

    with pytest.raises(KeyError):
        await fail()


async def test_a_cancelled_dial_leaves_nothing_behind() -> None:
    async def open_link(port: int) -> None:
        address = ("127.0.0.1", port)
        async with dial(everywhere([address, address]), certificate_der=DER, auth=AUTH):
            pytest.fail("it must not open")

    most = 0
    with silent_port() as port:
        before = open_sockets()
        for turns in range(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(open_link, port)
                for _ in range(turns):
                    await trio.lowlevel.checkpoint()
                most = max(most, open_sockets())
                nursery.cancel_scope.cancel()
            assert open_sockets() == before
    assert most > before


async def test_the_losers_of_a_race_are_closed() -> None:
    with silent_port() as silent:
        before = open_sockets()
        async with listening() as listener:
            addresses = [("127.0.0.1", silent), ("127.0.0.1", listener.port)]
            listening_only = open_sockets()
            async with dial(everywhere(addresses), certificate_der=DER, auth=AUTH) as (
                client,
                _,
            ):
                await listener.accept()
                await trio.testing.wait_all_tasks_blocked()
                assert client.statistics().kind == "tcp"
                # The winner, at both ends.
                assert open_sockets() == listening_only + 2
        assert open_sockets() == before
