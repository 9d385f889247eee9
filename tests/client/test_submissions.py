"""Notes about submitted packages, and the processes that may continue their jobs."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing

from sleap_rtc.client import submissions
from sleap_rtc.client.submissions import (
    DISK_TIMEOUT,
    FOLDER,
    KEPT_SECONDS,
    NoteFile,
    SubmissionNote,
    open_note,
)
from tests.io.storage.places import wait_read

SIZE, MODIFIED = 1234, 1_700_000_000_123_456_789

HOLDER = """
import sys
from pathlib import Path
import trio
from sleap_rtc.client.submissions import SubmissionNote, open_note

async def main(state, package, size, modified, job_id):
    async with open_note(Path(state), Path(package), int(size), int(modified)) as file:
        await file.write(
            SubmissionNote(job_id, "worker-1", package, int(size), int(modified))
        )
        notes = "".join(path.read_text() for path in Path(state).rglob("*.json"))
        print("noted" if job_id in notes else "not noted", flush=True)
        sys.stdin.read()

trio.run(main, *sys.argv[1:])
"""


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return tmp_path / "job.zip"


def note_of(package: Path, job_id: str = "job_0123456789abcdef") -> SubmissionNote:
    return SubmissionNote(job_id, "worker-1", str(package), SIZE, MODIFIED)


def opened(state: Path, package: Path) -> AbstractAsyncContextManager[NoteFile]:
    return open_note(state, package, SIZE, MODIFIED)


async def leave(state: Path, package: Path, note: SubmissionNote | None = None) -> Path:
    """Leave a note like a process that ends early; return its path."""
    async with opened(state, package) as file:
        await file.write(note or note_of(package))
        assert not file.trouble
    (path,) = (path for path in files(state) if path.suffix == ".json")
    return path


def files(state: Path) -> list[Path]:
    return sorted((state / FOLDER).iterdir())


def noted(state: Path) -> set[str]:
    """Return the ids of the jobs that have notes."""
    return {
        msgspec.json.decode(path.read_bytes(), type=SubmissionNote).job_id
        for path in files(state)
        if path.suffix == ".json"
    }


def make_old(path: Path, seconds: float = KEPT_SECONDS + 60) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


@contextmanager
def holder(
    state: Path, package: Path, job_id: str
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run another process that holds the note; yield it and its first line."""
    arguments = [str(state), str(package), str(SIZE), str(MODIFIED), job_id]
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


async def test_a_package_is_unknown_at_first(state: Path, package: Path) -> None:
    async with opened(state, package) as file:
        assert (file.earlier, file.changed) == (None, None)
        assert file.trouble == ""
    assert files(state) == []


async def test_the_next_process_reads_the_last_note(state: Path, package: Path) -> None:
    last = msgspec.structs.replace(
        note_of(package), route_tried="channel", output="/x/results"
    )
    async with opened(state, package) as file:
        await file.write(note_of(package))
        await file.write(last)
    async with opened(state, package) as file:
        assert file.earlier == last
        assert file.changed is None


async def test_a_package_has_one_note_under_all_its_names(
    state: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await leave(state, package)
    monkeypatch.chdir(package.parent)
    for name in ("job.zip", f"../{package.parent.name}/job.zip"):
        async with opened(state, Path(name)) as file:
            assert file.earlier == note_of(package)
    async with opened(state, package.with_name("other.zip")) as file:
        assert file.earlier is None


@pytest.mark.parametrize(
    ("size", "modified"), [(SIZE + 1, MODIFIED), (SIZE, MODIFIED - 1)]
)
async def test_a_package_that_has_changed_is_recognised(
    state: Path, package: Path, size: int, modified: int
) -> None:
    await leave(state, package)
    async with open_note(state, package, size, modified) as file:
        assert file.earlier is None
        assert file.changed == note_of(package)


async def test_a_finished_package_leaves_no_files(state: Path, package: Path) -> None:
    await leave(state, package)
    async with opened(state, package) as file:
        await file.remove()
        await file.remove()
    assert not file.trouble
    assert files(state) == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other permissions")
async def test_notes_are_for_their_owner_only(state: Path, package: Path) -> None:
    await leave(state, package)
    assert (state / FOLDER).stat().st_mode & 0o777 == 0o700
    for path in files(state):
        assert path.stat().st_mode & 0o777 == 0o600


async def test_a_note_is_named_after_the_hash_of_the_path(
    state: Path, package: Path
) -> None:
    path = await leave(state, package)
    assert len(path.stem) == 32
    assert set(path.stem) <= set("0123456789abcdef")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[" * 100_000,
        b"null",
        b'{"job_id": "job_0123456789abcdef"}',
        msgspec.json.encode(note_of(Path("x"), job_id="../../etc")),
        msgspec.json.encode(note_of(Path("x")))[:-3],
    ],
)
async def test_garbage_counts_as_no_note(
    state: Path, package: Path, content: bytes
) -> None:
    (await leave(state, package)).write_bytes(content)
    async with opened(state, package) as file:
        assert (file.earlier, file.changed, file.trouble) == (None, None, "")
        await file.write(note_of(package))
    async with opened(state, package) as file:
        assert file.earlier == note_of(package)


