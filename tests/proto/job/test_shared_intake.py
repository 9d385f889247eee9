"""The worker's side of a start over shared storage, without the rest of the job."""

from collections.abc import Callable
from typing import get_args

import pytest

from sleap_rtc.proto import messages
from sleap_rtc.proto.errors import LocalProtocolError, RemoteProtocolError
from sleap_rtc.proto.job.shared_intake import (
    IntakeOutput,
    IntakeState,
    SharedIntake,
    SharedRequest,
)
from sleap_rtc.proto.job.worker_outputs import (
    CheckInput,
    MakeOutput,
    ReadProbe,
    SendMessage,
)
from tests.proto.job.examples import CONTENT, EXAMPLES, JOB, NAME, drain, snapshot

Input = Callable[[SharedIntake], None]


def receive(kind: type[messages.Message]) -> Input:
    message = EXAMPLES[kind]
    assert isinstance(message, SharedRequest)
    return lambda intake: intake.receive_message(message, 0.0)


GOLDEN: list[tuple[IntakeState, Input, list[IntakeOutput]]] = [
    (
        IntakeState.PROBING,
        receive(messages.MountProbe),
        [ReadProbe(f"jobs/{JOB}/.probe")],
    ),
    (
        IntakeState.NEW,
        lambda intake: intake.probe_read(CONTENT),
        [SendMessage(messages.MountProbed(JOB, CONTENT))],
    ),
    (IntakeState.IDENTIFIED, receive(messages.JobIdentity), []),
    (
        IntakeState.CHECKING_INPUT,
        receive(messages.SharedInputPath),
        [CheckInput(f"jobs/{JOB}/{NAME}")],
    ),
    (
        IntakeState.INPUT_VALID,
        lambda intake: intake.input_valid(),
        [SendMessage(messages.PathValidated("input"))],
    ),
    (
        IntakeState.MAKING_OUTPUT,
        receive(messages.SharedOutputPath),
        [MakeOutput(f"jobs/{JOB}/models")],
    ),
    (
        IntakeState.READY,
        lambda intake: intake.output_made(),
        [SendMessage(messages.PathValidated("output"))],
    ),
    (IntakeState.STARTED, receive(messages.SharedStorageJob), []),
]
REFUSAL: list[IntakeOutput] = [SendMessage(messages.PathError("not there"))]
# The requests that each state expects, and the state that follows. One that leads back
# to its state is kept, or ignored because the client sent it before it saw the refusal.
EXPECTED: dict[IntakeState, dict[type[messages.Message], IntakeState]] = {
    IntakeState.NEW: {
        messages.MountProbe: IntakeState.PROBING,
        messages.JobIdentity: IntakeState.IDENTIFIED,
    },
    IntakeState.PROBING: {messages.JobIdentity: IntakeState.PROBING},
    IntakeState.IDENTIFIED: {messages.SharedInputPath: IntakeState.CHECKING_INPUT},
    IntakeState.CHECKING_INPUT: {
        messages.SharedOutputPath: IntakeState.CHECKING_INPUT,
    },
    IntakeState.INPUT_VALID: {messages.SharedOutputPath: IntakeState.MAKING_OUTPUT},
    IntakeState.MAKING_OUTPUT: {messages.SharedStorageJob: IntakeState.MAKING_OUTPUT},
    IntakeState.READY: {messages.SharedStorageJob: IntakeState.STARTED},
    IntakeState.REFUSED: {
        messages.SharedInputPath: IntakeState.CHECKING_INPUT,
        messages.SharedOutputPath: IntakeState.REFUSED,
        messages.SharedStorageJob: IntakeState.REFUSED,
    },
    IntakeState.STARTED: {},
}
OUTPUTS = {state: outputs for state, _, outputs in GOLDEN}
FLOW: list[type[messages.Message]] = [
    messages.JobIdentity,
    messages.SharedInputPath,
    messages.SharedOutputPath,
    messages.SharedStorageJob,
]


def intake_at(state: IntakeState) -> SharedIntake:
    """Return an intake that came to a state by real inputs; its outputs are drained."""
    intake = SharedIntake()
    if state is IntakeState.NEW:
        return intake
    for reached, step, _ in GOLDEN:
        step(intake)
        drain(intake)
        if reached is state:
            return intake
        if (state, reached) == (IntakeState.REFUSED, IntakeState.CHECKING_INPUT):
            intake.path_refused("not there")
            drain(intake)
            return intake
    raise AssertionError(f"no way to {state}")


def test_a_start_over_shared_storage() -> None:
    intake = SharedIntake()
    for state, step, outputs in GOLDEN:
        step(intake)
        assert (intake.state, drain(intake)) == (state, outputs)
    assert intake.package == f"jobs/{JOB}/{NAME}"
    assert intake.output_path == f"jobs/{JOB}/models"


@pytest.mark.parametrize("kind", get_args(SharedRequest))
@pytest.mark.parametrize("state", EXPECTED)
def test_every_request_in_every_state(
    state: IntakeState, kind: type[messages.Message]
) -> None:
    intake = intake_at(state)
    before = snapshot(intake)
    target = EXPECTED[state].get(kind)
    is_ignored = target is IntakeState.REFUSED
    if target is None:
        with pytest.raises(RemoteProtocolError, match=kind.__name__):
            receive(kind)(intake)
        assert snapshot(intake) == before
        return
    receive(kind)(intake)
    assert intake.state is target
    outputs = [] if target is state else OUTPUTS[target]
    assert drain(intake) == outputs
    assert (snapshot(intake) == before) == is_ignored


