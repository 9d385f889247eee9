"""What is noted about packages that are under way, and who may go on with them."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from sleap_rtc.client.submissions import FOLDER, KEPT_SECONDS, Note, NoteBook, open_note

SIZE, MODIFIED = 1234, 1_700_000_000_123_456_789

HOLDER = """
import sys
from pathlib import Path
from sleap_rtc.client.submissions import Note, open_note
state, package, size, modified, job_id = sys.argv[1:]
with open_note(Path(state), Path(package), int(size), int(modified)) as book:
    book.write(Note(job_id, "worker-1", package, int(size), int(modified)))
    print("shared" if book.shared else "noted", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return tmp_path / "job.zip"


def note_of(package: Path, job_id: str = "job_0123456789abcdef") -> Note:
    return Note(job_id, "worker-1", str(package), SIZE, MODIFIED)


def opened(state: Path, package: Path) -> NoteBook:
    return open_note(state, package, SIZE, MODIFIED)


def leave(state: Path, package: Path, note: Note | None = None) -> Path:
    """Leave a note as a process does that ends early, and say where it is."""
    with opened(state, package) as book:
        book.write(note or note_of(package))
        assert not book.trouble
    (path,) = (path for path in files(state) if path.suffix == ".json")
    return path


def files(state: Path) -> list[Path]:
    return sorted((state / FOLDER).iterdir())


def make_old(path: Path, seconds: float = KEPT_SECONDS + 60) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


@contextmanager
def holder(
    state: Path, package: Path, job_id: str
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Another process that has opened the note, and what it says."""
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


def test_a_package_is_unknown_at_first(state: Path, package: Path) -> None:
    with opened(state, package) as book:
        assert (book.shared, book.earlier, book.changed) == (False, None, None)
        assert book.trouble == ""
    assert files(state) == []


def test_the_next_process_reads_the_last_note(state: Path, package: Path) -> None:
    last = msgspec.structs.replace(
        note_of(package), route_tried="channel", output="/x/results"
    )
    with opened(state, package) as book:
        book.write(note_of(package))
        book.write(last)
    with opened(state, package) as book:
        assert book.earlier == last
        assert book.changed is None


def test_one_package_has_one_note_whatever_it_is_called(
    state: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(state, package)
    monkeypatch.chdir(package.parent)
    for name in ("job.zip", f"../{package.parent.name}/job.zip"):
        with opened(state, Path(name)) as book:
            assert book.earlier == note_of(package)
    with opened(state, package.with_name("other.zip")) as book:
        assert book.earlier is None


@pytest.mark.parametrize(
    ("size", "modified"), [(SIZE + 1, MODIFIED), (SIZE, MODIFIED - 1)]
)
def test_a_package_that_has_changed_is_told_apart(
    state: Path, package: Path, size: int, modified: int
) -> None:
    leave(state, package)
    with open_note(state, package, size, modified) as book:
        assert book.earlier is None
        assert book.changed == note_of(package)


def test_a_package_that_is_done_leaves_nothing(state: Path, package: Path) -> None:
    leave(state, package)
    with opened(state, package) as book:
        book.remove()
        book.remove()
    assert not book.trouble
    assert files(state) == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other permissions")
def test_notes_are_for_their_owner_only(state: Path, package: Path) -> None:
    leave(state, package)
    assert (state / FOLDER).stat().st_mode & 0o777 == 0o700
    for path in files(state):
        assert path.stat().st_mode & 0o777 == 0o600


def test_a_note_is_named_after_the_hash_of_the_path(state: Path, package: Path) -> None:
    path = leave(state, package)
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
def test_garbage_counts_as_no_note(state: Path, package: Path, content: bytes) -> None:
    leave(state, package).write_bytes(content)
    with opened(state, package) as book:
        assert (book.earlier, book.changed, book.trouble) == (None, None, "")
        book.write(note_of(package))
    with opened(state, package) as book:
        assert book.earlier == note_of(package)


# --------------------------------------------------------------------- other processes


def test_the_note_of_a_process_that_lives_is_left_alone(
    state: Path, package: Path
) -> None:
    with holder(state, package, "job_aaaaaaaaaaaaaaaa") as (process, said):
        assert said == "noted"
        with opened(state, package) as book:
            assert book.shared
            assert (book.earlier, book.changed, book.trouble) == (None, None, "")
            book.write(note_of(package))
            book.remove()
        # Nor did closing it take the lock from its holder.
        with opened(state, package) as book:
            assert book.shared
        with opened(state, package.with_name("other.zip")) as other:
            assert not other.shared
        process.communicate(timeout=30)
    with opened(state, package) as book:
        assert book.earlier == note_of(package, "job_aaaaaaaaaaaaaaaa")


def test_the_note_of_a_process_that_was_killed_is_taken_up(
    state: Path, package: Path
) -> None:
    with holder(state, package, "job_bbbbbbbbbbbbbbbb") as (process, said):
        assert said == "noted"
        process.kill()
        process.wait(timeout=30)
    with opened(state, package) as book:
        assert not book.shared
        assert book.earlier == note_of(package, "job_bbbbbbbbbbbbbbbb")
        with holder(state, package, "job_cccccccccccccccc") as (_, said):
            assert said == "shared"
    with opened(state, package) as book:
        assert book.earlier == note_of(package, "job_bbbbbbbbbbbbbbbb")


def test_two_books_of_one_process_keep_apart_too(state: Path, package: Path) -> None:
    with opened(state, package) as first, opened(state, package) as second:
        assert (first.shared, second.shared) == (False, True)


def test_a_book_is_closed_by_another_thread(state: Path, package: Path) -> None:
    books: list[NoteBook] = []
    thread = threading.Thread(target=lambda: books.append(opened(state, package)))
    thread.start()
    thread.join()
    books[0].write(note_of(package))
    books[0].close()
    books[0].close()
    with opened(state, package) as book:
        assert book.earlier == note_of(package)


def test_a_closed_book_notes_nothing(state: Path, package: Path) -> None:
    path = leave(state, package)
    book = opened(state, package)
    book.close()
    book.remove()
    assert path.exists()


# ------------------------------------------------------------------------- old notes


def test_old_notes_and_what_is_left_of_them_are_removed(
    state: Path, package: Path
) -> None:
    make_old(leave(state, package.with_name("old.zip")))
    make_old(leave(state, package))  # the package's own
    for name in (f"{'0' * 32}.lock", f".{'0' * 32}.json.aabbcc.part"):
        (state / FOLDER / name).touch()
        make_old(state / FOLDER / name)
    with opened(state, package) as book:
        assert (book.earlier, book.trouble) == (None, "")
    assert files(state) == []


def test_what_is_not_old_enough_stays(state: Path, package: Path) -> None:
    path = leave(state, package.with_name("recent.zip"))
    make_old(path, KEPT_SECONDS - 60)
    make_old(path.with_suffix(".lock"))
    part = state / FOLDER / f".{'0' * 32}.json.aabbcc.part"
    part.touch()
    with opened(state, package) as book:
        assert not book.trouble
    assert files(state) == sorted([part, path, path.with_suffix(".lock")])


def test_an_old_note_that_is_in_use_stays(state: Path, package: Path) -> None:
    with holder(state, package, "job_dddddddddddddddd") as (_, said):
        assert said == "noted"
        for path in files(state):
            make_old(path)
        with opened(state, package.with_name("other.zip")) as book:
            assert not book.trouble
        with opened(state, package) as book:
            assert book.shared
        assert {path.suffix for path in files(state)} == {".json", ".lock"}


# --------------------------------------------------------------------------- trouble


def test_a_state_directory_that_is_a_file_stops_nothing(
    state: Path, package: Path
) -> None:
    state.touch()
    with opened(state, package) as book:
        book.write(note_of(package))
        book.remove()
    assert (book.shared, book.earlier) == (False, None)
    assert str(state) in book.trouble


def test_a_note_that_cannot_be_written_stops_nothing(
    state: Path, package: Path
) -> None:
    path = leave(state, package)
    before = path.read_bytes()
    with opened(state, package) as book:
        book.write(note_of(package.with_name("\udcff.zip")))
        assert "no Unicode text" in book.trouble
    assert path.read_bytes() == before
    assert {path.suffix for path in files(state)} == {".json", ".lock"}


def test_a_directory_in_the_place_of_a_note_stops_nothing(
    state: Path, package: Path
) -> None:
    path = leave(state, package)
    path.unlink()
    path.mkdir()
    with opened(state, package) as book:
        book.write(note_of(package))
        assert book.earlier is None
        assert "no note of the job can be kept" in book.trouble


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_path_that_is_no_text_can_be_looked_up(state: Path, package: Path) -> None:
    with opened(state, package.with_name("\udcff.zip")) as book:
        assert (book.shared, book.trouble) == (False, "")
