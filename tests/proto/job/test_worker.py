from collections.abc import Callable

import msgspec
import pytest

from sleap_rtc.proto import messages as m
from sleap_rtc.proto.errors import LocalProtocolError, RemoteProtocolError
from sleap_rtc.proto.job.worker import (
    EXPECTED,
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
    State,
    StopRun,
    WorkerJob,
)
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

Input = Callable[[WorkerJob], None]
RESULTS = {RESULT.path: RESULT.size}


def receive(kind: type[m.Message]) -> Input:
    return lambda job: job.receive_message(EXAMPLES[kind], 0.0)


TO_THE_END: list[tuple[State, Input]] = [
    (State.RUNNING, lambda job: job.slot_granted()),
    (State.ENDED, lambda job: job.run_ended(None, RESULTS)),
    (State.DISCARDED, receive(m.ResultsReceived)),
]

STEPS: dict[str, list[tuple[State, Input]]] = {
    "shared": [
        (State.PROBING, receive(m.MountProbe)),
        (State.NEW, lambda job: job.probe_read(CONTENT)),
        (State.IDENTIFIED, receive(m.JobIdentity)),
        (State.CHECKING_INPUT, receive(m.SharedInputPath)),
        (State.INPUT_VALID, lambda job: job.input_valid()),
        (State.MAKING_OUTPUT, receive(m.SharedOutputPath)),
        (State.READY, lambda job: job.output_made()),
        (State.QUEUED, receive(m.SharedStorageJob)),
        *TO_THE_END,
    ],
    "refused": [
        (State.IDENTIFIED, receive(m.JobIdentity)),
        (State.CHECKING_INPUT, receive(m.SharedInputPath)),
        (State.REFUSED, lambda job: job.path_refused("not there")),
    ],
    "channel": [
        (State.ADMITTING, receive(m.JobSubmit)),
        (State.ADMITTED, lambda job: job.admitted()),
        (State.RECEIVING, receive(m.FileOffer)),
        (State.QUEUED, lambda job: job.package_received()),
        *TO_THE_END,
    ],
    "suspended": [
        (State.ADMITTING, receive(m.JobSubmit)),
        (State.ADMITTED, lambda job: job.admitted()),
        (State.SUSPENDED, lambda job: job.connection_lost(0.0)),
    ],
}

PLACES: list[tuple[str, State]] = [
    ("shared", State.NEW),
    ("refused", State.REFUSED),
    *[("shared", state) for state, _ in STEPS["shared"] if state is not State.NEW],
    *[("channel", state) for state, _ in STEPS["channel"]],
    ("suspended", State.SUSPENDED),
]


def job_at(route: str, state: State) -> WorkerJob:
    """A job that came to a state by real inputs; its outputs are drained."""
    job = WorkerJob()
    for reached, step in STEPS[route]:
        if job.state is state:
            break
        step(job)
        assert job.state is reached
    assert job.state is state
    drain(job)
    return job


def drain(job: WorkerJob) -> list[Output]:
    outputs: list[Output] = []
    while (output := job.next_output()) is not None:
        outputs.append(output)
    return outputs


def sent(outputs: list[Output]) -> list[m.Message]:
    return [each.message for each in outputs if isinstance(each, SendMessage)]


def test_every_state_can_be_reached() -> None:
    assert {state for _, state in PLACES} == set(State) == set(EXPECTED)


# --------------------------------------------------------- every state x every message

_BEFORE_THE_PACKAGE = (
    State.NEW,
    State.PROBING,
    State.IDENTIFIED,
    State.CHECKING_INPUT,
    State.INPUT_VALID,
    State.MAKING_OUTPUT,
    State.READY,
    State.REFUSED,
)
_CROSSED = {State.DISCARDED: State.DISCARDED}

