"""What several of the end-to-end tests need."""

from collections.abc import Callable

import pytest

from tests.e2e.nfs_lab import LabResult, nfs_lab_missing, run_in_nfs_lab


@pytest.fixture
def nfs_lab() -> Callable[[list[str], float], LabResult]:
    """Run commands on real NFS mounts, or skip the test and say what is missing."""
    reason = nfs_lab_missing()
    if reason is not None:
        pytest.skip(f"NOT CHECKED ON NFS: {reason}")
    return run_in_nfs_lab