# --------------------------------------------------------------------- other processes


async def test_the_note_of_a_living_process_is_left_alone(
    state: Path, package: Path
) -> None:
    with holder(state, package, "job_aaaaaaaaaaaaaaaa") as (process, said):
        assert said == "noted"
        async with opened(state, package) as file:
            assert (file.earlier, file.changed, file.trouble) == (None, None, "")
            await file.write(note_of(package))
            await file.remove()
        # Closing it did not take the lock from its holder either.
        async with opened(state, package) as file:
            await file.write(note_of(package))
        assert noted(state) == {"job_aaaaaaaaaaaaaaaa"}
        async with opened(state, package.with_name("other.zip")) as other:
            await other.write(note_of(package))
        assert noted(state) == {"job_aaaaaaaaaaaaaaaa", note_of(package).job_id}
        process.communicate(timeout=30)
    async with opened(state, package) as file:
        assert file.earlier == note_of(package, "job_aaaaaaaaaaaaaaaa")


async def test_the_note_of_a_killed_process_is_taken_over(
    state: Path, package: Path
) -> None:
    with holder(state, package, "job_bbbbbbbbbbbbbbbb") as (process, said):
        assert said == "noted"
        process.kill()
        process.wait(timeout=30)
    async with opened(state, package) as file:
        assert file.earlier == note_of(package, "job_bbbbbbbbbbbbbbbb")
        with holder(state, package, "job_cccccccccccccccc") as (_, said):
            assert said == "not noted"
    async with opened(state, package) as file:
        assert file.earlier == note_of(package, "job_bbbbbbbbbbbbbbbb")


async def test_two_notes_of_one_process_are_kept_apart(
    state: Path, package: Path
) -> None:
    async with opened(state, package) as first, opened(state, package) as second:
        await second.write(note_of(package, "job_2222222222222222"))
        assert noted(state) == set()
        await first.write(note_of(package, "job_1111111111111111"))
        await second.remove()
        assert noted(state) == {"job_1111111111111111"}


async def test_a_closed_note_changes_nothing(state: Path, package: Path) -> None:
    path = await leave(state, package)
    async with opened(state, package) as file:
        pass
    await file.write(note_of(package, "job_0000000000000000"))
    await file.remove()
    assert path.exists()
    async with opened(state, package) as file:
        assert file.earlier == note_of(package)


# -------------------------------------------------------------------------- progress


async def test_changes_are_on_the_disk_after_the_body(
    state: Path, package: Path
) -> None:
    async with opened(state, package) as file:
        await file.write(note_of(package))
        file.set_route("channel")
        file.set_output(Path("/x/results"))
    async with opened(state, package) as file:
        assert file.earlier is not None
        assert file.earlier.route_tried == "channel"
        assert file.earlier.output == "/x/results"


async def test_changes_are_on_the_disk_after_a_cancellation(
    state: Path, package: Path
) -> None:
    with trio.CancelScope() as scope:
        async with opened(state, package) as file:
            await file.write(note_of(package))
            scope.cancel()
            file.set_route("shared")
            await trio.sleep_forever()
    async with opened(state, package) as file:
        assert file.earlier is not None
        assert file.earlier.route_tried == "shared"


