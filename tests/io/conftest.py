"""Fixtures of the drivers' tests."""

import pytest
from trio.testing import MockClock


@pytest.fixture
def jumping_clock() -> MockClock:
    """A clock for `jump_when_idle`; QUIC paces by the time that passes meanwhile."""
    return MockClock(rate=1.0)


@pytest.fixture
def frozen_clock() -> MockClock:
    """A clock for `jump_when_idle` that does not move before that."""
    return MockClock()
