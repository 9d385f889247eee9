"""Refusals of a worker, with the reasons that its clients get."""

import shutil
from pathlib import Path

import pytest
import trio
import trio.testing

from sleap_rtc.io.storage.folder import StorageError
from sleap_rtc.proto import messages
from sleap_rtc.proto.errors import InvalidInput
from sleap_rtc.worker.job import MAX_RESULTS_AT_ONCE
from sleap_rtc.worker.job_storage import (
    look_at_package,
    make_room,
    open_result,
    results_left,
)
from tests.worker.world import JOB, SUBMIT, World, greeting, open_world, record

# ---------------------------------------------------------------------- the session


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (messages.Hello(greeting()), "HELLO must come first, and only once"),
        (messages.Error("tired"), "the client gave up: tired"),
        (messages.Auth("0" * 32, "0" * 64), "Auth is not expected"),
        (messages.SharedStorageJob(), "SharedStorageJob"),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_a_client_that_breaks_the_protocol_gets_the_reason(
    tmp_path: Path, sent: messages.Message, reason: str
) -> None:
    async with open_world(tmp_path) as world:
        client = await world.connect()
        await client.send(sent)
        assert reason in (await client.expect(messages.Error)).reason
        assert len(world.jobs) == 0


async def test_a_client_that_does_not_greet_first_is_refused(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        client = world.open_silent_link()
        await client.send(SUBMIT)
        assert "HELLO must come first" in (await client.expect(messages.Error)).reason


async def test_a_job_is_resumed_before_another_is_named(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        client = await world.begin()
        await client.send(messages.JobResume("job_ffff0000", messages.ResumePoint()))
        assert (
            "JOB_RESUME must be the first"
            in (await client.expect(messages.Error)).reason
        )


async def test_a_job_that_can_be_resumed_is_not_started_again(tmp_path: Path) -> None:
    async with open_world(tmp_path, shared_root=tmp_path) as world:
        await world.begin()
        other = await world.connect()
        await other.send(messages.JobIdentity(JOB))
        error = await other.expect(messages.Error)
        assert error.reason == f"{JOB} is known; it can be resumed"


# -------------------------------------------------------------- the shared storage


async def test_without_shared_storage_every_path_is_refused(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        client = await world.connect()
        await client.send(messages.MountProbe(JOB, f"jobs/{JOB}/probe"))
        probe = await client.expect(messages.MountProbeFailed)
        assert probe.reason == "Shared storage not configured on the worker"
        await client.send(
            messages.JobIdentity(JOB), messages.SharedInputPath(f"jobs/{JOB}/job.zip")
        )
        error = await client.expect(messages.PathError)
        assert error.reason == "Shared storage not configured on the worker"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("job.zip", "must lie in a directory of its own"),
        ("jobs/missing.zip", "File not found"),
        ("jobs", "'jobs' is a directory"),
    ],
)
async def test_a_package_is_a_file_in_a_job_directory(
    tmp_path: Path, path: str, reason: str
) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "job.zip").touch()
    async with open_world(tmp_path, shared_root=tmp_path) as world:
        client = await world.connect()
        await client.send(messages.JobIdentity(JOB), messages.SharedInputPath(path))
        assert reason in (await client.expect(messages.PathError)).reason


async def test_results_stay_beside_the_package(tmp_path: Path) -> None:
    (tmp_path / "shared/jobs/mine").mkdir(parents=True)
    (tmp_path / "shared/jobs/mine/job.zip").touch()
    async with open_world(tmp_path, shared_root=tmp_path / "shared") as world:
        client = await world.connect()
        await client.send(
            messages.JobIdentity(JOB), messages.SharedInputPath("jobs/mine/job.zip")
        )
        await client.expect(messages.PathValidated)
        await client.send(messages.SharedOutputPath("jobs/other/models"))
        assert (
            "is not in the job directory"
            in (await client.expect(messages.PathError)).reason
        )
        assert not (tmp_path / "shared/jobs/other").exists()


async def test_the_error_of_failing_storage_names_the_worker(tmp_path: Path) -> None:
    async with open_world(tmp_path, shared_root=tmp_path / "unmounted") as world:
        client = await world.connect()
        await client.send(messages.MountProbe(JOB, f"jobs/{JOB}/probe"))
        failed = await client.expect(messages.MountProbeFailed)
        assert failed.reason.startswith("the worker's shared storage: ")


