"""Transfers that resume an earlier transfer of the same file."""

import threading
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing
from typing_extensions import override

from sleap_rtc.io.link.link import LinkClosedError
from sleap_rtc.io.storage.folder import StorageError, open_owned
from sleap_rtc.io.transfer.chunk_files import ChunkReader, ChunkWriter
from sleap_rtc.proto.transfer.frames import Frame
from tests.io.link.memory import MemoryLink
from tests.io.transfer.sides import (
    CHUNK_SIZE,
    DEADLINE,
    Job,
    send_and_receive,
    two_sides,
)


async def cut_and_keep(job: Job, frames: int) -> int:
    """Lose the link after some frames; return the number of stored chunks."""
    async with two_sides() as (sender, receiver):
        assert isinstance(sender.link, MemoryLink)
        link = sender.link

        def cut(frame: Frame) -> list[Frame]:
            if link.frames_sent == frames:
                link.cut("the network is gone")
            return [frame]

        link.harm = cut
        await send_and_receive(job, sender, receiver)
    assert isinstance(job.errors["receiver"], LinkClosedError)
    job.errors.clear()
    job.sent = 0
    return job.stored // CHUNK_SIZE


@pytest.mark.parametrize("frames", [1, 2, 9, 20, 40])
async def test_a_transfer_continues_over_the_next_link(
    tmp_path: Path, frames: int
) -> None:
    job = Job(tmp_path, 40 * CHUNK_SIZE - 1)
    stored = await cut_and_keep(job, frames)
    assert stored < frames
    job.stored = 0
    async with two_sides() as (sender, receiver):
        await send_and_receive(job, sender, receiver)
        assert isinstance(sender.link, MemoryLink)
        # A chunk may be stored, but not yet reported, when the link is lost.
        assert 40 - frames < sender.link.frames_sent <= 40 - stored
    job.check_arrived()


async def test_many_lost_links_send_few_chunks_twice(tmp_path: Path) -> None:
    job = Job(tmp_path, 60 * CHUNK_SIZE)
    stored = 0
    for _ in range(6):
        before = stored
        job.stored = 0
        stored = await cut_and_keep(job, 10)
        assert before <= stored < before + 10
    job.stored = 0
    async with two_sides() as (sender, receiver):
        await send_and_receive(job, sender, receiver)
    job.check_arrived()


async def test_a_whole_part_is_verified_and_nothing_is_sent_again(
    tmp_path: Path,
) -> None:
    """A new sender hashes the chunks that it never sent."""
    job = Job(tmp_path, 100 * CHUNK_SIZE)
    sink = job.sink()
    source = ChunkReader(open_owned(job.source_path), chunk_size=CHUNK_SIZE)
    for index in range(100):
        assert sink.write(index, *source.read(index))
    source.close()
    sink.keep()
    async with two_sides() as (sender, receiver):
        assert isinstance(sender.link, MemoryLink)
        await send_and_receive(job, sender, receiver)
        assert sender.link.frames_sent == 0
    job.check_arrived()


async def test_another_file_of_the_same_size_is_not_mixed_in(tmp_path: Path) -> None:
    job = Job(tmp_path, 40 * CHUNK_SIZE)
    await cut_and_keep(job, 20)
    job.content = job.content[::-1]
    job.source_path.write_bytes(job.content)
    async with two_sides() as (sender, receiver):
        job.stored = 0
        await send_and_receive(job, sender, receiver)
        assert "changed" in job.reason("receiver")
        job.check_nothing_left()
        job.errors.clear()
        job.sent = job.stored = 0
        await send_and_receive(job, sender, receiver)
    job.check_arrived()


async def test_a_receiver_that_was_cancelled_continues_later(tmp_path: Path) -> None:
    job = Job(tmp_path, 40 * CHUNK_SIZE)
    async with two_sides() as (sender, receiver), trio.open_nursery() as nursery:
        nursery.start_soon(job.send, sender)
        with trio.CancelScope() as scope:
            assert isinstance(sender.link, MemoryLink)
            link = sender.link

            def stop_at_the_twentieth(frame: Frame) -> list[Frame]:
                if link.frames_sent == 20:
                    scope.cancel()
                return [frame]

            link.harm = stop_at_the_twentieth
            await job.receive(receiver)
    assert job.reason("sender") == "the other side cancelled the transfer"
    job.errors.clear()
    job.sent = job.stored = 0
    async with two_sides() as (sender, receiver):
        await send_and_receive(job, sender, receiver)
        assert isinstance(sender.link, MemoryLink)
        assert sender.link.frames_sent < 40
    job.check_arrived()


class _SlowDisk(ChunkWriter):
    """A sink whose fsync takes until the link is lost, and may fail then."""

    is_publishing: threading.Event
    may_end: threading.Event
    failure: StorageError | None

    @override
    def publish(self) -> Path:
        self.is_publishing.set()
        assert self.may_end.wait(DEADLINE)
        if self.failure is not None:
            raise self.failure
        return super().publish()


async def lose_link_during_fsync(job: Job, failure: StorageError | None) -> None:
    sink = _SlowDisk.open(
        job.root, job.offer.name, size=job.offer.size, chunk_size=CHUNK_SIZE
    )
    sink.is_publishing, sink.may_end = threading.Event(), threading.Event()
    sink.failure = failure
    async with two_sides() as (sender, receiver), trio.open_nursery() as nursery:
        nursery.start_soon(job.send, sender)
        await receiver.next_offer()
        nursery.start_soon(partial(job.receive, receiver, sink=sink))
        await trio.to_thread.run_sync(sink.is_publishing.wait, DEADLINE)
        assert isinstance(receiver.link, MemoryLink)
        receiver.link.cut("the laptop sleeps")
        await trio.testing.wait_all_tasks_blocked()
        sink.may_end.set()


async def test_a_link_that_is_lost_during_the_fsync_changes_nothing(
    tmp_path: Path,
) -> None:
    job = Job(tmp_path, 3 * CHUNK_SIZE)
    await lose_link_during_fsync(job, None)
    assert "receiver" not in job.errors
    assert job.path == job.root / job.offer.name
    assert job.path.read_bytes() == job.content


async def test_a_link_that_is_lost_before_the_fsync_fails_keeps_the_part(
    tmp_path: Path,
) -> None:
    job = Job(tmp_path, 3 * CHUNK_SIZE)
    await lose_link_during_fsync(job, StorageError("the disk is full"))
    error = job.errors["receiver"]
    assert isinstance(error, LinkClosedError)
    assert "the laptop sleeps" in str(error)
    job.check_kept()
