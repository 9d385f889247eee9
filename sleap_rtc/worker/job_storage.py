"""Job directories on the disk of a worker and on the shared storage."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TypeVar, TypeVarTuple

from sleap_rtc.io.storage.call import STORAGE_TIMEOUT, call_storage
from sleap_rtc.io.storage.copy import SPACE_PERCENT
from sleap_rtc.io.storage.folder import StorageError, list_tree, open_beneath
from sleap_rtc.io.storage.probe import ask_storage
from sleap_rtc.io.transfer.chunk_files import CHUNK_SIZE, ChunkReader
from sleap_rtc.proto.errors import InvalidInput
from sleap_rtc.proto.sizes import human_size
from sleap_rtc.worker.job_log import LOG_NAME

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


async def ask_shared(
    root: Path | None, function: Callable[[Path, *Ts], T], *args: *Ts
) -> T:
    """Call a function that touches the shared storage, which may hang.

    The error names the worker, because the client has shared storage as well.

    Raises:
        StorageError: If it is not configured, fails, or hangs.
        InvalidInput: If a path is not acceptable.
    """
    if root is None:
        raise StorageError("Shared storage not configured on the worker")
    try:
        return await ask_storage(root, function, root, *args, timeout=STORAGE_TIMEOUT)
    except StorageError as error:
        raise StorageError(f"the worker's shared storage: {error}") from None


def look_at_package(root: Path, path: str) -> None:
    """Check that a package exists and can be read (blocking).

    Raises:
        InvalidInput: If it is not a file, or is not in a directory of its own.
        StorageError: If the storage failed.
    """
    source = ChunkReader(open_beneath(root, path), chunk_size=CHUNK_SIZE)
    source.close()
    if len(PurePosixPath(path).parts) < 2:
        raise InvalidInput(f"{path} must lie in a directory of its own")


def make_room(directory: Path, size: int) -> None:
    """Make the directory of a job for a package of `size` bytes (blocking).

    A directory with only a part of a package is reused: the worker no longer has the
    record of its job, and the client sends the rest.

    Raises:
        StorageError: If the disk has too little room, or the job exists.
    """
    try:
        directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        free = shutil.disk_usage(directory.parent).free + _bytes_in(directory)
        needed = size * SPACE_PERCENT // 100
        if free < needed:
            raise StorageError(
                f"Insufficient disk space on the worker: need {human_size(needed)}, "
                f"have {human_size(free)}"
            )
        directory.mkdir(mode=0o700)
    except FileExistsError:
        if list_tree(directory):  # parts are hidden files, which are not listed
            raise StorageError(f"{directory.name} is known to the worker") from None
    except OSError as error:
        raise StorageError(
            f"The worker cannot make {directory}: {error.strerror}"
        ) from None


def _bytes_in(directory: Path) -> int:
    """Return the bytes of the parts in a directory."""
    try:
        with os.scandir(directory) as entries:
            return sum(entry.stat(follow_symlinks=False).st_size for entry in entries)
    except OSError:
        return 0


def open_result(directory: Path, path: str) -> ChunkReader:
    """Open a result in a job directory (blocking).

    Raises:
        InvalidInput: If it is not a file of the job.
        StorageError: If the storage failed.
    """
    return ChunkReader(open_beneath(directory, path), chunk_size=CHUNK_SIZE)


async def is_package_there(directory: Path, name: str, size: int) -> bool:
    """Return True if a job directory has the whole package.

    It is False for storage that fails or hangs, which must not keep a worker from
    starting.
    """
    try:
        found = await call_storage(os.lstat, directory / name, timeout=STORAGE_TIMEOUT)
    except (OSError, StorageError):
        return False
    return found.st_size == size


async def results_left(directory: Path, output: str) -> dict[str, int]:
    """Return the models and the log of a job whose worker was killed, with their sizes.

    It is empty for storage that fails or hangs, which must not keep a worker from
    starting.

    Args:
        directory: The job directory.
        output: Path of the models; its last part is their place in the directory.
    """
    models = PurePosixPath(output).name
    try:
        found = await ask_storage(
            directory, list_tree, directory, timeout=STORAGE_TIMEOUT
        )
    except (StorageError, InvalidInput):
        return {}
    return {
        path: size
        for path, size, _ in found
        if path == LOG_NAME or PurePosixPath(path).parts[0] == models
    }