# Where a message belongs, and the state after it. Everywhere else it is an error.
LEGAL: dict[type[m.Message], dict[State, State]] = {
    m.MountProbe: {State.NEW: State.PROBING},
    m.JobIdentity: {
        State.NEW: State.IDENTIFIED,
        State.PROBING: State.PROBING,
        **_CROSSED,
    },
    m.SharedInputPath: {
        State.IDENTIFIED: State.CHECKING_INPUT,
        State.REFUSED: State.CHECKING_INPUT,
        **_CROSSED,
    },
    m.SharedOutputPath: {
        State.CHECKING_INPUT: State.CHECKING_INPUT,
        State.INPUT_VALID: State.MAKING_OUTPUT,
        State.REFUSED: State.REFUSED,
        **_CROSSED,
    },
    m.SharedStorageJob: {
        State.MAKING_OUTPUT: State.MAKING_OUTPUT,
        State.READY: State.QUEUED,
        State.REFUSED: State.REFUSED,
        **_CROSSED,
    },
    m.JobSubmit: {
        **dict.fromkeys(_BEFORE_THE_PACKAGE, State.ADMITTING),
        **_CROSSED,
    },
    m.FileOffer: {State.ADMITTED: State.RECEIVING, **_CROSSED},
    m.JobCancel: {
        **dict.fromkeys(_BEFORE_THE_PACKAGE[1:], State.DISCARDED),
        State.ADMITTING: State.DISCARDED,
        State.ADMITTED: State.DISCARDED,
        State.RECEIVING: State.DISCARDED,
        State.QUEUED: State.QUEUED,
        State.RUNNING: State.RUNNING,
        State.ENDED: State.ENDED,
        **_CROSSED,
    },
    m.FileRequest: {State.ENDED: State.ENDED},
    m.ResultsReceived: {State.ENDED: State.DISCARDED, **_CROSSED},
    m.Error: {
        **dict.fromkeys(State, State.DISCARDED),
        State.ADMITTING: State.ADMITTING,
        State.ADMITTED: State.SUSPENDED,
        State.RECEIVING: State.SUSPENDED,
        State.QUEUED: State.QUEUED,
        State.RUNNING: State.RUNNING,
        State.ENDED: State.ENDED,
    },
    m.Unknown: {state: state for state in State},
}


@pytest.mark.parametrize("message", EXAMPLES.values(), ids=lambda x: type(x).__name__)
@pytest.mark.parametrize(("route", "state"), PLACES)
def test_every_message_in_every_state(
    route: str, state: State, message: m.Message
) -> None:
    job = job_at(route, state)
    before = snapshot(job)
    after = LEGAL.get(type(message), {}).get(state)
    if state is State.SUSPENDED:
        job.receive_message(message, 0.0)  # it came too late
        assert snapshot(job) == before
    elif after is not None:
        job.receive_message(message, 0.0)
        assert job.state is after
    else:
        with pytest.raises(RemoteProtocolError, match=type(message).__name__):
            job.receive_message(message, 0.0)
        assert snapshot(job) == before
    if state is State.DISCARDED or isinstance(message, m.Unknown):
        assert drain(job) == []


@pytest.mark.parametrize("state", State)
def test_the_table_lists_what_each_state_takes(state: State) -> None:
    belongs = {kind for kind in LEGAL if state in LEGAL[kind]}
    if state is State.PROBING:
        belongs |= {m.SharedInputPath, m.SharedOutputPath, m.SharedStorageJob}
    if state is State.CHECKING_INPUT:
        belongs.add(m.SharedStorageJob)
    belongs -= {m.Error, m.Unknown}
    assert EXPECTED[state] == (set() if state is State.SUSPENDED else belongs)


@pytest.mark.parametrize(("route", "state"), PLACES)
def test_a_message_of_another_job_is_an_error(route: str, state: State) -> None:
    for kind in EXPECTED[state]:
        if not hasattr(EXAMPLES[kind], "job_id") or state is State.NEW:
            continue
        job = job_at(route, state)
        before = snapshot(job)
        other = msgspec.structs.replace(EXAMPLES[kind], job_id=OTHER_JOB)
        with pytest.raises(RemoteProtocolError, match="another job"):
            job.receive_message(other, 0.0)
        assert snapshot(job) == before


# ------------------------------------------------- every state x every command, report

REPORTS: dict[str, Input] = {
    "probe_read": lambda job: job.probe_read(CONTENT),
    "probe_failed": lambda job: job.probe_failed("not there"),
    "input_valid": lambda job: job.input_valid(),
    "output_made": lambda job: job.output_made(),
    "path_refused": lambda job: job.path_refused("not there"),
    "admitted": lambda job: job.admitted(),
    "rejected": lambda job: job.rejected("disk full"),
    "package_opened": lambda job: job.package_opened(7),
    "package_received": lambda job: job.package_received(),
    "package_failed": lambda job: job.package_failed("disk full"),
    "queue_moved": lambda job: job.queue_moved(2),
    "slot_granted": lambda job: job.slot_granted(),
    "output": lambda job: job.output(0, "epoch 1"),
    "stage_complete": lambda job: job.stage_complete("training"),
    "run_ended": lambda job: job.run_ended(None, RESULTS),
}

