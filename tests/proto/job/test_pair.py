import random
from collections.abc import Sequence
from typing import get_args

import msgspec
import pytest

from sleap_rtc.proto import messages
from sleap_rtc.proto.job import client_outputs, worker_outputs
from sleap_rtc.proto.job.reports import LinePrinted
from sleap_rtc.proto.job.worker_table import WorkerState
from sleap_rtc.proto.route.routes import RoutePreference
from tests.proto.job.examples import JOB, NAME, SIZE
from tests.proto.job.world import LINES, PROBE_PATH, Mount, Scenario, Trouble, World

HISTORY = 40.0
"""Seconds after which every undisturbed scenario has ended."""


def check_peace(world: World) -> None:
    """Check that both sides have come to rest, agree, and have no output left."""
    ended = world.ended
    assert world.client.next_output() is None
    assert world.worker.next_output() is None
    assert world.client.deadline() is None
    assert len(set(world.discards)) == len(world.discards)
    assert world.runs <= 1
    assert len(set(world.enqueued_by)) == len(world.enqueued_by)
    check_lines(world)
    kinds = {type(message) for message in world.to_client}
    scenario = world.scenario
    disturbed = bool(
        scenario.lose_at or scenario.restart_client_at or scenario.restart_worker_at
    )
    match ended.outcome:
        case "complete":
            assert messages.JobComplete in kinds
            assert world.enqueued[0].route == world.client.route
            assert len(world.fetched) == scenario.results
        case "failed":
            assert messages.JobFailed in kinds
            assert messages.JobComplete not in kinds
        case "rejected":
            assert messages.JobRejected in kinds
            assert world.enqueued == []
        case "transfer_failed":
            assert ended.reason
        case "cancelled":
            assert scenario.cancel_at is not None
        case "lost":
            silent = ended.reason == "the worker did not answer for 30 s"
            assert silent or disturbed
    if ended.outcome in ("complete", "failed", "rejected") or not disturbed:
        assert world.worker.has_ended
    if not world.enqueued and not disturbed:
        assert world.worker.state is WorkerState.DISCARDED
        assert world.discards == [world.worker]
        if ended.outcome != "lost" and scenario.owner_cancels_at is None:
            assert world.client_storage == {}


def check_lines(world: World) -> None:
    """Check that no line comes twice, and none is missing in its last version."""
    lines = [
        (event.line, event.text)
        for event in world.events
        if isinstance(event, LinePrinted)
    ]
    assert lines == [line for line in LINES if line in lines]
    if world.ended.outcome == "complete" and not world.restarts_since_run:
        assert dict(lines) == dict(LINES)


# ------------------------------------------------------------------ one story at a time


def test_a_shared_job_sends_the_fixed_flow() -> None:
    world = World(Scenario()).run()
    check_peace(world)
    assert world.ended == client_outputs.JobEnded("complete", path=f"jobs/{JOB}/models")
    assert world.client.route == "shared"
    texts = [messages.encode_message(message) for message in world.to_worker]
    assert texts[1:] == [
        f"JOB_ID::{JOB}",
        f"SHARED_INPUT_PATH::jobs/{JOB}/{NAME}",
        f"SHARED_OUTPUT_PATH::jobs/{JOB}/models",
        "SHARED_STORAGE_JOB::start",
        f"RESULTS_RECEIVED::{JOB}",
    ]


def test_the_results_of_a_channel_job_are_fetched() -> None:
    world = World(Scenario(mount="none")).run()
    check_peace(world)
    assert world.ended == client_outputs.JobEnded("complete", path="models")
    assert world.enqueued == [worker_outputs.Enqueue(JOB, "channel", NAME)]
    assert world.worker.state is WorkerState.DISCARDED


@pytest.mark.parametrize("mount", ["same", "none"])
def test_three_thousand_results_are_fetched(mount: Mount) -> None:
    world = World(Scenario(mount=mount, results=3000)).run()
    check_peace(world)
    pages = [
        each.page for each in world.to_client if isinstance(each, messages.JobResults)
    ]
    assert len(pages) == 15
    assert [page.last for page in pages] == [False] * 14 + [True]


