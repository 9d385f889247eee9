import msgspec
import pytest

from sleap_rtc.proto import messages as m
from sleap_rtc.proto.errors import LocalProtocolError
from sleap_rtc.proto.job import client, worker
from tests.proto.job import test_client as clients
from tests.proto.job import test_worker as workers
from tests.proto.job.examples import EXAMPLES, JOB, NAME, RESULT, SIZE, snapshot
from tests.proto.job.test_pair import MOMENTS, check_peace
from tests.proto.job.world import Mount, Scenario, World

# ------------------------------------------------------- the client without its link

C = client.State

# The state after the loss, and after the link is restored.
CLIENT_RESTORED = {
    C.PREPARING: C.PREPARING,
    C.PROBING: C.PROBING,
    C.COPYING: C.COPYING,
    C.CHECKING_INPUT: C.CHECKING_INPUT,
    C.CHECKING_OUTPUT: C.CHECKING_INPUT,
    C.SUBMITTING: C.RESUMING,
    C.SENDING: C.RESUMING,
    C.WAITING: C.RESUMING,
    C.CANCELLING: C.RESUMING,
    C.FETCHING: C.RESUMING,
    C.RESUMING: C.RESUMING,
    C.ENDED: C.ENDED,
}
EVERY_MESSAGE = pytest.mark.parametrize(
    "message", EXAMPLES.values(), ids=lambda each: type(each).__name__
)
CLIENT_PLACES = pytest.mark.parametrize(("route", "state"), clients.PLACES)
WORKER_PLACES = pytest.mark.parametrize(("route", "state"), workers.PLACES)


def away(route: str, state: client.State) -> client.ClientJob:
    job = clients.job_at(route, state)
    job.connection_lost("no answer", 0.0)
    return job


@EVERY_MESSAGE
@CLIENT_PLACES
def test_a_message_of_a_lost_link_changes_no_client(
    route: str, state: client.State, message: m.Message
) -> None:
    job = away(route, state)
    before = snapshot(job)
    job.receive_message(message, 0.0)
    assert snapshot(job) == before


@CLIENT_PLACES
def test_a_lost_link_stops_transfers_and_asks_for_another_once(
    route: str, state: client.State
) -> None:
    job = away(route, state)
    outputs = clients.drain(job)
    if state is C.ENDED or (route, state) == ("shared", C.FETCHING):
        assert outputs == []
    elif state in (C.SENDING, C.FETCHING):
        assert outputs == [client.StopSending(), client.Reconnect("no answer")]
    else:
        assert outputs == [client.Reconnect("no answer")]
    assert job.state is state
    assert (job.deadline() is not None) == (state is C.CANCELLING)
    job.connection_lost("again", 0.0)
    assert clients.drain(job) == []


@CLIENT_PLACES
def test_a_link_is_restored_in_every_state(route: str, state: client.State) -> None:
    job = away(route, state)
    clients.drain(job)
    if state is C.IDLE:
        before = snapshot(job)
        with pytest.raises(LocalProtocolError, match="not been submitted"):
            job.link_restored(5.0)
        assert snapshot(job) == before
        return
    job.link_restored(5.0)
    if (route, state) == ("shared", C.FETCHING):
        assert (job.state, clients.drain(job)) == (state, [])
        return
    assert job.state is CLIENT_RESTORED[state]
    asked = clients.sent(clients.drain(job))
    if job.state is C.RESUMING:
        assert asked == [m.JobResume(JOB, m.ResumePoint(0))]
    assert bool(asked) == (job.state not in (C.PREPARING, C.COPYING, C.ENDED))
    wait = client.CANCEL_TIMEOUT if state is C.CANCELLING else 5.0 + 30.0
    assert job.deadline() == (wait if asked else None)
    if state is not C.ENDED:
        with pytest.raises(LocalProtocolError, match="no link was lost"):
            job.link_restored(5.0)


