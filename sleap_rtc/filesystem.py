"""Helpers for files on storage that a client and a worker share.

They raise `SharedStorageError` for storage that fails and `PathValidationError` for
paths that lead out of the shared root. All of them block; in async code call them with
`trio.to_thread.run_sync`.
"""

import os
import shutil
from pathlib import Path
from typing import TypedDict

from sleap_rtc.io.storage.copy import copy_file
from sleap_rtc.io.storage.folder import StorageError as SharedStorageError
from sleap_rtc.io.storage.folder import explain_errors, split_path
from sleap_rtc.proto.errors import InvalidInput as PathValidationError

__all__ = [
    "DiskUsage",
    "PathValidationError",
    "SharedStorageError",
    "check_disk_space",
    "get_disk_usage",
    "safe_copy",
    "safe_mkdir",
    "to_absolute_path",
    "to_relative_path",
    "validate_path_in_root",
]

StrPath = str | os.PathLike[str]


class DiskUsage(TypedDict):
    """Usage of a file system in bytes, and in percent of the total."""

    total: int
    used: int
    free: int
    percent_used: float


def safe_copy(src: StrPath, dst: StrPath, preserve_metadata: bool = False) -> None:
    """Copy a file, so that no reader ever sees half of the copy.

    Args:
        src: The file.
        dst: The new file in an existing directory, or that directory itself. A file of
            that name is replaced.
        preserve_metadata: Give the copy the permissions and times of the source.

    Raises:
        SharedStorageError: If the copy failed, or less than 120 % of the size is free.
            The copy is removed then.
    """
    source, target = Path(src), Path(dst)
    if target.is_dir():
        target /= source.name
    try:
        if not target.parent.is_dir():
            raise PathValidationError(f"No directory {target.parent}")
        copy_file(
            source,
            target.parent,
            target.name,
            progress=lambda copied: None,
            check=lambda: None,
            replace=True,
        )
    except PathValidationError as error:
        raise SharedStorageError(f"Failed to copy {source}: {error}") from error
    if preserve_metadata:
        with explain_errors(f"Failed to copy the times of {source}"):
            shutil.copystat(source, target)


def safe_mkdir(path: StrPath, parents: bool = True, exist_ok: bool = True) -> None:
    """Create a directory.

    Args:
        path: The directory.
        parents: Create missing parent directories.
        exist_ok: Accept a directory that exists already.

    Raises:
        SharedStorageError: If it cannot be created.
    """
    with explain_errors(f"Failed to create directory {path}"):
        Path(path).mkdir(parents=parents, exist_ok=exist_ok)


def check_disk_space(path: StrPath, required_bytes: int) -> bool:
    """Check that a number of bytes is free.

    Args:
        path: A place on the storage; it need not exist yet.
        required_bytes: Bytes needed.

    Returns:
        True if they are free, False if they are not or the storage does not answer.
    """
    try:
        return get_disk_usage(path)["free"] >= required_bytes
    except SharedStorageError:
        return False


def get_disk_usage(path: StrPath) -> DiskUsage:
    """Return the usage of the file system of a path.

    Args:
        path: A place on the storage; if it does not exist yet, the nearest directory
            above it counts.

    Raises:
        SharedStorageError: If the storage does not answer.
    """
    place = Path(path).absolute()
    with explain_errors(f"Failed to get the disk usage of {path}"):
        while not os.path.lexists(place) and place != place.parent:
            place = place.parent
        usage = shutil.disk_usage(place)
    percent = 100 * usage.used / usage.total if usage.total else 0.0
    return {
        "total": usage.total,
        "used": usage.used,
        "free": usage.free,
        "percent_used": percent,
    }


def validate_path_in_root(
    path: StrPath, root: StrPath, resolve_symlinks: bool = True
) -> Path:
    """Check that a path lies beneath a root.

    The answer holds for the moment of the call. Code that opens a path named by a peer
    uses `sleap_rtc.io.storage.folder.open_beneath` instead, which has no such race.

    Args:
        path: Absolute, or relative to the root. It need not exist.
        root: The root.
        resolve_symlinks: Follow links in both; without it only the text counts.

    Returns:
        The absolute path, without ``..`` and, if resolved, without links.

    Raises:
        PathValidationError: If it leads out of the root.
    """
    resolve = os.path.realpath if resolve_symlinks else os.path.abspath
    try:
        base = Path(resolve(root))
        found = Path(resolve(base / path))
    except ValueError as error:
        raise PathValidationError(f"Path refused: {error}") from None
    if not found.is_relative_to(base):
        raise PathValidationError(
            f"Path outside shared storage: {os.fspath(path)!r} is not beneath"
            f" the root {root}"
        )
    return found


def to_relative_path(path: StrPath, root: StrPath) -> Path:
    """Return the path of a file relative to a root, as the peer names it.

    Args:
        path: Absolute, or relative to the root.
        root: The root as this machine mounts it.

    Returns:
        The path relative to the root, without links. Its `Path.as_posix` is the text
        that crosses the wire.

    Raises:
        PathValidationError: If it leads out of the root.
    """
    return validate_path_in_root(path, root).relative_to(os.path.realpath(root))


def to_absolute_path(path: StrPath, root: StrPath) -> Path:
    """Return the path of a file on this machine.

    Args:
        path: Relative to the root.
        root: The root as this machine mounts it.

    Returns:
        The path beneath the root. It need not exist, and links are not followed.

    Raises:
        PathValidationError: If it is absolute or contains ``..``.
    """
    return Path(root, *split_path(Path(path).as_posix()))
