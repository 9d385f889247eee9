"""Delays double up to a limit, and jitter spreads them."""

import math

import pytest

from sleap_rtc.proto.backoff import Backoff
from sleap_rtc.proto.errors import LocalProtocolError

NEARLY_ONE = math.nextafter(1.0, 0.0)
BACKOFF = Backoff(0.5, 30.0)


def test_the_delay_doubles_up_to_a_limit() -> None:
    delays = [BACKOFF.delay(failures, NEARLY_ONE) for failures in range(1, 9)]
    assert delays == pytest.approx([0.5, 1, 2, 4, 8, 16, 30, 30])


def test_the_jitter_spreads_the_delay_over_its_upper_half() -> None:
    delays = [BACKOFF.delay(2, jitter) for jitter in (0.0, 0.5, NEARLY_ONE)]
    assert delays == pytest.approx([0.5, 0.75, 1.0])


def test_a_million_failures_do_not_overflow() -> None:
    assert BACKOFF.delay(10**6, NEARLY_ONE) == pytest.approx(30)
    assert Backoff(0.5, math.inf).delay(10**6, 0.0) == pytest.approx(2**30)


@pytest.mark.parametrize("jitter", [-0.01, 1.0, math.nan])
def test_a_jitter_out_of_range_is_refused(jitter: float) -> None:
    with pytest.raises(LocalProtocolError, match="jitter"):
        BACKOFF.delay(1, jitter)


def test_a_delay_follows_a_failure() -> None:
    with pytest.raises(LocalProtocolError, match="0 failures"):
        BACKOFF.delay(0, 0.0)
