"""The worker's store of jobs: an SQLite file that outlives the worker.

`JobStore` blocks and belongs into a worker thread. `StoreWriter` is for the event loop:
whoever changes a job hands over what it is now and goes on.
"""

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import structlog
import trio

from sleap_rtc.proto import messages as m

_VERSION = 1
"""Of the table below, kept in ``PRAGMA user_version``; 0 is a file without one."""

_TABLE = """
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY,
    job_id TEXT NOT NULL UNIQUE,
    worker_id TEXT NOT NULL,
    route TEXT NOT NULL,
    directory TEXT NOT NULL,
    package TEXT NOT NULL,
    size INTEGER NOT NULL,
    state TEXT NOT NULL,
    detail TEXT NOT NULL,
    output_path TEXT NOT NULL,
    results TEXT NOT NULL,
    updated REAL NOT NULL
)
"""

_BUSY_SECONDS = 5.0
"""How long to wait for another process that writes; a write takes milliseconds."""

_FLUSH_SECONDS = 3.0
"""How long a worker that ends may take to write what waits."""


class StoreError(Exception):
    """The store can't be opened, read or written.

    Args:
        message: What happened, to which file, and what to do.
        kind: SQLite's name for it, such as ``SQLITE_FULL``, to tell failures apart.
    """

    def __init__(self, message: str, kind: str = "") -> None:
        super().__init__(message)
        self.kind = kind


class JobRecord(msgspec.Struct, frozen=True):
    """What a worker has to remember of a job.

    Args:
        job_id: The job.
        worker_id: Peer id of the worker that it belongs to.
        route: How the package came.
        directory: The job directory, absolute.
        package: Name of the package, or its path beneath the shared root.
        size: Bytes of the package.
        state: Where the job stands.
        detail: Why it failed, for people.
        output_path: Where the models go, as the client named it.
        results: Path, relative to the job directory, and bytes of each result.
        updated: When it was so, in seconds since the epoch.
    """

    job_id: m.JobId
    worker_id: str
    route: m.Route
    directory: str
    package: str
    size: m.Size
    state: m.JobStateName
    detail: str
    output_path: str
    results: dict[str, m.Size]
    updated: float


class LoadedJobs(msgspec.Struct, frozen=True):
    """What a store knows of a worker's jobs.

    Args:
        records: Its jobs, the one that was saved first at the front.
        unreadable: For each row that makes no sense, which one and why, for people.
    """

    records: list[JobRecord]
    unreadable: list[str]


_COLUMNS = JobRecord.__struct_fields__
_UPDATES = ", ".join(f"{name} = excluded.{name}" for name in _COLUMNS)
_SAVE = (
    f"INSERT INTO jobs ({', '.join(_COLUMNS)}) "
    f"VALUES ({', '.join('?' * len(_COLUMNS))}) "
    # The row keeps its number, so the oldest job stays the first.
    f"ON CONFLICT (job_id) DO UPDATE SET {_UPDATES}"
)
_LOAD = f"SELECT {', '.join(_COLUMNS)} FROM jobs WHERE worker_id = ? ORDER BY number"
_REMOVE = "DELETE FROM jobs WHERE job_id = ?"


