"""A client's job, from the choice of a route to the results."""

from collections.abc import Callable
from typing import get_args

import msgspec
import pytest

from sleap_rtc.proto import messages
from sleap_rtc.proto.errors import LocalProtocolError, RemoteProtocolError
from sleap_rtc.proto.job.client import (
    CANCEL_TIMEOUT,
    PACKAGE_TRANSFER_ID,
    REPLY_TIMEOUT,
    ClientJob,
)
from sleap_rtc.proto.job.client_outputs import (
    CopyPackage,
    DiscardShared,
    FetchResults,
    JobEnded,
    Output,
    PrepareShared,
    Reconnect,
    RouteChosen,
    SendMessage,
    SendPackage,
    StopTransfer,
)
from sleap_rtc.proto.job.client_table import ClientState
from sleap_rtc.proto.job.reports import LinePrinted, StageComplete, StateChanged
from sleap_rtc.proto.job.route_plan import RoutePlan
from sleap_rtc.proto.job.shared_route import PATH_TIMEOUT, PROBE_TIMEOUT, SharedAnswer
from sleap_rtc.proto.route.routes import RoutePreference
from tests.proto.job.examples import (
    CONTENT,
    EXAMPLES,
    JOB,
    NAME,
    OTHER_JOB,
    RESULT,
    SIZE,
    drain,
    snapshot,
)

PROBE = f"jobs/{JOB}/mount-probe"
PACKAGE = f"jobs/{JOB}/{NAME}"

Input = Callable[[ClientJob], None]


def receive(message: messages.Message, now: float = 0.0) -> Input:
    assert isinstance(message, messages.WorkerJobMessage)
    return lambda job: job.receive_message(message, now)


def submit(preference: RoutePreference, roots: bool) -> Input:
    return lambda job: job.submit(RoutePlan(preference, roots, roots), 0.0)


def send(*parts: messages.ClientJobMessage) -> list[Output]:
    return [SendMessage(each) for each in parts]


CANCEL = send(messages.JobCancel(JOB))
RESULTS_RECEIVED = send(messages.ResultsReceived(JOB))
RESUME = send(messages.JobResume(JOB, messages.ResumePoint()))
SUBMIT = send(messages.JobSubmit(JOB, messages.Submission(NAME, SIZE)))
ANNOUNCE = send(messages.JobIdentity(JOB), messages.SharedInputPath(PACKAGE))
CHANNEL = RouteChosen("channel", "Disk full; falling back to RTC transfer")

Step = tuple[str, Input, list[Output]]

TO_THE_END: dict[str, list[Step]] = {
    route: [
        ("listed", receive(EXAMPLES[messages.JobResults]), []),
        (
            "fetching",
            receive(EXAMPLES[messages.JobComplete]),
            [FetchResults(JOB, route, (RESULT,))],
        ),
        (
            "ended",
            lambda job: job.results_fetched(),
            [*RESULTS_RECEIVED, JobEnded("complete", path="models")],
        ),
    ]
    for route in get_args(messages.Route)
}

# Each step with a name for the place that it leads to, and with its outputs.
GOLDEN: dict[str, list[Step]] = {
    "shared": [
        ("preparing", submit("auto", True), [PrepareShared(JOB)]),
        (
            "probing",
            lambda job: job.probe_written(PROBE, CONTENT, 0.0),
            send(messages.MountProbe(JOB, PROBE)),
        ),
        (
            "copying",
            receive(messages.MountProbed(JOB, CONTENT)),
            [
                RouteChosen("shared", "both sides see the same storage"),
                CopyPackage(PACKAGE),
            ],
        ),
        (
            "checking input",
            lambda job: job.package_copied(PACKAGE, 0.0),
            ANNOUNCE,
        ),
        (
            "checking output",
            receive(messages.PathValidated("input")),
            send(messages.SharedOutputPath(f"jobs/{JOB}/models")),
        ),
        (
            "waiting",
            receive(messages.PathValidated("output")),
            send(messages.SharedStorageJob()),
        ),
        *TO_THE_END["shared"],
    ],
    "channel": [
        (
            "submitting",
            submit("channel", False),
            [RouteChosen("channel", "the channel route was asked for"), *SUBMIT],
        ),
        (
            "sending",
            receive(EXAMPLES[messages.JobAccepted]),
            [SendPackage(PACKAGE_TRANSFER_ID)],
        ),
        ("waiting", lambda job: job.package_sent(), []),
        *TO_THE_END["channel"],
    ],
}
GOLDEN["required"] = [
    ("preparing", submit("shared", True), [PrepareShared(JOB)]),
    *GOLDEN["shared"][1:],
]

