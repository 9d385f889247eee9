"""The client's way to a start over shared storage, without the rest of the job."""

from collections.abc import Callable
from typing import get_args

import pytest

from sleap_rtc.proto import messages
from sleap_rtc.proto.errors import LocalProtocolError, RemoteProtocolError
from sleap_rtc.proto.job.client_outputs import (
    CopyPackage,
    PrepareShared,
    RouteChosen,
    SendMessage,
)
from sleap_rtc.proto.job.shared_route import (
    PATH_TIMEOUT,
    PROBE_TIMEOUT,
    TRANSITIONS,
    SharedAnswer,
    SharedOutput,
    SharedRoute,
    SharedState,
    SharedTrigger,
)
from sleap_rtc.proto.machine import Trigger
from tests.proto.job.examples import CONTENT, EXAMPLES, JOB, NAME, drain, snapshot

PROBE = f"jobs/{JOB}/mount-probe"
PACKAGE = f"jobs/{JOB}/{NAME}"
ASK_FOR_PROBE: list[SharedOutput] = [SendMessage(messages.MountProbe(JOB, PROBE))]
ANNOUNCE: list[SharedOutput] = [
    SendMessage(messages.JobIdentity(JOB)),
    SendMessage(messages.SharedInputPath(PACKAGE)),
]

Input = Callable[[SharedRoute], None]

INPUT_VALID = messages.PathValidated("input")
OUTPUT_VALID = messages.PathValidated("output")


def receive(message: SharedAnswer) -> Input:
    return lambda route: route.receive_message(message, 0.0)


GOLDEN: list[tuple[SharedState, Input, list[SharedOutput]]] = [
    (SharedState.PREPARING, lambda route: None, [PrepareShared(JOB)]),
    (
        SharedState.PROBING,
        lambda route: route.probe_written(PROBE, CONTENT, 0.0),
        ASK_FOR_PROBE,
    ),
    (
        SharedState.COPYING,
        receive(messages.MountProbed(JOB, CONTENT)),
        [
            RouteChosen("shared", "both sides see the same storage"),
            CopyPackage(PACKAGE),
        ],
    ),
    (
        SharedState.CHECKING_INPUT,
        lambda route: route.package_copied(PACKAGE, 0.0),
        ANNOUNCE,
    ),
    (
        SharedState.CHECKING_OUTPUT,
        receive(INPUT_VALID),
        [SendMessage(messages.SharedOutputPath(f"jobs/{JOB}/models"))],
    ),
    (
        SharedState.STARTED,
        receive(OUTPUT_VALID),
        [SendMessage(messages.SharedStorageJob())],
    ),
]
OUTPUTS = {state: outputs for state, _, outputs in GOLDEN}


def route_at(state: SharedState) -> SharedRoute:
    """Return a route that came to a state by real inputs; its outputs are drained."""
    route = SharedRoute(JOB, NAME)
    for reached, step, _ in GOLDEN:
        step(route)
        drain(route)
        if reached is state:
            return route
        if state is SharedState.FAILED and reached is SharedState.COPYING:
            route.storage_failed("Disk full")
            return route
    raise AssertionError(f"no way to {state}")


def test_a_start_over_shared_storage() -> None:
    route = SharedRoute(JOB, NAME)
    for state, step, outputs in GOLDEN:
        step(route)
        assert (route.state, drain(route)) == (state, outputs)


ANSWERS: list[SharedAnswer] = [
    messages.MountProbed(JOB, CONTENT),
    messages.MountProbed(JOB, "cd" * 32),
    messages.MountProbeFailed(JOB, "not there"),
    INPUT_VALID,
    OUTPUT_VALID,
    messages.PathError("not there"),
]

FAILURES = {
    "cd" * 32: "The worker mounts other storage",
    "not there": "not there",
}