@CLIENT_PLACES
def test_giving_up_ends_the_job_in_every_state(route: str, state: client.State) -> None:
    job = away(route, state)
    clients.drain(job)
    job.give_up("it stays away")
    outputs = clients.drain(job)
    if state is C.ENDED or (route, state) == ("shared", C.FETCHING):
        assert (job.state, outputs) == (state, [])
        return
    assert job.state is C.ENDED
    if state is C.CANCELLING:
        reason = "the worker was not told"
        assert outputs == [client.JobEnded("cancelled", reason, confirmed=False)]
    else:
        assert outputs[-1] == client.JobEnded("lost", "it stays away")


@CLIENT_PLACES
def test_a_job_is_cancelled_while_its_client_is_away(
    route: str, state: client.State
) -> None:
    job = away(route, state)
    clients.drain(job)
    job.cancel("Ctrl-C", 1.0)
    assert clients.sent(clients.drain(job)) == []
    depends = state in (C.SUBMITTING, C.SENDING, C.WAITING, C.CANCELLING, C.RESUMING)
    if not depends:
        assert job.state is C.ENDED
        return
    job.link_restored(2.0)
    started = 0.0 if state is C.CANCELLING else 1.0
    assert job.deadline() == started + client.CANCEL_TIMEOUT
    job.receive_message(EXAMPLES[m.JobResumed], 3.0)
    assert job.state is C.CANCELLING
    assert clients.sent(clients.drain(job))[-1] == m.JobCancel(JOB)
    job.connection_lost("again", 4.0)
    job.handle_timeout(100.0)
    ending = client.JobEnded("cancelled", "the worker is silent", confirmed=False)
    assert clients.drain(job)[-1] == ending


@pytest.mark.parametrize("name", ["package_sent", "transfer_failed"])
def test_a_sender_that_was_stopped_may_report_late(name: str) -> None:
    def report() -> client.State:
        clients.drain(job)
        clients.INPUTS[name](job)
        assert clients.drain(job) == []
        return job.state

    job = away("channel", C.SENDING)
    assert report() is C.SENDING
    job.link_restored(0.0)
    assert report() is C.RESUMING
    job.receive_message(EXAMPLES[m.JobResumed], 0.0)
    assert report() is C.WAITING


@pytest.mark.parametrize("name", ["results_fetched", "transfer_failed"])
def test_results_that_were_stopped_are_fetched_again(name: str) -> None:
    job = away("channel", C.FETCHING)
    job.link_restored(0.0)
    job.receive_message(m.JobResumed(JOB, m.JobProgress("COMPLETE")), 0.0)
    clients.INPUTS[name](job)
    assert job.state is C.WAITING
    clients.drain(job)
    job.receive_message(EXAMPLES[m.JobResults], 0.0)
    job.receive_message(EXAMPLES[m.JobComplete], 0.0)
    assert clients.drain(job) == [client.FetchResults(JOB, "channel", (RESULT,))]


def test_results_of_a_cancelled_job_that_come_later_do_not_make_it_failed() -> None:
    job = clients.job_at("channel", C.CANCELLING)
    for kind in (m.JobResults, m.JobFailed):
        job.receive_message(EXAMPLES[kind], 0.0)
    assert job.state is C.FETCHING
    job.connection_lost("no answer", 0.0)
    job.link_restored(0.0)
    job.receive_message(m.JobResumed(JOB, m.JobProgress("CANCELLED")), 0.0)
    for kind in (m.JobResults, m.JobFailed):
        job.receive_message(EXAMPLES[kind], 0.0)
    job.results_fetched()
    assert clients.drain(job)[-1] == client.JobEnded("cancelled", "Ctrl-C")


def test_what_the_worker_says_again_is_not_shown_again() -> None:
    job = clients.job_at("channel", C.WAITING)
    said: list[type[m.Message]] = [m.JobState, m.JobLog, m.TrainingComplete]
    for kind in said:
        job.receive_message(EXAMPLES[kind], 0.0)
    job.connection_lost("no answer", 0.0)
    job.link_restored(0.0)
    assert clients.sent(clients.drain(job))[-1] == m.JobResume(JOB, m.ResumePoint(1))
    said.append(m.JobResumed)
    for kind in reversed(said):
        job.receive_message(EXAMPLES[kind], 0.0)
    assert clients.drain(job) == []


