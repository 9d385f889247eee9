"""What only QUIC links do, over real UDP sockets on loopback."""

import os
import socket
from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing
from aioquic.buffer import Buffer  # type: ignore[attr-defined] # no __all__
from aioquic.quic.packet import pull_quic_header

from sleap_rtc.io.quic import QuicListener, open_quic_listener
from tests.io.links import CANCEL, CERTIFICATE, QUIC, judge, pair


@pytest.fixture(autouse=True)
async def deadline() -> AsyncIterator[None]:
    with trio.fail_after(60):
        yield


@pytest.fixture
async def listener() -> AsyncIterator[QuicListener]:
    async with open_quic_listener("127.0.0.1", 0, CERTIFICATE, judge) as opened:
        yield opened


@pytest.mark.parametrize("first", [0x00, 0x40, 0x80, 0xC0, 0xFF])
async def test_garbage_datagrams_are_counted_and_ignored(
    listener: QuicListener, first: int
) -> None:
    async with pair(QUIC, listener) as (client, worker):
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


# ------------------------------------------------------------------------- addresses


async def test_a_loopback_listener_is_reachable_only_there(
    listener: QuicListener,
) -> None:
    assert listener.local_addresses() == (("127.0.0.1", listener.port),)