ASIDE: dict[str, tuple[str, list[Input]]] = {
    "cancelling": ("waiting", [lambda job: job.cancel("Ctrl-C", 0.0)]),
    "resuming": (
        "waiting",
        [
            lambda job: job.connection_lost("no answer", 0.0),
            lambda job: job.connection_restored(0.0),
        ],
    ),
}
"""Places beside the golden paths: the place before, and the inputs that follow it."""

REACHED: dict[str, ClientState] = {
    "idle": ClientState.IDLE,
    "preparing": ClientState.SHARING,
    "probing": ClientState.SHARING,
    "copying": ClientState.SHARING,
    "checking input": ClientState.SHARING,
    "checking output": ClientState.SHARING,
    "submitting": ClientState.SUBMITTING,
    "sending": ClientState.SENDING,
    "waiting": ClientState.WAITING,
    "listed": ClientState.WAITING,
    "cancelling": ClientState.CANCELLING,
    "fetching": ClientState.FETCHING,
    "resuming": ClientState.RESUMING,
    "ended": ClientState.ENDED,
}
"""The state in each place, written by hand so that a wrong cell of the table shows."""

PLACES: list[tuple[str, str]] = [
    ("shared", "idle"),
    *[(route, name) for route in ("shared", "channel") for name, _, _ in GOLDEN[route]],
    *[(route, name) for route in ("shared", "channel") for name in ASIDE],
]
EVERY_PLACE = pytest.mark.parametrize(("route", "place"), PLACES)
SHARING = ("preparing", "probing", "copying", "checking input", "checking output")


def job_at(route: str, place: str) -> ClientJob:
    """Return a job that came to a place by real inputs; its outputs are drained."""
    job = ClientJob(JOB, NAME, SIZE)
    goal, aside = ASIDE.get(place, (place, []))
    steps = [] if place == "idle" else GOLDEN[route]
    for name, step, _ in steps:
        step(job)
        if name == goal:
            break
    for step in aside:
        step(job)
    drain(job)
    return job


@pytest.mark.parametrize("route", GOLDEN)
def test_a_golden_path(route: str) -> None:
    job = ClientJob(JOB, NAME, SIZE)
    for name, step, outputs in GOLDEN[route]:
        step(job)
        assert (name, drain(job)) == (name, outputs)
        assert (name, job.state) == (name, REACHED[name])


def test_every_state_is_tried() -> None:
    for route, place in PLACES:
        assert (place, job_at(route, place).state) == (place, REACHED[place])
    assert {REACHED[place] for _, place in PLACES} == set(ClientState)


# --------------------------------------------------------- every place x every message

FAILED: list[Output] = [*RESULTS_RECEIVED, JobEnded("failed", "exit status 1")]

# The messages that each state expects, besides those about shared storage, and the
# state that follows if no results were listed.
EXPECTED: dict[ClientState, dict[type[messages.Message], ClientState]] = {
    ClientState.IDLE: {},
    ClientState.SHARING: {
        messages.JobState: ClientState.SHARING,
        messages.JobFailed: ClientState.ENDED,
    },
    ClientState.SUBMITTING: {
        messages.JobState: ClientState.SUBMITTING,
        messages.JobAccepted: ClientState.SENDING,
        messages.JobRejected: ClientState.ENDED,
        messages.JobFailed: ClientState.ENDED,
    },
    ClientState.SENDING: {
        messages.JobState: ClientState.WAITING,  # it says that the job runs
        messages.JobFailed: ClientState.ENDED,
    },
    ClientState.WAITING: {
        messages.JobState: ClientState.WAITING,
        messages.JobLog: ClientState.WAITING,
        messages.TrainingComplete: ClientState.WAITING,
        messages.InferenceComplete: ClientState.WAITING,
        messages.JobResults: ClientState.WAITING,
        messages.JobComplete: ClientState.ENDED,
        messages.JobFailed: ClientState.ENDED,
    },
    ClientState.CANCELLING: {
        messages.JobState: ClientState.CANCELLING,
        messages.JobLog: ClientState.CANCELLING,
        messages.TrainingComplete: ClientState.CANCELLING,
        messages.InferenceComplete: ClientState.CANCELLING,
        messages.JobResults: ClientState.CANCELLING,
        messages.JobAccepted: ClientState.CANCELLING,
        messages.JobRejected: ClientState.ENDED,
        messages.JobComplete: ClientState.ENDED,
        messages.JobFailed: ClientState.ENDED,
    },
    ClientState.FETCHING: {},
    ClientState.RESUMING: {
        messages.JobState: ClientState.RESUMING,
        messages.JobRejected: ClientState.ENDED,
        messages.JobFailed: ClientState.ENDED,
        messages.ResumeAccepted: ClientState.WAITING,
        messages.JobUnknown: ClientState.SHARING,  # the start was lost
    },
}

