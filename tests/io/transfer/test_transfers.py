"""Real files over a link in memory, and over QUIC."""

import tracemalloc
from contextlib import closing
from pathlib import Path

import pytest
import trio
from blake3 import blake3
from typing_extensions import override

from sleap_rtc.io.connect.dial import dial
from sleap_rtc.io.connect.listener import open_listener
from sleap_rtc.io.link.certificates import make_certificate
from sleap_rtc.io.link.link import LinkClosedError
from sleap_rtc.io.nursery import open_background_nursery
from sleap_rtc.io.storage.files import Buffer
from sleap_rtc.io.storage.folder import StorageError, open_owned
from sleap_rtc.io.transfer.chunk_files import ChunkReader, ChunkWriter
from sleap_rtc.io.transfer.transfers import Transfers
from sleap_rtc.proto.messages import (
    Auth,
    ChunkGrant,
    FileError,
    FileReceived,
    FileVerified,
    Message,
    OfferedFile,
)
from sleap_rtc.proto.transfer.frames import ChunkHeader, Frame
from tests.io.link.memory import MemoryLink
from tests.io.transfer.sides import (
    CHUNK_SIZE,
    DEADLINE,
    Job,
    Side,
    send_and_receive,
    two_sides,
)


@pytest.mark.parametrize(
    "size", [0, 1, CHUNK_SIZE, CHUNK_SIZE + 1, 40 * CHUNK_SIZE, 40 * CHUNK_SIZE - 1]
)
async def test_a_file_arrives(tmp_path: Path, size: int) -> None:
    job = Job(tmp_path, size)
    async with two_sides() as (sender, receiver):
        await send_and_receive(job, sender, receiver)
        job.check_arrived()
        assert sender.transfers.active == receiver.transfers.active == 0


async def test_files_in_both_directions_share_a_link(tmp_path: Path) -> None:
    jobs = [Job(tmp_path, (n + 1) * 333_333, f"{n}.bin") for n in range(6)]
    async with two_sides() as sides, trio.open_nursery() as nursery:
        for number, job in enumerate(jobs):
            nursery.start_soon(job.send, sides[number % 2], number)
            nursery.start_soon(job.receive, sides[1 - number % 2], number)
    for job in jobs:
        job.check_arrived()


async def test_damaged_doubled_and_swapped_frames_do_no_harm(tmp_path: Path) -> None:
    job = Job(tmp_path, 30 * CHUNK_SIZE)
    held: list[Frame] = []

    def harm(frame: Frame) -> list[Frame]:
        match sender_link.frames_sent:
            case 3:
                return [Frame(frame.header, bytes(frame.header.length))]
            case 5:
                return [frame, frame]
            case 7:
                held.append(frame)
                return []
            case 9:
                return [frame, *held]
        return [frame]

    async with two_sides() as (sender, receiver):
        assert isinstance(sender.link, MemoryLink)
        sender_link = sender.link
        sender_link.harm = harm
        await send_and_receive(job, sender, receiver)
        job.check_arrived()
        assert sender_link.frames_sent == 31


async def test_both_sides_need_little_memory(tmp_path: Path) -> None:
    size = 300 * CHUNK_SIZE
    job = Job(tmp_path, 0)
    with job.source_path.open("wb") as file:
        file.truncate(size)
    job.offer = OfferedFile(name="job.zip", size=size, chunk_size=CHUNK_SIZE)
    async with two_sides() as (sender, receiver):
        tracemalloc.start()
        try:
            await send_and_receive(job, sender, receiver)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert not job.errors
    assert peak < 30 * CHUNK_SIZE


async def test_a_source_that_changes_is_noticed_by_both(tmp_path: Path) -> None:
    job = Job(tmp_path, 50 * CHUNK_SIZE)

    def change_source(frame: Frame) -> list[Frame]:
        with job.source_path.open("ab") as file:
            file.write(b"more")
        return [frame]

    async with two_sides() as (sender, receiver):
        assert isinstance(sender.link, MemoryLink)
        sender.link.harm = change_source
        await send_and_receive(job, sender, receiver)
    assert "changed while it was sent" in job.reason("sender")
    assert "changed while it was sent" in job.reason("receiver")
    job.check_nothing_left()


async def test_a_source_that_shrinks_is_noticed_by_both(tmp_path: Path) -> None:
    job = Job(tmp_path, 50 * CHUNK_SIZE)

    def cut_source(frame: Frame) -> list[Frame]:
        job.source_path.write_bytes(b"")
        return [frame]

    async with two_sides() as (sender, receiver):
        assert isinstance(sender.link, MemoryLink)
        sender.link.harm = cut_source
        await send_and_receive(job, sender, receiver)
    assert job.reason("sender") == job.reason("receiver")
    job.check_nothing_left()


