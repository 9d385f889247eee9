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
