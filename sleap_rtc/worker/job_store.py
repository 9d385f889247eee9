"""The worker's store of jobs: an SQLite file that outlives the worker.

`JobStore` blocks; call it from a worker thread. `StoreWriter` in
`sleap_rtc/worker/store_writer.py` is for the event loop.
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

from sleap_rtc.proto import messages

_VERSION = 1
"""Version of the table below, kept in ``PRAGMA user_version``; 0 means no table."""

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


class StoreLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of a store and of its writer; the product uses `LIMITS`."""

    busy_timeout: float = 5.0
    """Seconds to wait for another process that writes; a write takes milliseconds."""

    flush_timeout: float = 3.0
    """Seconds for the last writes of a worker that ends."""

    close_timeout: float = 3.0
    """Seconds for closing the store of a worker that ends."""


LIMITS = StoreLimits()
"""The limits of the product."""


class StoreError(Exception):
    """The store cannot be opened, read or written.

    Args:
        message: The failure, the file, and the remedy.
        kind: Name of the failure in SQLite, such as ``SQLITE_FULL``.
    """

    def __init__(self, message: str, kind: str = "") -> None:
        super().__init__(message)
        self.kind = kind


class JobRecord(msgspec.Struct, frozen=True):
    """The part of a job that outlives the worker's process.

    Args:
        job_id: The job.
        worker_id: Peer id of the worker that it belongs to.
        route: The route of the package.
        directory: The job directory, absolute.
        package: Name of the package, or its path beneath the shared root.
        size: Bytes of the package.
        state: The state of the job.
        detail: The reason of a failure, for people.
        output_path: The directory of the models, as the client named it.
        results: Path, relative to the job directory, and bytes of each result.
        updated: Time of the last change, in seconds since the epoch.
    """

    job_id: messages.JobId
    worker_id: str
    route: messages.Route
    directory: str
    package: str
    size: messages.Size
    state: messages.JobStateName
    detail: str
    output_path: str
    results: dict[str, messages.Size]
    updated: float


class LoadedJobs(msgspec.Struct, frozen=True):
    """The jobs of a worker in a store.

    Args:
        records: The jobs, in the order in which they were first saved.
        unreadable: A message for people about each row that is invalid.
    """

    records: list[JobRecord]
    unreadable: list[str]


_COLUMNS = JobRecord.__struct_fields__
_UPDATES = ", ".join(f"{name} = excluded.{name}" for name in _COLUMNS)
_SAVE = (
    f"INSERT INTO jobs ({', '.join(_COLUMNS)}) "
    f"VALUES ({', '.join('?' * len(_COLUMNS))}) "
    # The row keeps its number, so the oldest job stays first.
    f"ON CONFLICT (job_id) DO UPDATE SET {_UPDATES}"
)
_LOAD = f"SELECT {', '.join(_COLUMNS)} FROM jobs WHERE worker_id = ? ORDER BY number"
_REMOVE = "DELETE FROM jobs WHERE job_id = ?"


class JobStore:
    """The jobs of a user's workers; each change is on the disk when the call returns.

    Any number of threads and processes may use one file. Made by `open_store`.

    Args:
        path: The file, for errors.
        connection: The connection to the file; it is closed with the store.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self._path = path
        self._connection = connection
        self._lock = threading.Lock()

    def save(self, record: JobRecord) -> None:
        """Insert or replace the record of a job.

        Raises:
            StoreError: If the disk is full or fails, or the file stays locked.
        """
        fields = msgspec.structs.asdict(record)
        fields["results"] = msgspec.json.encode(record.results).decode()
        with self._lock, _translated(self._path):
            self._connection.execute(_SAVE, [fields[name] for name in _COLUMNS])

    def load(self, worker_id: str) -> LoadedJobs:
        """Read the jobs of a worker.

        An invalid row, for example after an edit by hand, costs only its own job.

        Raises:
            StoreError: If the file cannot be read.
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
                    f"Cannot read the job {name!r} in {self._path}: {error}."
                )
        return loaded

    def remove(self, job_id: str) -> None:
        """Delete the record of a job if the store has one.

        Raises:
            StoreError: If the disk is full or fails, or the file stays locked.
        """
        with self._lock, _translated(self._path):
            self._connection.execute(_REMOVE, [job_id])

    def close(self) -> None:
        """Close the file after the current call; safe to call again.

        Raises:
            StoreError: If the disk fails.
        """
        with self._lock, _translated(self._path):
            self._connection.close()