async def test_changes_are_written_while_the_body_runs(
    state: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[bytes] = []
    twice = trio.Event()

    def record(path: Path, content: bytes) -> None:
        written.append(content)
        if len(written) == 2:
            trio.from_thread.run_sync(twice.set)

    monkeypatch.setattr(submissions, "write_private", record)
    async with opened(state, package) as file:
        await file.write(note_of(package))
        file.set_route("channel")
        await twice.wait()
    assert b"channel" in written[1]


async def test_nothing_is_noted_after_the_note_was_removed(
    state: Path, package: Path
) -> None:
    async with opened(state, package) as file:
        file.set_route("channel")  # there is no job yet
        await file.write(note_of(package))
        file.set_output(Path("/x"))
        await file.remove()
        file.set_output(Path("/y"))
    assert files(state) == []


async def test_a_disk_that_hangs_does_not_raise(
    state: Path,
    package: Path,
    monkeypatch: pytest.MonkeyPatch,
    mock_clock: trio.testing.MockClock,
) -> None:
    hanging, released = trio.Event(), threading.Event()

    def hang(path: Path, content: bytes) -> None:
        trio.from_thread.run_sync(hanging.set)
        released.wait(timeout=60)

    monkeypatch.setattr(submissions, "write_private", hang)
    async with opened(state, package) as file, trio.open_nursery() as nursery:
        nursery.start_soon(file.write, note_of(package))
        await hanging.wait()
        mock_clock.jump(DISK_TIMEOUT)
        await trio.testing.wait_all_tasks_blocked()
        assert "did not answer within 10 s" in file.trouble
        released.set()


@pytest.mark.skipif(sys.platform == "win32", reason="FIFOs")
async def test_a_lock_that_comes_too_late_is_released(
    state: Path, package: Path, mock_clock: trio.testing.MockClock
) -> None:
    path = await leave(state, package)
    path.unlink()
    os.mkfifo(path)

    async def open_slowly() -> None:
        async with opened(state, package) as file:
            assert "did not answer within 10 s" in file.trouble

    async with trio.open_nursery() as nursery:
        nursery.start_soon(open_slowly)
        writer = await wait_read(path)
        path.unlink()
        mock_clock.jump(DISK_TIMEOUT)
    os.close(writer)  # the thread continues, and finds that it was left behind
    while files(state):
        await trio.lowlevel.checkpoint()


# ------------------------------------------------------------------------- old notes


async def test_old_notes_locks_and_partial_files_are_removed(
    state: Path, package: Path
) -> None:
    make_old(await leave(state, package.with_name("old.zip")))
    make_old(await leave(state, package))  # the package's own
    names = (
        f"{'0' * 32}.lock",
        f".{'0' * 32}.json.aabbcc.part",
        f".{'0' * 32}.json.x1y2z3",
    )
    for name in names:
        (state / FOLDER / name).touch()
        make_old(state / FOLDER / name)
    async with opened(state, package) as file:
        assert (file.earlier, file.trouble) == (None, "")
    assert files(state) == []


async def test_recent_files_stay(state: Path, package: Path) -> None:
    path = await leave(state, package.with_name("recent.zip"))
    make_old(path, KEPT_SECONDS - 60)
    make_old(path.with_suffix(".lock"))
    part = state / FOLDER / f".{'0' * 32}.json.aabbcc.part"
    part.touch()
    async with opened(state, package) as file:
        assert not file.trouble
    assert files(state) == sorted([part, path, path.with_suffix(".lock")])


async def test_an_old_note_that_is_in_use_stays(state: Path, package: Path) -> None:
    with holder(state, package, "job_dddddddddddddddd") as (_, said):
        assert said == "noted"
        for path in files(state):
            make_old(path)
        async with opened(state, package.with_name("other.zip")) as file:
            assert not file.trouble
        async with opened(state, package) as file:
            assert file.earlier is None
        assert {path.suffix for path in files(state)} == {".json", ".lock"}


# --------------------------------------------------------------------------- trouble


async def test_a_state_directory_that_is_a_file_does_not_raise(
    state: Path, package: Path
) -> None:
    state.touch()  # noqa: ASYNC240
    async with opened(state, package) as file:
        await file.write(note_of(package))
        await file.remove()
    assert file.earlier is None
    assert str(state) in file.trouble


async def test_a_note_that_cannot_be_written_does_not_raise(
    state: Path, package: Path
) -> None:
    path = await leave(state, package)
    before = path.read_bytes()
    async with opened(state, package) as file:
        await file.write(note_of(package.with_name("\udcff.zip")))
        assert "not Unicode text" in file.trouble
    assert path.read_bytes() == before
    assert {path.suffix for path in files(state)} == {".json", ".lock"}


async def test_a_directory_in_the_place_of_a_note_does_not_raise(
    state: Path, package: Path
) -> None:
    path = await leave(state, package)
    path.unlink()
    path.mkdir()
    async with opened(state, package) as file:
        await file.write(note_of(package))
        assert file.earlier is None
        assert "cannot keep a note of the job" in file.trouble


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
async def test_a_path_that_is_not_text_can_be_looked_up(
    state: Path, package: Path
) -> None:
    async with opened(state, package.with_name("\udcff.zip")) as file:
        assert file.trouble == ""