class JobStore:
    """The jobs of a user's workers; each call is on the disk when it returns.

    Threads and processes take turns. Made by `open_store`.

    Args:
        path: The file, for errors.
        connection: To the file; it is closed with the store.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self._path = path
        self._connection = connection
        self._lock = threading.Lock()

    def save(self, record: JobRecord) -> None:
        """Remember a job as it is now.

        Raises:
            StoreError: If the disk is full or fails, or others keep the file locked.
        """
        fields = msgspec.structs.asdict(record)
        fields["results"] = msgspec.json.encode(record.results).decode()
        with self._lock, _translated(self._path):
            self._connection.execute(_SAVE, [fields[name] for name in _COLUMNS])

    def load(self, worker_id: str) -> LoadedJobs:
        """Read the jobs of a worker.

        A row that makes no sense, because somebody edited it, costs only its own job.

        Raises:
            StoreError: If the file can't be read.
        """
        with self._lock, _translated(self._path):
            rows = self._connection.execute(_LOAD, [worker_id]).fetchall()
        loaded = LoadedJobs([], [])
        for row in rows:
            try:
                loaded.records.append(_record(row))
            except (ValueError, RecursionError) as error:
                name = row[0].decode("ascii", "replace")
                loaded.unreadable.append(
                    f"The job {name!r} in {self._path} can't be read: {error}."
                )
        return loaded

    def remove(self, job_id: str) -> None:
        """Forget a job; one that is not known is forgotten already.

        Raises:
            StoreError: If the disk is full or fails, or others keep the file locked.
        """
        with self._lock, _translated(self._path):
            self._connection.execute(_REMOVE, [job_id])

    def close(self) -> None:
        """Close the file, once the call that is under way is done; safe to repeat.

        Raises:
            StoreError: If the disk fails.
        """
        with self._lock, _translated(self._path):
            self._connection.close()


def open_store(path: Path) -> JobStore:
    """Open the store, and make it if it is not there, for its owner only.

    Args:
        path: The file; its directory exists.

    Raises:
        StoreError: If it can't be opened, is damaged, or was made by a newer version.
            The file stays as it is.
    """
    with _translated(path):
        _create_private(path)
        connection = sqlite3.connect(
            path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        try:
            _prepare(path, connection)
        except BaseException:
            connection.close()
            raise
        return JobStore(path, connection)


# -------------------------------------------------------------------- the SQLite side


def _create_private(path: Path) -> None:
    """Make the file if it is not there; SQLite gives its side files the same mode.

    A file that is there is not opened: closing it again would take away the locks that
    this process has on it.
    """
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        pass


def _prepare(path: Path, connection: sqlite3.Connection) -> None:
    # Text that somebody damaged must cost its row only, so rows decode their own.
    connection.text_factory = bytes
    _require_known_version(path, connection)
    # Where WAL is not to be had, the older journal is as safe.
    _use_write_ahead_log(connection)
    connection.execute("PRAGMA synchronous = FULL")
    (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != b"ok":
        raise _damaged(path, "SQLITE_CORRUPT")
    if _version(connection) == 0:
        _create_table(connection)


def _use_write_ahead_log(connection: sqlite3.Connection) -> None:
    """Switch the journal; SQLite does not wait for others by itself here."""
    end = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL").fetchone()
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorname != "SQLITE_BUSY" or time.monotonic() > end:
                raise
            time.sleep(0.01)


def _create_table(connection: sqlite3.Connection) -> None:
    connection.execute("BEGIN IMMEDIATE")
    with connection:  # which commits, or rolls back
        if _version(connection) == 0:  # nobody else was faster
            connection.execute(_TABLE)
            connection.execute(f"PRAGMA user_version = {_VERSION}")


def _version(connection: sqlite3.Connection) -> int:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    return int(version)


def _require_known_version(path: Path, connection: sqlite3.Connection) -> None:
    version = _version(connection)
    if version > _VERSION:
        raise StoreError(
            f"The job store {path} has version {version}, and this sleap-rtc knows "
            f"version {_VERSION}: a newer sleap-rtc has made it. Update sleap-rtc, or "
            "move the file aside to start without its jobs."
        )


def _record(row: tuple[Any, ...]) -> JobRecord:
    """Make a record of a row.

    Raises:
        ValueError: If it makes no sense.
        RecursionError: If its results are nested too deeply.
    """
    fields = {
        name: value.decode() if isinstance(value, bytes) else value
        for name, value in zip(_COLUMNS, row, strict=True)
    }
    fields["results"] = msgspec.json.decode(fields["results"])
    return msgspec.convert(fields, JobRecord)


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Turn what SQLite and the system say into words for people."""
    try:
        yield
    except sqlite3.Error as error:
        raise _store_error(path, error) from None
    except OSError as error:
        raise StoreError(
            f"The job store {path} can't be made: {error.strerror}. See that its "
            "directory is there and can be written.",
            "SQLITE_CANTOPEN",
        ) from None
    except UnicodeEncodeError:
        raise StoreError(
            f"The job can't be noted in {path}: a name in it is no Unicode text. "
            "Rename the directory that it lies in.",
            "SQLITE_MISMATCH",
        ) from None


