from collections.abc import Callable

import pytest

from sleap_rtc.proto import messages as m
from sleap_rtc.proto.errors import LocalProtocolError, RemoteProtocolError
from sleap_rtc.proto.job.client import (
    CANCEL_TIMEOUT,
    EXPECTED,
    PACKAGE_TRANSFER_ID,
    PROBE_TIMEOUT,
    REPLY_TIMEOUT,
    ClientJob,
    CopyPackage,
    DiscardShared,
    FetchResults,
    JobEnded,
    LinePrinted,
    Output,
    PrepareShared,
    RouteChosen,
    SendMessage,
    SendPackage,
    StageComplete,
    State,
    StateChanged,
    StopSending,
)
from sleap_rtc.proto.route.routes import RoutePreference
from tests.proto.job.examples import (
    CONTENT,
    EXAMPLES,
    JOB,
    NAME,
    OTHER_JOB,
    RESULT,
    SIZE,
    snapshot,
)

PROBE = f"jobs/{JOB}/.probe"
PACKAGE = f"jobs/{JOB}/{NAME}"

Input = Callable[[ClientJob], None]


def receive(message: m.Message) -> Input:
    return lambda job: job.receive_message(message, 0.0)


def submit(preference: RoutePreference, roots: bool) -> Input:
    return lambda job: job.submit(preference, 0.0, client_root=roots, worker_root=roots)


TO_THE_END: list[tuple[State, Input]] = [
    (State.WAITING, receive(EXAMPLES[m.JobResults])),
    (State.FETCHING, receive(EXAMPLES[m.JobComplete])),
    (State.ENDED, lambda job: job.results_fetched()),
]

STEPS: dict[str, list[tuple[State, Input]]] = {
    "shared": [
        (State.PREPARING, submit("auto", True)),
        (State.PROBING, lambda job: job.probe_written(PROBE, CONTENT, 0.0)),
        (State.COPYING, receive(m.MountProbed(JOB, CONTENT))),
        (State.CHECKING_INPUT, lambda job: job.package_copied(PACKAGE, 0.0)),
        (State.CHECKING_OUTPUT, receive(m.PathValidated("input"))),
        (State.WAITING, receive(m.PathValidated("output"))),
        *TO_THE_END,
    ],
    "channel": [
        (State.SUBMITTING, submit("auto", False)),
        (State.SENDING, receive(m.JobAccepted(JOB))),
        (State.WAITING, lambda job: job.package_sent()),
        *TO_THE_END,
    ],
}
STEPS["required"] = [
    (State.PREPARING, submit("shared", True)),
    *STEPS["shared"][1:],
]

# Every state, once for each route by which it can be reached.
PLACES: list[tuple[str, State]] = [
    ("shared", State.IDLE),
    *[
        (route, state)
        for route in ("shared", "channel")
        for state in dict.fromkeys(state for state, _ in STEPS[route])
    ],
    ("shared", State.CANCELLING),
    ("channel", State.CANCELLING),
    ("shared", State.RESUMING),
    ("channel", State.RESUMING),
]


def job_at(route: str, state: State) -> ClientJob:
    """A job that came to a state by real inputs; its outputs are drained."""
    job = ClientJob(JOB, NAME, SIZE)
    goal = State.WAITING if state in (State.CANCELLING, State.RESUMING) else state
    for reached, step in STEPS[route]:
        if job.state is goal:
            break
        step(job)
        assert job.state is reached
    if state is State.CANCELLING:
        job.cancel("Ctrl-C", 0.0)
    elif state is State.RESUMING:
        job.connection_lost("no answer", 0.0)
        job.link_restored(0.0)
    assert job.state is state
    drain(job)
    return job


def drain(job: ClientJob) -> list[Output]:
    outputs: list[Output] = []
    while (output := job.next_output()) is not None:
        outputs.append(output)
    return outputs


def sent(outputs: list[Output]) -> list[m.Message]:
    return [each.message for each in outputs if isinstance(each, SendMessage)]


def test_every_state_can_be_reached() -> None:
    assert {state for _, state in PLACES} == set(State) == set(EXPECTED)
    assert set(EXAMPLES) == {*m.TABLE.values(), m.Unknown}