# The outputs for each message in the places where it is expected; "" is for all places
# that are not named.
ANSWERS: dict[type[messages.Message], dict[str, list[Output]]] = {
    messages.JobState: {"": [StateChanged(messages.JobProgress("RUNNING"))]},
    messages.JobLog: {"": [LinePrinted(0, "epoch 1")]},
    messages.TrainingComplete: {"": [StageComplete("training")]},
    messages.InferenceComplete: {"": [StageComplete("inference")]},
    messages.JobResults: {"": []},
    messages.JobAccepted: {"submitting": [SendPackage(0)], "cancelling": []},
    messages.JobRejected: {
        "": [JobEnded("rejected", "disk full")],
        "cancelling": [JobEnded("cancelled", "disk full")],
    },
    messages.JobComplete: {
        "": [*RESULTS_RECEIVED, JobEnded("complete", path="models")],
        "listed": [FetchResults(JOB, "shared", (RESULT,))],
    },
    messages.JobFailed: {
        "": FAILED,
        **{place: [DiscardShared(JOB), *FAILED] for place in SHARING},
        "sending": [StopTransfer(), *FAILED],
        "listed": [FetchResults(JOB, "shared", (RESULT,))],
        "cancelling": [*RESULTS_RECEIVED, JobEnded("cancelled", "Ctrl-C")],
    },
    messages.ResumeAccepted: {"": [StateChanged(messages.JobProgress("RUNNING"))]},
    messages.JobUnknown: {"": ANNOUNCE},
}
JOB_MESSAGES = sorted(
    {*get_args(messages.WorkerJobMessage)} - {*get_args(SharedAnswer)},
    key=lambda kind: kind.__name__,
)


@pytest.mark.parametrize("kind", JOB_MESSAGES)
@EVERY_PLACE
def test_every_message_in_every_place(
    route: str, place: str, kind: type[messages.Message]
) -> None:
    job = job_at(route, place)
    before = snapshot(job)
    if place == "ended":
        receive(EXAMPLES[kind])(job)
        assert snapshot(job) == before
    elif kind not in EXPECTED[REACHED[place]]:
        with pytest.raises(RemoteProtocolError, match=f"{kind.__name__} is not expect"):
            receive(EXAMPLES[kind])(job)
        assert snapshot(job) == before
    else:
        receive(EXAMPLES[kind])(job)
        outputs = drain(job)
        if (kind, route) == (messages.JobUnknown, "channel"):
            reason = "the worker no longer has the job"
            assert outputs == [JobEnded("lost", reason)]
            assert job.state is ClientState.ENDED
            return
        if place == "listed" and kind in (messages.JobComplete, messages.JobFailed):
            assert job.state is ClientState.FETCHING
        else:
            assert job.state is EXPECTED[REACHED[place]][kind]
        answers = ANSWERS[kind]
        expected = answers[place] if place in answers else answers[""]
        assert outputs == [
            (
                msgspec.structs.replace(each, route=route)
                if isinstance(each, FetchResults)
                else each
            )
            for each in expected
        ]


