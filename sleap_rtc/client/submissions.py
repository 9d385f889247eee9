"""Notes about submitted packages, so that typing `send` again continues their jobs.

Each package whose job has not ended has a note in the state directory, named after the
hash of its path, and a lock beside it. The lock ends with the process that holds it. A
note without a lock was left by a process that crashed, and the next process takes over
its job.

A job must not fail because its note cannot be kept: no function here raises an error of
the storage. `NoteFile.trouble` holds the last one.
"""

import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal, TypeVar

import msgspec
import trio
from blake3 import blake3
from filelock import BaseFileLock, FileLock, Timeout

from sleap_rtc.io.nursery import open_background_nursery
from sleap_rtc.io.storage.call import call_storage
from sleap_rtc.io.storage.folder import StorageError
from sleap_rtc.io.storage.private import write_private
from sleap_rtc.proto.messages import JobId, Route

FOLDER = "submissions"
"""Name of the directory for notes in the state directory."""

KEPT_SECONDS = 30 * 24 * 3600.0
"""Seconds for which a note is kept. By then the worker has forgotten the job."""

DISK_TIMEOUT = 10.0
"""Seconds for one access to the state directory, which may be on a network mount."""

_DIGITS = 32
"""Hexadecimal digits of the hash in a file name."""

_NOTE, _LOCK = ".json", ".lock"

T = TypeVar("T")


class SubmissionNote(msgspec.Struct, frozen=True):
    """A package that was submitted, and the progress of its job.

    Args:
        job_id: The id of its job.
        worker_id: The peer id of the worker that has the job.
        package: The path of the package, for people.
        size: Bytes in the package.
        modified_ns: Time of its last change, in nanoseconds since 1970.
        route_tried: The last route that was started; empty if none was.
        output: The directory for the results, once it was chosen.
    """

    job_id: JobId
    worker_id: str
    package: str
    size: int
    modified_ns: int
    route_tried: Literal["shared", "channel", ""] = ""
    output: str | None = None


class NoteFile:
    """The note about one package, held by this process; `open_note` makes it.

    Args:
        path: The file.
        lock: Its lock. Without one, because another living process is sending this
            package or because of trouble, nothing is written, and the job of this
            process is independent.
        earlier: The note that an earlier process left about this very package.
        changed: The note that an earlier process left about this path, if the package
            has changed since.
        trouble: Why the last access failed, for people; empty if all is well.
    """

    def __init__(
        self,
        path: Path,
        lock: BaseFileLock | None,
        *,
        earlier: SubmissionNote | None = None,
        changed: SubmissionNote | None = None,
        trouble: str = "",
    ) -> None:
        self.earlier = earlier
        self.changed = changed
        self.trouble = trouble
        self._path = path
        self._lock = lock
        self._note: SubmissionNote | None = None
        self._is_current = True
        self._news = trio.Event()
        self._disk = trio.Lock()

    async def write(self, note: SubmissionNote) -> None:
        """Replace the note on the disk; after a crash it is the old or the new one."""
        self._note = note
        await self._save()

    def set_route(self, route: Route) -> None:
        """Record the route; it is written in the background."""
        if self._note is not None:
            self._change(msgspec.structs.replace(self._note, route_tried=route))

    def set_output(self, directory: Path) -> None:
        """Record the directory of the results; it is written in the background."""
        if self._note is not None:
            self._change(msgspec.structs.replace(self._note, output=str(directory)))

    async def remove(self) -> None:
        """Remove the note: there is no job to continue."""
        self._note = None
        async with self._disk:
            if self._lock is not None:
                await self._access(lambda: self._path.unlink(missing_ok=True))

    async def save_changes(self) -> None:
        """Write the note whenever it has changed, until cancelled."""
        while True:
            await self._news.wait()
            self._news = trio.Event()
            await self._save()

    async def close(self) -> None:
        """Write unsaved changes, and release the note."""
        with trio.move_on_after(DISK_TIMEOUT, shield=True):
            if not self._is_current:
                await self._save()
            lock, self._lock = self._lock, None
            if lock is not None:
                await self._access(lambda: _release(lock, self._path))

    def _change(self, note: SubmissionNote) -> None:
        if note != self._note:
            self._note, self._is_current = note, False
            self._news.set()

    async def _save(self) -> None:
        async with self._disk:
            note, self._is_current = self._note, True
            if note is not None and self._lock is not None:
                await self._access(
                    lambda: write_private(self._path, msgspec.json.encode(note))
                )

    async def _access(self, function: Callable[[], None]) -> None:
        try:
            await _access(self._path, function)
        except _NotKeptError as error:
            self.trouble = str(error)