@pytest.mark.parametrize(
    ("path", "is_made"),
    [
        (f"jobs/{JOB}", True),
        (f"jobs/{JOB}/models", True),
        (f"jobs/{JOB}/deep/models", False),
        ("jobs", False),
        ("jobs/job_ffff0000/models", False),
        (f"/jobs/{JOB}/models", False),
    ],
)
@pytest.mark.parametrize("is_early", [False, True])
def test_models_lie_beside_their_package(
    path: str, is_made: bool, is_early: bool
) -> None:
    intake = intake_at(
        IntakeState.CHECKING_INPUT if is_early else IntakeState.INPUT_VALID
    )
    intake.receive_message(messages.SharedOutputPath(path), 0.0)
    if is_early:
        receive(messages.SharedStorageJob)(intake)
        intake.input_valid()
    if is_made:
        assert intake.state is IntakeState.MAKING_OUTPUT
        assert drain(intake)[-1] == MakeOutput(path)
    else:
        assert intake.state is IntakeState.REFUSED
        reason = f"{path} is not in the job directory, beside the package"
        assert drain(intake)[-1] == SendMessage(messages.PathError(reason))
        receive(messages.SharedStorageJob)(intake)  # sent before the refusal came
        assert intake.state is IntakeState.REFUSED


# Each report with its outputs, the states that expect it, and those that follow.
REPORTS: list[tuple[Input, list[IntakeOutput], dict[IntakeState, IntakeState]]] = [
    (
        lambda intake: intake.probe_read(CONTENT),
        OUTPUTS[IntakeState.NEW],
        {IntakeState.PROBING: IntakeState.NEW},
    ),
    (
        lambda intake: intake.probe_failed("not there"),
        [SendMessage(messages.MountProbeFailed(JOB, "not there"))],
        {IntakeState.PROBING: IntakeState.NEW},
    ),
    (
        lambda intake: intake.input_valid(),
        OUTPUTS[IntakeState.INPUT_VALID],
        {IntakeState.CHECKING_INPUT: IntakeState.INPUT_VALID},
    ),
    (
        lambda intake: intake.output_made(),
        OUTPUTS[IntakeState.READY],
        {IntakeState.MAKING_OUTPUT: IntakeState.READY},
    ),
    (
        lambda intake: intake.path_refused("not there"),
        REFUSAL,
        {
            IntakeState.CHECKING_INPUT: IntakeState.REFUSED,
            IntakeState.MAKING_OUTPUT: IntakeState.REFUSED,
        },
    ),
]


@pytest.mark.parametrize(("report", "outputs", "reached"), REPORTS)
@pytest.mark.parametrize("state", IntakeState)
def test_every_report_in_every_state(
    state: IntakeState,
    report: Input,
    outputs: list[IntakeOutput],
    reached: dict[IntakeState, IntakeState],
) -> None:
    intake = intake_at(state)
    before = snapshot(intake)
    if state in reached:
        report(intake)
        assert drain(intake) == outputs
        assert intake.state is reached[state]
    else:
        with pytest.raises(LocalProtocolError):
            report(intake)
        assert snapshot(intake) == before


@pytest.mark.parametrize("first", [[], [messages.MountProbe]])
def test_a_client_may_send_the_whole_flow_without_waiting(
    first: list[type[messages.Message]],
) -> None:
    intake = SharedIntake()
    for kind in first + FLOW:
        receive(kind)(intake)
    if first:
        intake.probe_failed("not there")
    intake.input_valid()
    assert drain(intake)[-1] == MakeOutput(f"jobs/{JOB}/models")
    intake.output_made()
    assert intake.state is IntakeState.STARTED


@pytest.mark.parametrize(
    ("before", "wrong"),
    [
        ([messages.MountProbe], messages.SharedInputPath),
        ([messages.MountProbe, messages.JobIdentity], messages.JobIdentity),
        ([messages.MountProbe, messages.JobIdentity], messages.SharedStorageJob),
        ([messages.MountProbe, *FLOW], messages.SharedStorageJob),
        (FLOW[:2], messages.SharedStorageJob),
        (FLOW[:3], messages.SharedOutputPath),
        (FLOW, messages.SharedStorageJob),
    ],
)
def test_the_flow_has_an_order(
    before: list[type[messages.Message]], wrong: type[messages.Message]
) -> None:
    intake = SharedIntake()
    for kind in before:
        receive(kind)(intake)
    known = snapshot(intake)
    with pytest.raises(RemoteProtocolError, match=wrong.__name__):
        receive(wrong)(intake)
    assert snapshot(intake) == known


def test_a_refusal_drops_requests_that_were_sent_without_waiting() -> None:
    intake = SharedIntake()
    for kind in FLOW:
        receive(kind)(intake)
    drain(intake)
    intake.path_refused("not there")
    assert drain(intake) == REFUSAL
    receive(messages.SharedInputPath)(intake)
    drain(intake)
    intake.input_valid()
    assert drain(intake) == [SendMessage(messages.PathValidated("input"))]
