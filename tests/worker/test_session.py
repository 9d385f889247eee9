"""Links to a worker, and the jobs that outlive them, without a room around them."""

import time
from pathlib import Path

import pytest
import trio
import trio.testing
from blake3 import blake3
from trio.testing import MockClock
from typing_extensions import override

from sleap_rtc.io.storage.call import GRACE_TIMEOUT
from sleap_rtc.io.transfer.chunk_files import CHUNK_SIZE
from sleap_rtc.proto import messages
from sleap_rtc.proto.job.worker_table import WorkerState
from sleap_rtc.proto.transfer.frames import ChunkHeader, Frame
from sleap_rtc.worker.jobs import (
    KEEP_PARTS,
    SWEEP_INTERVAL,
)
from tests.io.link.memory import MemoryLink
from tests.io.storage.places import HangingStorage
from tests.worker.world import (
    JOB,
    OFFER,
    RESUME,
    SUBMIT,
    Client,
    greeting,
    open_world,
    record,
    until,
)


async def test_a_client_whose_job_was_taken_over_gets_an_error(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        first = await world.begin()
        second = await world.connect()
        await second.send(RESUME)
        # After this error a client does not come back and take the job again.
        error = await first.expect(messages.Error)
        assert error.reason == "a newer connection has taken over the job"
        await second.expect(messages.ResumeAccepted)


async def test_the_later_of_two_clients_that_resume_at_once_gets_the_job(
    tmp_path: Path,
) -> None:
    async with open_world(tmp_path) as world:
        first = await world.begin()
        await first.send(OFFER)
        await until(lambda: world.state() is WorkerState.RECEIVING)
        others = [await world.connect() for _ in range(5)]
        for other in others:
            await other.send(RESUME)
            await trio.testing.wait_all_tasks_blocked()
        await others[-1].expect(messages.ResumeAccepted)
        await until(lambda: all(other.link.is_cut for other in (first, *others[:-1])))
        await others[-1].send(OFFER)
        await others[-1].expect(messages.ChunkGrant)


async def test_messages_of_an_older_link_are_ignored(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        await world.begin()
        job = world.job()
        older = job._link
        assert older is not None
        await world.resume()
        job.receive_message(older, messages.JobCancel(JOB))
        assert job.state is WorkerState.ADMITTED


async def test_a_link_that_dies_while_it_waits_for_its_job_leaves_it_free(
    tmp_path: Path,
) -> None:
    async with open_world(tmp_path) as world:
        first = await world.begin()
        await first.send(OFFER)
        await until(lambda: world.state() is WorkerState.RECEIVING)
        second = await world.connect()
        await second.send(RESUME)
        await trio.testing.wait_all_tasks_blocked()
        second.link.cut("a tunnel")
        await until(lambda: world.state() is WorkerState.SUSPENDED)
        await world.resume()


async def test_a_job_can_be_resumed_while_room_is_made_for_it(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        first = await world.connect()
        await first.send(SUBMIT)
        second = await world.resume()
        await second.send(OFFER)
        await second.expect(messages.ChunkGrant)


async def test_a_refused_job_does_not_touch_the_other_job_of_its_id(
    tmp_path: Path,
) -> None:
    # The shared storage may hold all files of a user, even the state directory.
    async with open_world(tmp_path, shared_root=tmp_path) as world:
        await world.begin()
        directory = world.directory / JOB
        (directory / "job.zip").write_bytes(b"a package")
        hostile = await world.connect()
        await hostile.send(
            messages.JobIdentity("job_ffff0000"),
            messages.SharedInputPath(f"jobs/{JOB}/job.zip"),
        )
        await hostile.expect(messages.PathValidated)
        await hostile.send(
            messages.JobSubmit("job_ffff0000", messages.Submission("job.zip", 1))
        )
        await hostile.send(messages.JobCancel("job_ffff0000"))
        await hostile.expect(messages.JobFailed)
        await until(lambda: world.jobs.get("job_ffff0000") is None)
        assert (directory / "job.zip").read_bytes() == b"a package"
        another = await world.connect()
        await another.send(SUBMIT)
        rejected = await another.expect(messages.JobRejected)
        assert rejected.reason == f"{JOB} is known to the worker"
        assert (directory / "job.zip").exists()
        assert world.state() is WorkerState.ADMITTED


async def test_an_id_is_free_once_its_job_is_removed(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        directory = world.directory / JOB
        for _ in range(30):
            first, second = await world.connect(), await world.connect()
            await first.send(SUBMIT, messages.JobCancel(JOB))
            await first.expect(messages.JobFailed)
            await second.send(SUBMIT)
            await second.expect(messages.JobAccepted)
            await second.send(OFFER)
            await second.expect(messages.ChunkGrant)
            assert directory.exists()
            await second.send(messages.JobCancel(JOB))
            await second.expect(messages.JobFailed)
            await until(lambda: not world.jobs)
            assert not directory.exists()


async def test_a_link_that_named_no_job_leaves_nothing_behind(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        client = await world.connect()
        await client.send(RESUME)
        await client.expect(messages.JobUnknown)
        client.link.cut("gone")
        await trio.testing.wait_all_tasks_blocked()
        assert len(world.jobs) == 0
        assert world.store.load("worker-test").records == []


async def test_a_part_outlives_a_long_absence_of_the_worker(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        long_ago = time.time() - 2 * KEEP_PARTS
        await world.jobs.restore([record("RECEIVING", long_ago, tmp_path)])
        await world.resume()


async def test_the_age_of_a_part_counts_from_the_departure_of_its_client(
    tmp_path: Path,
) -> None:
    async with open_world(tmp_path) as world:
        long_ago = time.time() - 2 * KEEP_PARTS
        await world.jobs.restore([record("RECEIVING", long_ago, tmp_path)])
        job = world.job()
        client = await world.resume()
        client.link.cut("gone")
        await until(lambda: world.state() is WorkerState.SUSPENDED)
        await trio.testing.wait_all_tasks_blocked()
        job.discard_if_older(time.time() - SWEEP_INTERVAL)
        assert world.state() is WorkerState.SUSPENDED
        job.discard_if_older(time.time() + 1)
        assert world.state() is WorkerState.DISCARDED


async def test_a_state_directory_may_be_moved_between_two_runs(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        (world.directory / JOB).mkdir(parents=True)
        earlier = tmp_path / "elsewhere" / JOB
        await world.jobs.restore([record("RECEIVING", time.time(), earlier)])
        client = await world.resume()
        await client.send(OFFER)
        await client.expect(messages.ChunkGrant)
        assert list((world.directory / JOB).iterdir()) != []


class _Stalling(MemoryLink[messages.ClientMessage]):
    """A link that never delivers the number of bytes that were received before."""

    @override
    async def send_message(self, message: messages.Message) -> None:
        if isinstance(message, messages.JobState) and message.progress.received:
            await trio.sleep_forever()
        await super().send_message(message)


async def test_a_part_is_free_again_when_its_link_stalls_at_once(
    tmp_path: Path,
) -> None:
    payload = bytes(1024 * 1024)
    header = ChunkHeader(0, 0, len(payload), blake3(payload).digest())
    async with open_world(tmp_path) as world:
        first = await world.begin()
        await first.send(OFFER)
        await first.expect(messages.ChunkGrant)
        journal = tmp_path / "jobs" / JOB / ".job.zip.map"
        empty = journal.read_bytes()
        await first.link.send_frame(Frame(header, payload))
        await until(lambda: journal.read_bytes() != empty)
        await first.link.aclose()

        mine, its = _Stalling.pair()
        world.serve(its)
        second = Client(mine)
        await second.send(messages.Hello(greeting()), RESUME)
        await second.expect(messages.ResumeAccepted)
        await second.send(OFFER)
        await until(lambda: world.job().progress.received > 0)
        await second.link.aclose()

        third = await world.resume()
        await third.send(OFFER)
        assert (await third.expect(messages.JobState)).progress.state == "RECEIVING"
        assert (await third.expect(messages.ChunkGrant)).first == 1


async def test_a_job_on_storage_that_hangs_obeys_its_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mock_clock: MockClock
) -> None:
    payload = b"PK a package"
    with HangingStorage(tmp_path / "fifo") as storage:
        monkeypatch.setattr(
            "sleap_rtc.worker.runner.open_beneath", lambda *_: storage.touch()
        )
        async with open_world(tmp_path) as world:
            client = await world.connect()
            submission = messages.Submission("job.zip", len(payload))
            await client.send(messages.JobSubmit(JOB, submission))
            await client.expect(messages.JobAccepted)
            offer = messages.OfferedFile("job.zip", len(payload), CHUNK_SIZE)
            await client.send(messages.FileOffer(0, offer))
            await client.expect(messages.ChunkGrant)
            digest = blake3(payload).digest()
            header = ChunkHeader(0, 0, len(payload), digest)
            await client.link.send_frame(Frame(header, payload))
            await client.expect(messages.FileReceived)
            await client.send(messages.FileVerified(0))
            await storage.wait_touched()
            await client.send(messages.JobCancel(JOB))
            await trio.testing.wait_all_tasks_blocked()
            mock_clock.jump(GRACE_TIMEOUT)
            await client.expect(messages.JobFailed)
            assert world.state() is WorkerState.ENDED