class FullDisk(ChunkWriter):
    """Storage that fails at the third chunk."""

    @override
    def write(self, index: int, payload: Buffer, digest: bytes) -> bool:
        if index == 2:
            raise StorageError("Failed to write job.zip: the disk is full")
        return super().write(index, payload, digest)


async def test_both_sides_get_the_reason_of_a_failed_write(tmp_path: Path) -> None:
    job = Job(tmp_path, 50 * CHUNK_SIZE)
    sink = FullDisk.open(
        job.root, "job.zip", size=job.offer.size, chunk_size=CHUNK_SIZE
    )
    async with two_sides() as (sender, receiver), trio.open_nursery() as nursery:
        nursery.start_soon(job.send, sender)
        nursery.start_soon(job.receive, receiver, 1, sink)
    assert job.reason("receiver") == "Failed to write job.zip: the disk is full"
    assert job.reason("sender") == job.reason("receiver")
    job.check_nothing_left()


async def test_a_name_that_is_taken_meanwhile_is_not_overwritten(
    tmp_path: Path,
) -> None:
    job = Job(tmp_path, 5 * CHUNK_SIZE)
    sink = job.sink()
    (job.root / "job.zip").write_bytes(b"somebody else's")
    async with two_sides() as (sender, receiver), trio.open_nursery() as nursery:
        nursery.start_soon(job.send, sender)
        nursery.start_soon(job.receive, receiver, 1, sink)
    assert "job.zip" in job.reason("receiver")
    assert [path.name for path in job.root.iterdir()] == ["job.zip"]
    assert (job.root / "job.zip").read_bytes() == b"somebody else's"


@pytest.mark.parametrize("cancelled", ["sender", "receiver"])
async def test_cancelling_one_side_informs_the_other(
    tmp_path: Path, cancelled: str
) -> None:
    job = Job(tmp_path, 50 * CHUNK_SIZE)
    scope = trio.CancelScope()

    def cancel_at_the_fifth(frame: Frame) -> list[Frame]:
        if link.frames_sent == 5:
            scope.cancel()
        return [frame]

    async def in_scope(side: str) -> None:
        if side == cancelled:
            with scope:
                await run[side]()
            assert scope.cancelled_caught
        else:
            await run[side]()

    async with two_sides() as (sender, receiver), trio.open_nursery() as nursery:
        assert isinstance(sender.link, MemoryLink)
        link = sender.link
        link.harm = cancel_at_the_fifth
        run = {
            "sender": lambda: job.send(sender),
            "receiver": lambda: job.receive(receiver),
        }
        nursery.start_soon(in_scope, "sender")
        nursery.start_soon(in_scope, "receiver")
    (side,) = job.errors
    assert side != cancelled
    assert job.reason(side) == "the other side cancelled the transfer"
    if cancelled == "sender":
        job.check_nothing_left()
    else:
        job.check_kept()


async def test_a_lost_link_ends_both_sides_and_keeps_the_part(tmp_path: Path) -> None:
    job = Job(tmp_path, 50 * CHUNK_SIZE)

    def cut_at_the_fifth(frame: Frame) -> list[Frame]:
        if link.frames_sent == 5:
            link.cut("the network is gone")
        return [frame]

    async with two_sides() as (sender, receiver):
        assert isinstance(sender.link, MemoryLink)
        link = sender.link
        link.harm = cut_at_the_fifth
        await send_and_receive(job, sender, receiver)
        source = ChunkReader(open_owned(job.source_path), chunk_size=CHUNK_SIZE)
        with pytest.raises(LinkClosedError), closing(source):
            await sender.transfers.send_file(2, job.offer, source)
    for side in ("sender", "receiver"):
        assert isinstance(job.errors[side], LinkClosedError)
        assert str(job.errors[side]) == "the network is gone"
    job.check_kept()


async def test_a_file_arrives_over_quic(tmp_path: Path) -> None:
    job = Job(tmp_path, 40 * CHUNK_SIZE + 1)
    certificate = make_certificate()
    auth = Auth(session="5" * 32, proof="7" * 64)
    with trio.fail_after(DEADLINE):
        async with (
            open_listener(
                "127.0.0.1", 0, certificate, lambda auth: auth.session
            ) as listener,
            dial(
                {"quic": [("127.0.0.1", listener.port)]},
                certificate_der=certificate.certificate_der,
                auth=auth,
            ) as (link, _),
            open_background_nursery() as nursery,
        ):
            sender, receiver = Side(link), Side(await listener.accept())
            nursery.start_soon(sender.run)
            nursery.start_soon(receiver.run)
            await send_and_receive(job, sender, receiver)
    job.check_arrived()


# ----------------------------------------------------------------- hostile peers


