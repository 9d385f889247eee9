"""A worker's job, from the first message to the end of its run."""

from collections.abc import Callable
from typing import get_args

import msgspec
import pytest

from sleap_rtc.proto import messages
from sleap_rtc.proto.errors import LocalProtocolError, RemoteProtocolError
from sleap_rtc.proto.job.lines import LineEvent
from sleap_rtc.proto.job.shared_intake import SharedRequest
from sleap_rtc.proto.job.worker import StageSucceeded, WorkerJob
from sleap_rtc.proto.job.worker_outputs import (
    Admit,
    CheckInput,
    Discard,
    Enqueue,
    MakeOutput,
    Output,
    ReadProbe,
    ReceivePackage,
    Remember,
    SendMessage,
    SendResult,
    StopRun,
)
from sleap_rtc.proto.job.worker_table import WorkerState
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

Input = Callable[[WorkerJob], None]
RESULTS = {RESULT.path: RESULT.size}
PACKAGE = f"jobs/{JOB}/{NAME}"
MODELS = f"jobs/{JOB}/models"


def receive(message: type[messages.Message] | messages.Message) -> Input:
    example = EXAMPLES[message] if isinstance(message, type) else message
    assert isinstance(example, messages.ClientJobMessage)
    return lambda job: job.receive_message(example, 0.0)


def send(*parts: messages.WorkerJobMessage) -> list[Output]:
    return [SendMessage(each) for each in parts]


def state(name: messages.JobStateName, detail: str = "") -> messages.JobState:
    return messages.JobState(JOB, messages.JobProgress(name, detail=detail))


Step = tuple[str, Input, list[Output]]
DISCARD: list[Output] = [Discard()]
RESULT_PAGE = messages.JobResults(JOB, messages.ResultPage((RESULT,)))


def to_the_end(route: messages.Route, package: str, models: str) -> list[Step]:
    enqueue = Enqueue(JOB, route, package)
    return [
        (
            "queued",
            (
                receive(messages.SharedStorageJob)
                if route == "shared"
                else lambda job: job.package_received()
            ),
            [Remember(), enqueue],
        ),
        (
            "running",
            lambda job: job.slot_granted(),
            [Remember(), *send(state("RUNNING"))],
        ),
        (
            "ended",
            lambda job: job.run_ended(None, RESULTS),
            [
                Remember(),
                *send(
                    RESULT_PAGE, state("COMPLETE"), messages.JobComplete(JOB, models)
                ),
            ],
        ),
        ("discarded", receive(messages.ResultsReceived), DISCARD),
    ]


# Each step with a name for the place that it leads to, and with its outputs.
GOLDEN: dict[str, list[Step]] = {
    "shared": [
        ("probing", receive(messages.MountProbe), [ReadProbe(f"jobs/{JOB}/.probe")]),
        (
            "probed",
            lambda job: job.probe_read(CONTENT),
            send(messages.MountProbed(JOB, CONTENT)),
        ),
        ("identified", receive(messages.JobIdentity), []),
        ("checking input", receive(messages.SharedInputPath), [CheckInput(PACKAGE)]),
        (
            "input valid",
            lambda job: job.input_valid(),
            send(messages.PathValidated("input")),
        ),
        ("making output", receive(messages.SharedOutputPath), [MakeOutput(MODELS)]),
        (
            "ready",
            lambda job: job.output_made(),
            send(messages.PathValidated("output")),
        ),
        *to_the_end("shared", PACKAGE, MODELS),
    ],
    "channel": [
        (
            "admitting",
            receive(messages.JobSubmit),
            [Admit(JOB, messages.Submission(NAME, SIZE))],
        ),
        (
            "admitted",
            lambda job: job.admitted(),
            [Remember(), *send(messages.JobAccepted(JOB))],
        ),
        (
            "receiving",
            receive(messages.FileOffer),
            [
                *send(state("RECEIVING")),
                ReceivePackage(0, messages.OfferedFile(NAME, SIZE, 4096)),
            ],
        ),
        *to_the_end("channel", NAME, "models"),
    ],
}