@pytest.mark.parametrize("kind", get_args(SharedAnswer))
@EVERY_PLACE
def test_an_answer_about_shared_storage_is_ignored_once_the_channel_was_chosen(
    route: str, place: str, kind: type[messages.Message]
) -> None:
    job = job_at(route, place)
    before = snapshot(job)
    if place in SHARING:
        return  # test_shared_route.py tries these
    if route == "channel" or place == "ended":
        receive(EXAMPLES[kind])(job)
    else:
        with pytest.raises(RemoteProtocolError, match="is not expected in state"):
            receive(EXAMPLES[kind])(job)
    assert snapshot(job) == before


@EVERY_PLACE
def test_a_message_of_another_job_is_an_error(route: str, place: str) -> None:
    for kind in EXPECTED.get(REACHED[place], {}):
        if not issubclass(kind, messages.JobMessage):
            continue
        job = job_at(route, place)
        before = snapshot(job)
        other = msgspec.structs.replace(EXAMPLES[kind], job_id=OTHER_JOB)
        with pytest.raises(RemoteProtocolError, match="another job"):
            receive(other)(job)
        assert snapshot(job) == before


# ------------------------------------------------- every place x every command, report

Wanted = dict[str, list[Output]]
IGNORED: Wanted = {"cancelling": [], "resuming": [], "ended": []}
CANCELLED = JobEnded("cancelled", "Ctrl-C")
GIVEN_UP: list[Output] = [DiscardShared(JOB), CHANNEL, *SUBMIT]
FELL_SILENT = "The worker did not {}; falling back to RTC transfer"


def fallen_back(what: str) -> list[Output]:
    chosen = RouteChosen("channel", FELL_SILENT.format(what))
    return [DiscardShared(JOB), chosen, *SUBMIT]


# Each input with its outputs in the places where it is allowed; in the places that are
# not named it is a LocalProtocolError.
INPUTS: dict[str, tuple[Input, Wanted]] = {
    "submit": (submit("auto", True), {"idle": [PrepareShared(JOB)], "ended": []}),
    "resume": (
        lambda job: job.resume(RoutePlan("auto", True, True), 0.0, route="shared"),
        {"idle": RESUME, "ended": []},
    ),
    "cancel": (
        lambda job: job.cancel("Ctrl-C", 0.0),
        {
            "idle": [CANCELLED],
            **{place: [DiscardShared(JOB), CANCELLED] for place in SHARING},
            "submitting": CANCEL,
            "sending": [StopTransfer(), *CANCEL],
            "waiting": CANCEL,
            "listed": CANCEL,
            "fetching": [StopTransfer(), CANCELLED],
            **IGNORED,  # a job that is resumed is cancelled once the worker answers
        },
    ),
    "probe_written": (
        lambda job: job.probe_written(PROBE, CONTENT, 0.0),
        {"preparing": send(messages.MountProbe(JOB, PROBE)), **IGNORED},
    ),
    "package_copied": (
        lambda job: job.package_copied(PACKAGE, 0.0),
        {"copying": ANNOUNCE, **IGNORED},
    ),
    "shared_failed": (
        lambda job: job.shared_failed("Disk full", 0.0),
        {"preparing": GIVEN_UP, "copying": GIVEN_UP, **IGNORED},
    ),
    "package_sent": (
        lambda job: job.package_sent(),
        {"sending": [], "fetching": [], **IGNORED},
    ),
    "results_fetched": (
        lambda job: job.results_fetched(),
        {
            "fetching": [*RESULTS_RECEIVED, JobEnded("complete", path="models")],
            **IGNORED,
        },
    ),
    "transfer_failed": (
        lambda job: job.transfer_failed("Disk full"),
        {
            "sending": [*CANCEL, JobEnded("transfer_failed", "Disk full")],
            "fetching": [JobEnded("transfer_failed", "Disk full")],
            **IGNORED,
        },
    ),
    "connection_restored": (lambda job: job.connection_restored(0.0), {"ended": []}),
    "give_up": (lambda job: job.give_up("the worker is gone"), {"ended": []}),
    "connection_lost": (
        lambda job: job.connection_lost("no answer", 0.0),
        {
            **{place: [Reconnect("no answer")] for _, place in PLACES},
            "sending": [StopTransfer(), Reconnect("no answer")],
            "fetching": [StopTransfer(), Reconnect("no answer")],
            "ended": [],
        },
    ),
    "early_timeout": (
        lambda job: job.handle_timeout(1.0),
        {place: [] for _, place in PLACES},
    ),
    "timeout": (
        lambda job: job.handle_timeout(1000.0),
        {
            **{place: [] for _, place in PLACES},
            "probing": fallen_back("find the probe file in time"),
            "checking input": fallen_back("check the paths in time"),
            "checking output": fallen_back("check the paths in time"),
            "submitting": [
                *CANCEL,
                JobEnded("lost", "the worker did not answer for 30 s"),
            ],
            "cancelling": [
                JobEnded("cancelled", "the worker is silent", confirmed=False)
            ],
            "resuming": [JobEnded("lost", "the worker did not resume for 30 s")],
        },
    ),
}


