"""One job over links that come and go, with a worker that its test writes."""

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing

from sleap_rtc.client import events
from sleap_rtc.errors import NoWorkerError
from sleap_rtc.io.link.link import Link
from sleap_rtc.proto import messages
from sleap_rtc.proto.job.client import CANCEL_TIMEOUT
from sleap_rtc.proto.job.client_outputs import RouteChosen
from sleap_rtc.proto.job.reports import LinePrinted, StageComplete, StateChanged
from tests.client.scripted import ScriptedWorker, result_file, scripted_worker
from tests.client.session_world import (
    CONTENT,
    JOB,
    PATIENCE,
    Client,
    names,
    same_content,
)
from tests.io.link.memory import MemoryLink

# ------------------------------------------------------------------- the channel route


async def test_a_package_arrives_and_its_results_are_fetched(
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
            messages.JobState(job_id, messages.JobProgress("QUEUED", position=2)),
            messages.JobState(job_id, messages.JobProgress("RUNNING")),
            messages.JobLog(job_id, 0, 0, "epoch 1"),
            messages.TrainingComplete(),
            messages.InferenceComplete(),
        )
        await worker.complete(job_id, made)
        await worker.send_result(made)
        await worker.expect(messages.ResultsReceived)

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
        await worker.expect(messages.JobSubmit)
        await worker.send(messages.JobRejected(JOB, "disk full; ask the owner"))

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
            messages.JobState(JOB, messages.JobProgress("RUNNING")),
            messages.JobResults(JOB, messages.ResultPage((file,))),
            messages.JobFailed(JOB, "exit code 1"),
        )
        await worker.send_result(made)
        await worker.expect(messages.ResultsReceived)

    ending = await client.run(script)
    assert (ending.outcome, ending.reason) == ("failed", "exit code 1")
    assert (tmp_path / "results" / made.name).exists()


async def test_a_result_that_the_worker_cannot_send_fails_the_transfer(
    client: Client, made: Path, tmp_path: Path
) -> None:
    async def script(worker: ScriptedWorker) -> None:
        await worker.greet()
        await worker.accept()
        await worker.receive_package(tmp_path / "worker")
        await worker.send(messages.JobState(JOB, messages.JobProgress("RUNNING")))
        await worker.complete(JOB, made)
        request = await worker.expect(messages.FileRequest)
        await worker.send(messages.FileError(request.transfer_id, "it is gone"))

    ending = await client.run(script)
    assert ending.outcome == "transfer_failed"
    assert "1 of 1 results did not arrive" in ending.reason
    assert "best.ckpt: it is gone" in ending.reason


async def test_a_directory_that_cannot_be_made_fails_the_transfer(
    client: Client, made: Path, tmp_path: Path
) -> None:
    client.plan = msgspec.structs.replace(client.plan, output=Path("/dev/null/x"))

    async def script(worker: ScriptedWorker) -> None:
        await worker.greet()
        await worker.accept()
        await worker.receive_package(tmp_path / "worker")
        await worker.send(messages.JobState(JOB, messages.JobProgress("RUNNING")))
        await worker.complete(JOB, made)

    ending = await client.run(script)
    assert ending.outcome == "transfer_failed"
    assert "Failed to create directory" in ending.reason


async def test_a_package_that_changed_is_not_sent(client: Client) -> None:
    client.plan.package.write_bytes(CONTENT + b"more")

    async def script(worker: ScriptedWorker) -> None:
        await worker.greet()
        await worker.accept()
        await worker.expect(messages.JobCancel)

    ending = await client.run(script)
    assert ending.outcome == "transfer_failed"
    assert ending.reason == "job.zip changed in the meantime"


async def test_a_package_that_is_gone_is_not_sent(client: Client) -> None:
    client.plan.package.unlink()

    async def script(worker: ScriptedWorker) -> None:
        await worker.greet()
        await worker.accept()
        await worker.expect(messages.JobCancel)

    ending = await client.run(script)
    assert ending.outcome == "transfer_failed"
    assert "job.zip" in ending.reason


# ------------------------------------------------------------------------- cancelling


async def test_a_cancelled_job_ends_when_the_worker_confirms(
    client: Client, tmp_path: Path
) -> None:
    async def script(worker: ScriptedWorker) -> None:
        await worker.greet()
        await worker.accept()
        await worker.receive_package(tmp_path)
        await worker.send(messages.JobState(JOB, messages.JobProgress("RUNNING")))
        client.cancel_asked.set()
        await worker.expect(messages.JobCancel)
        await worker.send(messages.JobFailed(JOB, "cancelled"))

    tmp_path = tmp_path / "worker"
    tmp_path.mkdir()
    ending = await client.run(script)
    assert (ending.outcome, ending.confirmed) == ("cancelled", True)


async def test_a_worker_that_does_not_confirm_is_given_some_time(
    client: Client, autojump_clock: trio.testing.MockClock
) -> None:
    async def script(worker: ScriptedWorker) -> None:
        await worker.greet()
        await worker.expect(messages.JobSubmit)
        client.cancel_asked.set()

    began = trio.current_time()
    ending = await client.run(script)
    assert (ending.outcome, ending.confirmed) == ("cancelled", False)
    assert trio.current_time() - began == pytest.approx(CANCEL_TIMEOUT)