def frame_of(transfer_id: int, index: int, payload: bytes) -> Frame:
    digest = blake3(payload).digest()
    return Frame(ChunkHeader(transfer_id, index, len(payload), digest), payload)


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (frame_of(1, 40, b"x" * CHUNK_SIZE), "chunk 40 came and was not granted"),
        (frame_of(1, 2**32 - 1, b"x"), "chunk 4294967295 came of a file of 50"),
        (frame_of(1, 0, b"x"), "chunk 0 came with 1 bytes instead of 65536"),
        (
            frame_of(1, 0, b"x" * (CHUNK_SIZE + 1)),
            "chunk 0 came with 65537 bytes instead of 65536",
        ),
    ],
)
async def test_a_frame_that_was_never_granted_ends_only_its_transfer(
    tmp_path: Path, frame: Frame, reason: str
) -> None:
    job = Job(tmp_path, 50 * CHUNK_SIZE)
    async with two_sides() as (hostile, receiver):
        hostile.is_hostile = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(job.receive, receiver)
            assert await hostile.next_message() == ChunkGrant(1, 0, 16)
            await hostile.link.send_frame(frame)
        assert job.reason("receiver") == reason
        assert await hostile.next_message() == FileError(1, reason)
        job.check_nothing_left()
        await hostile.link.send_frame(frame)  # too late now
        hostile.is_hostile = False
        other = Job(tmp_path, 3 * CHUNK_SIZE, "other.zip")
        await send_and_receive(other, hostile, receiver)
        other.check_arrived()


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (ChunkGrant(1, 49, 2), "of a file of 50"),
        (ChunkGrant(1, 2**32 - 1, 2**32 - 1), "of a file of 50"),
        (FileReceived(1, "0" * 64), "changed while it was sent"),
        (FileVerified(1), "FileVerified is not expected"),
        (FileError(1, "no room"), "no room"),
    ],
)
async def test_a_hostile_receiver_ends_only_its_transfer(
    tmp_path: Path, message: Message, reason: str
) -> None:
    job = Job(tmp_path, 50 * CHUNK_SIZE)
    async with two_sides() as (sender, hostile):
        hostile.is_hostile = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(job.send, sender)
            await hostile.next_offer()
            await hostile.link.send_message(message)
        assert reason in job.reason("sender")
        if not isinstance(message, FileError):
            assert await hostile.next_message() == FileError(1, job.reason("sender"))
        assert sender.transfers.active == 0
        assert not sender.link_is_cut


async def test_a_sender_that_never_verifies_gets_no_file_published(
    tmp_path: Path,
) -> None:
    job = Job(tmp_path, 5)
    async with two_sides() as (hostile, receiver):
        hostile.is_hostile = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(job.receive, receiver)
            assert await hostile.next_message() == ChunkGrant(1, 0, 1)
            await hostile.link.send_frame(frame_of(1, 0, job.content))
            assert isinstance(await hostile.next_message(), FileReceived)
            assert not (job.root / "job.zip").exists()
            await hostile.link.send_message(FileError(1, "I changed my mind"))
    assert job.reason("receiver") == "I changed my mind"
    job.check_nothing_left()


async def test_a_transfer_id_serves_one_transfer_at_a_time(tmp_path: Path) -> None:
    job = Job(tmp_path, 5 * CHUNK_SIZE)
    second = Job(tmp_path, 7, "second.zip")
    async with two_sides() as (sender, receiver), trio.open_nursery() as nursery:
        sender.is_hostile = True
        nursery.start_soon(job.receive, receiver)
        grant = await sender.next_message()
        await second.receive(receiver)
        assert second.reason("receiver") == "transfer 1 is already running"
        nursery.start_soon(job.send, sender)
        await receiver.next_offer()
        sender.is_hostile = False
        assert isinstance(grant, ChunkGrant)
        sender.transfers.receive_message(grant)
    job.check_arrived()
    assert [path.name for path in job.root.iterdir()] == ["job.zip"]


async def test_a_peer_that_waits_for_an_unknown_transfer_gets_an_error(
    tmp_path: Path,
) -> None:
    job = Job(tmp_path, 5)
    async with two_sides() as (_, receiver):
        await job.receive(receiver, 9)
        assert "there is no such transfer" in job.reason("receiver")
        job.check_nothing_left()
        for late in (FileError(9, "late"), FileVerified(9), FileReceived(9, "0" * 64)):
            receiver.transfers.receive_message(late)


async def test_a_flood_of_grants_for_unknown_transfers_takes_no_memory() -> None:
    link, _ = MemoryLink.pair()
    transfers = Transfers(link)
    tracemalloc.start()
    try:
        for number in range(20_000):
            transfers.receive_message(ChunkGrant(number, 0, 1))
        size = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert size < 100_000
