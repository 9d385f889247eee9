"""When a client tries again, and when it stops."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sleap_rtc.proto.errors import LocalProtocolError
from sleap_rtc.proto.route.reconnection import (
    FIRST_PAUSE,
    GONE_GRACE,
    GONE_SECONDS,
    LONGEST_PAUSE,
    LONGEST_PAUSE_GONE,
    GiveUp,
    Reconnection,
    TryAgain,
)

LOST = 1000.0
NEARLY_ONE = math.nextafter(1.0, 0.0)
GONE, AWAY = True, False


def lost(silent_for: float = 0.0, patience: float = math.inf) -> Reconnection:
    return Reconnection(lost_at=LOST, silent_for=silent_for, patience=patience)


def pauses(kinds: list[bool], jitter: float) -> list[float]:
    """The pauses after attempts that take no time."""
    policy, now, found = lost(), LOST, []
    for kind in kinds:
        decision = policy.attempt_failed(now, kind, jitter)
        assert isinstance(decision, TryAgain)
        found.append(decision.at - now)
        now = decision.at
    return found


# what the attempts found, the pauses with full jitter
PAUSES = [
    ([AWAY] * 9, [0.25, 0.5, 1, 2, 4, 8, 15, 15, 15]),
    ([GONE] * 6, [0.25, 0.5, 1, 1, 1, 1]),
    # A network that is back, and a worker that is not: look often.
    ([AWAY] * 7 + [GONE] * 4, [0.25, 0.5, 1, 2, 4, 8, 15, 0.25, 0.5, 1, 1]),
    # What was seen of the worker says nothing of the network.
    ([GONE] * 5 + [AWAY] * 3, [0.25, 0.5, 1, 1, 1, 0.25, 0.5, 1]),
    # A network that comes and goes does not make the client hurry.
    ([AWAY, GONE] * 4, [0.25, 0.25, 0.5, 0.25, 1, 0.25, 2, 0.25]),
]


@pytest.mark.parametrize(("kinds", "wanted"), PAUSES)
def test_the_pauses_double_up_to_a_limit(
    kinds: list[bool], wanted: list[float]
) -> None:
    assert pauses(kinds, NEARLY_ONE) == pytest.approx(wanted)
    assert pauses(kinds, 0.0) == pytest.approx([pause / 2 for pause in wanted])


def test_a_thousand_failures_do_not_overflow() -> None:
    assert pauses([AWAY] * 1100, NEARLY_ONE)[-1] == pytest.approx(LONGEST_PAUSE)


# seconds silent before the loss; (seconds after the loss, what the attempt found);
# the index of the attempt that is the last, or None
TIMES = [
    pytest.param(0, [(0, GONE), (6.9, GONE)], None, id="within the grace"),
    pytest.param(0, [(0, GONE), (6.9, GONE), (7, GONE)], 2, id="after the grace"),
    pytest.param(1, [(0, GONE), (5.9, GONE), (6, GONE)], 2, id="silence counts"),
    pytest.param(15, [(0, GONE), (1, GONE), (2.9, GONE)], None, id="not within 3 s"),
    pytest.param(15, [(0, GONE), (3, GONE)], 1, id="after 3 s"),
    pytest.param(15, [(4, GONE), (4.2, GONE)], 1, id="never after one attempt"),
    pytest.param(99, [(0, AWAY)] * 50, None, id="away is no evidence"),
    pytest.param(
        15, [(0, AWAY), (20, GONE), (26.9, GONE)], None, id="grace after waking up"
    ),
    pytest.param(15, [(0, AWAY), (20, GONE), (25, GONE), (27, GONE)], 3, id="its end"),
    pytest.param(
        0,
        [(0, GONE), (6, GONE), (10, AWAY), (11, GONE), (17.9, GONE), (18, GONE)],
        5,
        id="away starts the grace again",
    ),
    pytest.param(0, [(1, AWAY), (27, GONE), (60, AWAY)], None, id="one is not two"),
]


@pytest.mark.parametrize(("silent_for", "attempts", "last"), TIMES)
def test_a_worker_that_is_gone_is_given_up_after_a_grace(
    silent_for: float, attempts: list[tuple[float, bool]], last: int | None
) -> None:
    policy = lost(silent_for)
    for number, (after, kind) in enumerate(attempts):
        decision = policy.attempt_failed(LOST + after, kind, 0.5)
        assert isinstance(decision, GiveUp) == (number == last)


def test_the_reason_says_since_when_the_worker_is_gone() -> None:
    policy = lost(silent_for=20)
    policy.attempt_failed(LOST, GONE, 0.0)
    decision = policy.attempt_failed(LOST + 4, GONE, 0.0)
    assert isinstance(decision, GiveUp)
    assert "last heard of 24 s ago" in decision.reason


def test_patience_ends_with_one_more_attempt() -> None:
    policy = lost(patience=60)
    assert policy.attempt_failed(LOST + 59.9, AWAY, 0.5) == TryAgain(LOST + 60)
    decision = policy.attempt_failed(LOST + 60, AWAY, 0.5)
    assert decision == GiveUp("the worker could not be reached again for 60 s")


def test_patience_ends_for_a_worker_that_is_gone_too() -> None:
    policy = lost(patience=2)
    assert isinstance(policy.attempt_failed(LOST + 2, GONE, 0.5), GiveUp)


def test_without_patience_there_is_one_attempt() -> None:
    assert isinstance(lost(patience=0).attempt_failed(LOST, AWAY, 0.5), GiveUp)


@pytest.mark.parametrize("jitter", [-0.01, 1.0, math.nan])
def test_a_jitter_out_of_range_is_refused_and_changes_nothing(jitter: float) -> None:
    policy = lost()
    with pytest.raises(LocalProtocolError, match="jitter"):
        policy.attempt_failed(LOST, AWAY, jitter)
    assert policy.attempt_failed(LOST, AWAY, 0.0) == TryAgain(LOST + FIRST_PAUSE / 2)


@pytest.mark.parametrize("kind", [GONE, AWAY])
def test_nothing_follows_the_end(kind: bool) -> None:
    policy = lost(patience=0)
    policy.attempt_failed(LOST, AWAY, 0.0)
    for _ in range(2):
        with pytest.raises(LocalProtocolError, match="after the last one"):
            policy.attempt_failed(LOST + 1, kind, 0.0)


attempt = st.tuples(
    st.floats(0, 30), st.booleans(), st.floats(0, 1, exclude_max=True)
)  # how long it took, what it found, the jitter


@given(
    silent_for=st.floats(0, 100),
    patience=st.floats(0, 300),
    attempts=st.lists(attempt, max_size=100),
)
def test_whatever_happens_the_waits_and_the_end_keep_to_their_limits(
    silent_for: float,
    patience: float,
    attempts: list[tuple[float, bool, float]],
) -> None:
    policy, now = lost(silent_for, patience), LOST
    found: list[bool] = []
    for took, kind, jitter in attempts:
        now += took
        found.append(kind)
        decision = policy.attempt_failed(now, kind, jitter)
        if isinstance(decision, GiveUp):
            if now < LOST + patience:
                assert found[-2:] == [GONE, GONE]
                assert now >= LOST + GONE_SECONDS
                assert now >= LOST - silent_for + GONE_GRACE
            return
        longest = LONGEST_PAUSE_GONE if kind is GONE else LONGEST_PAUSE
        assert now <= decision.at <= min(now + longest, LOST + patience)
        now = decision.at


@given(
    silent_for=st.floats(0, 100),
    jitters=st.lists(st.floats(0, 1, exclude_max=True), min_size=40, max_size=40),
)
def test_a_worker_that_is_gone_is_not_waited_for_longer_than_the_grace_and_a_pause(
    silent_for: float, jitters: list[float]
) -> None:
    policy, now = lost(silent_for), LOST
    for jitter in jitters:
        decision = policy.attempt_failed(now, GONE, jitter)
        if isinstance(decision, GiveUp):
            break
        now = decision.at
    ends = max(LOST + GONE_SECONDS, LOST - silent_for + GONE_GRACE)
    assert isinstance(decision, GiveUp)
    assert ends <= now <= ends + LONGEST_PAUSE_GONE
