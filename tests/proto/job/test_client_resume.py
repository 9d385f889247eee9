"""A client's job whose link is lost, and restored."""

from typing import get_args

import pytest

from sleap_rtc.proto import messages
from sleap_rtc.proto.errors import LocalProtocolError
from sleap_rtc.proto.job.client import (
    CANCEL_TIMEOUT,
    PACKAGE_TRANSFER_ID,
    REPLY_TIMEOUT,
    ClientJob,
)
from sleap_rtc.proto.job.client_outputs import (
    DiscardShared,
    FetchResults,
    JobEnded,
    Output,
    PrepareShared,
    RouteChosen,
    SendMessage,
    SendPackage,
)
from sleap_rtc.proto.job.client_table import ClientState
from sleap_rtc.proto.job.route_plan import RoutePlan
from tests.proto.job import test_client as clients
from tests.proto.job.examples import EXAMPLES, JOB, NAME, RESULT, SIZE, drain, snapshot

CLIENT_PLACES = pytest.mark.parametrize(("route", "place"), clients.PLACES)
QUESTION: dict[str, list[Output]] = {
    "probing": clients.send(messages.MountProbe(JOB, clients.PROBE)),
    "checking input": clients.ANNOUNCE,
    "checking output": clients.ANNOUNCE,
    "preparing": [],
    "copying": [],
    "ended": [],
}
"""Outputs once the link is restored; in all other places the worker is asked."""


def away(route: str, place: str) -> ClientJob:
    job = clients.job_at(route, place)
    job.connection_lost("no answer", 0.0)
    return job


def needs_no_link(route: str, place: str) -> bool:
    return place == "ended" or (route, place) == ("shared", "fetching")


@pytest.mark.parametrize("kind", get_args(messages.WorkerJobMessage))
@CLIENT_PLACES
def test_a_message_of_a_lost_link_changes_no_client(
    route: str, place: str, kind: type[messages.Message]
) -> None:
    job = away(route, place)
    before = snapshot(job)
    clients.receive(EXAMPLES[kind])(job)
    assert snapshot(job) == before


@CLIENT_PLACES
def test_a_lost_link_is_reported_once(route: str, place: str) -> None:
    job = away(route, place)
    drain(job)
    assert (job.deadline() is not None) == (place == "cancelling")
    job.connection_lost("again", 0.0)
    assert drain(job) == []


@CLIENT_PLACES
def test_a_link_is_restored_in_every_place(route: str, place: str) -> None:
    job = away(route, place)
    drain(job)
    if place == "idle":
        before = snapshot(job)
        with pytest.raises(LocalProtocolError, match="not been submitted"):
            job.connection_restored(5.0)
        assert snapshot(job) == before
        return
    job.connection_restored(5.0)
    if needs_no_link(route, place):
        assert drain(job) == []
        return
    asked = drain(job)
    assert asked == QUESTION.get(place, clients.RESUME)
    reached = clients.REACHED[place]
    assert job.state is (reached if place in QUESTION else ClientState.RESUMING)
    wait = CANCEL_TIMEOUT if place == "cancelling" else 5.0 + REPLY_TIMEOUT
    assert job.deadline() == (wait if asked else None)
    with pytest.raises(LocalProtocolError, match="no link was lost"):
        job.connection_restored(5.0)


@CLIENT_PLACES
def test_giving_up_ends_the_job_in_every_place(route: str, place: str) -> None:
    job = away(route, place)
    drain(job)
    job.give_up("it stays away")
    outputs = drain(job)
    if needs_no_link(route, place):
        assert outputs == []
    elif place == "cancelling":
        reason = "the worker was not informed"
        assert outputs == [JobEnded("cancelled", reason, confirmed=False)]
    else:
        assert outputs[-1] == JobEnded("lost", "it stays away")


@CLIENT_PLACES
def test_a_job_is_cancelled_while_its_client_is_away(route: str, place: str) -> None:
    job = away(route, place)
    drain(job)
    job.cancel("Ctrl-C", 1.0)
    outputs = drain(job)
    assert not any(isinstance(each, SendMessage) for each in outputs)
    if place not in ("submitting", "sending", "waiting", "listed", *clients.ASIDE):
        assert place == "ended" or outputs[-1] == JobEnded("cancelled", "Ctrl-C")
        return
    job.connection_restored(2.0)
    started = 0.0 if place == "cancelling" else 1.0
    assert job.deadline() == started + CANCEL_TIMEOUT
    clients.receive(EXAMPLES[messages.ResumeAccepted], 3.0)(job)
    assert drain(job)[-1:] == clients.CANCEL
    assert job.state is ClientState.CANCELLING
    job.connection_lost("again", 4.0)
    job.handle_timeout(100.0)
    ending = JobEnded("cancelled", "the worker is silent", confirmed=False)
    assert drain(job)[-1] == ending


@pytest.mark.parametrize("name", ["package_sent", "transfer_failed"])
def test_a_sender_that_was_stopped_may_report_late(name: str) -> None:
    def report() -> str:
        drain(job)
        clients.INPUTS[name][0](job)
        assert drain(job) == []
        return job.state.name

    job = away("channel", "sending")
    assert report() == "SENDING"
    job.connection_restored(0.0)
    assert report() == "RESUMING"
    clients.receive(EXAMPLES[messages.ResumeAccepted])(job)
    assert report() == "WAITING"


