import sys
from collections.abc import Callable

import pytest

from tests.e2e.nfs_lab import LabResult

RunInLab = Callable[[list[str], float], LabResult]

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

TWO_HOSTS = """
import os, pathlib
import sleap_rtc
a, b = (pathlib.Path(os.environ[name]) for name in ("NFS_A", "NFS_B"))
kinds = {line.split()[1]: line.split()[2] for line in open("/proc/mounts")}
print(kinds[str(a)], kinds[str(b)])
(a / "file").write_text("written by the one")
print((b / "file").read_text())
raise SystemExit(7)
"""


def test_the_laboratory_shows_one_nfs_to_two_hosts(nfs_lab: RunInLab) -> None:
    result = nfs_lab([sys.executable, "-c", TWO_HOSTS], 30)
    assert result.output.splitlines() == ["nfs4 nfs4", "written by the one"]
    assert result.returncode == 7


@pytest.mark.timeout(300)
def test_a_job_takes_the_shared_route_over_two_nfs_mounts(nfs_lab: RunInLab) -> None:
    result = nfs_lab([sys.executable, "-m", "tests.e2e.nfs_job"], 200)
    assert result.returncode == 0, result.output
    assert "Route: shared (" in result.output
    (results,) = (x for x in result.output.splitlines() if x.startswith("results:"))
    assert "job.log models/synth_run/best.ckpt" in results
