"""A worker's job whose client goes away, and comes back."""

from typing import get_args

import pytest

from sleap_rtc.proto import messages
from sleap_rtc.proto.errors import LocalProtocolError
from sleap_rtc.proto.job.client_outputs import JobEnded, Outcome
from sleap_rtc.proto.job.lines import LineEvent
from sleap_rtc.proto.job.worker import StageSucceeded, WorkerJob
from sleap_rtc.proto.job.worker_outputs import (
    Discard,
    Enqueue,
    Output,
    Remember,
    SendMessage,
    StopReceiving,
)
from tests.proto.job import test_client as clients
from tests.proto.job import test_worker as workers
from tests.proto.job.examples import JOB, NAME, RESULT, SIZE, drain, snapshot

EVERY_PLACE = pytest.mark.parametrize(("route", "place"), workers.PLACES)

WHERE: dict[str, messages.JobStateName] = {
    "admitted": "RECEIVING",
    "receiving": "RECEIVING",
    "suspended": "RECEIVING",
    "queued": "QUEUED",
    "running": "RUNNING",
    "ended": "COMPLETE",
}
"""The state that a client gets when it resumes a job, for each place."""


def resume(job: WorkerJob, next_sequence: int = 0) -> list[Output]:
    """Resume a job over another link, and return the outputs of the worker."""
    job.connection_restored(5.0)
    point = messages.ResumePoint(next_sequence)
    job.receive_message(messages.JobResume(JOB, point), 5.0)
    return drain(job)


def resumed(name: messages.JobStateName) -> Output:
    return SendMessage(messages.ResumeAccepted(JOB, messages.JobProgress(name)))


@pytest.mark.parametrize("kind", get_args(messages.ClientJobMessage))
@EVERY_PLACE
def test_a_message_of_a_lost_link_changes_no_worker(
    route: str, place: str, kind: type[messages.Message]
) -> None:
    job = workers.job_at(route, place)
    job.connection_lost("no answer", 0.0)
    before = snapshot(job)
    workers.receive(kind)(job)
    assert snapshot(job) == before


@EVERY_PLACE
def test_a_client_that_goes_away_takes_only_an_unsubmitted_job_with_it(
    route: str, place: str
) -> None:
    job = workers.job_at(route, place)
    is_kept = place in WHERE or place == "admitting"
    assert job.can_resume == is_kept
    job.connection_lost("no answer", 0.0)
    assert job.can_resume == is_kept
    if place == "receiving":
        assert drain(job) == [StopReceiving()]
    elif is_kept or place == "discarded":
        assert drain(job) == []
    else:
        assert drain(job) == [Discard()]
    job.connection_lost("no answer", 0.0)
    assert drain(job) == []


@EVERY_PLACE
def test_a_client_comes_back_in_every_place(route: str, place: str) -> None:
    job = workers.job_at(route, place)
    before = snapshot(job)
    if place != "suspended":
        with pytest.raises(LocalProtocolError, match="nothing to resume"):
            job.connection_restored(0.0)
        assert snapshot(job) == before
    job.connection_lost("no answer", 0.0)
    drain(job)
    if place == "admitting":
        assert resume(job) == []
        job.admitted()
        assert drain(job) == [Remember(), resumed("RECEIVING")]
    elif place in WHERE:
        outputs = resume(job)
        assert outputs[0] == resumed(WHERE[place])
        ending = workers.GOLDEN[route][-2][2][1:]
        assert outputs[1:] == (ending if place == "ended" else [])
    else:
        with pytest.raises(LocalProtocolError, match="nothing to resume"):
            job.connection_restored(0.0)


@pytest.mark.parametrize("place", ["admitted", "suspended"])
def test_a_package_is_offered_again_after_a_loss(place: str) -> None:
    job = workers.job_at("channel", place)
    job.connection_lost("no answer", 0.0)
    resume(job)
    workers.receive(messages.FileOffer)(job)
    job.package_received()
    assert drain(job)[-1] == Enqueue(JOB, "channel", NAME)


def test_a_job_that_is_admitted_without_its_client_waits_for_it() -> None:
    job = workers.job_at("channel", "admitting")
    job.connection_lost("no answer", 0.0)
    job.admitted()
    assert drain(job) == [Remember()]
    assert resume(job) == [resumed("RECEIVING")]


def test_a_client_that_comes_back_gets_a_refusal() -> None:
    job = workers.job_at("channel", "admitting")
    job.connection_lost("no answer", 0.0)
    resume(job)
    job.rejected("disk full")
    [refusal] = workers.sent(drain(job))
    for cancels in (False, True):
        client = clients.job_at("channel", "resuming")
        if cancels:
            client.cancel("Ctrl-C", 0.0)
        clients.receive(refusal)(client)
        outcome: Outcome = "cancelled" if cancels else "rejected"
        assert drain(client)[-1] == JobEnded(outcome, "disk full")


def test_missed_lines_come_first_and_then_the_stages() -> None:
    job = workers.job_at("channel", "running")
    job.progressed(LineEvent(0, "10%"))
    job.connection_lost("no answer", 0.0)
    job.progressed(LineEvent(0, "20%"))
    job.progressed(LineEvent(1, "saved"))
    job.progressed(StageSucceeded("training"))
    drain(job)
    assert workers.sent(resume(job, next_sequence=1)) == [
        messages.ResumeAccepted(JOB, messages.JobProgress("RUNNING")),
        messages.JobLog(JOB, 1, 0, "20%"),
        messages.JobLog(JOB, 2, 1, "saved"),
        messages.TrainingComplete(),
    ]


def restored(progress: messages.JobProgress) -> WorkerJob:
    return WorkerJob.restored(
        JOB,
        "channel",
        messages.Submission(NAME, SIZE),
        progress,
        results={RESULT.path: RESULT.size},
        output_path="models",
    )


STOPPED = "the worker was stopped while the job ran"


@pytest.mark.parametrize(
    ("noted", "then"),
    [
        (messages.JobProgress("RECEIVING"), messages.JobProgress("RECEIVING")),
        (messages.JobProgress("QUEUED", 3), messages.JobProgress("QUEUED")),
        (messages.JobProgress("RUNNING"), messages.JobProgress("FAILED", 0, STOPPED)),
        *[
            (progress, progress)
            for progress in (
                messages.JobProgress("COMPLETE", 0, "2 files stay on the worker"),
                messages.JobProgress("FAILED", 0, ""),
                messages.JobProgress("FAILED", 0, "x" * 1024),
                messages.JobProgress("CANCELLED", 0, "the owner said so"),
            )
        ],
    ],
)
def test_a_restarted_worker_restores_a_job(
    noted: messages.JobProgress, then: messages.JobProgress
) -> None:
    job = restored(noted)
    enqueue = Enqueue(JOB, "channel", NAME)
    outputs: dict[messages.JobStateName, list[Output]] = {
        "QUEUED": [Remember(), enqueue],
        "RUNNING": [Remember()],
    }
    assert drain(job) == outputs.get(noted.state, [])
    assert job.progress == then
    replies = workers.sent(resume(job))
    assert replies[0] == messages.ResumeAccepted(JOB, then)
    if job.has_ended:
        assert replies[1] == messages.JobResults(JOB, messages.ResultPage((RESULT,)))
    if then.state == "COMPLETE":
        assert replies[-1] == messages.JobComplete(JOB, "models")
    elif job.has_ended:
        assert replies[-1] == messages.JobFailed(JOB, then.detail)