AFTER: dict[str, dict[State, State]] = {
    "probe_read": {State.PROBING: State.NEW},
    "probe_failed": {State.PROBING: State.NEW},
    "input_valid": {State.CHECKING_INPUT: State.INPUT_VALID},
    "output_made": {State.MAKING_OUTPUT: State.READY},
    "path_refused": {
        State.CHECKING_INPUT: State.REFUSED,
        State.MAKING_OUTPUT: State.REFUSED,
    },
    "admitted": {State.ADMITTING: State.ADMITTED},
    "rejected": {State.ADMITTING: State.DISCARDED},
    "package_opened": {State.RECEIVING: State.RECEIVING},
    "package_received": {
        State.RECEIVING: State.QUEUED,
        State.SUSPENDED: State.QUEUED,  # it was complete when the link was lost
    },
    "package_failed": {State.RECEIVING: State.DISCARDED},
    "queue_moved": {State.QUEUED: State.QUEUED},
    "slot_granted": {State.QUEUED: State.RUNNING},
    "output": {State.RUNNING: State.RUNNING},
    "stage_complete": {State.RUNNING: State.RUNNING},
    "run_ended": {State.QUEUED: State.ENDED, State.RUNNING: State.ENDED},
}
_ABOUT_PATHS = tuple(REPORTS)[:5]


@pytest.mark.parametrize("name", REPORTS)
@pytest.mark.parametrize(("route", "state"), PLACES)
def test_every_report_in_every_state(route: str, state: State, name: str) -> None:
    job = job_at(route, state)
    before = snapshot(job)
    if state in AFTER[name]:
        REPORTS[name](job)
        assert job.state is AFTER[name][state]
        assert drain(job)
        return
    late = state in (State.ENDED, State.DISCARDED)
    late |= state is State.SUSPENDED and name in ("package_opened", "package_failed")
    if late or (route in ("channel", "suspended") and name in _ABOUT_PATHS):
        REPORTS[name](job)  # too late to matter
    else:
        with pytest.raises(LocalProtocolError):
            REPORTS[name](job)
    assert snapshot(job) == before


CANCELLED = [
    m.JobState(JOB, m.JobProgress("CANCELLED", detail="the owner said so")),
    m.JobFailed(JOB, "the owner said so"),
]


@pytest.mark.parametrize(("route", "state"), PLACES)
def test_the_owner_can_cancel_in_every_state(route: str, state: State) -> None:
    job = job_at(route, state)
    job.cancel("the owner said so")
    outputs = drain(job)
    if state in (State.NEW, State.ENDED, State.DISCARDED):
        assert outputs == []
        assert job.state is state
    elif state is State.SUSPENDED:
        assert outputs == [Discard()]
        assert job.state is State.DISCARDED
    elif state in (State.QUEUED, State.RUNNING):
        assert outputs == [StopRun()]
        job.cancel("once more")
        assert drain(job) == []
        job.run_ended("killed by a signal", {})
        assert sent(drain(job)) == CANCELLED
    else:
        assert sent(outputs) == CANCELLED
        assert outputs[-1] == Discard()
        assert job.state is State.DISCARDED
        for report in REPORTS.values():
            report(job)
        assert drain(job) == []


def test_the_owner_can_cancel_between_the_probe_and_the_paths() -> None:
    job = WorkerJob()
    receive(m.MountProbe)(job)
    job.probe_read(CONTENT)
    drain(job)
    job.cancel("the owner said so")
    assert sent(drain(job)) == CANCELLED
    for kind in FLOW:
        receive(kind)(job)
    assert drain(job) == []


def test_a_job_without_a_client_runs_to_its_end_and_sends_nothing() -> None:
    job = job_at("channel", State.QUEUED)
    job.connection_lost(0.0)
    job.queue_moved(0)
    job.slot_granted()
    for line in range(1000):
        job.output(line, "epoch")
    job.run_ended(None, RESULTS)
    assert job.has_ended
    assert drain(job) == [Remember(), Remember()]


# ----------------------------------------------------------------------- whole stories


def story(route: str) -> list[Output]:
    job = WorkerJob()
    seen: list[Output] = []
    for _, step in STEPS[route]:
        step(job)
        seen += drain(job)
    return seen


