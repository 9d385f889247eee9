"""One job over links that come and go, with a worker that its test writes."""

import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from random import Random

import msgspec
import pytest
import trio
import trio.testing
from blake3 import blake3

from sleap_rtc.client import events
from sleap_rtc.client.events import SessionEvent
from sleap_rtc.client.reach import WorkerGoneError
from sleap_rtc.client.session import OpenLink, Plan, run_job
from sleap_rtc.errors import NoWorkerError
from sleap_rtc.io.link.link import Link
from sleap_rtc.proto import messages as m
from sleap_rtc.proto.job.client import CANCEL_TIMEOUT
from sleap_rtc.proto.job.client_outputs import JobEnded, RouteChosen
from sleap_rtc.proto.job.reports import LinePrinted, StageComplete, StateChanged
from tests.client.scripted import ScriptedWorker, result_file, scripted_worker
from tests.io.link.memory import MemoryLink

JOB = "job_0123abcd"
PATIENCE = 60.0
CONTENT = Random(1).randbytes(3 * 1024 * 1024 + 1)

Script = Callable[[ScriptedWorker], Awaitable[None]]


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    package = tmp_path / "job.zip"
    package.write_bytes(CONTENT)
    return Plan(
        job_id=JOB,
        package=package,
        size=len(CONTENT),
        preference="auto",
        shared_root=None,
        output=None,
        default_output=tmp_path / "results",
        patience=PATIENCE,
    )


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A result on the worker's disk."""
    path = tmp_path / "worker" / "best.ckpt"
    path.parent.mkdir()
    path.write_bytes(b"weights" * 1000)
    return path


class Client:
    """Runs a job, and records its events and the links that were opened again."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.events: list[SessionEvent] = []
        self.cancel_asked = trio.Event()
        self.attempts = 0
        self.ending: JobEnded | None = None

    async def run(self, *scripts: Script) -> JobEnded:
        """Run the job; each script is the worker's end of one link."""
        remaining = iter(scripts)

        @asynccontextmanager
        async def open_link() -> AsyncIterator[Link]:
            script = next(remaining, None)
            if script is None:
                raise WorkerGoneError("There is no worker.")
            mine, its = MemoryLink.pair()
            async with scripted_worker(its) as worker, trio.open_nursery() as nursery:
                nursery.start_soon(script, worker)
                yield mine
                mine.cut("the client closed the link")

        def open_again() -> AbstractAsyncContextManager[Link]:
            self.attempts += 1
            return open_link()

        async with open_link() as first:
            return await self._run(first, open_again)

    async def run_on(self, link: Link, open_again: OpenLink) -> JobEnded:
        return await self._run(link, open_again)

    async def _run(self, link: Link, open_again: OpenLink) -> JobEnded:
        return await run_job(
            self.plan,
            link,
            open_again,
            greeting=m.Greeting(m.PROTOCOL_VERSION, "1.0", "client"),
            on_event=self.events.append,
            cancel_asked=self.cancel_asked,
        )

    def of(self, kind: type[SessionEvent]) -> list[SessionEvent]:
        return [event for event in self.events if isinstance(event, kind)]


@pytest.fixture
def client(plan: Plan) -> Client:
    return Client(plan)


# ------------------------------------------------------------------- the channel route


async def test_a_package_arrives_and_results_come_home(
    client: Client, made: Path, tmp_path: Path
) -> None:
    received: list[bytes] = []

    async def script(worker: ScriptedWorker) -> None:
        greeting = await worker.greet()
        assert greeting.role == "client"
        job_id = await worker.accept()
        package = await worker.receive_package(tmp_path / "worker")
        received.append(package.read_bytes())
        await worker.send(
            m.JobState(job_id, m.JobProgress("QUEUED", position=2)),
            m.JobState(job_id, m.JobProgress("RUNNING")),
            m.JobLog(job_id, 0, 0, "epoch 1"),
            m.TrainingComplete(),
            m.InferenceComplete(),
        )
        await worker.complete(job_id, made)
        await worker.send_result(made)
        await worker.expect(m.ResultsReceived)

    ending = await client.run(script)
    assert ending.outcome == "complete"
    assert received == [CONTENT]
    assert names(tmp_path / "results") == [made.name]
    assert same_content(tmp_path / "results" / made.name, made)
    kinds = [
        type(e) for e in client.events if not isinstance(e, events.TransferProgress)
    ]
    assert kinds == [
        RouteChosen,
        StateChanged,
        StateChanged,
        LinePrinted,
        StageComplete,
        StageComplete,
        events.ResultsChosen,
        events.ResultsStored,
    ]
    progress = client.of(events.TransferProgress)
    assert progress[-1] == events.TransferProgress("Fetching results", 7000, 7000)
    assert events.TransferProgress("Sending job.zip", len(CONTENT), len(CONTENT)) in (
        progress
    )