ASIDE: dict[str, tuple[str, Input]] = {
    "refused": ("checking input", lambda job: job.path_refused("not there")),
    "suspended": ("receiving", lambda job: job.connection_lost("no answer", 0.0)),
}
"""Places beside the golden paths: the place before, and the input that follows it."""

REACHED: dict[str, WorkerState] = {
    "new": WorkerState.NEW,
    "probing": WorkerState.SHARING,
    "probed": WorkerState.SHARING,
    "identified": WorkerState.SHARING,
    "checking input": WorkerState.SHARING,
    "input valid": WorkerState.SHARING,
    "making output": WorkerState.SHARING,
    "ready": WorkerState.SHARING,
    "refused": WorkerState.SHARING,
    "admitting": WorkerState.ADMITTING,
    "admitted": WorkerState.ADMITTED,
    "receiving": WorkerState.RECEIVING,
    "suspended": WorkerState.SUSPENDED,
    "queued": WorkerState.QUEUED,
    "running": WorkerState.RUNNING,
    "ended": WorkerState.ENDED,
    "discarded": WorkerState.DISCARDED,
}
"""The state in each place, written by hand so that a wrong cell of the table shows."""

PLACES: list[tuple[str, str]] = [
    ("shared", "new"),
    *[(route, name) for route in GOLDEN for name, _, _ in GOLDEN[route]],
    ("shared", "refused"),
    ("channel", "suspended"),
]
EVERY_PLACE = pytest.mark.parametrize(("route", "place"), PLACES)


def job_at(route: str, place: str) -> WorkerJob:
    """Return a job that came to a place by real inputs; its outputs are drained."""
    job = WorkerJob()
    goal, aside = ASIDE.get(place, (place, lambda job: None))
    for name, step, _ in [] if place == "new" else GOLDEN[route]:
        step(job)
        if name == goal:
            break
    aside(job)
    drain(job)
    return job


def sent(outputs: list[Output]) -> list[messages.Message]:
    return [each.message for each in outputs if isinstance(each, SendMessage)]


@pytest.mark.parametrize("route", GOLDEN)
def test_a_golden_path(route: str) -> None:
    job = WorkerJob()
    for name, step, outputs in GOLDEN[route]:
        step(job)
        assert (name, drain(job)) == (name, outputs)
        assert (name, job.state) == (name, REACHED[name])


def test_every_state_is_tried() -> None:
    for route, place in PLACES:
        assert (place, job_at(route, place).state) == (place, REACHED[place])
    assert {REACHED[place] for _, place in PLACES} == set(WorkerState)


# --------------------------------------------------------- every place x every message

CANCELLED = "cancelled by the client"

_CANCELLED: dict[type[messages.Message], WorkerState] = {
    messages.JobCancel: WorkerState.DISCARDED
}

# The messages that each state expects, besides those about shared storage, and the
# state that follows.
EXPECTED: dict[WorkerState, dict[type[messages.Message], WorkerState]] = {
    WorkerState.NEW: {messages.JobSubmit: WorkerState.ADMITTING},
    WorkerState.SHARING: {messages.JobSubmit: WorkerState.ADMITTING, **_CANCELLED},
    WorkerState.ADMITTING: _CANCELLED,
    WorkerState.ADMITTED: {messages.FileOffer: WorkerState.RECEIVING, **_CANCELLED},
    WorkerState.RECEIVING: _CANCELLED,
    WorkerState.QUEUED: {messages.JobCancel: WorkerState.QUEUED},
    WorkerState.RUNNING: {messages.JobCancel: WorkerState.RUNNING},
    WorkerState.ENDED: {
        messages.JobCancel: WorkerState.ENDED,
        messages.FileRequest: WorkerState.ENDED,
        messages.ResultsReceived: WorkerState.DISCARDED,
    },
    WorkerState.DISCARDED: {
        messages.JobSubmit: WorkerState.DISCARDED,
        messages.FileOffer: WorkerState.DISCARDED,
        messages.JobCancel: WorkerState.DISCARDED,
        messages.ResultsReceived: WorkerState.DISCARDED,
    },
}