def test_a_job_without_results_ends_at_once() -> None:
    world = World(Scenario(results=0)).run()
    check_peace(world)
    assert world.ended.outcome == "complete"


FALLBACKS: list[tuple[str, Scenario]] = [
    ("not configured, will use RTC", Scenario(mount="none")),
    ("not configured, will use RTC", Scenario(mount="worker only")),
    ("not configured on the worker", Scenario(mount="client only")),
    ("does not see this storage: no such file", Scenario(mount="other")),
    ("mounts other storage", Scenario(fails=frozenset({"probe"}))),
    ("Permission denied", Scenario(fails=frozenset({"prepare"}))),
    ("No space left on device", Scenario(fails=frozenset({"copy"}))),
    ("refused the path: no such file", Scenario(fails=frozenset({"input"}))),
    ("refused the path: Permission", Scenario(fails=frozenset({"output"}))),
    ("did not find the probe file in time", Scenario(hangs=frozenset({"probe"}))),
    ("did not check the paths in time", Scenario(hangs=frozenset({"input"}))),
    ("did not check the paths in time", Scenario(hangs=frozenset({"output"}))),
]


@pytest.mark.parametrize(("why", "scenario"), FALLBACKS)
def test_a_job_falls_back_to_the_channel_and_completes(
    why: str, scenario: Scenario
) -> None:
    world = World(scenario).run()
    check_peace(world)
    assert world.ended.outcome == "complete"
    assert world.client.route == world.enqueued[0].route == "channel"
    assert why in world.route_reasons[-1]


@pytest.mark.parametrize(("why", "scenario"), FALLBACKS)
def test_a_job_that_must_be_shared_ends_instead(why: str, scenario: Scenario) -> None:
    del why
    world = World(msgspec.structs.replace(scenario, preference="shared")).run()
    check_peace(world)
    assert world.ended.outcome == "transfer_failed"
    assert world.enqueued == []


ENDINGS: list[tuple[client_outputs.Outcome, Mount, Trouble]] = [
    ("rejected", "none", "admit"),
    ("failed", "none", "receive"),
    ("transfer_failed", "none", "send"),
    ("failed", "none", "run"),
    ("failed", "same", "run"),
    ("transfer_failed", "none", "fetch"),
    ("transfer_failed", "same", "fetch"),
]


@pytest.mark.parametrize(("outcome", "mount", "trouble"), ENDINGS)
def test_other_trouble_ends_the_job(
    outcome: client_outputs.Outcome, mount: Mount, trouble: Trouble
) -> None:
    world = World(Scenario(mount=mount, fails=frozenset({trouble}))).run()
    check_peace(world)
    assert world.ended.outcome == outcome
    if trouble == "run":
        assert len(world.fetched) == 2


def test_a_client_gives_up_on_a_worker_that_never_answers() -> None:
    world = World(Scenario(mount="none", hangs=frozenset({"admit"}))).run()
    check_peace(world)
    assert world.ended.reason == "the worker did not answer for 30 s"


# --------------------------------------------- cancelled, stopped or lost at any moment

MOMENTS = [number / 2 for number in range(1, int(HISTORY))]


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("mount", ["same", "other", "none"])
def test_a_cancellation_at_any_moment_ends_both_sides(
    mount: Mount, moment: float
) -> None:
    world = World(Scenario(mount=mount, cancel_at=moment)).run()
    check_peace(world)
    assert world.ended.outcome in ("cancelled", "complete")


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("mount", ["same", "other", "none"])
def test_the_owner_of_a_worker_may_stop_the_job_at_any_moment(
    mount: Mount, moment: float
) -> None:
    world = World(Scenario(mount=mount, owner_cancels_at=moment)).run()
    check_peace(world)
    assert world.ended.outcome in ("failed", "complete")


