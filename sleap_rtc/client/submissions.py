"""What this machine has begun to send, so that `send` typed again can go on with it.

Each package that is under way has a note in the state directory, named after the hash
of its path, and a lock beside it. The lock ends with the process that holds it: a note
without one was left by a process that crashed, and the next one takes it up.

The functions here block, and are called in worker threads. They never raise: a job does
not fail because nothing could be noted. `NoteBook.trouble` says what was wrong.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import msgspec
from blake3 import blake3
from filelock import BaseFileLock, FileLock, Timeout

from sleap_rtc.io.closing import Closing
from sleap_rtc.io.storage.files import PartFile, write_at
from sleap_rtc.io.storage.folder import Folder
from sleap_rtc.proto.errors import InvalidInput
from sleap_rtc.proto.messages import JobId

FOLDER = "submissions"
"""Where the notes are in the state directory."""

KEPT_SECONDS = 30 * 24 * 3600.0
"""How long a note is kept. A worker has forgotten the job by then, or nobody waits."""

_DIGITS = 32
"""Hexadecimal digits of the hash in a name."""

_NOTE, _LOCK = ".json", ".lock"


class Note(msgspec.Struct, frozen=True):
    """A package that was begun, and how far it came.

    Args:
        job_id: The id of its job.
        worker_id: The peer id of the worker that has the job.
        package: The path of the package, for people.
        size: Bytes in the package.
        modified_ns: When it was last changed, in nanoseconds since 1970.
        route_tried: The route that was begun last; empty if none was.
        output: The directory for the results, once it was chosen.
    """

    job_id: JobId
    worker_id: str
    package: str
    size: int
    modified_ns: int
    route_tried: Literal["shared", "channel", ""] = ""
    output: str | None = None


def open_note(
    state_directory: Path, package: Path, size: int, modified_ns: int
) -> "NoteBook":
    """Open the note about a package, and remove all notes that are too old.

    Args:
        state_directory: Where this machine keeps its state; it is made if need be.
        package: The package, wherever the process stands.
        size: Its bytes.
        modified_ns: When it was last changed, in nanoseconds since 1970.

    Returns:
        A book for use in a ``with`` block.
    """
    directory = state_directory / FOLDER
    book = NoteBook(directory / f"{_key(package)}{_NOTE}")
    with book.noticing_trouble():
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _remove_old_notes(directory)
        book.open(size, modified_ns)
    return book


class NoteBook(Closing):
    """The note about one package, for one process.

    Any thread may use it, one at a time. Leaving its ``with`` block keeps the note.

    Attributes:
        shared: Another living process sends this package: nothing is noted here, and
            what this one sends is a job of its own.
        earlier: What an earlier process left about this very package.
        changed: What one left about a package of this path that has changed since.
        trouble: Why nothing, or not all, could be noted; empty if all is well.
    """

    def __init__(self, path: Path) -> None:
        self.shared = False
        self.earlier: Note | None = None
        self.changed: Note | None = None
        self.trouble = ""
        self._path = path
        self._lock: BaseFileLock | None = None

    def open(self, size: int, modified_ns: int) -> None:
        """Take the lock and read the note; `open_note` does this.

        Raises:
            OSError: If the state directory can't be used.
        """
        self._lock = _take_lock(self._path)
        self.shared = self._lock is None
        note = None if self.shared else _read(self._path)
        if note is not None:
            if (note.size, note.modified_ns) == (size, modified_ns):
                self.earlier = note
            else:
                self.changed = note

    def write(self, note: Note) -> None:
        """Replace the note; after a crash there is the old one or the new one."""
        if self._lock is not None:
            with self.noticing_trouble():
                _write(self._path, note)

    def remove(self) -> None:
        """Forget the package: there is nothing left to go on with."""
        if self._lock is not None:
            with self.noticing_trouble():
                self._path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let another process have the note; safe to call again."""
        lock, self._lock = self._lock, None
        if lock is not None:
            with self.noticing_trouble():
                _release(lock, self._path)

    @contextmanager
    def noticing_trouble(self) -> Iterator[None]:
        """Keep what goes wrong with the state directory for people to read."""
        try:
            yield
        except OSError as error:
            self._complain(error.strerror or str(error))
        except UnicodeEncodeError:
            self._complain("its path is no Unicode text")
        except InvalidInput as error:
            self._complain(str(error))

    def _complain(self, reason: str) -> None:
        self.trouble = (
            f"no note of the job can be kept in {self._path.parent}: {reason}"
        )


def _key(package: Path) -> str:
    """Name the note about a package after its path."""
    path = os.path.normcase(os.path.abspath(package))
    return blake3(os.fsencode(path)).hexdigest()[:_DIGITS]


# --------------------------------------------------------------------------- notes


def _read(path: Path) -> Note | None:
    """Read a note; None if there is none, or none that makes sense."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Note)
    except (FileNotFoundError, ValueError, RecursionError):
        return None


def _write(path: Path, note: Note) -> None:
    content = msgspec.json.encode(note)
    part = PartFile.create(Folder.open(path.parent), path.name, replace=True)
    try:
        with part.use() as fd:
            if hasattr(os, "fchmod"):  # Windows has the user's profile for that
                os.fchmod(fd, 0o600)
            write_at(fd, content, 0)
        part.publish()
    finally:
        part.discard()


def _remove_old_notes(directory: Path) -> None:
    """Remove the notes that nobody has touched for long, and what is left of others."""
    limit = time.time() - KEPT_SECONDS
    for path in directory.iterdir():
        if not _is_older(path, limit):
            continue
        if path.suffix == ".part":  # of a process that crashed while it wrote a note
            path.unlink(missing_ok=True)
        elif path.suffix in (_NOTE, _LOCK):
            _remove_old_note(path.with_suffix(_NOTE), limit)


def _remove_old_note(path: Path, limit: float) -> None:
    if path.exists() and not _is_older(path, limit):
        return  # it is the lock that is old
    lock = _take_lock(path)
    if lock is not None:
        try:
            # It may have been written anew before it was locked.
            if _is_older(path, limit):
                path.unlink()
        finally:
            _release(lock, path)


def _is_older(path: Path, limit: float) -> bool:
    try:
        return path.stat().st_mtime < limit
    except FileNotFoundError:
        return False


# --------------------------------------------------------------------------- locks


def _take_lock(path: Path) -> BaseFileLock | None:
    """Lock a note, unless another living process has."""
    # A book is opened by one worker thread and closed by another.
    lock = FileLock(path.with_suffix(_LOCK), mode=0o600, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    return lock


def _release(lock: BaseFileLock, path: Path) -> None:
    """Unlock a note, and remove the lock of one that is no more."""
    lock_path = path.with_suffix(_LOCK)
    try:
        if os.name != "nt" and not path.exists():
            # Before others can take it: who has opened it by now sees that it is gone.
            lock_path.unlink(missing_ok=True)
    finally:
        lock.release()
    if os.name == "nt" and not path.exists():
        try:
            lock_path.unlink(missing_ok=True)
        except PermissionError:
            pass  # Windows removes nothing that is open: somebody else has it