# --------------------------------------------------------- every state x every message

_STOPPED = {
    State.PROBING: State.ENDED,
    State.COPYING: State.ENDED,
    State.CHECKING_INPUT: State.ENDED,
    State.CHECKING_OUTPUT: State.ENDED,
    State.SUBMITTING: State.ENDED,
    State.SENDING: State.ENDED,
    State.WAITING: State.ENDED,
    State.CANCELLING: State.ENDED,
    State.RESUMING: State.ENDED,
}
_RUNNING = {
    State.WAITING: State.WAITING,
    State.CANCELLING: State.CANCELLING,
}

# Where a message belongs, and the state after it. Everywhere else it is an error.
LEGAL: dict[type[m.Message], dict[State, State]] = {
    m.MountProbed: {State.PROBING: State.COPYING},
    m.MountProbeFailed: {State.PROBING: State.SUBMITTING},
    m.PathValidated: {State.CHECKING_INPUT: State.CHECKING_OUTPUT},
    m.PathError: {
        State.CHECKING_INPUT: State.SUBMITTING,
        State.CHECKING_OUTPUT: State.SUBMITTING,
    },
    m.JobAccepted: {
        State.SUBMITTING: State.SENDING,
        State.CANCELLING: State.CANCELLING,
    },
    m.JobRejected: {
        State.SUBMITTING: State.ENDED,
        State.CANCELLING: State.ENDED,
        State.RESUMING: State.ENDED,
    },
    m.JobResumed: {State.RESUMING: State.WAITING},
    m.JobUnknown: {State.RESUMING: State.CHECKING_INPUT},
    m.JobState: {
        **{state: state for state in _STOPPED},
        State.SENDING: State.WAITING,
    },
    m.JobFailed: _STOPPED,
    m.JobLog: _RUNNING,
    m.TrainingComplete: _RUNNING,
    m.InferenceComplete: _RUNNING,
    m.JobResults: _RUNNING,
    m.JobComplete: {State.WAITING: State.ENDED, State.CANCELLING: State.ENDED},
    m.Error: dict.fromkeys(State, State.ENDED),
    m.Unknown: {state: state for state in State},
}
_STALE = (m.MountProbed, m.MountProbeFailed, m.PathValidated, m.PathError)


@pytest.mark.parametrize("message", EXAMPLES.values(), ids=lambda x: type(x).__name__)
@pytest.mark.parametrize(("route", "state"), PLACES)
def test_every_message_in_every_state(
    route: str, state: State, message: m.Message
) -> None:
    job = job_at(route, state)
    before = snapshot(job)
    late = route == "channel" and isinstance(message, _STALE)
    if state is State.ENDED or isinstance(message, m.Unknown) or late:
        job.receive_message(message, 0.0)
        assert snapshot(job) == before
    elif state in LEGAL.get(type(message), {}):
        job.receive_message(message, 0.0)
        after = LEGAL[type(message)][state]
        if (type(message), route) == (m.JobUnknown, "channel"):
            after = State.ENDED  # the worker had the whole package
        assert job.state is after
    else:
        with pytest.raises(RemoteProtocolError, match="expected while"):
            job.receive_message(message, 0.0)
        assert snapshot(job) == before


@pytest.mark.parametrize(("route", "state"), PLACES)
def test_the_table_lists_what_each_state_takes(route: str, state: State) -> None:
    everywhere = {m.Error, m.Unknown}
    belongs = {kind for kind in LEGAL if state in LEGAL[kind]} - everywhere
    if state is State.CHECKING_OUTPUT:
        belongs.add(m.PathValidated)  # the example says "input"
    assert EXPECTED[state] == belongs


@pytest.mark.parametrize(("route", "state"), PLACES)
def test_a_message_of_another_job_is_an_error(route: str, state: State) -> None:
    for kind in EXPECTED[state]:
        if not hasattr(EXAMPLES[kind], "job_id"):
            continue
        job = job_at(route, state)
        before = snapshot(job)
        other = kind(OTHER_JOB, *list_fields(EXAMPLES[kind])[1:])
        with pytest.raises(RemoteProtocolError, match="another job"):
            job.receive_message(other, 0.0)
        assert snapshot(job) == before