THE_END: list[Output] = [
    Remember(),
    SendMessage(m.JobState(JOB, m.JobProgress("RUNNING"))),
    Remember(),
    SendMessage(m.JobResults(JOB, m.ResultPage((RESULT,)))),
    SendMessage(m.JobState(JOB, m.JobProgress("COMPLETE"))),
]


def test_the_shared_route_from_start_to_results() -> None:
    assert story("shared") == [
        ReadProbe(f"jobs/{JOB}/.probe"),
        SendMessage(m.MountProbed(JOB, CONTENT)),
        CheckInput(f"jobs/{JOB}/{NAME}"),
        SendMessage(m.PathValidated("input")),
        MakeOutput(f"jobs/{JOB}/models"),
        SendMessage(m.PathValidated("output")),
        Remember(),
        Enqueue(JOB, "shared", f"jobs/{JOB}/{NAME}"),
        *THE_END,
        SendMessage(m.JobComplete(JOB, f"jobs/{JOB}/models")),
        Discard(),
    ]


def test_the_channel_route_from_start_to_results() -> None:
    assert story("channel") == [
        Admit(JOB, m.Submission(NAME, SIZE)),
        Remember(),
        SendMessage(m.JobAccepted(JOB)),
        SendMessage(m.JobState(JOB, m.JobProgress("RECEIVING"))),
        ReceivePackage(0, m.OfferedFile(NAME, SIZE, 4096)),
        Remember(),
        Enqueue(JOB, "channel", NAME),
        *THE_END,
        SendMessage(m.JobComplete(JOB, "models")),
        Discard(),
    ]


def test_a_failed_job_names_its_results_before_the_reason() -> None:
    job = job_at("channel", State.RUNNING)
    job.output(0, "epoch 1")
    job.output(0, "epoch 2")
    job.stage_complete("training")
    job.stage_complete("inference")
    job.run_ended("exit status 1", RESULTS)
    assert sent(drain(job)) == [
        m.JobLog(JOB, 0, 0, "epoch 1"),
        m.JobLog(JOB, 1, 0, "epoch 2"),
        m.TrainingComplete(),
        m.InferenceComplete(),
        m.JobResults(JOB, m.ResultPage((RESULT,))),
        m.JobState(JOB, m.JobProgress("FAILED", detail="exit status 1")),
        m.JobFailed(JOB, "exit status 1"),
    ]


FLOW: list[type[m.Message]] = [
    m.JobIdentity,
    m.SharedInputPath,
    m.SharedOutputPath,
    m.SharedStorageJob,
]


@pytest.mark.parametrize("first", [[], [m.MountProbe]])
def test_a_client_may_send_the_whole_shared_flow_without_waiting(
    first: list[type[m.Message]],
) -> None:
    job = WorkerJob()
    for kind in first + FLOW:
        receive(kind)(job)
    if first:
        job.probe_failed("not there")
    job.input_valid()
    job.output_made()
    assert drain(job)[-1] == Enqueue(JOB, "shared", f"jobs/{JOB}/{NAME}")


@pytest.mark.parametrize(
    ("before", "wrong"),
    [
        ([m.MountProbe], m.SharedInputPath),
        ([m.MountProbe, m.JobIdentity], m.JobIdentity),
        ([m.MountProbe, m.JobIdentity], m.SharedStorageJob),
        ([m.MountProbe, *FLOW], m.SharedStorageJob),
        (FLOW[:2], m.SharedStorageJob),
        (FLOW[:3], m.SharedOutputPath),
        (FLOW, m.SharedStorageJob),
    ],
)
def test_the_shared_flow_has_an_order(
    before: list[type[m.Message]], wrong: type[m.Message]
) -> None:
    job = WorkerJob()
    for kind in before:
        receive(kind)(job)
    known = snapshot(job)
    with pytest.raises(RemoteProtocolError, match=wrong.__name__):
        receive(wrong)(job)
    assert snapshot(job) == known


def test_a_refusal_drops_what_was_sent_without_waiting() -> None:
    job = WorkerJob()
    for kind in FLOW:
        receive(kind)(job)
    job.path_refused("not there")
    assert sent(drain(job)) == [m.PathError("not there")]
    receive(m.SharedInputPath)(job)
    job.input_valid()
    assert job.state is State.INPUT_VALID
    assert sent(drain(job)) == [m.PathValidated("input")]


