"""The UDP socket of QUIC, with real sockets."""

import socket
import sys
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import cast

import pytest
import trio

from sleap_rtc.io.quic.engine import Address
from sleap_rtc.io.quic.socket import (
    _UDP_GRO,
    BATCH,
    BATCH_BYTES,
    GSO_DATAGRAMS,
    UdpSocket,
    bind_udp,
)

_SO_NO_CHECK = 11
"""Number of the socket option, from the headers of Linux."""


def open_udp() -> closing[UdpSocket]:
    return closing(UdpSocket(bind_udp(socket.AF_INET, "127.0.0.1", 0)))


def address_of(udp: UdpSocket) -> tuple[str, int]:
    host, port = udp._socket.getsockname()
    return host, port


@pytest.fixture(autouse=True)
async def deadline() -> AsyncIterator[None]:
    with trio.fail_after(60):
        yield


async def test_datagrams_arrive_in_bounded_batches_with_their_source() -> None:
    with (
        open_udp() as receiver,
        open_udp() as sender,
    ):
        target = address_of(receiver)
        # Each longer than the one before, so that no two travel together.
        sent = [bytes(number) for number in range(1, BATCH + 10)]
        sender.send([(data, target) for data in sent])
        first = await receiver.receive_batch()
        second = await receiver.receive_batch()
        assert len(first) == BATCH
        assert [data for data, _ in first + second] == sent
        assert {source for _, source in first} == {address_of(sender)}


async def test_large_datagrams_make_short_batches() -> None:
    size = 32_000
    with (
        open_udp() as receiver,
        open_udp() as sender,
    ):
        target = address_of(receiver)
        sent = 0
        while sent * size <= BATCH_BYTES + size:
            sender.send([(bytes(size), target)])
            sent += 1
        first = await receiver.receive_batch()
        assert 1 < len(first) <= BATCH_BYTES // size + 2
        while sent > len(first):
            sent -= len(await receiver.receive_batch())
        assert sent == len(first)


@pytest.mark.parametrize("size", [1, 1350, 8900])
async def test_datagrams_of_one_size_arrive_apart(size: int) -> None:
    with (
        open_udp() as receiver,
        open_udp() as sender,
    ):
        target = address_of(receiver)
        sent = [bytes((number,)) * size for number in range(3 * GSO_DATAGRAMS // 2)]
        sent.append(b"!")
        sender.send([(data, target) for data in sent])
        arrived: list[bytes] = []
        while len(arrived) < len(sent):
            batch = await receiver.receive_batch()
            assert len(batch) < BATCH + GSO_DATAGRAMS
            arrived += [data for data, _ in batch]
        assert arrived == sent


async def test_a_batch_has_one_receiver() -> None:
    with (
        open_udp() as one,
        open_udp() as other,
        open_udp() as sender,
    ):
        targets = [address_of(one), address_of(other)]
        sender.send([(bytes((n,)) * 100, targets[n % 2]) for n in range(10)])
        for parity, receiver in enumerate((one, other)):
            batch = await receiver.receive_batch()
            assert [data[0] for data, _ in batch] == list(range(parity, 10, 2))


async def test_a_system_without_offload_handles_one_datagram_at_a_time() -> None:
    with (
        open_udp() as receiver,
        open_udp() as sender,
    ):
        receiver._has_gro = sender._has_gso = False
        if sys.platform == "linux":
            receiver._socket.setsockopt(socket.IPPROTO_UDP, _UDP_GRO, 0)
        target = address_of(receiver)
        sent = [bytes((number,)) * 100 for number in range(20)]
        sender.send([(data, target) for data in sent])
        batch = await receiver.receive_batch()
        assert [data for data, _ in batch] == sent


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has the offload")
async def test_batches_that_cannot_be_cut_are_sent_one_at_a_time() -> None:
    with (
        open_udp() as receiver,
        open_udp() as sender,
    ):
        # A socket without checksums cannot cut (EIO), as some network cards.
        sender._socket.setsockopt(socket.SOL_SOCKET, _SO_NO_CHECK, 1)
        target = address_of(receiver)
        sent = [bytes((number,)) * 100 for number in range(20)]
        sender.send([(data, target) for data in sent])
        assert not sender._has_gso
        batch = await receiver.receive_batch()
        assert [data for data, _ in batch] == sent


async def test_the_buffers_are_larger_than_the_default() -> None:
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as plain,
        open_udp() as large,
    ):
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            usual = plain.getsockopt(socket.SOL_SOCKET, option)
            assert large._socket.getsockopt(socket.SOL_SOCKET, option) > usual


async def test_an_error_of_the_network_is_not_an_error_of_the_socket() -> None:
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as dead,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as bound,
    ):
        # Connected to another peer, it refuses the datagrams of this one.
        dead.bind(("127.0.0.1", 0))
        dead.connect(("127.0.0.1", 9))
        target = dead.getsockname()
        # The system reports refused datagrams to a connected socket only.
        bound.connect(target)
        bound.setblocking(False)
        udp = UdpSocket(bound)
        udp.send([(b"hello", target)])
        assert await udp.receive_batch() == []
        udp.send([(b"hello", target)])
        udp.send([(b"hello", target)])


async def test_a_datagram_that_cannot_leave_is_dropped() -> None:
    with open_udp() as udp:
        target = address_of(udp)
        udp.send([(bytes(70_000), target), (b"next", target)])
        assert [data for data, _ in await udp.receive_batch()] == [b"next"]


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux makes a datagram sender wait"
)
async def test_a_full_socket_keeps_the_rest_until_there_is_room(
    tmp_path: Path,
) -> None:
    # UDP on loopback drops instead of waiting; datagrams of this family wait.
    receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    receiver.bind(str(tmp_path / "receiver"))
    sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sender.connect(str(tmp_path / "receiver"))
    sender.setblocking(False)
    receiver.setblocking(False)
    target = cast(Address, str(tmp_path / "receiver"))
    sent = [b"%d" % number for number in range(2000)]
    with closing(UdpSocket(sender)) as udp, receiver:
        udp.send([(data, target) for data in sent])
        assert udp.full
        received: list[bytes] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(udp.wait_until_sent)
            while len(received) < len(sent):
                await trio.lowlevel.wait_readable(receiver)
                received.append(receiver.recv(100))
        assert received == sent
        assert not udp.full


async def test_a_busy_port_is_an_error() -> None:
    with open_udp() as first, pytest.raises(OSError, match="in use"):
        bind_udp(socket.AF_INET, *address_of(first))