def list_fields(message: m.Message) -> list[object]:
    return [getattr(message, field) for field in message.__struct_fields__]


# ------------------------------------------------- every state x every command, report

INPUTS: dict[str, Input] = {
    "submit": submit("auto", True),
    "cancel": lambda job: job.cancel("Ctrl-C", 0.0),
    "probe_written": lambda job: job.probe_written(PROBE, CONTENT, 0.0),
    "package_copied": lambda job: job.package_copied(PACKAGE, 0.0),
    "shared_failed": lambda job: job.shared_failed("Disk full", 0.0),
    "package_sent": lambda job: job.package_sent(),
    "results_fetched": lambda job: job.results_fetched(),
    "transfer_failed": lambda job: job.transfer_failed("Disk full"),
    "resume": lambda job: job.resume(
        "auto", 0.0, client_root=True, worker_root=True, route="shared"
    ),
    "link_restored": lambda job: job.link_restored(0.0),
    "give_up": lambda job: job.give_up("the worker is gone"),
    "connection_lost": lambda job: job.connection_lost("no answer", 0.0),
    "early_timeout": lambda job: job.handle_timeout(1.0),
    "timeout": lambda job: job.handle_timeout(1000.0),
}

_OVER = {
    State.CANCELLING: State.CANCELLING,
    State.RESUMING: State.RESUMING,
    State.ENDED: State.ENDED,
}

# The state after an input; where none stands it is a LocalProtocolError.
AFTER: dict[str, dict[State, State]] = {
    "submit": {State.IDLE: State.PREPARING, State.ENDED: State.ENDED},
    "cancel": {
        **dict.fromkeys(State, State.ENDED),
        State.SUBMITTING: State.CANCELLING,
        State.SENDING: State.CANCELLING,
        State.WAITING: State.CANCELLING,
        State.CANCELLING: State.CANCELLING,
        State.RESUMING: State.RESUMING,  # it is cancelled once the worker answers
    },
    "probe_written": {State.PREPARING: State.PROBING, **_OVER},
    "package_copied": {State.COPYING: State.CHECKING_INPUT, **_OVER},
    "shared_failed": {
        State.PREPARING: State.SUBMITTING,
        State.COPYING: State.SUBMITTING,
        **_OVER,
    },
    "package_sent": {State.SENDING: State.WAITING, **_OVER},
    "results_fetched": {State.FETCHING: State.ENDED, **_OVER},
    "transfer_failed": {
        State.SENDING: State.ENDED,
        State.FETCHING: State.ENDED,
        **_OVER,
    },
    "resume": {State.IDLE: State.RESUMING, State.ENDED: State.ENDED},
    "link_restored": {State.ENDED: State.ENDED},
    "give_up": {State.ENDED: State.ENDED},
    "connection_lost": {state: state for state in State},
    "early_timeout": {state: state for state in State},
    "timeout": {
        **{state: state for state in State},
        State.PROBING: State.SUBMITTING,
        State.CHECKING_INPUT: State.SUBMITTING,
        State.CHECKING_OUTPUT: State.SUBMITTING,
        State.SUBMITTING: State.ENDED,
        State.CANCELLING: State.ENDED,
        State.RESUMING: State.ENDED,
    },
}
_SAME_STATE = {("cancel", State.RESUMING)} | {
    ("connection_lost", state) for state in State if state is not State.ENDED
}
"""These change something else than the state."""


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize(("route", "state"), PLACES)
def test_every_input_in_every_state(route: str, state: State, name: str) -> None:
    job = job_at(route, state)
    before = snapshot(job)
    after = AFTER[name].get(state)
    if after is None:
        with pytest.raises(LocalProtocolError):
            INPUTS[name](job)
        after = state
    else:
        INPUTS[name](job)
    assert job.state is after
    if after is state and (name, state) not in _SAME_STATE:
        assert snapshot(job) == before


