"""The worker's store of jobs: durability, refusals, and several users at once."""

import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sleap_rtc.worker.job_store import JobStore, StoreError, StoreLimits, open_store
from tests.io.storage.places import small_mount
from tests.worker.stores import ME, opened, record

POSIX_ONLY = pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
CHILD = Path(__file__).with_name("doomed_store.py")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "jobs.db"


def edit(path: Path, *statements: str) -> None:
    connection = sqlite3.connect(path)
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()


# ---------------------------------------------------------------------- what is kept


def test_every_field_comes_back_after_the_file_was_closed(path: Path) -> None:
    full = record(
        1,
        route="shared",
        package="jobs/é 1/training.zip",
        state="FAILED",
        detail="line one\nline 'two'; -- \x00 \N{SNOWMAN}",
        results={"models/a.json": 0, "models/b": 2**50},
        size=2**50,
        updated=1.7e9 + 1 / 3,
    )
    with opened(path) as store:
        store.save(full)
    with opened(path) as store:
        assert store.load(ME).records == [full]


def test_jobs_come_in_the_order_in_which_they_were_first_saved(path: Path) -> None:
    with opened(path) as store:
        for number in (3, 1, 2):
            store.save(record(number))
        store.save(record(3, state="COMPLETE", updated=99.0))
        states = [(job.job_id[-1], job.state) for job in store.load(ME).records]
    assert states == [("3", "COMPLETE"), ("1", "QUEUED"), ("2", "QUEUED")]


def test_a_worker_sees_only_its_own_jobs(path: Path) -> None:
    with opened(path) as store:
        store.save(record(1))
        store.save(record(2, worker_id="worker-there-0123ab"))
        assert store.load(ME).records == [record(1)]
        assert store.load("worker-nowhere-0123ab").records == []


def test_a_removed_job_is_forgotten_and_may_be_removed_again(path: Path) -> None:
    with opened(path) as store:
        store.save(record(1))
        store.save(record(2))
        store.remove(record(1).job_id)
        store.remove(record(1).job_id)
        assert store.load(ME).records == [record(2)]


@POSIX_ONLY
def test_the_files_are_for_their_owner_only(path: Path) -> None:
    with opened(path) as store:
        store.save(record(1))
        modes = {
            file.name: stat.S_IMODE(file.stat().st_mode)
            for file in path.parent.iterdir()
        }
    assert modes == {
        "jobs.db": 0o600,
        "jobs.db-wal": 0o600,
        "jobs.db-shm": 0o600,
    }


@POSIX_ONLY
def test_stricter_permissions_of_the_owner_are_kept(path: Path) -> None:
    with opened(path):
        pass
    path.chmod(0o400)
    try:
        open_store(path).close()
    except StoreError:
        pass  # only root could write it
    assert stat.S_IMODE(path.stat().st_mode) == 0o400


def test_every_write_waits_for_the_disk(path: Path) -> None:
    with opened(path) as store:
        settings = [
            store._connection.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("journal_mode", "synchronous")
        ]
    assert settings == [b"wal", 2]


def test_a_store_may_be_closed_twice_and_refuses_later_calls(path: Path) -> None:
    store = open_store(path)
    store.close()
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.save(record(1))


# ------------------------------------------------------------------- what is refused


def test_a_store_of_a_newer_version_is_refused_and_not_changed(path: Path) -> None:
    edit(path, "CREATE TABLE future (x)", "PRAGMA user_version = 2")
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"jobs\.db has version 2.*Update sleap-rtc"):
        open_store(path)
    assert path.read_bytes() == before


def test_a_file_that_is_not_a_store_is_refused_and_not_changed(path: Path) -> None:
    path.write_bytes(b"my thesis " * 1000)
    with pytest.raises(StoreError, match=r"jobs\.db is damaged.*move it aside"):
        open_store(path)
    assert path.read_bytes() == b"my thesis " * 1000


def test_a_store_with_a_torn_page_is_refused(path: Path) -> None:
    with opened(path) as store:
        for number in range(200):
            store.save(record(number))
    content = bytearray(path.read_bytes())
    content[4096:12288] = b"\xa5" * 8192
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"jobs\.db is damaged.*move it aside"):
        open_store(path)
    assert path.read_bytes() == content


def test_a_database_of_something_else_is_refused(path: Path) -> None:
    edit(path, "CREATE TABLE jobs (something_else)")
    with pytest.raises(StoreError, match=r"jobs already exists.*aside"):
        open_store(path)


def test_a_place_without_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="its directory exists"):
        open_store(tmp_path / "nowhere" / "jobs.db")


