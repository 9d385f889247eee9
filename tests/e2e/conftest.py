"""Fixtures of the end-to-end tests."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import Lab
from tests.e2e.nfs_lab import LabResult, nfs_lab_missing, run_in_nfs_lab


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    """Machines that live as long as the test."""
    found = Lab(tmp_path)
    try:
        yield found
    finally:
        found.close()


@pytest.fixture
def nfs_lab() -> Callable[[list[str], float], LabResult]:
    """Run commands on real NFS mounts; skip the test where a program is missing."""
    reason = nfs_lab_missing()
    if reason is not None:
        pytest.skip(f"NOT CHECKED ON NFS: {reason}")
    return run_in_nfs_lab