@pytest.mark.parametrize("message", ANSWERS, ids=str)
@pytest.mark.parametrize("state", TRANSITIONS)
def test_every_answer_in_every_state(state: SharedState, message: SharedAnswer) -> None:
    route = route_at(state)
    before = snapshot(route)
    try:
        route.receive_message(message, 0.0)
    except RemoteProtocolError:
        assert snapshot(route) == before
        assert trigger_of(message) not in TRANSITIONS[state]
        return
    assert route.state is TRANSITIONS[state][trigger_of(message)]
    if route.state is SharedState.FAILED:
        last = list(vars_of(message))[-1]
        assert FAILURES[last] in route.failure
        assert drain(route) == []
    else:
        assert drain(route) == OUTPUTS[route.state]


def trigger_of(message: SharedAnswer) -> Trigger:
    """Return what an answer means to a route that was asked."""
    match message:
        case messages.MountProbed(content=content) if content != CONTENT:
            return SharedTrigger.OTHER_STORAGE
        case messages.PathValidated(which="input"):
            return SharedTrigger.INPUT_VALID
        case messages.PathValidated():
            return SharedTrigger.OUTPUT_VALID
        case _:
            return type(message)


def vars_of(message: messages.Message) -> list[str]:
    return [getattr(message, field) for field in message.__struct_fields__]


def test_every_answer_is_tried() -> None:
    assert {type(each) for each in ANSWERS} == set(get_args(SharedAnswer))
    assert set(get_args(SharedAnswer)) <= set(EXAMPLES)


REPORTS: list[tuple[SharedTrigger, Input, list[SharedOutput]]] = [
    (
        SharedTrigger.PROBE_WRITTEN,
        lambda route: route.probe_written(PROBE, CONTENT, 0.0),
        ASK_FOR_PROBE,
    ),
    (
        SharedTrigger.COPIED,
        lambda route: route.package_copied(PACKAGE, 0.0),
        ANNOUNCE,
    ),
    (
        SharedTrigger.STORAGE_FAILED,
        lambda route: route.storage_failed("Disk full"),
        [],
    ),
    (SharedTrigger.ANNOUNCE, lambda route: route.announce(0.0), ANNOUNCE),
]


@pytest.mark.parametrize(("trigger", "report", "outputs"), REPORTS)
@pytest.mark.parametrize("state", TRANSITIONS)
def test_every_report_in_every_state(
    state: SharedState,
    trigger: SharedTrigger,
    report: Input,
    outputs: list[SharedOutput],
) -> None:
    route = route_at(state)
    before = snapshot(route)
    if trigger in TRANSITIONS[state]:
        report(route)
        assert (route.state, drain(route)) == (TRANSITIONS[state][trigger], outputs)
    else:
        with pytest.raises(LocalProtocolError):
            report(route)
        assert snapshot(route) == before


TIMEOUTS = {
    SharedState.PROBING: (PROBE_TIMEOUT, "did not find the probe file in time"),
    SharedState.CHECKING_INPUT: (PATH_TIMEOUT, "did not check the paths in time"),
    SharedState.CHECKING_OUTPUT: (PATH_TIMEOUT, "did not check the paths in time"),
}


@pytest.mark.parametrize("state", TRANSITIONS)
def test_a_silent_worker_fails_the_route(state: SharedState) -> None:
    route = route_at(state)
    before = snapshot(route)
    seconds, failure = TIMEOUTS.get(state, (None, ""))
    assert route.deadline() == seconds
    route.handle_timeout(0.0 if seconds is None else seconds - 1)
    assert snapshot(route) == before
    if seconds is not None:
        route.handle_timeout(seconds)
        assert route.state is SharedState.FAILED
        assert failure in route.failure
        assert route.deadline() is None


REPEATED: dict[SharedState, list[SharedOutput]] = {
    SharedState.PROBING: ASK_FOR_PROBE,
    SharedState.CHECKING_INPUT: ANNOUNCE,
    SharedState.CHECKING_OUTPUT: ANNOUNCE,
}


@pytest.mark.parametrize("state", TRANSITIONS)
def test_unanswered_requests_are_repeated_over_a_new_link(
    state: SharedState,
) -> None:
    route = route_at(state)
    route.connection_restored(100.0)
    assert drain(route) == REPEATED.get(state, [])
    assert (route.deadline() == 130.0) == (state in REPEATED)