@pytest.mark.parametrize("ending", ["cancel", "error", "give_up"])
@pytest.mark.parametrize(("route", "state"), PLACES)
def test_an_end_stops_what_is_under_way(route: str, state: State, ending: str) -> None:
    job = job_at(route, state)
    if ending == "error":
        job.receive_message(m.Error("shutting down"), 0.0)
    elif ending == "give_up" and (route, state) != ("shared", State.FETCHING):
        job.connection_lost("no answer", 0.0)
        job.give_up("no answer")
    else:
        job.cancel("Ctrl-C", 0.0)
    outputs = drain(job)
    if ending == "error" and state is not State.ENDED:
        reason = "the worker ended the connection: shutting down"
        assert outputs[-1] == JobEnded("lost", reason)
    shared = state in list(State)[1:6]
    assert (DiscardShared(JOB) in outputs) == shared
    transferring = state in (State.SENDING, State.FETCHING)
    assert (StopSending() in outputs) == transferring
    if job.state is State.ENDED and state is not State.ENDED:
        assert isinstance(outputs[-1], JobEnded)
    for report in list(INPUTS)[2:8]:
        if job.state in (State.ENDED, State.CANCELLING):
            INPUTS[report](job)
            assert drain(job) == []


@pytest.mark.parametrize(("route", "state"), PLACES)
def test_only_what_waits_for_the_worker_has_a_deadline(
    route: str, state: State
) -> None:
    seconds = {
        State.PROBING: PROBE_TIMEOUT,
        State.CHECKING_INPUT: REPLY_TIMEOUT,
        State.CHECKING_OUTPUT: REPLY_TIMEOUT,
        State.SUBMITTING: REPLY_TIMEOUT,
        State.CANCELLING: CANCEL_TIMEOUT,
        State.RESUMING: REPLY_TIMEOUT,
    }
    job = job_at(route, state)
    deadline = job.deadline()
    assert deadline == seconds.get(state)
    if deadline is not None:
        job.handle_timeout(deadline)
        assert job.state is AFTER["timeout"][state]
        assert job.deadline() != deadline or job.state is State.SUBMITTING


# ----------------------------------------------------------------------- whole stories


def test_the_shared_route_from_start_to_results() -> None:
    job = ClientJob(JOB, NAME, SIZE)
    seen: list[Output] = []
    for _, step in STEPS["shared"]:
        step(job)
        seen += drain(job)
    assert seen == [
        PrepareShared(JOB),
        SendMessage(m.MountProbe(JOB, PROBE)),
        RouteChosen("shared", "both sides see the same storage"),
        CopyPackage(PACKAGE),
        SendMessage(m.JobIdentity(JOB)),
        SendMessage(m.SharedInputPath(PACKAGE)),
        SendMessage(m.SharedOutputPath(f"jobs/{JOB}/models")),
        SendMessage(m.SharedStorageJob()),
        FetchResults(JOB, "shared", (RESULT,)),
        SendMessage(m.ResultsReceived(JOB)),
        JobEnded("complete", path="models"),
    ]


def test_the_channel_route_from_start_to_results() -> None:
    job = ClientJob(JOB, NAME, SIZE)
    seen: list[Output] = []
    for _, step in STEPS["channel"]:
        step(job)
        seen += drain(job)
    assert seen == [
        RouteChosen("channel", "Shared storage not configured, will use RTC transfer"),
        SendMessage(m.JobSubmit(JOB, m.Submission(NAME, SIZE))),
        SendPackage(PACKAGE_TRANSFER_ID),
        FetchResults(JOB, "channel", (RESULT,)),
        SendMessage(m.ResultsReceived(JOB)),
        JobEnded("complete", path="models"),
    ]


