"""What only QUIC links do, over real UDP sockets on loopback."""

import os
import socket
from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing
from aioquic.buffer import Buffer  # type: ignore[attr-defined] # no __all__
from aioquic.quic.packet import pull_quic_header

from sleap_rtc.io.quic.driver import QuicListener, dial_quic, open_quic_listener
from sleap_rtc.io.quic.link import QuicLink
from sleap_rtc.proto.mtu import LARGEST_DATAGRAM
from sleap_rtc.proto.transfer.frames import ChunkHeader, Frame
from tests.io.link.kinds import AUTH, CANCEL, CERTIFICATE, QUIC, judge, pair


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


async def test_datagrams_over_loopback_grow_to_the_size_that_is_asked_for() -> None:
    async with (
        open_quic_listener("127.0.0.1", 0, CERTIFICATE, judge) as listener,
        dial_quic(
            "127.0.0.1",
            listener.port,
            certificate_der=CERTIFICATE.certificate_der,
            auth=AUTH,
            largest_datagram=4000,
        ) as client,
    ):
        worker = await listener.accept()
        size = 1024 * 1024
        header = ChunkHeader(1, 0, size, bytes(32))
        for link, other in ((client, worker), (worker, client)):
            await link.send_frame(Frame(header, bytes(size)))
            await other.receive_frame()
        assert isinstance(client, QuicLink)
        assert isinstance(worker, QuicLink)
        assert client._session._engine.datagram_size == 4000
        assert worker._session._engine.datagram_size == LARGEST_DATAGRAM


# ------------------------------------------------------------------------- addresses


async def test_a_loopback_listener_is_reachable_only_there(
    listener: QuicListener,
) -> None:
    assert listener.local_addresses() == (("127.0.0.1", listener.port),)
