"""Fixtures of the tests of a client."""

from pathlib import Path

import pytest

from sleap_rtc.client.session import Plan
from tests.client.session_world import CONTENT, JOB, PATIENCE, Client


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    package = tmp_path / "job.zip"
    package.write_bytes(CONTENT)
    return Plan(
        job_id=JOB,
        package=package,
        size=len(CONTENT),
        preference="auto",
        shared_root=None,
        output=None,
        default_output=tmp_path / "results",
        patience=PATIENCE,
    )


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A result on the worker's disk."""
    path = tmp_path / "worker" / "best.ckpt"
    path.parent.mkdir()
    path.write_bytes(b"weights" * 1000)
    return path


@pytest.fixture
def client(plan: Plan) -> Client:
    return Client(plan)
