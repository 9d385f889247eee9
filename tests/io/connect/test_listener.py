"""One port number for links of both kinds."""

import socket
from collections.abc import AsyncIterator

import pytest
import trio

from sleap_rtc.io.connect.listener import open_listener
from tests.io.link.kinds import AUTH, CERTIFICATE, DER, QUIC, TCP, judge


@pytest.fixture(autouse=True)
async def deadline() -> AsyncIterator[None]:
    with trio.fail_after(30):
        yield


async def test_links_of_both_kinds_come_from_one_port() -> None:
    async with open_listener("127.0.0.1", 0, CERTIFICATE, judge) as listener:
        assert listener.local_addresses() == (("127.0.0.1", listener.port),)
        for kind in (TCP, QUIC, TCP):
            async with kind.dial(
                "127.0.0.1", listener.port, certificate_der=DER, auth=AUTH
            ):
                worker = await listener.accept()
                assert worker.statistics().kind == kind.name
                assert worker.peer == "client 5555"


@pytest.mark.parametrize("host", ["", "::", "0.0.0.0"])
async def test_a_listener_for_everywhere_is_reached_over_loopback(host: str) -> None:
    try:
        async with open_listener(host, 0, CERTIFICATE, judge) as listener:
            local = "::1" if host == "::" else "127.0.0.1"
            for kind in (TCP, QUIC):
                async with kind.dial(
                    local, listener.port, certificate_der=DER, auth=AUTH
                ):
                    await listener.accept()
    except OSError as error:
        if host != "::":
            raise
        pytest.skip(f"no IPv6 here: {error}")


@pytest.mark.parametrize("taken", ["UDP", "TCP"])
async def test_a_named_port_has_to_be_free_for_both(taken: str) -> None:
    kind = socket.SOCK_DGRAM if taken == "UDP" else socket.SOCK_STREAM
    with socket.socket(socket.AF_INET, kind) as other:
        other.bind(("127.0.0.1", 0))
        if taken == "TCP":
            other.listen()
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=f"{taken} port {port}: .*in use"):
            async with open_listener("127.0.0.1", port, CERTIFICATE, judge):
                pytest.fail("it must not open")


async def test_a_port_is_free_again_after_its_listener() -> None:
    port = 0
    for _ in range(3):
        async with open_listener("127.0.0.1", port, CERTIFICATE, judge) as listener:
            port = listener.port
            async with TCP.dial("127.0.0.1", port, certificate_der=DER, auth=AUTH):
                await listener.accept()


async def test_a_free_port_is_sought_until_both_can_have_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        real = socket.socket.bind
        asked: list[int] = []

        def bind(self: socket.socket, address: tuple[str, int]) -> None:
            """Give the first UDP socket the number that TCP can't have."""
            if address[1] == 0 and not asked:
                address = (address[0], taken.getsockname()[1])
            asked.append(address[1])
            real(self, address)

        monkeypatch.setattr(socket.socket, "bind", bind)
        async with open_listener("127.0.0.1", 0, CERTIFICATE, judge) as listener:
            assert listener.port != taken.getsockname()[1]
        assert len(asked) >= 4


async def test_a_listener_needs_a_literal_address() -> None:
    with pytest.raises(OSError, match="UDP port 0"):
        async with open_listener("not an address", 0, CERTIFICATE, judge):
            pytest.fail("it must not open")