@pytest.mark.parametrize("route", [None, "shared", "channel"])
def test_a_job_of_an_earlier_process_is_submitted_if_it_is_not_known(
    route: m.Route | None,
) -> None:
    job = client.ClientJob(JOB, NAME, SIZE)
    job.resume("auto", 0.0, client_root=True, worker_root=True, route=route)
    job.receive_message(m.JobUnknown(JOB), 0.0)
    assert job.state is C.PREPARING
    assert job.route is None


def test_a_start_that_was_lost_is_repeated_and_a_job_that_ran_is_not() -> None:
    job = clients.job_at("shared", C.RESUMING)
    job.receive_message(m.JobUnknown(JOB), 0.0)
    assert job.state is C.CHECKING_INPUT
    job = clients.job_at("shared", C.RESUMING)
    job.receive_message(EXAMPLES[m.JobResumed], 0.0)
    job.connection_lost("no answer", 0.0)
    job.link_restored(0.0)
    job.receive_message(m.JobUnknown(JOB), 0.0)
    reason = "the worker does not know the job any more"
    assert clients.drain(job)[-1] == client.JobEnded("lost", reason)


def test_the_copy_for_a_job_that_never_started_goes_when_it_is_cancelled() -> None:
    job = clients.job_at("shared", C.RESUMING)
    job.cancel("Ctrl-C", 0.0)
    job.receive_message(m.JobUnknown(JOB), 0.0)
    ended = client.JobEnded("cancelled", "Ctrl-C")
    assert clients.drain(job) == [client.DiscardShared(JOB), ended]


def test_a_cancellation_does_not_wait_for_results_that_come_again() -> None:
    job = away("channel", C.FETCHING)
    job.link_restored(0.0)
    clients.drain(job)
    job.cancel("Ctrl-C", 0.0)
    assert clients.drain(job) == [client.JobEnded("cancelled", "Ctrl-C")]


def test_results_of_a_job_whose_route_is_forgotten_come_through_the_channel() -> None:
    job = client.ClientJob(JOB, NAME, SIZE)
    job.resume("auto", 0.0, client_root=True, worker_root=True, route=None)
    clients.drain(job)
    job.receive_message(EXAMPLES[m.JobResumed], 0.0)
    chosen = client.RouteChosen("channel", "the worker has the job already")
    assert chosen in clients.drain(job)
    assert job.route == "channel"


# ------------------------------------------------------- the worker without its client

W = worker.State
KEPT = {
    W.ADMITTING: W.ADMITTING,
    W.ADMITTED: W.SUSPENDED,
    W.RECEIVING: W.SUSPENDED,
    W.SUSPENDED: W.SUSPENDED,
    W.QUEUED: W.QUEUED,
    W.RUNNING: W.RUNNING,
    W.ENDED: W.ENDED,
}


@EVERY_MESSAGE
@WORKER_PLACES
def test_a_message_of_a_lost_link_changes_no_worker(
    route: str, state: worker.State, message: m.Message
) -> None:
    job = workers.job_at(route, state)
    job.connection_lost(0.0)
    before = snapshot(job)
    job.receive_message(message, 0.0)
    assert snapshot(job) == before


@WORKER_PLACES
def test_a_client_that_goes_away_takes_only_an_unsubmitted_job_with_it(
    route: str, state: worker.State
) -> None:
    job = workers.job_at(route, state)
    assert job.can_resume == (state in KEPT)
    job.connection_lost(0.0)
    assert job.can_resume == (state in KEPT)
    outputs = workers.drain(job)
    if state is W.DISCARDED:
        assert outputs == []
    elif state is W.RECEIVING:
        assert outputs == [worker.StopReceiving()]
    else:
        assert outputs == ([] if state in KEPT else [worker.Discard()])
    assert job.state is KEPT.get(state, W.DISCARDED)
    job.connection_lost(0.0)
    assert workers.drain(job) == []