REPORTS = (
    "probe_written",
    "package_copied",
    "shared_failed",
    "package_sent",
    "results_fetched",
    "transfer_failed",
)
"""Reports on effects, which may come late."""


# The state after each input that changes it.
CHANGED: dict[tuple[str, str], ClientState] = {
    ("idle", "submit"): ClientState.SHARING,
    ("idle", "resume"): ClientState.RESUMING,
    ("idle", "cancel"): ClientState.ENDED,
    **{(place, "cancel"): ClientState.ENDED for place in SHARING},
    ("submitting", "cancel"): ClientState.CANCELLING,
    ("sending", "cancel"): ClientState.CANCELLING,
    ("waiting", "cancel"): ClientState.CANCELLING,
    ("listed", "cancel"): ClientState.CANCELLING,
    ("fetching", "cancel"): ClientState.ENDED,
    ("preparing", "shared_failed"): ClientState.SUBMITTING,
    ("copying", "shared_failed"): ClientState.SUBMITTING,
    ("sending", "package_sent"): ClientState.WAITING,
    ("fetching", "results_fetched"): ClientState.ENDED,
    ("sending", "transfer_failed"): ClientState.ENDED,
    ("fetching", "transfer_failed"): ClientState.ENDED,
    ("probing", "timeout"): ClientState.SUBMITTING,
    ("checking input", "timeout"): ClientState.SUBMITTING,
    ("checking output", "timeout"): ClientState.SUBMITTING,
    ("submitting", "timeout"): ClientState.ENDED,
    ("cancelling", "timeout"): ClientState.ENDED,
    ("resuming", "timeout"): ClientState.ENDED,
}


@pytest.mark.parametrize("name", INPUTS)
@EVERY_PLACE
def test_every_input_in_every_place(route: str, place: str, name: str) -> None:
    job = job_at(route, place)
    before = snapshot(job)
    act, wanted = INPUTS[name]
    if (name, place, route) == ("connection_lost", "fetching", "shared"):
        act(job)
        assert drain(job) == []  # the results are copied without the worker
    elif place in wanted:
        act(job)
        assert drain(job) == wanted[place]
        assert job.state is CHANGED.get((place, name), REACHED[place])
    else:
        with pytest.raises(LocalProtocolError):
            act(job)
        assert snapshot(job) == before


@pytest.mark.parametrize("ending", ["cancel", "error", "give_up"])
@EVERY_PLACE
def test_an_end_stops_the_effect_under_way(route: str, place: str, ending: str) -> None:
    job = job_at(route, place)
    if ending == "error":
        job.receive_message(messages.Error("shutting down"), 0.0)
    elif ending == "give_up" and (route, place) != ("shared", "fetching"):
        job.connection_lost("no answer", 0.0)
        job.give_up("no answer")
    else:
        job.cancel("Ctrl-C", 0.0)
    outputs = drain(job)
    if ending != "cancel":
        assert job.state is ClientState.ENDED or place in ("cancelling", "fetching")
    if ending == "error" and place != "ended":
        reason = "the worker ended the connection: shutting down"
        assert outputs[-1] == JobEnded("lost", reason)
    assert (DiscardShared(JOB) in outputs) == (place in SHARING)
    assert (StopTransfer() in outputs) == (place in ("sending", "fetching"))
    if job.state is ClientState.ENDED and place != "ended":
        assert isinstance(outputs[-1], JobEnded)
    before = snapshot(job)
    for name in REPORTS:
        if job.state is not ClientState.RESUMING:
            INPUTS[name][0](job)
            assert snapshot(job) == before, name