# --------------------------------------------------------------------- the results


async def open_ended_job(world: World, *results: str) -> Path:
    """Restore a job that has completed; return its directory."""
    directory = world.directory / JOB
    directory.mkdir(parents=True)
    ended = record("COMPLETE", 1.0, directory, results=dict.fromkeys(results, 3))
    await world.jobs.restore([ended])
    return directory


async def test_a_result_that_is_gone_is_refused_alone(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        directory = await open_ended_job(world, "models/a", "models/b")
        (directory / "models").mkdir()
        (directory / "models/b").write_bytes(b"abc")
        client = await world.resume()
        await client.send(messages.FileRequest(1, JOB, "models/a"))
        error = await client.expect(messages.FileError)
        assert error.transfer_id == 1
        assert "File not found" in error.reason
        await client.send(messages.FileRequest(2, JOB, "models/b"))
        assert (await client.expect(messages.FileOffer)).file.size == 3


async def test_a_file_that_is_not_a_result_is_refused(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        directory = await open_ended_job(world, "models/a")
        (directory / "secret").write_bytes(b"abc")
        client = await world.resume()
        await client.send(messages.FileRequest(1, JOB, "secret"))
        assert "not a result" in (await client.expect(messages.FileError)).reason


async def test_one_link_sends_a_limited_number_of_results_at_once(
    tmp_path: Path,
) -> None:
    names = [f"models/{number}" for number in range(MAX_RESULTS_AT_ONCE + 1)]
    async with open_world(tmp_path) as world:
        directory = await open_ended_job(world, *names)
        (directory / "models").mkdir()
        for name in names:
            (directory / name).write_bytes(b"abc")
        client = await world.resume()
        for number, name in enumerate(names[:-1]):
            await client.send(messages.FileRequest(number, JOB, name))
            await client.expect(messages.FileOffer)
        await client.send(messages.FileRequest(99, JOB, names[-1]))
        error = await client.expect(messages.FileError)
        assert (error.transfer_id, error.reason) == (
            99,
            "only 16 files are sent at once",
        )


async def test_results_that_were_fetched_are_removed(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        directory = await open_ended_job(world, "models/a")
        client = await world.resume()
        await client.send(messages.ResultsReceived(JOB))
        while len(world.jobs):
            await trio.lowlevel.checkpoint()
        assert not directory.exists()
        assert world.store.load("worker-test").records == []


# ---------------------------------------------------------------- the job directory


def test_room_for_120_percent_is_required(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=119)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(
        StorageError, match="on the worker: need 120 bytes, have 119 bytes"
    ):
        make_room(tmp_path / "jobs" / JOB, 100)
    assert not (tmp_path / "jobs" / JOB).exists()


def test_the_part_of_an_earlier_link_counts_as_free_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "jobs" / JOB
    directory.mkdir(parents=True)
    (directory / ".job.zip.part").write_bytes(bytes(60))
    usage = shutil.disk_usage(tmp_path)._replace(free=60)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    make_room(directory, 100)


def test_a_directory_with_files_is_not_used_again(tmp_path: Path) -> None:
    make_room(tmp_path / "jobs" / JOB, 1)
    (tmp_path / "jobs" / JOB / "job.zip").touch()
    with pytest.raises(StorageError, match=f"{JOB} is known to the worker"):
        make_room(tmp_path / "jobs" / JOB, 1)


def test_a_job_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "jobs").touch()
    with pytest.raises(StorageError, match=f"{JOB}: Not a directory"):
        make_room(tmp_path / "jobs" / JOB, 1)


async def test_a_killed_job_left_its_models_and_its_log(tmp_path: Path) -> None:
    for path in ("models/a", "job.log", "data/b", "train.sh"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(b"abc")
    with trio.fail_after(60):
        assert await results_left(tmp_path, "jobs/x/models") == {
            "models/a": 3,
            "job.log": 3,
        }
        assert await results_left(tmp_path / "gone", "models") == {}


def test_every_opened_file_is_closed(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs/job.zip").write_bytes(b"abc")
    look_at_package(tmp_path, "jobs/job.zip")
    (tmp_path / "job.zip").touch()
    with pytest.raises(InvalidInput):
        look_at_package(tmp_path, "job.zip")
    open_result(tmp_path, "jobs/job.zip").close()
    with pytest.raises(InvalidInput):
        open_result(tmp_path, "jobs/none")
