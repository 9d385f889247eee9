"""Both sides of a job, over links that are lost at any moment."""

import msgspec
import pytest

from sleap_rtc.proto.job.client_table import ClientState
from sleap_rtc.proto.job.worker_table import WorkerState
from tests.proto.job.test_pair import MOMENTS, check_peace
from tests.proto.job.world import Mount, Scenario, World

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
def test_two_lost_links_at_any_moment_cost_nothing(mount: Mount, moment: float) -> None:
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
    ran = any(state is WorkerState.RUNNING for state in world.disturbed)
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
    disturbed: set[ClientState | WorkerState] = set()
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
    states = {*ClientState, *WorkerState}
    assert states - disturbed == {
        ClientState.IDLE,
        ClientState.CANCELLING,
    }
