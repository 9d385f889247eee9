"""Behaviour of QUIC links alone, over real UDP sockets on loopback."""

import os
import socket
from collections.abc import AsyncIterator

import pytest
import trio
from aioquic.buffer import Buffer  # type: ignore[attr-defined] # no __all__
from aioquic.quic.packet import pull_quic_header
from msgspec.structs import replace

from sleap_rtc.io.link.limits import LIMITS
from sleap_rtc.io.link.link import Link
from sleap_rtc.io.quic.link import QuicLink
from sleap_rtc.proto.messages import Message
from tests.io.link.kinds import (
    VERIFIED,
    OneKind,
    dialed,
    listening_for_one,
    make_frame,
    pair,
)


@pytest.fixture(autouse=True)
async def deadline() -> AsyncIterator[None]:
    with trio.fail_after(60):
        yield


@pytest.fixture
async def listener() -> AsyncIterator[OneKind]:
    async with listening_for_one("quic") as opened:
        yield opened


@pytest.mark.parametrize("first", [0x00, 0x40, 0x80, 0xC0, 0xFF])
async def test_garbage_datagrams_are_ignored(listener: OneKind, first: int) -> None:
    async with pair("quic", listener) as (client, worker):
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
        await client.send_message(VERIFIED)
        assert await worker.receive_message() == VERIFIED


async def test_an_unknown_version_is_answered_with_the_known_ones(
    listener: OneKind,
) -> None:
    with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        first = b"\xc0\x0a\x1a\x2a\x3a\x08" + bytes(range(8)) + b"\x00" + bytes(1200)
        await stranger.sendto(first, ("127.0.0.1", listener.port))
        answer, _ = await stranger.recvfrom(2000)
    header = pull_quic_header(Buffer(data=answer), host_cid_length=8)
    assert header.version == 0
    assert header.supported_versions == [1, 0x6B3343CF]


async def test_datagrams_over_loopback_grow_as_far_as_each_side_allows(
    listener: OneKind,
) -> None:
    limits = replace(LIMITS, largest_datagram=4000)
    async with dialed("quic", listener.port, limits=limits) as client:
        worker = await listener.accept()
        for link, other in ((client, worker), (worker, client)):
            await link.send_frame(make_frame(0))
            await other.receive_frame()
        assert size_of_datagrams(client) == 4000
        assert size_of_datagrams(worker) == LIMITS.largest_datagram


def size_of_datagrams(link: Link[Message]) -> int:
    assert isinstance(link, QuicLink)
    return link.session._engine.connection.datagram_size
