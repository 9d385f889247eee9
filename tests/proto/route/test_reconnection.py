"""The decisions after a lost link: when to try again, and when to stop."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sleap_rtc.proto.errors import LocalProtocolError
from sleap_rtc.proto.route.reconnection import (
    AWAY_BACKOFF,
    GONE_BACKOFF,
    GONE_TIMEOUT,
    MIN_GONE_TIMEOUT,
    GiveUp,
    Reconnection,
    TryAgain,
)

LOST = 1000.0
NEARLY_ONE = math.nextafter(1.0, 0.0)
GONE, AWAY = True, False


def lost(silent_for: float = 0.0, patience: float = math.inf) -> Reconnection:
    return Reconnection(lost_at=LOST, silent_for=silent_for, patience=patience)


def delays(kinds: list[bool], jitter: float) -> list[float]:
    """Return the delays after attempts that take no time."""
    policy, now, found = lost(), LOST, []
    for kind in kinds:
        decision = policy.attempt_failed(kind, jitter, now)
        assert isinstance(decision, TryAgain)
        found.append(decision.at - now)
        now = decision.at
    return found


# findings of the attempts, the delays with full jitter
DELAYS = [
    ([AWAY] * 9, [0.25, 0.5, 1, 2, 4, 8, 15, 15, 15]),
    ([GONE] * 6, [0.25, 0.5, 1, 1, 1, 1]),
    # The network is back and the worker is not: try often.
    ([AWAY] * 7 + [GONE] * 4, [0.25, 0.5, 1, 2, 4, 8, 15, 0.25, 0.5, 1, 1]),
    # The absence of a worker proves nothing about the network.
    ([GONE] * 5 + [AWAY] * 3, [0.25, 0.5, 1, 1, 1, 0.25, 0.5, 1]),
    # A network that comes and goes does not shorten the delays.
    ([AWAY, GONE] * 4, [0.25, 0.25, 0.5, 0.25, 1, 0.25, 2, 0.25]),
]


@pytest.mark.parametrize(("kinds", "wanted"), DELAYS)
def test_each_state_of_the_worker_has_its_own_backoff(
    kinds: list[bool], wanted: list[float]
) -> None:
    assert delays(kinds, NEARLY_ONE) == pytest.approx(wanted)
    assert delays(kinds, 0.0) == pytest.approx([delay / 2 for delay in wanted])


# seconds silent before the loss; (seconds after the loss, the finding of the attempt);
# the index of the attempt that is the last, or None
TIMES = [
    pytest.param(0, [(0, GONE), (6.9, GONE)], None, id="within the timeout"),
    pytest.param(0, [(0, GONE), (6.9, GONE), (7, GONE)], 2, id="after the timeout"),
    pytest.param(1, [(0, GONE), (5.9, GONE), (6, GONE)], 2, id="silence counts"),
    pytest.param(15, [(0, GONE), (1, GONE), (2.9, GONE)], None, id="not within 3 s"),
    pytest.param(15, [(0, GONE), (3, GONE)], 1, id="after 3 s"),
    pytest.param(15, [(4, GONE), (4.2, GONE)], 1, id="never after one attempt"),
    pytest.param(99, [(0, AWAY)] * 50, None, id="away is not evidence"),
    pytest.param(
        15, [(0, AWAY), (20, GONE), (26.9, GONE)], None, id="timeout after waking up"
    ),
    pytest.param(15, [(0, AWAY), (20, GONE), (25, GONE), (27, GONE)], 3, id="after it"),
    pytest.param(
        0,
        [(0, GONE), (6, GONE), (10, AWAY), (11, GONE), (17.9, GONE), (18, GONE)],
        5,
        id="away restarts the timeout",
    ),
    pytest.param(0, [(1, AWAY), (27, GONE), (60, AWAY)], None, id="one is not two"),
]


@pytest.mark.parametrize(("silent_for", "attempts", "last"), TIMES)
def test_a_worker_that_is_gone_is_given_up_after_a_timeout(
    silent_for: float, attempts: list[tuple[float, bool]], last: int | None
) -> None:
    policy = lost(silent_for)
    for number, (after, kind) in enumerate(attempts):
        decision = policy.attempt_failed(kind, 0.5, LOST + after)
        assert isinstance(decision, GiveUp) == (number == last)


def test_the_reason_includes_the_time_since_the_worker_was_heard_of() -> None:
    policy = lost(silent_for=20)
    policy.attempt_failed(GONE, 0.0, LOST)
    decision = policy.attempt_failed(GONE, 0.0, LOST + 4)
    assert isinstance(decision, GiveUp)
    assert "last heard of 24 s ago" in decision.reason


def test_the_last_attempt_is_made_when_patience_ends() -> None:
    policy = lost(patience=60)
    assert policy.attempt_failed(AWAY, 0.5, LOST + 59.9) == TryAgain(LOST + 60)
    decision = policy.attempt_failed(AWAY, 0.5, LOST + 60)
    assert decision == GiveUp("the worker could not be reached again for 60 s")


def test_patience_also_ends_for_a_worker_that_is_gone() -> None:
    policy = lost(patience=2)
    assert isinstance(policy.attempt_failed(GONE, 0.5, LOST + 2), GiveUp)


def test_without_patience_one_attempt_is_made() -> None:
    assert isinstance(lost(patience=0).attempt_failed(AWAY, 0.5, LOST), GiveUp)


@pytest.mark.parametrize("jitter", [-0.01, 1.0, math.nan])
def test_a_jitter_out_of_range_is_refused_and_changes_nothing(jitter: float) -> None:
    policy = lost()
    with pytest.raises(LocalProtocolError, match="jitter"):
        policy.attempt_failed(AWAY, jitter, LOST)
    assert policy.attempt_failed(AWAY, 0.0, LOST) == TryAgain(
        LOST + AWAY_BACKOFF.first / 2
    )


@pytest.mark.parametrize("kind", [GONE, AWAY])
def test_nothing_follows_the_end(kind: bool) -> None:
    policy = lost(patience=0)
    policy.attempt_failed(AWAY, 0.0, LOST)
    for _ in range(2):
        with pytest.raises(LocalProtocolError, match="after the last one"):
            policy.attempt_failed(kind, 0.0, LOST + 1)


attempt = st.tuples(
    st.floats(0, 30), st.booleans(), st.floats(0, 1, exclude_max=True)
)  # duration of the attempt, its finding, the jitter


@given(
    silent_for=st.floats(0, 100),
    patience=st.floats(0, 300),
    attempts=st.lists(attempt, max_size=100),
)
def test_delays_and_end_always_keep_their_limits(
    silent_for: float,
    patience: float,
    attempts: list[tuple[float, bool, float]],
) -> None:
    policy, now = lost(silent_for, patience), LOST
    found: list[bool] = []
    for took, kind, jitter in attempts:
        now += took
        found.append(kind)
        decision = policy.attempt_failed(kind, jitter, now)
        if isinstance(decision, GiveUp):
            if now < LOST + patience:
                assert found[-2:] == [GONE, GONE]
                assert now >= LOST + MIN_GONE_TIMEOUT
                assert now >= LOST - silent_for + GONE_TIMEOUT
            return
        longest = GONE_BACKOFF.longest if kind is GONE else AWAY_BACKOFF.longest
        assert now <= decision.at <= min(now + longest, LOST + patience)
        now = decision.at


@given(
    silent_for=st.floats(0, 100),
    jitters=st.lists(st.floats(0, 1, exclude_max=True), min_size=40, max_size=40),
)
def test_the_wait_for_a_worker_that_is_gone_is_limited(
    silent_for: float, jitters: list[float]
) -> None:
    policy, now = lost(silent_for), LOST
    for jitter in jitters:
        decision = policy.attempt_failed(GONE, jitter, now)
        if isinstance(decision, GiveUp):
            break
        now = decision.at
    ends = max(LOST + MIN_GONE_TIMEOUT, LOST - silent_for + GONE_TIMEOUT)
    assert isinstance(decision, GiveUp)
    assert ends <= now <= ends + GONE_BACKOFF.longest