@WORKER_PLACES
def test_a_client_comes_back_in_every_state(route: str, state: worker.State) -> None:
    job = workers.job_at(route, state)
    before = snapshot(job)
    if state is not W.SUSPENDED:
        with pytest.raises(LocalProtocolError, match="nothing to resume"):
            job.attached(0, 0.0)
        assert snapshot(job) == before
    job.connection_lost(0.0)
    workers.drain(job)
    if state not in KEPT:
        with pytest.raises(LocalProtocolError, match="nothing to resume"):
            job.attached(0, 0.0)
        return
    job.attached(0, 0.0)
    replies = workers.sent(workers.drain(job))
    if state is W.ADMITTING:
        assert replies == []
        job.admitted()
        replies = workers.sent(workers.drain(job))
    waits = state in list(W)[8:12]
    assert job.state is (W.ADMITTED if waits else state)
    assert replies[0] == m.JobResumed(JOB, job.progress)
    assert job.progress.state == {
        W.QUEUED: "QUEUED",
        W.RUNNING: "RUNNING",
        W.ENDED: "COMPLETE",
    }.get(state, "RECEIVING")
    kinds = [type(each) for each in replies[1:]]
    ending = [m.JobResults, m.JobState, m.JobComplete]
    assert kinds == (ending if state is W.ENDED else [])


def test_a_client_that_comes_back_is_told_of_a_refusal() -> None:
    job = workers.job_at("channel", W.ADMITTING)
    job.connection_lost(0.0)
    job.attached(0, 0.0)
    job.rejected("disk full")
    [refusal] = workers.sent(workers.drain(job))
    for cancels in (False, True):
        other = clients.job_at("channel", C.RESUMING)
        if cancels:
            other.cancel("Ctrl-C", 0.0)
        other.receive_message(refusal, 0.0)
        outcome: client.Outcome = "cancelled" if cancels else "rejected"
        assert clients.drain(other)[-1] == client.JobEnded(outcome, "disk full")


def test_missed_lines_come_first_and_then_the_stages() -> None:
    job = workers.job_at("channel", W.RUNNING)
    job.output(0, "10%")
    job.connection_lost(0.0)
    job.output(0, "20%")
    job.output(1, "saved")
    job.stage_complete("training")
    workers.drain(job)
    job.attached(1, 0.0)
    assert workers.sent(workers.drain(job)) == [
        m.JobResumed(JOB, m.JobProgress("RUNNING")),
        m.JobLog(JOB, 1, 0, "20%"),
        m.JobLog(JOB, 2, 1, "saved"),
        m.TrainingComplete(),
    ]


def restored(progress: m.JobProgress) -> worker.WorkerJob:
    return worker.WorkerJob.restored(
        JOB,
        "channel",
        m.Submission(NAME, SIZE),
        progress,
        results={RESULT.path: RESULT.size},
        output_path="models",
    )


STOPPED = "the worker was stopped while the job ran"


@pytest.mark.parametrize(
    ("noted", "state", "then"),
    [
        (m.JobProgress("RECEIVING"), W.SUSPENDED, m.JobProgress("RECEIVING")),
        (m.JobProgress("QUEUED", 3), W.QUEUED, m.JobProgress("QUEUED")),
        (m.JobProgress("RUNNING"), W.ENDED, m.JobProgress("FAILED", 0, STOPPED)),
        *[
            (progress, W.ENDED, progress)
            for progress in (
                m.JobProgress("COMPLETE", 0, "2 files stay on the worker"),
                m.JobProgress("FAILED", 0, ""),
                m.JobProgress("FAILED", 0, "x" * 1024),
                m.JobProgress("CANCELLED", 0, "the owner said so"),
            )
        ],
        (
            m.JobProgress("CANCELLED"),
            W.ENDED,
            m.JobProgress("CANCELLED", 0, "cancelled"),
        ),
    ],
)
def test_a_restarted_worker_goes_on_with_what_it_noted(
    noted: m.JobProgress, state: worker.State, then: m.JobProgress
) -> None:
    job = restored(noted)
    outputs = workers.drain(job)
    assert workers.sent(outputs) == []
    enqueued = worker.Enqueue(JOB, "channel", NAME) in outputs
    assert enqueued == (noted.state == "QUEUED")
    assert (worker.Remember() in outputs) == (noted.state in ("QUEUED", "RUNNING"))
    assert (job.state, job.progress) == (state, then)
    job.attached(0, 0.0)
    replies = workers.sent(workers.drain(job))
    assert replies[0] == m.JobResumed(JOB, then)
    if state is W.ENDED:
        assert replies[1] == m.JobResults(JOB, m.ResultPage((RESULT,)))
        if then.state == "COMPLETE":
            assert replies[-1] == m.JobComplete(JOB, "models")
        else:
            assert replies[-1] == m.JobFailed(JOB, then.detail)