@EVERY_PLACE
def test_only_a_question_to_the_worker_has_a_deadline(route: str, place: str) -> None:
    seconds = {
        "probing": PROBE_TIMEOUT,
        "checking input": PATH_TIMEOUT,
        "checking output": PATH_TIMEOUT,
        "submitting": REPLY_TIMEOUT,
        "cancelling": CANCEL_TIMEOUT,
        "resuming": REPLY_TIMEOUT,
    }
    assert job_at(route, place).deadline() == seconds.get(place)


# ----------------------------------------------------------------------- whole stories

FALLBACKS: list[tuple[str, Input, str]] = [
    ("preparing", INPUTS["shared_failed"][0], "Disk full"),
    ("probing", receive(messages.MountProbed(JOB, "cd" * 32)), "mounts other storage"),
    ("probing", receive(EXAMPLES[messages.MountProbeFailed]), "not there"),
    ("probing", INPUTS["timeout"][0], "did not find the probe file in time"),
    ("copying", INPUTS["shared_failed"][0], "Disk full"),
    ("checking input", receive(EXAMPLES[messages.PathError]), "not there"),
    ("checking input", INPUTS["timeout"][0], "did not check the paths in time"),
    ("checking output", receive(EXAMPLES[messages.PathError]), "not there"),
    ("checking output", INPUTS["timeout"][0], "did not check the paths in time"),
]


@pytest.mark.parametrize(("place", "trouble", "why"), FALLBACKS)
def test_trouble_with_the_shared_route_falls_back_for_a_reason(
    place: str, trouble: Input, why: str
) -> None:
    job = job_at("shared", place)
    trouble(job)
    discard, chosen, submission = drain(job)
    assert discard == DiscardShared(JOB)
    assert isinstance(chosen, RouteChosen)
    assert chosen.route == job.route == "channel"
    assert why in chosen.reason
    assert submission == SendMessage(
        messages.JobSubmit(JOB, messages.Submission(NAME, SIZE))
    )


@pytest.mark.parametrize(("place", "trouble", "why"), FALLBACKS)
def test_trouble_with_a_required_shared_route_is_the_end(
    place: str, trouble: Input, why: str
) -> None:
    job = job_at("required", place)
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


def test_reports_of_the_worker_become_events() -> None:
    job = job_at("channel", "waiting")
    for kind in (
        messages.JobState,
        messages.JobLog,
        messages.TrainingComplete,
        messages.InferenceComplete,
    ):
        receive(EXAMPLES[kind])(job)
    assert drain(job) == [
        StateChanged(messages.JobProgress("RUNNING")),
        LinePrinted(0, "epoch 1"),
        StageComplete("training"),
        StageComplete("inference"),
    ]


@pytest.mark.parametrize("route", ["shared", "channel"])
def test_the_results_of_a_failed_job_are_fetched(route: str) -> None:
    job = job_at(route, "waiting")
    receive(EXAMPLES[messages.JobResults])(job)
    receive(EXAMPLES[messages.JobFailed])(job)
    [fetch] = drain(job)
    assert isinstance(fetch, FetchResults)
    job.results_fetched()
    assert drain(job)[-1] == JobEnded("failed", "exit status 1")


def test_the_results_of_a_cancelled_job_are_fetched() -> None:
    job = job_at("channel", "cancelling")
    receive(EXAMPLES[messages.JobResults])(job)
    receive(EXAMPLES[messages.JobFailed])(job)
    assert job.state is ClientState.FETCHING
    job.results_fetched()
    assert drain(job)[-1] == JobEnded("cancelled", "Ctrl-C")


def test_the_results_of_a_job_that_completes_while_it_is_cancelled_are_fetched() -> (
    None
):
    job = job_at("channel", "cancelling")
    receive(EXAMPLES[messages.JobResults])(job)
    receive(EXAMPLES[messages.JobComplete])(job)
    assert drain(job) == [FetchResults(JOB, "channel", (RESULT,))]
    assert job.state is ClientState.FETCHING


def test_a_job_that_completes_while_it_is_cancelled_is_complete() -> None:
    job = job_at("channel", "cancelling")
    receive(EXAMPLES[messages.JobComplete])(job)
    assert drain(job) == [
        SendMessage(messages.ResultsReceived(JOB)),
        JobEnded("complete", path="models"),
    ]


