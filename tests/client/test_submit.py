"""`submit` from the package to its results or its error, in a room of this process."""

import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from sleap_rtc import client
from sleap_rtc.client.events import SessionEvent
from sleap_rtc.client.submissions import FOLDER
from sleap_rtc.client.submit import CANCEL_PATIENCE
from sleap_rtc.errors import (
    ConnectionLostError,
    InterruptedJobError,
    JobFailedError,
    JobTimeoutError,
    NoWorkerError,
    RefusedError,
    TransferFailedError,
    UsageError,
    UserError,
)
from sleap_rtc.io.nursery import open_background_nursery
from sleap_rtc.proto import messages
from tests.client.room_lab import Script, environ_of, serve, worker_in
from tests.client.scripted import ScriptedWorker, result_file
from tests.e2e.packages import make_package
from tests.io.signaling.lab import Server, running_server
from tests.io.storage.places import ends_while_reading


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with running_server() as server:
        yield server


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, with no configuration of the user."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    for name in ("SHARED_STORAGE_ROOT", "SLEAP_RTC_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(home))
    return home


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A result on the worker's disk."""
    path = tmp_path / "worker" / "best.ckpt"
    path.parent.mkdir()
    path.write_bytes(b"weights")
    return path


class Sender:
    """Submits a package of its own to the room of a server."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        self.package = make_package(folder / "home" / "job.zip", "act say hello")
        self.environ = environ_of(folder, url)
        self.events: list[client.Event] = []
        self.cancel_asked = trio.Event()

    async def submit(self, **options: object) -> client.JobResult:
        request = client.JobRequest(**{"package": self.package, **options})  # type: ignore[arg-type]
        return await client.submit(
            request,
            self.events.append,
            cancel_asked=self.cancel_asked,
            environ=self.environ,
        )

    async def submit_to(
        self, server: Server, *scripts: Script, **options: object
    ) -> client.JobResult:
        """Submit while a worker runs these scripts, one on each link."""
        async with (
            worker_in(server) as listener,
            open_background_nursery() as nursery,
        ):
            nursery.start_soon(serve, listener, *scripts)
            return await self.submit(**options)

    def notes(self) -> list[str]:
        """List the notes that are left."""
        folder = self.folder / "state" / FOLDER
        return [name for name in os.listdir(folder) if name.endswith(".json")]

    def of(self, kind: type[client.Event]) -> list[client.Event]:
        return [event for event in self.events if isinstance(event, kind)]


@pytest.fixture
def sender(tmp_path: Path, server: Server) -> Sender:
    return Sender(tmp_path, server.url)


# ------------------------------------------------------------------------ golden paths


async def test_a_job_completes_and_leaves_no_note(
    sender: Sender, server: Server, made: Path, home: Path
) -> None:
    async def script(worker: ScriptedWorker) -> None:
        greeting = await worker.greet()
        assert not greeting.shared_storage
        job_id = await worker.accept()
        await worker.receive_package(made.parent)
        await worker.send(
            messages.JobState(job_id, messages.JobProgress("QUEUED")),
            messages.JobState(job_id, messages.JobProgress("RUNNING")),
        )
        await worker.complete(job_id, made)
        await worker.send_result(made)

    result = await sender.submit_to(server, script)
    assert result.output == home / "job-results"
    assert os.listdir(result.output) == ["best.ckpt"]
    assert list(result.seconds) == ["connect", "transfer", "queue", "run"]
    assert sender.notes() == []
    assert isinstance(sender.events[0], client.WorkerChosen)
    assert isinstance(sender.events[-1], client.ResultsStored)


async def test_a_directory_is_packed_and_sent(
    sender: Sender, server: Server, made: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "home" / "my job"
    folder.mkdir()
    (folder / "train-script.sh").write_text("act say hello\n")
    names: list[str] = []

    async def script(worker: ScriptedWorker) -> None:
        await worker.greet()
        job_id = await worker.accept()
        names.append((await worker.receive_package(made.parent)).name)
        await worker.send(messages.JobState(job_id, messages.JobProgress("RUNNING")))
        await worker.send(messages.JobComplete(job_id, "models"))

    result = await sender.submit_to(server, script, package=folder)
    assert names == ["my job.zip"]
    assert result.output is None


async def test_the_same_package_continues_its_job(
    sender: Sender, server: Server, made: Path
) -> None:
    jobs: list[str] = []

    async def first(worker: ScriptedWorker) -> None:
        await worker.greet()
        jobs.append(await worker.accept())
        await worker.receive_package(made.parent)
        await worker.send(messages.JobState(jobs[0], messages.JobProgress("RUNNING")))
        stopped.set()

    async def second(worker: ScriptedWorker) -> None:
        await worker.greet()
        resume = await worker.expect(messages.JobResume)
        jobs.append(resume.job_id)
        await worker.send(
            messages.ResumeAccepted(resume.job_id, messages.JobProgress("RUNNING"))
        )
        await worker.send(messages.JobComplete(resume.job_id, "models"))

    stopped = trio.Event()
    async with trio.open_nursery() as nursery:

        async def until_stopped() -> None:
            await stopped.wait()
            nursery.cancel_scope.cancel()  # as a crash of the client would

        nursery.start_soon(until_stopped)
        await sender.submit_to(server, first)
    assert len(sender.notes()) == 1
    result = await sender.submit_to(server, second)
    assert jobs == [result.job_id] * 2
    chosen = sender.of(client.WorkerChosen)[-1]
    assert isinstance(chosen, client.WorkerChosen)
    assert chosen.reason == "it has the job"
    assert sender.of(client.JobResumed) == [client.JobResumed(result.job_id)]
    assert sender.notes() == []


async def test_another_worker_gets_a_new_job(
    sender: Sender, server: Server, made: Path
) -> None:
    await leave_note(sender, server)

    async def script(worker: ScriptedWorker) -> None:
        await worker.greet()
        job_id = await worker.accept()
        await worker.receive_package(made.parent)
        await worker.send(messages.JobComplete(job_id, "models"))

    async with (
        worker_in(server, "worker-2") as listener,
        open_background_nursery() as nursery,
    ):
        nursery.start_soon(serve, listener, script)
        await sender.submit(worker="worker-2")
    assert sender.of(client.JobResumed) == []


async def leave_note(sender: Sender, server: Server) -> str:
    """Submit to a worker that goes away; return the id of the job."""
    jobs: list[str] = []

    async def script(worker: ScriptedWorker) -> None:
        await worker.greet()
        jobs.append(await worker.accept())
        worker.link.close_now("the worker ended")

    with pytest.raises(ConnectionLostError):
        await sender.submit_to(server, script, patience=0)
    assert len(sender.notes()) == 1
    return jobs[0]


async def test_a_job_is_not_started_elsewhere_while_its_worker_is_away(
    sender: Sender, server: Server
) -> None:
    job_id = await leave_note(sender, server)
    with pytest.raises(NoWorkerError) as caught:
        await sender.submit()
    assert f"submitted to worker-1 as {job_id}" in caught.value.message
    assert "--fresh" in caught.value.hint
    assert len(sender.notes()) == 1


async def test_fresh_starts_another_job(
    sender: Sender, server: Server, made: Path
) -> None:
    job_id = await leave_note(sender, server)

    async def script(worker: ScriptedWorker) -> None:
        await worker.greet()
        assert await worker.accept() != job_id
        await worker.receive_package(made.parent)
        await worker.send(messages.JobFailed(job_id, "enough"))

    with pytest.raises(UserError):
        await sender.submit_to(server, script, fresh=True)


async def test_a_changed_package_is_a_new_job(sender: Sender, server: Server) -> None:
    job_id = await leave_note(sender, server)
    make_package(sender.package, "act say something else")
    with pytest.raises(NoWorkerError, match="no worker is in the room"):
        await sender.submit()
    assert sender.of(client.PackageChanged) == [client.PackageChanged(job_id)]


async def test_a_job_runs_even_if_its_note_cannot_be_written(
    sender: Sender, server: Server, made: Path
) -> None:
    state = made.parent.parent / "state"
    state.mkdir()
    (state / FOLDER).write_bytes(b"a file")

    async def script(worker: ScriptedWorker) -> None:
        await worker.greet()
        job_id = await worker.accept()
        await worker.receive_package(made.parent)
        await worker.send(messages.JobComplete(job_id, "models"))

    await sender.submit_to(server, script)
    (trouble,) = sender.of(client.NoteTrouble)
    assert isinstance(trouble, client.NoteTrouble)
    assert str(state) in trouble.reason


# ------------------------------------------------------------------------------ errors


async def reject(worker: ScriptedWorker, made: Path) -> None:
    job_id = (await worker.expect(messages.JobSubmit)).job_id
    await worker.send(messages.JobRejected(job_id, "disk full; ask the owner"))


async def fail(worker: ScriptedWorker, made: Path) -> None:
    job_id = await worker.accept()
    await worker.receive_package(made.parent)
    page = messages.ResultPage((result_file(made),))
    await worker.send(
        messages.JobState(job_id, messages.JobProgress("RUNNING")),
        messages.JobResults(job_id, page),
        messages.JobFailed(job_id, "exit code 1"),
    )
    await worker.send_result(made)


async def lose_results(worker: ScriptedWorker, made: Path) -> None:
    job_id = await worker.accept()
    await worker.receive_package(made.parent)
    await worker.send(messages.JobState(job_id, messages.JobProgress("RUNNING")))
    await worker.complete(job_id, made)
    request = await worker.expect(messages.FileRequest)
    await worker.send(messages.FileError(request.transfer_id, "it is gone"))


async def leave(worker: ScriptedWorker, made: Path) -> None:
    await worker.accept()
    worker.link.close_now("the worker ended")


ENDINGS = [
    (reject, RefusedError, "worker-1 rejected the job: disk full; ask the owner", 0),
    (fail, JobFailedError, r"exit code 1\. Partial results are in .*job-results", 0),
    (lose_results, TransferFailedError, "best.ckpt: it is gone", 1),
    (leave, ConnectionLostError, "connection to worker-1 was lost", 1),
]


@pytest.mark.parametrize(("ending", "error", "words", "notes"), ENDINGS)
async def test_each_ending_has_its_error_and_keeps_the_note_if_it_may_continue(
    sender: Sender,
    server: Server,
    made: Path,
    ending: object,
    error: type[UserError],
    words: str,
    notes: int,
) -> None:
    async def script(worker: ScriptedWorker) -> None:
        await worker.greet()
        assert callable(ending)
        await ending(worker, made)

    with pytest.raises(error, match=words):
        await sender.submit_to(server, script, patience=0)
    assert len(sender.notes()) == notes


BAD_PACKAGES = {
    "none.zip": "There is no package",
    "text.zip": "is not a zip file",
    "bad:name.zip": "Cannot send",
    "a\\b.zip": "Cannot send",
    "link folder": "Cannot pack",
}


@pytest.mark.parametrize("name", BAD_PACKAGES)
async def test_a_bad_package_is_a_usage_error(
    sender: Sender, home: Path, name: str
) -> None:
    prepare_bad_package(home / name)
    with pytest.raises(UsageError, match=BAD_PACKAGES[name]):
        await sender.submit(package=home / name)
    assert sender.events == []


def prepare_bad_package(path: Path) -> None:
    if path.name == "link folder":
        path.mkdir()
        (path / "file").symlink_to("/etc/passwd")
    elif path.name != "none.zip":
        path.write_bytes(b"text")


async def test_a_package_that_goes_away_while_connecting_is_a_usage_error(
    sender: Sender, server: Server
) -> None:
    async with worker_in(server, on_offer=None) as listener:

        def remove(event: client.Event) -> None:
            if isinstance(event, client.LinkOpened):
                sender.package.unlink()

        with pytest.raises(UsageError, match="Cannot read"):
            await client.submit(
                client.JobRequest(sender.package), remove, environ=sender.environ
            )
        assert listener.port


# -------------------------------------------------------------------------- cancelling


async def test_cancelling_before_a_worker_is_reached_ends_at_once(
    sender: Sender, server: Server
) -> None:
    async with worker_in(server, on_offer=sender.cancel_asked.set):
        with pytest.raises(InterruptedJobError, match="The job was cancelled"):
            await sender.submit()


@pytest.mark.parametrize("change", ["nothing", "fresh", "package"])
async def test_cancelling_before_a_worker_is_reached_keeps_the_note_of_an_earlier_job(
    sender: Sender, server: Server, change: str
) -> None:
    await leave_note(sender, server)
    if change == "package":
        make_package(sender.package, "act say something else")
    async with worker_in(server, on_offer=sender.cancel_asked.set):
        with pytest.raises(InterruptedJobError) as caught:
            await sender.submit(fresh=change == "fresh")
    assert len(sender.notes()) == 1
    assert bool(caught.value.hint) is (change == "nothing")


async def test_a_cancelled_job_is_cancelled_at_the_worker(
    sender: Sender, server: Server, made: Path
) -> None:
    async def script(worker: ScriptedWorker) -> None:
        await worker.greet()
        job_id = await worker.accept()
        await worker.receive_package(made.parent)
        await worker.send(messages.JobState(job_id, messages.JobProgress("RUNNING")))
        sender.cancel_asked.set()
        await worker.expect(messages.JobCancel)
        await worker.send(messages.JobFailed(job_id, "cancelled"))

    with pytest.raises(InterruptedJobError) as caught:
        await sender.submit_to(server, script)
    assert caught.value.message == "The job was cancelled."
    assert sender.notes() == []


async def test_a_cancellation_that_is_not_confirmed_keeps_the_note(
    sender: Sender, server: Server, mock_clock: trio.testing.MockClock
) -> None:
    async def script(worker: ScriptedWorker) -> None:
        await worker.greet()
        await worker.accept()
        sender.cancel_asked.set()
        while not isinstance(await worker.expect(messages.Message), messages.JobCancel):
            pass
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(CANCEL_PATIENCE)

    with pytest.raises(InterruptedJobError) as caught:
        await sender.submit_to(server, script)
    assert caught.value.message.startswith("The job was cancelled, but ")
    assert "Send the package again" in caught.value.hint
    assert len(sender.notes()) == 1


async def test_the_timeout_of_a_request_cancels_its_job(
    sender: Sender, server: Server, made: Path, mock_clock: trio.testing.MockClock
) -> None:
    async def script(worker: ScriptedWorker) -> None:
        await worker.greet()
        job_id = await worker.accept()
        await worker.receive_package(made.parent)
        await worker.send(messages.JobState(job_id, messages.JobProgress("RUNNING")))
        mock_clock.jump(5)
        await worker.expect(messages.JobCancel)
        await worker.send(messages.JobFailed(job_id, "cancelled"))

    with pytest.raises(JobTimeoutError, match="cancelled after 5 s"):
        await sender.submit_to(server, script, timeout=5.0)


# ------------------------------------------------------------------ storage that hangs


@pytest.mark.skipif(sys.platform == "win32", reason="FIFOs")
@pytest.mark.parametrize("call", ["submit", "list_workers"])
async def test_a_client_can_be_cancelled_while_its_invite_hangs(
    sender: Sender, call: str, mock_clock: trio.testing.MockClock
) -> None:
    del sender.environ["SLEAP_RTC_INVITE"]
    invite = sender.folder / "state" / "invite"
    invite.parent.mkdir()
    os.mkfifo(invite)
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "submit": sender.submit,
        "list_workers": partial(client.list_workers, environ=sender.environ),
    }
    assert await ends_while_reading(calls[call], invite, mock_clock)


@pytest.mark.skipif(sys.platform == "win32", reason="FIFOs")
async def test_a_client_can_be_cancelled_while_its_configuration_hangs(
    sender: Sender, mock_clock: trio.testing.MockClock
) -> None:
    config = sender.folder / "config.toml"
    os.mkfifo(config)
    sender.environ["SLEAP_RTC_CONFIG"] = str(config)
    assert await ends_while_reading(sender.submit, config, mock_clock)


@pytest.mark.skipif(sys.platform == "win32", reason="FIFOs")
@pytest.mark.parametrize("step", ["make_state_directory", "_make_plan"])
async def test_a_client_can_be_cancelled_while_its_home_hangs(
    sender: Sender,
    server: Server,
    step: str,
    monkeypatch: pytest.MonkeyPatch,
    mock_clock: trio.testing.MockClock,
) -> None:
    fifo = sender.folder / "fifo"
    os.mkfifo(fifo)
    module = sys.modules[client.submit.__module__]  # the package has `submit` as well
    monkeypatch.setattr(module, step, lambda *_: fifo.read_bytes())
    async with worker_in(server):
        assert await ends_while_reading(sender.submit, fifo, mock_clock)


def test_the_events_of_a_session_are_events_of_submit() -> None:
    assert set(SessionEvent.__args__) < set(client.Event.__args__)