FALLBACKS: list[tuple[State, Input, str]] = [
    (State.PREPARING, INPUTS["shared_failed"], "Disk full"),
    (State.PROBING, receive(m.MountProbed(JOB, "cd" * 32)), "mounts other storage"),
    (State.PROBING, receive(EXAMPLES[m.MountProbeFailed]), "not there"),
    (State.PROBING, INPUTS["timeout"], "did not find the probe file in time"),
    (State.COPYING, INPUTS["shared_failed"], "Disk full"),
    (State.CHECKING_INPUT, receive(EXAMPLES[m.PathError]), "not there"),
    (State.CHECKING_INPUT, INPUTS["timeout"], "did not check the paths in time"),
    (State.CHECKING_OUTPUT, receive(EXAMPLES[m.PathError]), "not there"),
    (State.CHECKING_OUTPUT, INPUTS["timeout"], "did not check the paths in time"),
]


@pytest.mark.parametrize(("state", "trouble", "why"), FALLBACKS)
def test_trouble_with_the_shared_route_falls_back_and_tells_why(
    state: State, trouble: Input, why: str
) -> None:
    job = job_at("shared", state)
    trouble(job)
    discard, chosen, submission = drain(job)
    assert discard == DiscardShared(JOB)
    assert isinstance(chosen, RouteChosen)
    assert chosen.route == job.route == "channel"
    assert why in chosen.reason
    assert submission == SendMessage(m.JobSubmit(JOB, m.Submission(NAME, SIZE)))


@pytest.mark.parametrize(("state", "trouble", "why"), FALLBACKS)
def test_trouble_with_a_required_shared_route_is_the_end(
    state: State, trouble: Input, why: str
) -> None:
    job = job_at("required", state)
    trouble(job)
    discard, ended = drain(job)
    assert discard == DiscardShared(JOB)
    assert isinstance(ended, JobEnded)
    assert ended.outcome == "transfer_failed"
    assert why in ended.reason


def test_a_required_shared_route_without_roots_ends_at_once() -> None:
    job = ClientJob(JOB, NAME, SIZE)
    submit("shared", False)(job)
    [ended] = drain(job)
    assert isinstance(ended, JobEnded)
    assert ended.outcome == "transfer_failed"


@pytest.mark.parametrize("state", [State.CHECKING_INPUT, State.CHECKING_OUTPUT])
def test_the_answer_about_the_other_path_is_an_error(state: State) -> None:
    job = job_at("shared", state)
    other = m.PathValidated("output" if state is State.CHECKING_INPUT else "input")
    with pytest.raises(RemoteProtocolError, match=f"PATH_VALIDATED::{other.which}"):
        job.receive_message(other, 0.0)
    assert job.state is state


def test_what_the_worker_tells_is_shown() -> None:
    job = job_at("channel", State.WAITING)
    for kind in (m.JobState, m.JobLog, m.TrainingComplete, m.InferenceComplete):
        job.receive_message(EXAMPLES[kind], 0.0)
    assert drain(job) == [
        StateChanged(m.JobProgress("RUNNING")),
        LinePrinted(0, "epoch 1"),
        StageComplete("training"),
        StageComplete("inference"),
    ]


@pytest.mark.parametrize("route", ["shared", "channel"])
def test_the_results_of_a_failed_job_are_fetched(route: str) -> None:
    job = job_at(route, State.WAITING)
    job.receive_message(EXAMPLES[m.JobResults], 0.0)
    job.receive_message(EXAMPLES[m.JobFailed], 0.0)
    [fetch] = drain(job)
    assert isinstance(fetch, FetchResults)
    job.results_fetched()
    assert drain(job)[-1] == JobEnded("failed", "exit status 1")


def test_the_results_of_a_cancelled_job_are_fetched() -> None:
    job = job_at("channel", State.CANCELLING)
    job.receive_message(EXAMPLES[m.JobResults], 0.0)
    job.receive_message(EXAMPLES[m.JobFailed], 0.0)
    assert job.state is State.FETCHING
    job.results_fetched()
    assert drain(job)[-1] == JobEnded("cancelled", "Ctrl-C")


def test_a_job_that_completes_while_it_is_cancelled_is_complete() -> None:
    job = job_at("channel", State.CANCELLING)
    job.receive_message(EXAMPLES[m.JobComplete], 0.0)
    assert drain(job) == [
        SendMessage(m.ResultsReceived(JOB)),
        JobEnded("complete", path="models"),
    ]