def open_store(path: Path, limits: StoreLimits = LIMITS) -> JobStore:
    """Open the store, or create it with access for its owner only.

    Args:
        path: The file; its directory exists.
        limits: The limits of the store.

    Raises:
        StoreError: If it cannot be opened, is damaged, or was made by a newer version.
            The file is not changed.
    """
    with _translated(path):
        _create_private(path)
        connection = sqlite3.connect(
            path,
            timeout=limits.busy_timeout,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            _prepare(path, connection, limits)
        except BaseException:
            connection.close()
            raise
        return JobStore(path, connection)


def _create_private(path: Path) -> None:
    """Create the file if it does not exist; SQLite gives its side files the same mode.

    An existing file is not opened: closing it again would drop all locks of this
    process on it.
    """
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        pass


def _prepare(path: Path, connection: sqlite3.Connection, limits: StoreLimits) -> None:
    # Damaged text must cost only its row, so each row is decoded by itself.
    connection.text_factory = bytes
    _require_known_version(path, connection)
    # Where WAL is not available, the older journal is as safe.
    _use_write_ahead_log(connection, limits)
    connection.execute("PRAGMA synchronous = FULL")
    (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != b"ok":
        raise _damaged(path, "SQLITE_CORRUPT")
    if _version(connection) == 0:
        _create_table(connection)


def _use_write_ahead_log(connection: sqlite3.Connection, limits: StoreLimits) -> None:
    """Switch the journal; here SQLite does not wait for other processes itself."""
    end = time.monotonic() + limits.busy_timeout
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
    with connection:  # commits, or rolls back
        if _version(connection) == 0:  # no other process has created it
            connection.execute(_TABLE)
            connection.execute(f"PRAGMA user_version = {_VERSION}")


def _version(connection: sqlite3.Connection) -> int:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    return int(version)


def _require_known_version(path: Path, connection: sqlite3.Connection) -> None:
    version = _version(connection)
    if version > _VERSION:
        raise StoreError(
            f"The job store {path} has version {version}, and this sleap-rtc reads "
            f"version {_VERSION}: a newer sleap-rtc has made it. Update sleap-rtc, or "
            "move the file aside to start without its jobs."
        )


def _record(row: tuple[Any, ...]) -> JobRecord:
    """Convert a row to a record.

    Raises:
        ValueError: If a field is invalid.
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
    """Convert the errors of SQLite and of the system to `StoreError`."""
    try:
        yield
    except sqlite3.Error as error:
        raise _store_error(path, error) from None
    except OSError as error:
        raise StoreError(
            f"Cannot create the job store {path}: {error.strerror}. Check that its "
            "directory exists and can be written.",
            "SQLITE_CANTOPEN",
        ) from None
    except UnicodeEncodeError:
        raise StoreError(
            f"Cannot store the job in {path}: a name in it is not Unicode text. "
            "Rename the directory of the job.",
            "SQLITE_MISMATCH",
        ) from None


_PRIMARY_CODE = 0xFF
"""Mask of the byte in an error code of SQLite that is the kind of the error."""

_ADVICE = {
    sqlite3.SQLITE_FULL: "Make room on the disk.",
    sqlite3.SQLITE_BUSY: "Find the other process that keeps the file locked.",
    sqlite3.SQLITE_READONLY: "Check that the file and its directory can be written.",
    sqlite3.SQLITE_CANTOPEN: "Check that the file and its directory can be written.",
    sqlite3.SQLITE_IOERR: "Check that the disk works and has room.",
}


def _store_error(path: Path, error: sqlite3.Error) -> StoreError:
    # Errors of the Python module have no code.
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & _PRIMARY_CODE
    kind = getattr(error, "sqlite_errorname", "SQLITE_ERROR")
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return _damaged(path, kind)
    advice = _ADVICE.get(code, "Move the file aside to start without its jobs.")
    return StoreError(f"Cannot use the job store {path}: {error}. {advice}", kind)


def _damaged(path: Path, kind: str) -> StoreError:
    return StoreError(
        f"The job store {path} is damaged; it was not changed. Restore it from a "
        f"backup, or move it aside, together with {path.name}-wal and {path.name}-shm, "
        "to start without its jobs. Their results stay in their directories.",
        kind,
    )