# ------------------------------------------------------ both, and links that come back

EVERY_MOMENT = pytest.mark.parametrize("moment", MOMENTS)
EVERY_MOUNT = pytest.mark.parametrize("mount", ["same", "other", "none"])
LAGS = (0.0, 3.0, 1000.0)


@EVERY_MOMENT
@EVERY_MOUNT
def test_a_lost_link_at_any_moment_costs_nothing(mount: Mount, moment: float) -> None:
    for lag in LAGS:
        for back_after in (0.0, 2.0, 100.0):
            scenario = Scenario(
                mount=mount, lose_at=(moment,), back_after=back_after, worker_lag=lag
            )
            world = World(scenario).run()
            check_peace(world)
            assert world.ended.outcome == "complete"
            assert len(world.enqueued) == world.runs == 1


@EVERY_MOMENT
@EVERY_MOUNT
def test_so_do_two_of_them(mount: Mount, moment: float) -> None:
    # The client needs 4 s from the first loss until it has resumed.
    for after in (2.5, 3.5, 4.5, 5.5, 9.5):
        for lag in LAGS:
            scenario = Scenario(
                mount=mount, lose_at=(moment, moment + after), worker_lag=lag
            )
            world = World(scenario).run()
            check_peace(world)
            assert world.ended.outcome == "complete"
            assert world.runs == 1


@EVERY_MOMENT
@EVERY_MOUNT
def test_a_client_may_give_up_at_any_moment(mount: Mount, moment: float) -> None:
    world = World(Scenario(mount=mount, lose_at=(moment,), back_after=None)).run()
    check_peace(world)
    assert world.ended.outcome in ("lost", "complete")


@EVERY_MOMENT
@EVERY_MOUNT
def test_a_job_may_be_cancelled_while_its_client_is_away(
    mount: Mount, moment: float
) -> None:
    for later in (1.5, 2.5, 4.5):
        scenario = Scenario(mount=mount, lose_at=(moment,), cancel_at=moment + later)
        world = World(scenario).run()
        check_peace(world)
        assert world.ended.outcome in ("cancelled", "complete")


@EVERY_MOMENT
@EVERY_MOUNT
def test_a_worker_may_be_restarted_at_any_moment(mount: Mount, moment: float) -> None:
    world = World(Scenario(mount=mount, restart_worker_at=(moment,))).run()
    check_peace(world)
    ran = any(state is W.RUNNING for state in world.disturbed)
    assert world.ended.outcome == ("failed" if ran else "complete")
    assert world.runs == 1


@EVERY_MOMENT
@EVERY_MOUNT
def test_a_client_may_be_restarted_at_any_moment(mount: Mount, moment: float) -> None:
    for lag in LAGS:
        scenario = Scenario(mount=mount, restart_client_at=(moment,), worker_lag=lag)
        world = World(scenario).run()
        check_peace(world)
        assert world.ended.outcome == "complete"
        assert len(world.enqueued) == world.runs == 1


def test_these_moments_cover_every_state() -> None:
    disturbed: set[client.State | worker.State] = set()
    for scenario in (
        Scenario(),
        Scenario(mount="none"),
        Scenario(fails=frozenset({"input"})),
    ):
        for moment in MOMENTS:
            for after in (0.0, 1.5, 3.5):
                moments = (moment, moment + after)
                world = World(msgspec.structs.replace(scenario, lose_at=moments)).run()
                disturbed.update(world.disturbed)
    assert {*client.State, *worker.State} - disturbed == {
        C.IDLE,
        C.CANCELLING,
        W.IDENTIFIED,  # the path comes with the identity
    }