@asynccontextmanager
async def open_note(
    state_directory: Path, package: Path, size: int, modified_ns: int
) -> AsyncIterator[NoteFile]:
    """Hold the note about a package for as long as the body runs.

    Notes that are too old are removed first. The note stays on the disk after the body,
    unless the body removed it.

    Args:
        state_directory: The state directory; it is made if need be.
        package: The path of the package.
        size: Its bytes.
        modified_ns: Time of its last change, in nanoseconds since 1970.
    """
    path = state_directory / FOLDER / f"{_key(package)}{_NOTE}"
    file = await _open(path, size, modified_ns)
    try:
        async with open_background_nursery() as nursery:
            nursery.start_soon(file.save_changes)
            yield file
    finally:
        await file.close()


async def _open(path: Path, size: int, modified_ns: int) -> NoteFile:
    def release(found: tuple[BaseFileLock | None, SubmissionNote | None]) -> None:
        if found[0] is not None:
            _release(found[0], path)

    try:
        lock, note = await _access(path, lambda: _lock_and_read(path), discard=release)
    except _NotKeptError as error:
        return NoteFile(path, None, trouble=str(error))
    if note is not None and (note.size, note.modified_ns) == (size, modified_ns):
        return NoteFile(path, lock, earlier=note)
    return NoteFile(path, lock, changed=note)


def _key(package: Path) -> str:
    """Return the name of the note about a package."""
    path = os.path.normcase(os.path.abspath(package))
    return blake3(os.fsencode(path)).hexdigest()[:_DIGITS]


class _NotKeptError(Exception):
    """A note could not be read or written; the text is for people."""


async def _access(
    path: Path,
    function: Callable[[], T],
    discard: Callable[[T], None] | None = None,
) -> T:
    """Run a function that accesses a note, in a worker thread.

    Not cancellable, but limited in time: an interrupted change would be useless to a
    later process.

    Raises:
        _NotKeptError: If it failed or took too long.
    """
    try:
        return await call_storage(
            function, timeout=DISK_TIMEOUT, shield=True, discard=discard
        )
    except OSError as error:
        reason = error.strerror or str(error)
    except StorageError as error:
        reason = str(error)
    except UnicodeEncodeError:
        reason = "its path is not Unicode text"
    raise _NotKeptError(f"cannot keep a note of the job in {path.parent}: {reason}")


# --------------------------------------------------------------------- on the disk


def _lock_and_read(path: Path) -> tuple[BaseFileLock | None, SubmissionNote | None]:
    """Lock a note and read it; return no note if another process holds the lock."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _remove_old_notes(path.parent)
    lock = _acquire(path)
    if lock is None:
        return None, None
    try:
        return lock, _read(path)
    except BaseException:
        _release(lock, path)
        raise


def _read(path: Path) -> SubmissionNote | None:
    """Read a note; None if it does not exist or is damaged."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=SubmissionNote)
    except (FileNotFoundError, ValueError, RecursionError):
        return None


def _remove_old_notes(directory: Path) -> None:
    """Remove old notes, their locks, and files that a crash left half-written."""
    limit = time.time() - KEPT_SECONDS
    for path in directory.iterdir():
        if not _is_older(path, limit):
            continue
        if path.name.startswith("."):
            path.unlink(missing_ok=True)
        elif path.suffix in (_NOTE, _LOCK):
            _remove_old_note(path.with_suffix(_NOTE), limit)


def _remove_old_note(path: Path, limit: float) -> None:
    if path.exists() and not _is_older(path, limit):
        return  # the note is recent; only its lock is old
    lock = _acquire(path)
    if lock is not None:
        try:
            # Another process may have written it before it was locked.
            if _is_older(path, limit):
                path.unlink()
        finally:
            _release(lock, path)


def _is_older(path: Path, limit: float) -> bool:
    try:
        return path.stat().st_mtime < limit
    except FileNotFoundError:
        return False


def _acquire(path: Path) -> BaseFileLock | None:
    """Lock a note; None if another living process holds it."""
    # The lock is acquired in one worker thread and released in another.
    lock = FileLock(path.with_suffix(_LOCK), mode=0o600, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    return lock


def _release(lock: BaseFileLock, path: Path) -> None:
    """Unlock a note; the lock file of a note that is gone is removed."""
    lock_path = path.with_suffix(_LOCK)
    try:
        if os.name != "nt" and not path.exists():
            # Removed while locked: a process that has opened it notices the removal.
            lock_path.unlink(missing_ok=True)
    finally:
        lock.release()
    if os.name == "nt" and not path.exists():
        try:
            lock_path.unlink(missing_ok=True)
        except PermissionError:
            pass  # Windows does not remove an open file: another process has it