def test_a_silent_worker_does_not_hold_up_a_cancellation() -> None:
    job = job_at("channel", State.CANCELLING)
    job.receive_message(EXAMPLES[m.JobLog], 10.0)
    job.handle_timeout(CANCEL_TIMEOUT)
    ending = JobEnded("cancelled", "the worker is silent", confirmed=False)
    assert drain(job)[-1] == ending
    assert ending.can_be_resumed


@pytest.mark.parametrize("answer", [m.JobRejected, m.JobFailed])
def test_the_text_of_a_worker_does_not_undo_a_cancellation(
    answer: type[m.JobRejected] | type[m.JobFailed],
) -> None:
    job = job_at("channel", State.CANCELLING)
    job.receive_message(answer(JOB, "disk full; the worker was not told"), 0.0)
    ending = drain(job)[-1]
    assert isinstance(ending, JobEnded)
    assert (ending.outcome, ending.confirmed) == ("cancelled", True)
    assert not ending.can_be_resumed


def test_a_second_cancellation_ends_the_fetching_too() -> None:
    job = job_at("channel", State.CANCELLING)
    job.receive_message(EXAMPLES[m.JobResults], 0.0)
    job.receive_message(EXAMPLES[m.JobFailed], 0.0)
    drain(job)
    job.cancel("Ctrl-C again", 1.0)
    assert drain(job) == [StopSending(), JobEnded("cancelled", "Ctrl-C")]


# --------------------------------------------------------- messages that cross reports


def test_a_failed_package_stops_its_sender() -> None:
    # The worker says FAILED in a JobState before it sends JobFailed.
    job = job_at("channel", State.SENDING)
    job.receive_message(m.JobState(JOB, m.JobProgress("FAILED")), 0.0)
    assert job.state is State.SENDING
    job.receive_message(EXAMPLES[m.JobFailed], 0.0)
    assert drain(job)[1:] == [
        StopSending(),
        SendMessage(m.ResultsReceived(JOB)),
        JobEnded("failed", "exit status 1"),
    ]


@pytest.mark.parametrize("report", ["package_sent", "transfer_failed"])
def test_a_worker_may_be_quicker_than_the_report_of_the_sender(report: str) -> None:
    job = job_at("channel", State.SENDING)
    job.receive_message(EXAMPLES[m.JobState], 0.0)
    assert job.state is State.WAITING
    drain(job)
    INPUTS[report](job)
    assert (job.state, drain(job)) == (State.WAITING, [])
    with pytest.raises(LocalProtocolError):
        INPUTS[report](job)


@pytest.mark.parametrize("kind", [m.JobComplete, m.JobFailed])
def test_a_worker_that_ends_the_job_too_early_stops_the_sender(
    kind: type[m.Message],
) -> None:
    job = job_at("channel", State.SENDING)
    job.receive_message(EXAMPLES[m.JobState], 0.0)
    job.receive_message(EXAMPLES[m.JobResults], 0.0)
    job.receive_message(EXAMPLES[kind], 0.0)
    stop, fetch = drain(job)[1:]
    assert stop == StopSending()
    assert isinstance(fetch, FetchResults)
    job.package_sent()
    assert drain(job) == []
    job.results_fetched()
    assert isinstance(drain(job)[-1], JobEnded)


# -------------------------------------------------------------------- a hostile worker


def page(count: int, length: int) -> m.JobResults:
    files = tuple(m.ResultFile("x" * length, 1) for _ in range(count))
    return m.JobResults(JOB, m.ResultPage(files, last=False))


@pytest.mark.parametrize(
    ("each", "fits"),
    [
        (page(200, 20), m.MAX_RESULT_FILES // 200),
        (page(10, 4096), m.MAX_RESULT_PATHS // 40960),
    ],
)
def test_a_worker_can_not_fill_the_memory_with_results(
    each: m.JobResults, fits: int
) -> None:
    job = job_at("channel", State.WAITING)
    for _ in range(fits):
        job.receive_message(each, 0.0)
    before = snapshot(job)
    with pytest.raises(RemoteProtocolError, match="result files"):
        job.receive_message(each, 0.0)
    assert snapshot(job) == before
