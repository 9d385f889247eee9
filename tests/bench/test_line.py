"""One direction of a path and its datagrams; no socket, and no clock."""

from collections.abc import Iterator
from itertools import pairwise

import pytest

from bench.line import Conditions, Line

SIZE = 1350


def come_out(conditions: Conditions, count: int, every: float = 0.001) -> list[float]:
    return [due for _, due in passed(Line(conditions, "up"), count, every)]


def passed(line: Line, count: int, every: float = 0.001) -> Iterator[tuple[int, float]]:
    for number in range(count):
        due = line.enter(SIZE, number * every)
        if due is not None:
            yield number, due


def lost(conditions: Conditions, direction: str, count: int = 2000) -> set[int]:
    line = Line(conditions, direction)
    return set(range(count)) - {number for number, _ in passed(line, count)}


def test_without_conditions_everything_comes_out_at_once() -> None:
    assert come_out(Conditions(), 3) == [0.0, 0.001, 0.002]


def test_every_datagram_is_delayed() -> None:
    found = come_out(Conditions(delay=0.025), 3)
    assert found == pytest.approx([0.025, 0.026, 0.027])


def test_jitter_stays_within_its_limit_and_keeps_the_order() -> None:
    conditions = Conditions(delay=0.02, jitter=0.01)
    found = come_out(conditions, 1000, every=0.02)
    extra = [due - number * 0.02 - 0.02 for number, due in enumerate(found)]
    assert -1e-9 <= min(extra) < 0.001
    assert 0.009 < max(extra) <= 0.01 + 1e-9
    close = come_out(conditions, 1000, every=0.001)
    assert close == sorted(close)


def test_jitter_may_reorder_if_asked() -> None:
    found = come_out(Conditions(jitter=0.01, may_reorder=True), 1000)
    assert found != sorted(found)


@pytest.mark.parametrize("share", [0.001, 0.01, 0.5])
def test_the_configured_share_is_lost(share: float) -> None:
    count = 200_000
    line = Line(Conditions(loss=share), "up")
    arrived = sum(1 for _ in passed(line, count))
    assert line.counts.entered == count
    assert line.counts.lost == count - arrived
    deviation = (count * share * (1 - share)) ** 0.5
    assert abs(line.counts.lost - count * share) < 5 * deviation


def test_losses_come_one_by_one_and_are_not_spaced_evenly() -> None:
    found = sorted(lost(Conditions(loss=0.1), "up", 20_000))
    gaps = [after - before for before, after in pairwise(found)]
    assert 0.08 < sum(gap == 1 for gap in gaps) / len(gaps) < 0.12
    assert max(gaps) > 30


def test_the_seed_decides_which_datagrams_are_lost() -> None:
    conditions = Conditions(loss=0.01)
    first = lost(conditions, "up")
    assert first
    assert lost(conditions, "up") == first
    assert lost(conditions, "down") != first
    assert lost(Conditions(loss=0.01, seed=2), "up") != first


def test_a_rate_spaces_datagrams_that_come_at_once() -> None:
    line = Line(Conditions(rate=SIZE * 100, delay=1.0), "up")
    found = [line.enter(SIZE, 0.0) for _ in range(3)]
    assert found == pytest.approx([1.01, 1.02, 1.03])
    assert line.enter(SIZE, 5.0) == pytest.approx(6.01)


def test_a_full_queue_drops_further_datagrams() -> None:
    line = Line(Conditions(rate=SIZE * 100, queue=3 * SIZE), "up")
    found = [line.enter(SIZE, 0.0) is not None for _ in range(5)]
    assert found == [True, True, True, False, False]
    assert line.counts.overflowed == 2
    assert line.enter(SIZE, 0.0101) is not None
    assert line.enter(SIZE, 0.0101) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"loss": -0.1},
        {"loss": 1.0},
        {"delay": -1.0},
        {"jitter": -1.0},
        {"queue": -1},
        {"rate": 0.0},
    ],
)
def test_impossible_conditions_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"."):
        Conditions(**wrong)  # type: ignore[arg-type] # all of them are numbers