async def test_an_earlier_job_is_cancelled_at_its_worker_even_before_the_greeting(
    client: Client,
) -> None:
    client.plan = msgspec.structs.replace(client.plan, resumes=True)
    client.cancel_asked.set()

    async def script(worker: ScriptedWorker) -> None:
        await worker.greet()
        await worker.expect(messages.JobResume)
        await worker.send(messages.ResumeAccepted(JOB, messages.JobProgress("RUNNING")))
        await worker.expect(messages.JobCancel)
        await worker.send(messages.JobFailed(JOB, "cancelled"))

    ending = await client.run(script)
    assert (ending.outcome, ending.confirmed) == ("cancelled", True)


async def test_a_job_is_cancelled_while_its_link_is_lost(
    client: Client, autojump_clock: trio.testing.MockClock
) -> None:
    client.plan = msgspec.structs.replace(client.plan, patience=1e6)
    mine, its = MemoryLink.pair()

    @asynccontextmanager
    async def open_again() -> AsyncIterator[Link[messages.WorkerMessage]]:
        client.attempts += 1
        if client.attempts == 5:
            client.cancel_asked.set()
        raise NoWorkerError("The server does not answer.")
        yield mine

    async with scripted_worker(its) as worker, trio.open_nursery() as nursery:

        async def script() -> None:
            await worker.greet()
            await worker.expect(messages.JobSubmit)
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
        await worker.expect(messages.FileOffer)
        assert isinstance(worker.link, MemoryLink)
        worker.link.cut("the network is gone")

    async def second(worker: ScriptedWorker) -> None:
        await worker.greet()
        await worker.expect(messages.JobResume)
        progress = messages.JobProgress("RECEIVING", received=1024 * 1024)
        await worker.send(messages.ResumeAccepted(JOB, progress))
        await worker.receive_package(folder)
        await worker.send(messages.JobState(JOB, messages.JobProgress("RUNNING")))
        await worker.send(messages.JobFailed(JOB, "enough"))

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
        await worker.send(messages.JobState(JOB, messages.JobProgress("RUNNING")))
        await worker.complete(JOB, made)
        await worker.expect(messages.FileRequest)
        assert isinstance(worker.link, MemoryLink)
        worker.link.cut("the network is gone")

    async def second(worker: ScriptedWorker) -> None:
        await worker.greet()
        await worker.expect(messages.JobResume)
        await worker.send(
            messages.ResumeAccepted(JOB, messages.JobProgress("COMPLETE"))
        )
        await worker.complete(JOB, made)
        await worker.send_result(made)
        await worker.expect(messages.ResultsReceived)

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
        await worker.expect(messages.JobResume)
        await worker.send(
            messages.ResumeAccepted(JOB, messages.JobProgress("COMPLETE"))
        )
        await worker.complete(JOB, made)
        await worker.expect(messages.ResultsReceived)

    assert (await client.run(script)).outcome == "complete"
    assert client.events[0] == events.JobResumed(JOB)
    assert client.of(events.ResultsStored) == [events.ResultsStored(chosen, 1, 7000)]


async def test_a_worker_that_is_gone_is_given_up(
    client: Client, autojump_clock: trio.testing.MockClock
) -> None:
    async def script(worker: ScriptedWorker) -> None:
        await worker.greet()
        await worker.expect(messages.JobSubmit)
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
    async def open_again() -> AsyncIterator[Link[messages.WorkerMessage]]:
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


GREETINGS: dict[str, messages.Message] = {
    "its first message was not HELLO": messages.JobAccepted(JOB),
    "it speaks protocol 7": messages.Hello(messages.Greeting(7, "2.0", "worker")),
    "go away": messages.Error("go away"),
}


@pytest.mark.parametrize("words", GREETINGS)
async def test_a_worker_that_greets_wrongly_ends_the_job(
    client: Client, words: str
) -> None:
    told: list[messages.Message] = []

    async def script(worker: ScriptedWorker) -> None:
        await worker.expect(messages.Hello)
        await worker.send(GREETINGS[words])
        told.extend(await worker.wait_closed())

    ending = await client.run(script)
    assert ending.outcome == "lost"
    assert "the worker broke the protocol" in ending.reason
    assert words in ending.reason
    assert [type(message) for message in told] == [messages.Error]


async def test_a_worker_that_breaks_the_protocol_later_gets_the_reason(
    client: Client,
) -> None:
    told: list[messages.Message] = []

    async def script(worker: ScriptedWorker) -> None:
        await worker.greet()
        await worker.expect(messages.JobSubmit)
        await worker.send(messages.JobComplete(JOB, "models"))
        told.extend(await worker.wait_closed())

    ending = await client.run(script)
    assert ending.outcome == "lost"
    assert [type(message) for message in told] == [messages.Error]


async def test_a_silent_worker_is_tried_again(
    client: Client, autojump_clock: trio.testing.MockClock
) -> None:
    async def silent(worker: ScriptedWorker) -> None:
        await worker.expect(messages.Hello)

    async def rejecting(worker: ScriptedWorker) -> None:
        await worker.greet()
        await worker.expect(messages.JobSubmit)
        await worker.send(messages.JobRejected(JOB, "busy"))

    ending = await client.run(silent, rejecting)
    assert ending.outcome == "rejected"
    assert client.attempts == 1