@pytest.mark.parametrize("name", ["results_fetched", "transfer_failed"])
def test_results_that_were_stopped_are_fetched_again(name: str) -> None:
    job = away("channel", "fetching")
    job.connection_restored(0.0)
    job.receive_message(
        messages.ResumeAccepted(JOB, messages.JobProgress("COMPLETE")), 0.0
    )
    clients.INPUTS[name][0](job)
    assert job.state.name == "WAITING"
    drain(job)
    clients.receive(EXAMPLES[messages.JobResults])(job)
    clients.receive(EXAMPLES[messages.JobComplete])(job)
    assert drain(job) == [FetchResults(JOB, "channel", (RESULT,))]


def test_results_that_have_arrived_count_although_the_link_was_lost() -> None:
    job = away("channel", "fetching")
    drain(job)
    job.results_fetched()
    assert drain(job) == [JobEnded("complete", path="models")]
    assert job.state is ClientState.ENDED


def test_results_of_a_cancelled_job_that_come_later_do_not_make_it_failed() -> None:
    job = clients.job_at("channel", "cancelling")
    for kind in (messages.JobResults, messages.JobFailed):
        clients.receive(EXAMPLES[kind])(job)
    assert job.state.name == "FETCHING"
    job.connection_lost("no answer", 0.0)
    job.connection_restored(0.0)
    job.receive_message(
        messages.ResumeAccepted(JOB, messages.JobProgress("CANCELLED")), 0.0
    )
    for kind in (messages.JobResults, messages.JobFailed):
        clients.receive(EXAMPLES[kind])(job)
    job.results_fetched()
    assert drain(job)[-1] == JobEnded("cancelled", "Ctrl-C")


def test_a_repeated_report_is_shown_once() -> None:
    job = clients.job_at("channel", "waiting")
    reported: list[type[messages.Message]] = [
        messages.JobState,
        messages.JobLog,
        messages.TrainingComplete,
    ]
    for kind in reported:
        clients.receive(EXAMPLES[kind])(job)
    job.connection_lost("no answer", 0.0)
    job.connection_restored(0.0)
    assert drain(job)[-1] == SendMessage(
        messages.JobResume(JOB, messages.ResumePoint(1))
    )
    reported.append(messages.ResumeAccepted)
    for kind in reversed(reported):
        clients.receive(EXAMPLES[kind])(job)
    assert drain(job) == []


@pytest.mark.parametrize("route", [None, "shared", "channel"])
def test_a_job_of_an_earlier_process_is_submitted_if_the_worker_lacks_it(
    route: messages.Route | None,
) -> None:
    job = ClientJob(JOB, NAME, SIZE)
    job.resume(RoutePlan("auto", True, True), 0.0, route=route)
    job.receive_message(messages.JobUnknown(JOB), 0.0)
    assert drain(job)[-1] == PrepareShared(JOB)
    assert job.route is None


@pytest.mark.parametrize("place", ["submitting", "sending"])
def test_a_package_is_submitted_again_if_the_worker_lacks_the_job(place: str) -> None:
    job = away("channel", place)
    job.connection_restored(0.0)
    drain(job)
    job.receive_message(messages.JobUnknown(JOB), 1.0)
    assert drain(job) == clients.SUBMIT
    assert job.state is ClientState.SUBMITTING
    clients.receive(EXAMPLES[messages.JobAccepted])(job)
    assert drain(job) == [SendPackage(PACKAGE_TRANSFER_ID)]
    assert job.state.name == "SENDING"


def test_a_package_that_is_incomplete_is_sent_again() -> None:
    job = away("channel", "sending")
    job.connection_restored(0.0)
    drain(job)
    incomplete = messages.JobProgress("RECEIVING")
    job.receive_message(messages.ResumeAccepted(JOB, incomplete), 1.0)
    assert SendPackage(PACKAGE_TRANSFER_ID) in drain(job)
    assert job.state is ClientState.SENDING
    job.package_sent()
    assert job.state.name == "WAITING"


def test_a_start_that_was_lost_is_repeated() -> None:
    job = clients.job_at("shared", "resuming")
    job.receive_message(messages.JobUnknown(JOB), 0.0)
    assert drain(job) == clients.ANNOUNCE


@pytest.mark.parametrize("report", [messages.JobState, messages.ResumeAccepted])
def test_a_job_that_the_worker_had_is_not_started_again(
    report: type[messages.Message],
) -> None:
    if report is messages.JobState:
        job = clients.job_at("shared", "waiting")
    else:
        job = clients.job_at("shared", "resuming")
    clients.receive(EXAMPLES[report])(job)
    job.connection_lost("no answer", 0.0)
    job.connection_restored(0.0)
    drain(job)
    job.receive_message(messages.JobUnknown(JOB), 0.0)
    assert drain(job) == [JobEnded("lost", "the worker no longer has the job")]


def test_the_copy_for_a_job_that_never_started_is_removed_when_it_is_cancelled() -> (
    None
):
    job = clients.job_at("shared", "resuming")
    job.cancel("Ctrl-C", 0.0)
    job.receive_message(messages.JobUnknown(JOB), 0.0)
    ended = JobEnded("cancelled", "Ctrl-C")
    assert drain(job) == [DiscardShared(JOB), ended]


def test_a_cancellation_does_not_wait_for_results_that_are_fetched_again() -> None:
    job = away("channel", "fetching")
    job.connection_restored(0.0)
    drain(job)
    job.cancel("Ctrl-C", 0.0)
    assert drain(job) == [JobEnded("cancelled", "Ctrl-C")]


def test_results_of_a_job_without_a_known_route_come_through_the_channel() -> None:
    job = ClientJob(JOB, NAME, SIZE)
    job.resume(RoutePlan("auto", True, True), 0.0, route=None)
    drain(job)
    clients.receive(EXAMPLES[messages.ResumeAccepted])(job)
    chosen = RouteChosen("channel", "the worker has the job already")
    assert chosen in drain(job)
    assert job.route == "channel"
