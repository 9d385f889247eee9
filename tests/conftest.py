"""Hooks of all tests."""

import os
import signal

import pytest
from hypothesis import HealthCheck, settings

from tests.io.storage.places import ignores_permissions

# A shell's jobs in the background ignore interrupts, and so do their own processes.
signal.signal(signal.SIGINT, signal.default_int_handler)


# A busy machine may take any time for an example.
settings.register_profile(
    "busy", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("busy")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test of permissions for a user with all permissions."""
    if item.get_closest_marker("unprivileged") is None or not ignores_permissions():
        return
    if os.environ.get("PERMISSIONS_MUST_BE_TESTED"):
        pytest.fail("this user may read and write everything")
    pytest.skip("NOT TESTED: this user may read and write everything")