@pytest.mark.parametrize(
    "state", [State.PROBING, State.CHECKING_INPUT, State.MAKING_OUTPUT]
)
def test_a_fallback_drops_what_was_sent_without_waiting(state: State) -> None:
    job = job_at("shared", state)
    for kind in FLOW[{State.PROBING: 0, State.CHECKING_INPUT: 2}.get(state, 3) :]:
        receive(kind)(job)
    receive(m.JobSubmit)(job)
    for name in _ABOUT_PATHS:
        REPORTS[name](job)
    job.admitted()
    receive(m.FileOffer)(job)
    job.package_received()
    assert drain(job)[-1] == Enqueue(JOB, "channel", NAME)


def test_a_result_is_sent_on_request_and_nothing_else_is() -> None:
    job = job_at("channel", State.ENDED)
    receive(m.FileRequest)(job)
    job.receive_message(m.FileRequest(2, JOB, "../secret"), 0.0)
    assert drain(job) == [
        SendResult(1, RESULT.path),
        SendMessage(m.FileError(2, "../secret is no result of this job")),
    ]


@pytest.mark.parametrize(
    "file",
    [m.OfferedFile("other.zip", SIZE, 4096), m.OfferedFile(NAME, SIZE + 1, 4096)],
)
def test_another_file_than_the_announced_one_is_an_error(file: m.OfferedFile) -> None:
    job = job_at("channel", State.ADMITTED)
    before = snapshot(job)
    with pytest.raises(RemoteProtocolError, match="not announced"):
        job.receive_message(m.FileOffer(0, file), 0.0)
    assert snapshot(job) == before


# --------------------------------------------------- whatever happens fits the messages


def through_the_wire(message: m.Message) -> m.Message:
    return m.decode_message_untrusted(m.encode_message(message))


BAD_TEXT = "\udcff" + "\U0001f9a6" * m.MAX_MESSAGE_BYTES


@pytest.mark.parametrize(
    ("state", "name"),
    [
        (State.PROBING, "probe_failed"),
        (State.CHECKING_INPUT, "path_refused"),
        (State.RUNNING, "output"),
        (State.RUNNING, "run_ended"),
    ],
)
def test_any_text_of_the_owner_fits_into_its_message(state: State, name: str) -> None:
    job = job_at("shared", state)
    call: dict[str, Input] = {
        "probe_failed": lambda job: job.probe_failed(BAD_TEXT),
        "path_refused": lambda job: job.path_refused(BAD_TEXT),
        "output": lambda job: job.output(0, BAD_TEXT),
        "run_ended": lambda job: job.run_ended(BAD_TEXT, {}),
    }
    call[name](job)
    messages = sent(drain(job))
    assert messages
    for message in messages:
        assert through_the_wire(message) == message


@pytest.mark.parametrize("length", [10, 300, 4000])
def test_results_fit_into_their_messages(length: int) -> None:
    results = {f"{number:05}é\x01".ljust(length, "x"): 1 for number in range(1000)}
    job = job_at("channel", State.RUNNING)
    job.run_ended(None, results)
    messages = [through_the_wire(message) for message in sent(drain(job))]
    pages = [each.page for each in messages if isinstance(each, m.JobResults)]
    assert {file.path: file.size for page in pages for file in page.files} == results
    assert [page.last for page in pages] == [False] * (len(pages) - 1) + [True]


def test_results_that_no_message_can_carry_are_counted() -> None:
    job = job_at("channel", State.RUNNING)
    job.run_ended(None, {"good": 1, "bad\udcff": 1, "x" * 4097: 1})
    page, state, _ = [through_the_wire(message) for message in sent(drain(job))]
    assert page == m.JobResults(JOB, m.ResultPage((m.ResultFile("good", 1),)))
    assert isinstance(state, m.JobState)
    assert state.progress.detail.startswith("2 files stay on the worker")


@pytest.mark.parametrize(
    ("count", "length", "listed"),
    [
        (m.MAX_RESULT_FILES + 5, 10, m.MAX_RESULT_FILES),
        (2000, 4096, m.MAX_RESULT_PATHS // 4096),
    ],
)
def test_more_results_than_a_client_takes_are_not_listed(
    count: int, length: int, listed: int
) -> None:
    job = job_at("channel", State.RUNNING)
    job.run_ended(None, {f"{number:0{length}}": 1 for number in range(count)})
    pages = [each for each in sent(drain(job)) if isinstance(each, m.JobResults)]
    assert sum(len(each.page.files) for each in pages) == listed