def test_a_silent_worker_does_not_hold_up_a_cancellation() -> None:
    job = job_at("channel", "cancelling")
    receive(EXAMPLES[messages.JobLog], 10.0)(job)
    job.handle_timeout(CANCEL_TIMEOUT)
    ending = JobEnded("cancelled", "the worker is silent", confirmed=False)
    assert drain(job)[-1] == ending
    assert ending.can_be_resumed


@pytest.mark.parametrize("answer", [messages.JobRejected, messages.JobFailed])
def test_the_text_of_a_worker_does_not_undo_a_cancellation(
    answer: type[messages.JobRejected] | type[messages.JobFailed],
) -> None:
    job = job_at("channel", "cancelling")
    job.receive_message(answer(JOB, "disk full; the worker was not informed"), 0.0)
    ending = drain(job)[-1]
    assert isinstance(ending, JobEnded)
    assert (ending.outcome, ending.confirmed) == ("cancelled", True)
    assert not ending.can_be_resumed


def test_a_second_cancellation_ends_the_fetching() -> None:
    job = job_at("channel", "cancelling")
    receive(EXAMPLES[messages.JobResults])(job)
    receive(EXAMPLES[messages.JobFailed])(job)
    drain(job)
    job.cancel("Ctrl-C again", 1.0)
    assert drain(job) == [StopTransfer(), JobEnded("cancelled", "Ctrl-C")]


# --------------------------------------------------------- messages that cross reports


def test_a_failed_package_stops_its_sender() -> None:
    # The worker sends FAILED in a JobState before JobFailed.
    job = job_at("channel", "sending")
    job.receive_message(messages.JobState(JOB, messages.JobProgress("FAILED")), 0.0)
    assert job.state is ClientState.SENDING
    receive(EXAMPLES[messages.JobFailed])(job)
    assert drain(job)[1:] == [
        StopTransfer(),
        SendMessage(messages.ResultsReceived(JOB)),
        JobEnded("failed", "exit status 1"),
    ]


@pytest.mark.parametrize("report", ["package_sent", "transfer_failed"])
def test_a_worker_may_be_quicker_than_the_report_of_the_sender(report: str) -> None:
    job = job_at("channel", "sending")
    receive(EXAMPLES[messages.JobState])(job)
    assert job.state is ClientState.WAITING
    drain(job)
    INPUTS[report][0](job)
    assert (job.state, drain(job)) == (ClientState.WAITING, [])
    with pytest.raises(LocalProtocolError):
        INPUTS[report][0](job)


@pytest.mark.parametrize("kind", [messages.JobComplete, messages.JobFailed])
def test_a_worker_that_ends_the_job_too_early_stops_the_sender(
    kind: type[messages.Message],
) -> None:
    job = job_at("channel", "sending")
    receive(EXAMPLES[messages.JobState])(job)
    receive(EXAMPLES[messages.JobResults])(job)
    receive(EXAMPLES[kind])(job)
    stop, fetch = drain(job)[1:]
    assert stop == StopTransfer()
    assert isinstance(fetch, FetchResults)
    job.package_sent()
    assert drain(job) == []
    job.results_fetched()
    assert isinstance(drain(job)[-1], JobEnded)


# -------------------------------------------------------------------- a hostile worker


def page(count: int, length: int) -> messages.JobResults:
    files = tuple(messages.ResultFile("x" * length, 1) for _ in range(count))
    return messages.JobResults(JOB, messages.ResultPage(files, last=False))


@pytest.mark.parametrize(
    ("each", "fits"),
    [
        (page(200, 20), messages.MAX_RESULT_FILES // 200),
        (page(10, 4096), messages.MAX_RESULT_PATHS // 40960),
    ],
)
def test_a_worker_cannot_fill_the_memory_with_results(
    each: messages.JobResults, fits: int
) -> None:
    job = job_at("channel", "waiting")
    for _ in range(fits):
        job.receive_message(each, 0.0)
    before = snapshot(job)
    with pytest.raises(RemoteProtocolError, match="result files"):
        job.receive_message(each, 0.0)
    assert snapshot(job) == before
