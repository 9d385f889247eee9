"""The peer id of a worker: the same after a restart, and different from all others."""

import re
import stat
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from sleap_rtc.config import ConfigError
from sleap_rtc.worker.identity import take_identity

HOLDER = """
import sys
from pathlib import Path
from sleap_rtc.worker.identity import take_identity
identity = take_identity(Path(sys.argv[1]), sys.argv[2])
print(identity.peer_id, flush=True)
sys.stdin.read()
"""


def peer_id(state: Path, slug: str = "gpu-box") -> str:
    """Return an identity that is released at once."""
    with closing(take_identity(state, slug)) as identity:
        return identity.peer_id


def stored(state: Path) -> Path:
    return state / "workers" / "gpu-box-1.json"


def start_holder(state: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(state), "gpu-box"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def told(holder: subprocess.Popen[str]) -> str:
    assert holder.stdout is not None
    return holder.stdout.readline().strip()


def test_an_id_shows_the_name_and_stays_the_same(tmp_path: Path) -> None:
    first = peer_id(tmp_path / "state")
    assert re.fullmatch(r"worker-gpu-box-[0-9a-f]{6}", first)
    assert peer_id(tmp_path / "state") == first


def test_two_workers_at_once_have_two_ids_and_keep_them(tmp_path: Path) -> None:
    with closing(take_identity(tmp_path, "gpu-box")) as one:
        with closing(take_identity(tmp_path, "gpu-box")) as two:
            assert one.peer_id != two.peer_id
        assert peer_id(tmp_path) == two.peer_id
    assert peer_id(tmp_path) == one.peer_id


def test_workers_of_two_names_keep_their_ids_in_any_order(tmp_path: Path) -> None:
    with (
        closing(take_identity(tmp_path, "a")) as a,
        closing(take_identity(tmp_path, "b")) as b,
    ):
        first = (a.peer_id, b.peer_id)
    with (
        closing(take_identity(tmp_path, "b")) as b,
        closing(take_identity(tmp_path, "a")) as a,
    ):
        assert (a.peer_id, b.peer_id) == first


def test_a_killed_worker_gets_its_id_back(tmp_path: Path) -> None:
    with start_holder(tmp_path) as holder:
        held = told(holder)
        assert peer_id(tmp_path) != held
        holder.kill()
        holder.wait(timeout=10)
    assert peer_id(tmp_path) == held


def test_processes_that_start_together_get_different_ids(tmp_path: Path) -> None:
    holders = [start_holder(tmp_path) for _ in range(4)]
    ids = [told(holder) for holder in holders]
    for holder in holders:
        holder.communicate(timeout=10)
    assert len(set(ids)) == 4


def test_another_thread_may_release_an_id_even_twice(tmp_path: Path) -> None:
    identity = take_identity(tmp_path, "gpu-box")
    thread = threading.Thread(target=identity.close)
    thread.start()
    thread.join()
    identity.close()
    assert peer_id(tmp_path) == identity.peer_id


@pytest.mark.parametrize(
    "garbage",
    [b"", b"{", b'{"tag": "../../"}', b'{"tag": "ABCDEF"}', b"\xff", b"[" * 100_000],
    ids=lambda garbage: str(garbage[:16]),
)
def test_garbage_is_replaced_by_a_new_id_and_logged(
    tmp_path: Path, garbage: bytes
) -> None:
    peer_id(tmp_path)
    stored(tmp_path).write_bytes(garbage)
    with capture_logs() as logs:
        fresh = peer_id(tmp_path)
    assert [log["file"] for log in logs] == [str(stored(tmp_path))]
    assert re.fullmatch(r"worker-gpu-box-[0-9a-f]{6}", fresh)
    assert peer_id(tmp_path) == fresh


def test_a_half_written_file_of_a_killed_worker_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "workers").mkdir()
    (tmp_path / "workers" / ".gpu-box-1.json.0123").write_bytes(b'{"tag"')
    assert peer_id(tmp_path) == peer_id(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_the_files_are_for_their_owner_only(tmp_path: Path) -> None:
    with closing(take_identity(tmp_path, "gpu-box")):
        modes = {
            path.name: stat.S_IMODE(path.stat().st_mode)
            for path in [tmp_path / "workers", *(tmp_path / "workers").iterdir()]
        }
    assert modes == {
        "workers": 0o700,
        "gpu-box-1.json": 0o600,
        "gpu-box-1.lock": 0o600,
    }


def test_a_state_directory_that_is_a_file_is_refused_with_advice(
    tmp_path: Path,
) -> None:
    path = tmp_path / "state"
    path.touch()
    with pytest.raises(ConfigError, match="SLEAP_RTC_STATE_DIR"):
        take_identity(path, "gpu-box")


@pytest.mark.unprivileged
def test_a_folder_that_cannot_be_written_is_refused_with_advice(tmp_path: Path) -> None:
    (tmp_path / "workers").mkdir(mode=0o500)
    with pytest.raises(ConfigError, match="Permission denied"):
        take_identity(tmp_path, "gpu-box")


def test_an_id_that_cannot_be_read_is_not_lost(tmp_path: Path) -> None:
    stored(tmp_path).mkdir(parents=True)
    with pytest.raises(ConfigError, match="Cannot keep the worker's id"):
        take_identity(tmp_path, "gpu-box")
    stored(tmp_path).rmdir()
    peer_id(tmp_path)
    assert stored(tmp_path).is_file()  # so the lock was given back