# The outputs for each message in the places where it is expected; "" is for all places
# that are not named.
ANSWERS: dict[type[messages.Message], dict[str, list[Output]]] = {
    messages.JobSubmit: {"": [Admit(JOB, messages.Submission(NAME, SIZE))]},
    messages.FileOffer: {
        "": [
            *send(state("RECEIVING")),
            ReceivePackage(0, messages.OfferedFile(NAME, SIZE, 4096)),
        ]
    },
    messages.JobCancel: {
        "": [
            *send(state("CANCELLED", CANCELLED), messages.JobFailed(JOB, CANCELLED)),
            Discard(),
        ],
        "queued": [StopRun()],
        "running": [StopRun()],
        "ended": [],
    },
    messages.FileRequest: {"": [SendResult(1, RESULT.path)]},
    messages.ResultsReceived: {"": DISCARD},
}
JOB_MESSAGES = sorted(
    {*get_args(messages.ClientJobMessage)}
    - {*get_args(SharedRequest), messages.JobResume},
    key=lambda kind: kind.__name__,
)


@pytest.mark.parametrize("kind", JOB_MESSAGES)
@EVERY_PLACE
def test_every_message_in_every_place(
    route: str, place: str, kind: type[messages.Message]
) -> None:
    job = job_at(route, place)
    before = snapshot(job)
    if place == "suspended":
        receive(kind)(job)  # it came after the end of the link
        assert snapshot(job) == before
    elif kind not in EXPECTED[REACHED[place]]:
        with pytest.raises(RemoteProtocolError, match=kind.__name__):
            receive(kind)(job)
        assert snapshot(job) == before
    else:
        receive(kind)(job)
        assert job.state is EXPECTED[REACHED[place]][kind]
        answers = {"discarded": [], **ANSWERS[kind]}
        assert drain(job) == (answers[place] if place in answers else answers[""])


@pytest.mark.parametrize("kind", get_args(SharedRequest))
@EVERY_PLACE
def test_requests_about_shared_storage_come_before_the_start(
    route: str, place: str, kind: type[messages.Message]
) -> None:
    job = job_at(route, place)
    before = snapshot(job)
    if job.state in (WorkerState.NEW, WorkerState.SHARING):
        return  # test_shared_intake.py tries these
    crossed = place == "discarded" and kind is not messages.MountProbe
    if crossed or place == "suspended":
        receive(kind)(job)
    else:
        with pytest.raises(RemoteProtocolError, match=kind.__name__):
            receive(kind)(job)
    assert snapshot(job) == before


@EVERY_PLACE
def test_a_message_of_another_job_is_an_error(route: str, place: str) -> None:
    if place in ("new", "suspended"):
        return  # no job is named, or the link has ended
    for kind in EXPECTED[REACHED[place]]:
        if not hasattr(EXAMPLES[kind], "job_id"):
            continue
        job = job_at(route, place)
        before = snapshot(job)
        other = msgspec.structs.replace(EXAMPLES[kind], job_id=OTHER_JOB)
        with pytest.raises(RemoteProtocolError, match="another job"):
            receive(other)(job)
        assert snapshot(job) == before


# ------------------------------------------------- every place x every command, report

Wanted = dict[str, list[Output]]