async def test_a_rejected_job_ends_with_the_reason(client: Client) -> None:
    async def script(worker: ScriptedWorker) -> None:
        await worker.greet()
        await worker.expect(m.JobSubmit)
        await worker.send(m.JobRejected(JOB, "disk full; ask the owner"))

    ending = await client.run(script)
    assert (ending.outcome, ending.reason) == ("rejected", "disk full; ask the owner")


async def test_a_failed_job_brings_its_partial_results(
    client: Client, made: Path, tmp_path: Path
) -> None:
    async def script(worker: ScriptedWorker) -> None:
        await worker.greet()
        await worker.accept()
        await worker.receive_package(tmp_path / "worker")
        file = result_file(made)
        await worker.send(
            m.JobState(JOB, m.JobProgress("RUNNING")),
            m.JobResults(JOB, m.ResultPage((file,))),
            m.JobFailed(JOB, "exit code 1"),
        )
        await worker.send_result(made)
        await worker.expect(m.ResultsReceived)

    ending = await client.run(script)
    assert (ending.outcome, ending.reason) == ("failed", "exit code 1")
    assert (tmp_path / "results" / made.name).exists()


async def test_a_result_that_the_worker_can_not_send_fails_the_transfer(
    client: Client, made: Path, tmp_path: Path
) -> None:
    async def script(worker: ScriptedWorker) -> None:
        await worker.greet()
        await worker.accept()
        await worker.receive_package(tmp_path / "worker")
        await worker.send(m.JobState(JOB, m.JobProgress("RUNNING")))
        await worker.complete(JOB, made)
        request = await worker.expect(m.FileRequest)
        await worker.send(m.FileError(request.transfer_id, "it is gone"))

    ending = await client.run(script)
    assert ending.outcome == "transfer_failed"
    assert "1 of 1 results did not arrive" in ending.reason
    assert "best.ckpt: it is gone" in ending.reason


async def test_a_directory_that_can_not_be_made_fails_the_transfer(
    client: Client, made: Path, tmp_path: Path
) -> None:
    client.plan = msgspec.structs.replace(client.plan, output=Path("/dev/null/x"))

    async def script(worker: ScriptedWorker) -> None:
        await worker.greet()
        await worker.accept()
        await worker.receive_package(tmp_path / "worker")
        await worker.send(m.JobState(JOB, m.JobProgress("RUNNING")))
        await worker.complete(JOB, made)

    ending = await client.run(script)
    assert ending.outcome == "transfer_failed"
    assert "Failed to create directory" in ending.reason


async def test_a_package_that_changed_is_not_sent(client: Client) -> None:
    client.plan.package.write_bytes(CONTENT + b"more")

    async def script(worker: ScriptedWorker) -> None:
        await worker.greet()
        await worker.accept()
        await worker.expect(m.JobCancel)

    ending = await client.run(script)
    assert ending.outcome == "transfer_failed"
    assert ending.reason == "job.zip changed in the meantime"


async def test_a_package_that_is_gone_is_not_sent(client: Client) -> None:
    client.plan.package.unlink()

    async def script(worker: ScriptedWorker) -> None:
        await worker.greet()
        await worker.accept()
        await worker.expect(m.JobCancel)

    ending = await client.run(script)
    assert ending.outcome == "transfer_failed"
    assert "job.zip" in ending.reason


# --------------------------------------------------------------------- the shared route


async def share(worker: ScriptedWorker, root: Path) -> Path:
    """Answer like a worker on the shared route; return the path of the package."""
    await worker.greet(shared=True)
    probe = await worker.expect(m.MountProbe)
    content = (root / probe.path).read_bytes()
    await worker.send(m.MountProbed(JOB, blake3(content).hexdigest()))
    await worker.expect(m.JobIdentity)
    path = (await worker.expect(m.SharedInputPath)).path
    await worker.send(m.PathValidated("input"))
    await worker.expect(m.SharedOutputPath)
    await worker.send(m.PathValidated("output"))
    await worker.expect(m.SharedStorageJob)
    await worker.send(m.JobState(JOB, m.JobProgress("RUNNING")))
    return root / path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "storage"
    root.mkdir()
    return root


