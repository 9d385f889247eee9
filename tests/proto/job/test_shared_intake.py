"""The worker's side of a start over shared storage, without the rest of the job."""

from collections.abc import Callable
from typing import get_args

import pytest

from sleap_rtc.proto import messages
from sleap_rtc.proto.errors import LocalProtocolError, RemoteProtocolError
from sleap_rtc.proto.job.shared_intake import (
    EARLY,
    TRANSITIONS,
    IntakeOutput,
    IntakeState,
    Report,
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
@pytest.mark.parametrize("state", TRANSITIONS)
def test_every_request_in_every_state(
    state: IntakeState, kind: type[messages.Message]
) -> None:
    intake = intake_at(state)
    before = snapshot(intake)
    target = TRANSITIONS[state].get(kind)
    is_early = kind in EARLY.get(state, ())
    if target is None or (is_early and kind is not EARLY[state][0]):
        with pytest.raises(RemoteProtocolError, match=kind.__name__):
            receive(kind)(intake)
        assert snapshot(intake) == before
        return
    receive(kind)(intake)
    assert intake.state is target
    outputs = [] if target is state else OUTPUTS[target]
    assert drain(intake) == outputs
    assert (snapshot(intake) == before) == (target is state and not is_early)


REPORTS: list[tuple[Report, Input, list[IntakeOutput]]] = [
    (
        Report.PROBED,
        lambda intake: intake.probe_read(CONTENT),
        OUTPUTS[IntakeState.NEW],
    ),
    (
        Report.PROBED,
        lambda intake: intake.probe_failed("not there"),
        [SendMessage(messages.MountProbeFailed(JOB, "not there"))],
    ),
    (
        Report.INPUT_VALID,
        lambda intake: intake.input_valid(),
        OUTPUTS[IntakeState.INPUT_VALID],
    ),
    (
        Report.OUTPUT_MADE,
        lambda intake: intake.output_made(),
        OUTPUTS[IntakeState.READY],
    ),
    (
        Report.PATH_REFUSED,
        lambda intake: intake.path_refused("not there"),
        REFUSAL,
    ),
]


@pytest.mark.parametrize(("trigger", "report", "outputs"), REPORTS)
@pytest.mark.parametrize("state", TRANSITIONS)
def test_every_report_in_every_state(
    state: IntakeState, trigger: Report, report: Input, outputs: list[IntakeOutput]
) -> None:
    intake = intake_at(state)
    before = snapshot(intake)
    if trigger in TRANSITIONS[state]:
        report(intake)
        assert drain(intake) == outputs
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