# Each report with its outputs in the places where it is expected.
REPORTS: dict[str, tuple[Input, Wanted]] = {
    "probe_read": (
        lambda job: job.probe_read(CONTENT),
        {"probing": send(messages.MountProbed(JOB, CONTENT))},
    ),
    "probe_failed": (
        lambda job: job.probe_failed("not there"),
        {"probing": send(messages.MountProbeFailed(JOB, "not there"))},
    ),
    "input_valid": (
        lambda job: job.input_valid(),
        {"checking input": send(messages.PathValidated("input"))},
    ),
    "output_made": (
        lambda job: job.output_made(),
        {"making output": send(messages.PathValidated("output"))},
    ),
    "path_refused": (
        lambda job: job.path_refused("not there"),
        {
            "checking input": send(messages.PathError("not there")),
            "making output": send(messages.PathError("not there")),
        },
    ),
    "admitted": (
        lambda job: job.admitted(),
        {"admitting": [Remember(), *send(messages.JobAccepted(JOB))]},
    ),
    "rejected": (
        lambda job: job.rejected("disk full"),
        {"admitting": [*send(messages.JobRejected(JOB, "disk full")), Discard()]},
    ),
    "package_opened": (
        lambda job: job.package_opened(7),
        {
            "receiving": send(
                messages.JobState(JOB, messages.JobProgress("RECEIVING", received=7))
            ),
            "suspended": [],
        },
    ),
    "package_received": (
        lambda job: job.package_received(),
        {
            "receiving": [Remember(), Enqueue(JOB, "channel", NAME)],
            # It was complete when the link was lost.
            "suspended": [Remember(), Enqueue(JOB, "channel", NAME)],
        },
    ),
    "package_failed": (
        lambda job: job.package_failed("disk full"),
        {
            "receiving": [
                *send(
                    state("FAILED", "disk full"), messages.JobFailed(JOB, "disk full")
                ),
                Discard(),
            ],
            "suspended": [],
        },
    ),
    "queue_moved": (
        lambda job: job.queue_moved(2),
        {"queued": send(messages.JobState(JOB, messages.JobProgress("QUEUED", 2)))},
    ),
    "slot_granted": (
        lambda job: job.slot_granted(),
        {"queued": [Remember(), *send(state("RUNNING"))]},
    ),
    "output": (
        lambda job: job.progressed(LineEvent(0, "epoch 1")),
        {"running": send(messages.JobLog(JOB, 0, 0, "epoch 1"))},
    ),
    "stage_complete": (
        lambda job: job.progressed(StageSucceeded("training")),
        {"running": send(messages.TrainingComplete())},
    ),
    "run_ended": (
        lambda job: job.run_ended("killed", {}),
        {
            place: [
                Remember(),
                *send(state("FAILED", "killed"), messages.JobFailed(JOB, "killed")),
            ]
            for place in ("queued", "running")
        },
    ),
}
ABOUT_PATHS = tuple(REPORTS)[:5]

# The state after each report that changes it.
REPORTED: dict[tuple[str, str], WorkerState] = {
    ("admitting", "admitted"): WorkerState.ADMITTED,
    ("admitting", "rejected"): WorkerState.DISCARDED,
    ("receiving", "package_received"): WorkerState.QUEUED,
    ("suspended", "package_received"): WorkerState.QUEUED,
    ("receiving", "package_failed"): WorkerState.DISCARDED,
    ("queued", "slot_granted"): WorkerState.RUNNING,
    ("queued", "run_ended"): WorkerState.ENDED,
    ("running", "run_ended"): WorkerState.ENDED,
}


@pytest.mark.parametrize("name", REPORTS)
@EVERY_PLACE
def test_every_report_in_every_place(route: str, place: str, name: str) -> None:
    job = job_at(route, place)
    before = snapshot(job)
    report, wanted = REPORTS[name]
    if place in wanted:
        report(job)
        assert drain(job) == wanted[place]
        assert job.state is REPORTED.get((place, name), REACHED[place])
        return
    if place in ("ended", "discarded") or (route == "channel" and name in ABOUT_PATHS):
        report(job)  # too late to matter
    else:
        with pytest.raises(LocalProtocolError):
            report(job)
    assert snapshot(job) == before


CANCELLED_BY_OWNER = send(
    state("CANCELLED", "the owner said so"),
    messages.JobFailed(JOB, "the owner said so"),
)


# The state after the loss of the link, in the places where it changes.
LOST: dict[WorkerState, WorkerState] = {
    WorkerState.NEW: WorkerState.DISCARDED,
    WorkerState.SHARING: WorkerState.DISCARDED,
    WorkerState.ADMITTED: WorkerState.SUSPENDED,
    WorkerState.RECEIVING: WorkerState.SUSPENDED,
}


