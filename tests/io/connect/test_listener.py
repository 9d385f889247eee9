"""One port number for links of all kinds."""

import socket
import sys
from collections.abc import AsyncIterator

import pytest
import trio

from sleap_rtc.io.connect.kinds import KINDS
from sleap_rtc.io.connect.listener import open_listener
from sleap_rtc.proto.route.kinds import LINK_KINDS
from tests.io.link.kinds import (
    CERTIFICATE,
    dialed,
    judge,
    listening,
    listening_for_one,
    one_number,
    open_sockets,
)

linux_only = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux lets a listener share its number"
)


@pytest.fixture(autouse=True)
async def deadline() -> AsyncIterator[None]:
    with trio.fail_after(30):
        yield


async def test_links_of_all_kinds_come_from_one_port() -> None:
    async with listening() as listener:
        assert listener.local_addresses() == (("127.0.0.1", listener.port),)
        for kind in (*LINK_KINDS, *LINK_KINDS):
            async with dialed(kind, listener.port):
                worker = await listener.accept()
                assert worker.statistics().kind == kind
                assert worker.peer == "client 5555"


@pytest.mark.parametrize("host", ["", "::", "0.0.0.0"])
async def test_a_listener_for_everywhere_is_reached_over_loopback(host: str) -> None:
    try:
        async with open_listener(host, 0, CERTIFICATE, judge) as listener:
            local = "::1" if host == "::" else "127.0.0.1"
            for kind in LINK_KINDS:
                async with dialed(kind, listener.port, host=local):
                    await listener.accept()
    except OSError as error:
        if host != "::":
            raise
        pytest.skip(f"no IPv6 here: {error}")


@pytest.mark.parametrize("transport", ["UDP", "TCP"])
async def test_a_given_port_has_to_be_free_for_all_kinds(transport: str) -> None:
    with one_number() as (tcp, _):
        port = tcp.getsockname()[1]
        if transport == "TCP":
            tcp.listen()
        elif sys.platform != "linux":
            pytest.skip("the TCP number cannot be reserved")
        before = open_sockets()
        with pytest.raises(OSError, match=f"{transport} port {port}: .*in use"):
            async with open_listener("127.0.0.1", port, CERTIFICATE, judge):
                pytest.fail("it must not open")
        assert open_sockets() == before


@linux_only
async def test_connections_of_an_earlier_listener_do_not_block_its_port() -> None:
    with one_number() as (tcp, _):
        port = tcp.getsockname()[1]
        for _ in range(3):
            async with (
                listening_for_one("tcp", KINDS["tcp"].bind("127.0.0.1", port)) as again,
                dialed("tcp", port),
            ):
                await again.accept()


@linux_only
async def test_a_free_port_is_searched_until_all_kinds_can_have_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with one_number() as (_, udp):
        taken = udp.getsockname()[1]
        real = socket.socket.bind
        asked: list[int] = []

        def bind(self: socket.socket, address: tuple[str, int]) -> None:
            """Bind the first socket to a number that the second one cannot have."""
            if not asked:
                address = (address[0], taken)
            asked.append(address[1])
            real(self, address)

        monkeypatch.setattr(socket.socket, "bind", bind)
        before = open_sockets()
        async with listening() as listener:
            assert listener.port != taken
            assert open_sockets() == before + len(LINK_KINDS)
        assert asked[:3] == [taken, taken, 0]


async def test_a_listener_needs_a_literal_address() -> None:
    with pytest.raises(OSError, match="TCP port 0"):
        async with open_listener("not an address", 0, CERTIFICATE, judge):
            pytest.fail("it must not open")
