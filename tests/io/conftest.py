"""Fixtures of the drivers' tests."""

import pytest
import trio.testing


@pytest.fixture
def jumping_clock() -> trio.testing.MockClock:
    """A clock that jumps to the next deadline when nothing has moved for 50 ms."""
    return trio.testing.MockClock(rate=1.0, autojump_threshold=0.05)


@pytest.fixture
def frozen_clock() -> trio.testing.MockClock:
    """A clock that only jumps. QUIC paces by the time that passes, so it needs more."""
    return trio.testing.MockClock(autojump_threshold=0.05)