@EVERY_PLACE
def test_the_link_can_be_lost_in_every_place(route: str, place: str) -> None:
    job = job_at(route, place)
    job.connection_lost("no answer", 0.0)
    assert job.state is LOST.get(REACHED[place], REACHED[place])
    assert (Discard() in drain(job)) == (
        place == "new" or REACHED[place].name == "SHARING"
    )


@EVERY_PLACE
def test_the_owner_can_cancel_in_every_place(route: str, place: str) -> None:
    job = job_at(route, place)
    job.cancel("the owner said so")
    outputs = drain(job)
    if place in ("new", "ended", "discarded"):
        assert outputs == []
    elif place == "suspended":
        assert outputs == DISCARD
        assert job.state is WorkerState.DISCARDED
    elif place in ("queued", "running"):
        assert outputs == [StopRun()]
        job.cancel("again")
        assert drain(job) == []
        job.run_ended("killed by a signal", {})
        assert drain(job) == [Remember(), *CANCELLED_BY_OWNER]
    else:
        assert outputs == [*CANCELLED_BY_OWNER, Discard()]
        assert job.state is WorkerState.DISCARDED
        for report, _ in REPORTS.values():
            report(job)
        assert drain(job) == []


def test_the_owner_can_cancel_between_the_probe_and_the_paths() -> None:
    job = job_at("shared", "probed")
    job.cancel("the owner said so")
    assert drain(job) == [*CANCELLED_BY_OWNER, Discard()]
    for kind in FLOW:
        receive(kind)(job)
    assert drain(job) == []


FLOW: list[type[messages.Message]] = [
    messages.JobIdentity,
    messages.SharedInputPath,
    messages.SharedOutputPath,
    messages.SharedStorageJob,
]


def test_a_job_without_a_client_runs_to_its_end_and_sends_nothing() -> None:
    job = job_at("channel", "queued")
    job.connection_lost("no answer", 0.0)
    job.queue_moved(0)
    job.slot_granted()
    for line in range(1000):
        job.progressed(LineEvent(line, "epoch"))
    job.run_ended(None, RESULTS)
    assert job.has_ended
    assert drain(job) == [Remember(), Remember()]


# ----------------------------------------------------------------------- whole stories


def test_a_failed_job_names_its_results_before_the_reason() -> None:
    job = job_at("channel", "running")
    job.progressed(LineEvent(0, "epoch 1"))
    job.progressed(LineEvent(0, "epoch 2"))
    job.progressed(StageSucceeded("training"))
    job.progressed(StageSucceeded("inference"))
    job.run_ended("exit status 1", RESULTS)
    assert sent(drain(job)) == [
        messages.JobLog(JOB, 0, 0, "epoch 1"),
        messages.JobLog(JOB, 1, 0, "epoch 2"),
        messages.TrainingComplete(),
        messages.InferenceComplete(),
        messages.JobResults(JOB, messages.ResultPage((RESULT,))),
        messages.JobState(JOB, messages.JobProgress("FAILED", detail="exit status 1")),
        messages.JobFailed(JOB, "exit status 1"),
    ]


def test_a_client_may_probe_the_storage_a_second_time() -> None:
    job = job_at("shared", "probed")
    receive(messages.MountProbe)(job)
    assert drain(job) == [ReadProbe(f"jobs/{JOB}/.probe")]
    assert job.state is WorkerState.SHARING


def test_a_client_may_start_a_job_without_waiting_for_answers() -> None:
    job = WorkerJob()
    for kind in FLOW:
        receive(kind)(job)
    job.input_valid()
    job.output_made()
    assert drain(job)[-1] == Enqueue(JOB, "shared", PACKAGE)


@pytest.mark.parametrize("place", ["probing", "checking input", "making output"])
def test_a_fallback_drops_requests_that_were_sent_without_waiting(place: str) -> None:
    job = job_at("shared", place)
    for kind in FLOW[{"probing": 0, "checking input": 2}.get(place, 3) :]:
        receive(kind)(job)
    receive(messages.JobSubmit)(job)
    for name in ABOUT_PATHS:
        REPORTS[name][0](job)
    job.admitted()
    receive(messages.FileOffer)(job)
    job.package_received()
    assert drain(job)[-1] == Enqueue(JOB, "channel", NAME)