def test_a_directory_is_not_a_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError) as caught:
        open_store(tmp_path)
    assert caught.value.kind == "SQLITE_CANTOPEN"


@pytest.mark.parametrize(
    "change",
    [
        "job_id = 'job_../../etc'",
        "route = 'pigeon'",
        "state = 'LOST'",
        "size = -1",
        "size = 'many'",
        "results = '{'",
        "results = '[1]'",
        "results = '{\"a\": -1}'",
        f"results = '{'[' * 100_000}'",
        "results = X'ff'",
        "package = CAST(X'fffe' AS TEXT)",
        "updated = 'yesterday'",
    ],
    ids=lambda change: change[:30],
)
def test_a_row_that_was_edited_badly_costs_only_its_own_job(
    path: Path, change: str
) -> None:
    with opened(path) as store:
        for number in (1, 2, 3):
            store.save(record(number))
    edit(path, f"UPDATE jobs SET {change} WHERE number = 2")
    with opened(path) as store:
        loaded = store.load(ME)
    assert loaded.records == [record(1), record(3)]
    (problem,) = loaded.unreadable
    assert "job_" in problem
    assert str(path) in problem


def test_a_name_that_is_not_unicode_is_refused_with_advice(path: Path) -> None:
    with opened(path) as store:
        with pytest.raises(StoreError, match="not Unicode text"):
            store.save(record(1, directory="/state/\udcff"))
        store.save(record(2))
        assert store.load(ME).records == [record(2)]


def test_a_locked_store_is_reported(path: Path) -> None:
    with opened(path, StoreLimits(busy_timeout=0.05)) as store:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="locked") as caught:
            store.save(record(1))
        other.close()
        assert caught.value.kind == "SQLITE_BUSY"
        store.save(record(1))


def fill(folder: Path) -> None:
    with (folder / "ballast").open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass


def test_a_full_disk_is_reported_and_loses_nothing(tmp_path: Path) -> None:
    with small_mount(tmp_path, 1) as mount, opened(mount / "jobs.db") as store:
        store.save(record(1))
        fill(mount)
        with pytest.raises(StoreError, match="room") as caught:
            store.save(record(2, detail="x" * 2**20))
        assert caught.value.kind == "SQLITE_FULL"
        (mount / "ballast").unlink()
        store.save(record(500))
        jobs = store.load(ME).records
        assert (jobs[0], jobs[-1]) == (record(1), record(500))


# ---------------------------------------------------------------- several at once


def test_threads_take_turns(path: Path) -> None:
    def save(store: JobStore, first: int) -> None:
        for number in range(first, first + 20):
            store.save(record(number))

    with opened(path) as store:
        threads = [
            threading.Thread(target=save, args=(store, 100 * n)) for n in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(store.load(ME).records) == 80


def start_child(path: Path, first: int, count: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(CHILD), str(path), str(first), str(count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def read_saved(child: subprocess.Popen[str], count: int) -> int:
    assert child.stdout is not None
    return max(int(child.stdout.readline()) for _ in range(count))


def check_whole(path: Path, saved: dict[int, int]) -> None:
    """Check that all rows are whole, and that no saved row is missing.

    Args:
        path: The store.
        saved: The first and the last number that each child has saved.
    """
    with opened(path) as store:
        loaded = store.load(ME)
    assert loaded.unreadable == []
    found = {int(job.job_id[4:], 16): job for job in loaded.records}
    for first, last in saved.items():
        assert set(range(first, last + 1)) <= found.keys()
    for number, job in found.items():
        assert job.detail == f"{number} " * 300


def test_a_killed_process_leaves_whole_rows(path: Path) -> None:
    saved: dict[int, int] = {}
    for first in (1000, 2000, 3000):  # each continues with the store of the last one
        with start_child(path, first, 1000) as child:
            saved[first] = read_saved(child, 25)
            child.kill()
            rest = child.stdout.read().split("\n")[:-1] if child.stdout else []
            saved[first] = max([saved[first], *map(int, rest)])
        if sys.platform != "win32":
            assert child.returncode == -signal.SIGKILL
        check_whole(path, saved)


def test_two_processes_make_and_fill_one_store_at_once(path: Path) -> None:
    # SQLite is not fair: a process without pauses can keep another waiting.
    with start_child(path, 1000, 15) as one, start_child(path, 2000, 15) as two:
        saved = {1000: read_saved(one, 15), 2000: read_saved(two, 15)}
        one.kill()
        two.kill()
    check_whole(path, saved)