_PRIMARY_CODE = 0xFF
"""The lower byte of an error code of SQLite; the others say where it happened."""

_ADVICE = {
    sqlite3.SQLITE_FULL: "Make room on the disk.",
    sqlite3.SQLITE_BUSY: "See which other process keeps the file locked.",
    sqlite3.SQLITE_READONLY: "See that the file and its directory can be written.",
    sqlite3.SQLITE_CANTOPEN: "See that the file and its directory can be written.",
    sqlite3.SQLITE_IOERR: "See that the disk works and has room.",
}


def _store_error(path: Path, error: sqlite3.Error) -> StoreError:
    # An error that does not come from SQLite itself has no code.
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & _PRIMARY_CODE
    kind = getattr(error, "sqlite_errorname", "SQLITE_ERROR")
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return _damaged(path, kind)
    advice = _ADVICE.get(code, "Move the file aside to start without its jobs.")
    return StoreError(f"The job store {path} can't be used: {error}. {advice}", kind)


def _damaged(path: Path, kind: str) -> StoreError:
    return StoreError(
        f"The job store {path} is damaged, and was left as it is. Restore it from a "
        f"backup, or move it aside, together with {path.name}-wal and {path.name}-shm, "
        "to start without its jobs. Their results stay in their directories.",
        kind,
    )


# --------------------------------------------------------------------- the Trio side


class StoreWriter:
    """Writes jobs to a store; whoever puts them never waits.

    A disk that is full or slow does not stop a job. Of a job that changes faster than
    it can be written only the latest record is kept, so memory stays bounded.

    Args:
        store: Where they go. It stays open as long as `run` runs.
        log: Where failures are told.
    """

    def __init__(
        self, store: JobStore, log: structlog.typing.FilteringBoundLogger
    ) -> None:
        self._store = store
        self._log = log
        self._waiting: dict[str, JobRecord | None] = {}
        self._changed = trio.Event()
        self._told: set[str] = set()
        self._limiter = trio.CapacityLimiter(1)

    def put(self, entry: JobRecord | str) -> None:
        """Write a record, or forget a job.

        What could not be written before is tried again, too.

        Args:
            entry: What a job is now, or the id of the job to remove.
        """
        if isinstance(entry, JobRecord):
            self._waiting[entry.job_id] = entry
        else:
            self._waiting[entry] = None
        self._changed.set()

    async def run(self) -> None:
        """Write until cancelled, and then for some seconds what still waits."""
        try:
            while True:
                await self._changed.wait()
                self._changed = trio.Event()
                await self._write_waiting()
        finally:
            with trio.move_on_after(_FLUSH_SECONDS, shield=True):
                await self._write_waiting()
            if self._waiting:
                self._log.warning("jobs not stored", jobs=list(self._waiting))

    async def _write_waiting(self) -> None:
        """Write each entry once; what fails, or is interrupted, goes on waiting."""
        for job_id, entry in list(self._waiting.items()):
            try:
                # An abandoned thread ends by itself. The next one waits for it, and
                # writing an entry twice does no harm.
                await trio.to_thread.run_sync(
                    self._write,
                    job_id,
                    entry,
                    abandon_on_cancel=True,
                    limiter=self._limiter,
                )
            except StoreError as error:
                self._tell(error)
            else:
                if self._waiting[job_id] is entry:  # and nothing newer
                    del self._waiting[job_id]
        if not self._waiting:
            self._told.clear()

    def _write(self, job_id: str, entry: JobRecord | None) -> None:
        if entry is None:
            self._store.remove(job_id)
        else:
            self._store.save(entry)

    def _tell(self, error: StoreError) -> None:
        """Log each kind of failure once, until the store has worked again."""
        if error.kind not in self._told:
            self._told.add(error.kind)
            self._log.error("job not stored", reason=str(error))