def test_only_requested_results_are_sent() -> None:
    job = job_at("channel", "ended")
    receive(messages.FileRequest)(job)
    job.receive_message(messages.FileRequest(2, JOB, "../secret"), 0.0)
    assert drain(job) == [
        SendResult(1, RESULT.path),
        SendMessage(messages.FileError(2, "../secret is not a result of this job")),
    ]


@pytest.mark.parametrize(
    "file",
    [
        messages.OfferedFile("other.zip", SIZE, 4096),
        messages.OfferedFile(NAME, SIZE + 1, 4096),
    ],
)
def test_a_file_that_was_not_announced_is_an_error(
    file: messages.OfferedFile,
) -> None:
    job = job_at("channel", "admitted")
    before = snapshot(job)
    with pytest.raises(RemoteProtocolError, match="not announced"):
        job.receive_message(messages.FileOffer(0, file), 0.0)
    assert snapshot(job) == before


# --------------------------------------------------- whatever happens fits the messages


def through_the_wire(message: messages.Message) -> messages.Message:
    return messages.decode_message_untrusted(messages.encode_message(message))


BAD_TEXT = "\udcff" + "\U0001f9a6" * messages.MAX_MESSAGE_BYTES


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("probing", "probe_failed"),
        ("checking input", "path_refused"),
        ("running", "output"),
        ("running", "run_ended"),
    ],
)
def test_any_text_of_the_owner_fits_into_its_message(place: str, name: str) -> None:
    job = job_at("shared", place)
    call: dict[str, Input] = {
        "probe_failed": lambda job: job.probe_failed(BAD_TEXT),
        "path_refused": lambda job: job.path_refused(BAD_TEXT),
        "output": lambda job: job.progressed(LineEvent(0, BAD_TEXT)),
        "run_ended": lambda job: job.run_ended(BAD_TEXT, {}),
    }
    call[name](job)
    outputs = sent(drain(job))
    assert outputs
    for message in outputs:
        assert through_the_wire(message) == message


@pytest.mark.parametrize("length", [10, 300, 4000])
def test_results_fit_into_their_messages(length: int) -> None:
    results = {f"{number:05}é\x01".ljust(length, "x"): 1 for number in range(1000)}
    job = job_at("channel", "running")
    job.run_ended(None, results)
    received = [through_the_wire(message) for message in sent(drain(job))]
    pages = [each.page for each in received if isinstance(each, messages.JobResults)]
    assert {file.path: file.size for page in pages for file in page.files} == results
    assert [page.last for page in pages] == [False] * (len(pages) - 1) + [True]


def test_results_that_no_message_can_carry_are_counted() -> None:
    job = job_at("channel", "running")
    job.run_ended(None, {"good": 1, "bad\udcff": 1, "x" * 4097: 1})
    page, last, _ = [through_the_wire(message) for message in sent(drain(job))]
    assert page == messages.JobResults(
        JOB, messages.ResultPage((messages.ResultFile("good", 1),))
    )
    assert isinstance(last, messages.JobState)
    assert last.progress.detail.startswith("2 files stay on the worker")


@pytest.mark.parametrize(
    ("count", "length", "listed"),
    [
        (messages.MAX_RESULT_FILES + 5, 10, messages.MAX_RESULT_FILES),
        (2000, 4096, messages.MAX_RESULT_PATHS // 4096),
    ],
)
def test_more_results_than_a_client_takes_are_not_listed(
    count: int, length: int, listed: int
) -> None:
    job = job_at("channel", "running")
    job.run_ended(None, {f"{number:0{length}}": 1 for number in range(count)})
    pages = [each for each in sent(drain(job)) if isinstance(each, messages.JobResults)]
    assert sum(len(each.page.files) for each in pages) == listed