# ------------------------------------------------------------ a client of another kind

FLOW: list[messages.Message] = [
    messages.MountProbe(JOB, PROBE_PATH),
    messages.JobIdentity(JOB),
    messages.SharedInputPath(f"jobs/{JOB}/{NAME}"),
    messages.SharedOutputPath(f"jobs/{JOB}/models"),
    messages.SharedStorageJob(),
]


@pytest.mark.parametrize("first", [0, 1])
def test_a_client_that_does_not_wait_is_served(first: int) -> None:
    world = World(Scenario())
    world.worker_storage |= {PROBE_PATH: b"nonce", f"jobs/{JOB}/{NAME}": b"package"}
    world.run_script(FLOW[first:])
    replies = [messages.encode_message(message) for message in world.to_client]
    assert replies[1 - first : 3 - first] == [
        "PATH_VALIDATED::input",
        "PATH_VALIDATED::output",
    ]
    assert replies[-1] == f"JOB_COMPLETE::{JOB}::jobs/{JOB}/models"
    assert world.worker.has_ended


def test_a_client_that_does_not_wait_can_be_refused_and_fall_back() -> None:
    world = World(Scenario())
    world.run_script(
        [*FLOW[1:], messages.JobSubmit(JOB, messages.Submission(NAME, SIZE))]
    )
    kinds = [type(message) for message in world.to_client]
    # It fell back before the answer came, so the answer is not sent.
    assert kinds == [messages.JobAccepted]
    other = World(Scenario()).run_script(FLOW[1:])
    assert [type(message) for message in other.to_client] == [messages.PathError]


# -------------------------------------------------------------------- random schedules

ROUNDS = 3000
DELAYS = (0.0, 0.001, 1.0, 1.0, 5.0, 25.0, 45.0)
"""Seconds; the last one is longer than either side waits."""

FAILURES: tuple[Trouble, ...] = get_args(Trouble)
HANGS: tuple[Trouble, ...] = ("probe", "input", "output", "admit")


def random_scenario(rng: random.Random) -> Scenario:
    delays = rng.sample(DELAYS[: rng.choice((5, 5, 7))], 2)

    def some(troubles: Sequence[Trouble], chance: float) -> frozenset[Trouble]:
        return frozenset(each for each in troubles if rng.random() < chance)

    def moment(chance: float) -> float | None:
        return rng.uniform(0, 15 * max(delays)) if rng.random() < chance else None

    def moments(chance: float) -> tuple[float, ...]:
        found: list[float] = []
        while (when := moment(chance)) is not None:
            found.append(when)
        return tuple(found)

    preferences: tuple[RoutePreference, ...] = ("auto", "auto", "shared", "channel")
    mounts: tuple[Mount, ...] = ("same", "same", "other", "none")
    return Scenario(
        mount=rng.choice(mounts),
        preference=rng.choice(preferences),
        fails=some(FAILURES, 0.05),
        hangs=some(HANGS, 0.05),
        cancel_at=moment(0.4),
        owner_cancels_at=moment(0.2),
        lose_at=moments(0.4),
        back_after=rng.choice((0.0, 0.5, 5.0, 100.0, None)),
        worker_lag=rng.choice((0.0, 0.0, 20.0, 1000.0)),
        restart_client_at=moments(0.15),
        restart_worker_at=moments(0.15),
        results=rng.randrange(4),
        delay=lambda: rng.choice(delays) * rng.uniform(0.5, 1.5),
    )


def test_random_schedules_always_end_in_agreement() -> None:
    outcomes: set[client_outputs.Outcome] = set()
    for seed in range(ROUNDS):
        world = World(random_scenario(random.Random(seed)))
        try:
            world.run()
            check_peace(world)
        except BaseException as error:
            error.add_note(f"seed {seed}: {world.scenario}")
            raise
        outcomes.add(world.ended.outcome)
    assert outcomes == set(get_args(client_outputs.Outcome))