def same_content(one: Path, other: Path) -> bool:
    return one.read_bytes() == other.read_bytes()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def make_result(root: Path) -> Path:
    """Write a result as a worker does that shares the storage."""
    path = root / "jobs" / JOB / "best.ckpt"
    path.write_bytes(b"weights")
    return path


async def test_shared_results_stay_where_they_are(client: Client, root: Path) -> None:
    client.plan = msgspec.structs.replace(client.plan, shared_root=root)
    copies: list[bytes] = []

    async def script(worker: ScriptedWorker) -> None:
        copies.append((await share(worker, root)).read_bytes())
        await worker.complete(JOB, make_result(root))
        await worker.expect(m.ResultsReceived)

    ending = await client.run(script)
    assert ending.outcome == "complete"
    assert copies == [CONTENT]
    assert names(root / "jobs" / JOB) == ["best.ckpt", "job.zip"]
    assert client.of(events.ResultsStored) == [
        events.ResultsStored(root / "jobs" / JOB, 1, 7)
    ]
    (copied,) = client.of(events.PackageCopied)
    assert isinstance(copied, events.PackageCopied)
    assert copied.size == len(CONTENT)


async def test_shared_results_are_copied_to_the_output(
    client: Client, root: Path, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    client.plan = msgspec.structs.replace(client.plan, shared_root=root, output=output)

    async def script(worker: ScriptedWorker) -> None:
        await share(worker, root)
        await worker.complete(JOB, make_result(root))

    assert (await client.run(script)).outcome == "complete"
    assert (output / "best.ckpt").read_bytes() == b"weights"


async def test_shared_results_are_copied_without_the_worker(
    client: Client, root: Path, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    client.plan = msgspec.structs.replace(client.plan, shared_root=root, output=output)

    async def script(worker: ScriptedWorker) -> None:
        await share(worker, root)
        await worker.complete(JOB, make_result(root))
        assert isinstance(worker.link, MemoryLink)
        worker.link.cut("the worker left")

    assert (await client.run(script)).outcome == "complete"
    assert client.attempts == 0
    assert (output / "best.ckpt").read_bytes() == b"weights"


async def test_a_result_that_leads_out_of_the_storage_is_not_copied(
    client: Client, root: Path, tmp_path: Path
) -> None:
    client.plan = msgspec.structs.replace(
        client.plan, shared_root=root, output=tmp_path / "output"
    )

    async def script(worker: ScriptedWorker) -> None:
        await share(worker, root)
        path = make_result(root)
        await worker.complete(JOB, path)
        path.unlink()
        path.symlink_to("/etc/passwd")

    ending = await client.run(script)
    assert ending.outcome == "transfer_failed"
    assert "best.ckpt" in ending.reason
    assert names(tmp_path / "output") == []


async def test_a_worker_with_other_storage_gets_the_package_by_the_channel(
    client: Client, root: Path, tmp_path: Path
) -> None:
    client.plan = msgspec.structs.replace(client.plan, shared_root=root)

    async def script(worker: ScriptedWorker) -> None:
        await worker.greet(shared=True)
        await worker.expect(m.MountProbe)
        await worker.send(m.MountProbeFailed(JOB, "no such file"))
        await worker.accept()
        await worker.receive_package(tmp_path / "worker")
        await worker.send(m.JobFailed(JOB, "enough"))

    (tmp_path / "worker").mkdir()
    assert (await client.run(script)).outcome == "failed"
    assert names(root / "jobs") == []


async def test_storage_that_is_gone_is_not_used(
    client: Client, root: Path, tmp_path: Path
) -> None:
    client.plan = msgspec.structs.replace(client.plan, shared_root=root / "none")

    async def script(worker: ScriptedWorker) -> None:
        await worker.greet(shared=True)
        await worker.accept()
        await worker.send(m.JobFailed(JOB, "enough"))

    assert (await client.run(script)).outcome == "failed"
    (route,) = client.of(RouteChosen)
    assert isinstance(route, RouteChosen)
    assert route.route == "channel"


async def test_a_package_that_can_not_be_copied_goes_by_the_channel(
    client: Client, root: Path
) -> None:
    client.plan = msgspec.structs.replace(client.plan, shared_root=root, size=1)

    async def script(worker: ScriptedWorker) -> None:
        await worker.greet(shared=True)
        probe = await worker.expect(m.MountProbe)
        content = (root / probe.path).read_bytes()
        await worker.send(m.MountProbed(JOB, blake3(content).hexdigest()))
        await worker.accept()
        await worker.expect(m.JobCancel)

    ending = await client.run(script)
    assert ending.reason == "job.zip changed in the meantime"
    routes = [e.route for e in client.of(RouteChosen) if isinstance(e, RouteChosen)]
    assert routes == ["shared", "channel"]
    assert names(root / "jobs") == []


# ------------------------------------------------------------------------- cancelling


async def test_a_cancelled_job_ends_when_the_worker_confirms(
    client: Client, tmp_path: Path
) -> None:
    async def script(worker: ScriptedWorker) -> None:
        await worker.greet()
        await worker.accept()
        await worker.receive_package(tmp_path)
        await worker.send(m.JobState(JOB, m.JobProgress("RUNNING")))
        client.cancel_asked.set()
        await worker.expect(m.JobCancel)
        await worker.send(m.JobFailed(JOB, "cancelled"))

    tmp_path = tmp_path / "worker"
    tmp_path.mkdir()
    ending = await client.run(script)
    assert (ending.outcome, ending.confirmed) == ("cancelled", True)


async def test_a_worker_that_does_not_confirm_is_given_some_time(
    client: Client, autojump_clock: trio.testing.MockClock
) -> None:
    async def script(worker: ScriptedWorker) -> None:
        await worker.greet()
        await worker.expect(m.JobSubmit)
        client.cancel_asked.set()

    began = trio.current_time()
    ending = await client.run(script)
    assert (ending.outcome, ending.confirmed) == ("cancelled", False)
    assert trio.current_time() - began == pytest.approx(CANCEL_TIMEOUT)


async def test_a_job_is_cancelled_while_its_link_is_lost(
    client: Client, autojump_clock: trio.testing.MockClock
) -> None:
    client.plan = msgspec.structs.replace(client.plan, patience=1e6)
    mine, its = MemoryLink.pair()

    @asynccontextmanager
    async def open_again() -> AsyncIterator[Link]:
        client.attempts += 1
        if client.attempts == 5:
            client.cancel_asked.set()
        raise NoWorkerError("The server does not answer.")
        yield mine

    async with scripted_worker(its) as worker, trio.open_nursery() as nursery:

        async def script() -> None:
            await worker.greet()
            await worker.expect(m.JobSubmit)
            its.cut("the network is gone")

        nursery.start_soon(script)
        ending = await client.run_on(mine, open_again)
    assert (ending.outcome, ending.confirmed) == ("cancelled", False)


# --------------------------------------------------------------------------- the links


async def test_a_package_is_continued_over_the_next_link(
    client: Client, tmp_path: Path
) -> None:
    async def first(worker: ScriptedWorker) -> None:
        await worker.greet()
        await worker.accept()
        await worker.expect(m.FileOffer)
        assert isinstance(worker.link, MemoryLink)
        worker.link.cut("the network is gone")

    async def second(worker: ScriptedWorker) -> None:
        await worker.greet()
        await worker.expect(m.JobResume)
        progress = m.JobProgress("RECEIVING", received=1024 * 1024)
        await worker.send(m.ResumeAccepted(JOB, progress))
        await worker.receive_package(folder)
        await worker.send(m.JobState(JOB, m.JobProgress("RUNNING")))
        await worker.send(m.JobFailed(JOB, "enough"))

    folder = tmp_path / "worker"
    folder.mkdir()
    ending = await client.run(first, second)
    assert ending.outcome == "failed"
    assert client.of(events.LinkLost) == [events.LinkLost("the network is gone")]
    assert (folder / "job.zip").read_bytes() == CONTENT


async def test_results_are_fetched_over_the_next_link(
    client: Client, made: Path, tmp_path: Path
) -> None:
    async def first(worker: ScriptedWorker) -> None:
        await worker.greet()
        await worker.accept()
        await worker.receive_package(tmp_path / "worker")
        await worker.send(m.JobState(JOB, m.JobProgress("RUNNING")))
        await worker.complete(JOB, made)
        await worker.expect(m.FileRequest)
        assert isinstance(worker.link, MemoryLink)
        worker.link.cut("the network is gone")

    async def second(worker: ScriptedWorker) -> None:
        await worker.greet()
        await worker.expect(m.JobResume)
        await worker.send(m.ResumeAccepted(JOB, m.JobProgress("COMPLETE")))
        await worker.complete(JOB, made)
        await worker.send_result(made)
        await worker.expect(m.ResultsReceived)

    ending = await client.run(first, second)
    assert ending.outcome == "complete"
    assert (tmp_path / "results" / made.name).exists()


async def test_a_job_of_an_earlier_process_is_resumed(
    client: Client, made: Path, tmp_path: Path
) -> None:
    chosen = tmp_path / "chosen"
    client.plan = msgspec.structs.replace(
        client.plan, resumes=True, route="channel", chosen_output=chosen
    )
    chosen.mkdir()
    shutil.copy(made, chosen)  # fetched by that process

    async def script(worker: ScriptedWorker) -> None:
        await worker.greet()
        await worker.expect(m.JobResume)
        await worker.send(m.ResumeAccepted(JOB, m.JobProgress("COMPLETE")))
        await worker.complete(JOB, made)
        await worker.expect(m.ResultsReceived)

    assert (await client.run(script)).outcome == "complete"
    assert client.events[0] == events.JobResumed(JOB)
    assert client.of(events.ResultsStored) == [events.ResultsStored(chosen, 1, 7000)]


async def test_a_worker_that_is_gone_is_given_up(
    client: Client, autojump_clock: trio.testing.MockClock
) -> None:
    async def script(worker: ScriptedWorker) -> None:
        await worker.greet()
        await worker.expect(m.JobSubmit)
        assert isinstance(worker.link, MemoryLink)
        worker.link.cut("the worker ended")

    began = trio.current_time()
    ending = await client.run(script)
    assert ending.outcome == "lost"
    assert "no longer running" in ending.reason
    assert 3 <= trio.current_time() - began <= 15


async def test_a_worker_that_never_greets_is_tried_with_pauses_and_given_up(
    client: Client, autojump_clock: trio.testing.MockClock
) -> None:
    @asynccontextmanager
    async def open_again() -> AsyncIterator[Link]:
        client.attempts += 1
        assert client.attempts < 1000, "there are no pauses"
        mine, its = MemoryLink.pair()
        its.cut("it closed the connection")
        yield mine

    first, its = MemoryLink.pair()
    its.cut("it closed the connection")
    began = trio.current_time()
    ending = await client.run_on(first, open_again)
    assert ending.outcome == "lost"
    assert "could not be reached again for 60 s" in ending.reason
    assert trio.current_time() - began == PATIENCE
    assert client.attempts < 20


GREETINGS: dict[str, m.Message] = {
    "it did not greet first": m.JobAccepted(JOB),
    "it speaks protocol 7": m.Hello(m.Greeting(7, "2.0", "worker")),
    "go away": m.Error("go away"),
}


@pytest.mark.parametrize("words", GREETINGS)
async def test_a_worker_that_greets_wrongly_ends_the_job(
    client: Client, words: str
) -> None:
    told: list[m.Message] = []

    async def script(worker: ScriptedWorker) -> None:
        await worker.expect(m.Hello)
        await worker.send(GREETINGS[words])
        told.extend(await worker.wait_closed())

    ending = await client.run(script)
    assert ending.outcome == "lost"
    assert "the worker broke the protocol" in ending.reason
    assert words in ending.reason
    assert [type(message) for message in told] == [m.Error]


async def test_a_worker_that_breaks_the_protocol_later_gets_the_reason(
    client: Client,
) -> None:
    told: list[m.Message] = []

    async def script(worker: ScriptedWorker) -> None:
        await worker.greet()
        await worker.expect(m.JobSubmit)
        await worker.send(m.JobComplete(JOB, "models"))
        told.extend(await worker.wait_closed())

    ending = await client.run(script)
    assert ending.outcome == "lost"
    assert [type(message) for message in told] == [m.Error]


async def test_a_silent_worker_is_tried_again(
    client: Client, autojump_clock: trio.testing.MockClock
) -> None:
    async def silent(worker: ScriptedWorker) -> None:
        await worker.expect(m.Hello)

    async def rejecting(worker: ScriptedWorker) -> None:
        await worker.greet()
        await worker.expect(m.JobSubmit)
        await worker.send(m.JobRejected(JOB, "busy"))

    ending = await client.run(silent, rejecting)
    assert ending.outcome == "rejected"
    assert client.attempts == 1
