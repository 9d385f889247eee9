"""Copy a file to shared storage: fast, whole or not at all, and never for ever."""

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import trio

from sleap_rtc.io.files import (
    PartFile,
    file_identity,
    read_at,
    start_part_file,
    write_at,
)
from sleap_rtc.io.folder import (
    CopyTimeoutError,
    SharedStorageError,
    StoppedError,
    explain_errors,
    open_owned,
    split_path,
)

SPACE_PERCENT = 120
"""Free space that a copy needs, in percent of the file: results follow it."""

SLOWEST_RATE = 10 * 1024 * 1024
"""Bytes per second below which storage counts as hanging."""

SHORTEST_TIMEOUT = 60.0
"""Seconds that even a small copy may take: network mounts fail over in about 30."""

_CLEANUP_SECONDS = 2.0
"""How long an ended copy may take to remove its part file before it is left to it."""

_MEBIBYTE = 1024 * 1024
_BUFFER = 4 * _MEBIBYTE
_FIRST_RANGE = 8 * _MEBIBYTE
_SMALLEST_RANGE = _MEBIBYTE
_LARGEST_RANGE = 64 * _MEBIBYTE
_SHORT_CALL = 0.05
_LONG_CALL = 0.25
"""Seconds. A range grows while calls are short, so that a stop is never far."""

_KERNEL_CAN_NOT = frozenset(
    [
        errno.EXDEV,
        errno.EOPNOTSUPP,
        errno.ENOTSUP,
        errno.ENOSYS,
        errno.EINVAL,
        errno.EPERM,  # old sandboxes answer so for calls that they do not know
        errno.EBADF,
    ]
)
"""What copy_file_range() answers for a pair of file systems that it can't serve."""


def copy_file(
    source: Path,
    root: Path,
    relative: str,
    *,
    progress: Callable[[int], None],
    cancelled: Callable[[], bool],
    replace: bool = False,
) -> Path:
    """Copy a file to a new one beneath a root, in the calling thread.

    Nothing has the new name before all of the content is on the disk; after a failure
    or a stop nothing is left but directories.

    Args:
        source: A file that the owner of this process named.
        root: An existing directory that the owner named.
        relative: Where beneath it the copy goes; missing directories are made.
        progress: Called now and then with the bytes copied so far.
        cancelled: Asked between calls to the system whether to stop.
        replace: Take the place of a file of that name, instead of refusing.

    Returns:
        The path of the copy.

    Raises:
        PathValidationError: If the source is no readable file, or the path leads out.
        InsufficientSpaceError: If less than 120 % of the size is free.
        SharedStorageError: If the name is taken, the source changed meanwhile, or
            storage failed.
        StoppedError: If `cancelled` said so.
    """
    _stop_if(cancelled)
    fd = open_owned(source)
    try:
        with explain_errors(f"Failed to copy {source.name}"):
            part = start_part_file(
                root,
                split_path(relative),
                needed=os.fstat(fd).st_size * SPACE_PERCENT // 100,
                where="on shared storage",
                replace=replace,
            )
            try:
                _fill(part, fd, progress, cancelled)
                return part.publish()
            finally:
                part.discard()
    finally:
        os.close(fd)


async def copy_with_deadline(
    source: Path,
    root: Path,
    relative: str,
    *,
    on_progress: Callable[[int], None],
    timeout: float | None = None,
) -> Path:
    """Copy a file to a new one beneath a root, in a worker thread.

    The event loop stays responsive when storage hangs; the thread is then left behind.
    Cancellation stops the copy and removes what it wrote.

    Args:
        source: A file that the owner of this process named.
        root: An existing directory that the owner named.
        relative: Where beneath it the copy goes; missing directories are made.
        on_progress: Called in the event loop with the bytes copied so far.
        timeout: Seconds for the whole copy. By default 30 and one for each 10 MiB,
            but at least 60.

    Returns:
        The path of the copy.

    Raises:
        CopyTimeoutError: If it took longer.
        PathValidationError: As `copy_file`.
        InsufficientSpaceError: As `copy_file`.
        SharedStorageError: As `copy_file`.
    """
    began = trio.current_time()
    with trio.move_on_after(SHORTEST_TIMEOUT if timeout is None else timeout) as scope:
        if timeout is None:
            size = await trio.to_thread.run_sync(
                _size_of, source, abandon_on_cancel=True
            )
            scope.deadline = began + default_timeout(size)
        return await _copy_in_thread(source, root, relative, on_progress)
    raise CopyTimeoutError(
        f"File copy timed out after {round(scope.deadline - began, 1):g} seconds:"
        f" {relative}. Check that the shared storage answers"
    )


def default_timeout(size: int) -> float:
    """Say how many seconds the copy of a file of so many bytes may take."""
    return max(SHORTEST_TIMEOUT, size / SLOWEST_RATE + 30)


async def _copy_in_thread(
    source: Path, root: Path, relative: str, on_progress: Callable[[int], None]
) -> Path:
    """Run `copy_file`; when cancelled, give it a moment to clean up."""
    token = trio.lowlevel.current_trio_token()
    running, stop = threading.Event(), threading.Event()
    ended = trio.Event()

    def report(copied: int) -> None:
        trio.from_thread.run_sync(on_progress, copied)

    def run() -> Path:
        running.set()
        try:
            return copy_file(
                source, root, relative, progress=report, cancelled=stop.is_set
            )
        finally:
            try:
                token.run_sync_soon(ended.set)
            except trio.RunFinishedError:
                pass  # this thread hung for longer than the event loop lived

    try:
        return await trio.to_thread.run_sync(run, abandon_on_cancel=True)
    finally:
        stop.set()
        if running.is_set():
            with trio.move_on_after(_CLEANUP_SECONDS, shield=True):
                await ended.wait()


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0  # copy_file() will say what is wrong with it


def _fill(
    part: PartFile,
    source: int,
    progress: Callable[[int], None],
    cancelled: Callable[[], bool],
) -> None:
    """Copy all of an open file."""
    before = file_identity(source)
    copied = 0
    with part.use() as target:
        for rung in _RUNGS:
            for offset in rung(source, target, copied, before[0]):
                copied = offset
                progress(copied)
                _stop_if(cancelled)
    if file_identity(source) != before:
        raise SharedStorageError(f"{part.path.name} changed while it was copied")


def _stop_if(cancelled: Callable[[], bool]) -> None:
    if cancelled():
        raise StoppedError("The copy was stopped")


def _copy_in_kernel(source: int, target: int, offset: int, size: int) -> Iterator[int]:
    """Copy without moving the data through this process, where the kernel can.

    On XFS and btrfs it shares the blocks, on NFS 4.2 and SMB 3 the server copies.

    Yields:
        The bytes copied so far; the last is where it could not go on.
    """
    length = _FIRST_RANGE
    while offset < size and hasattr(os, "copy_file_range"):
        began = time.monotonic()
        try:
            count = os.copy_file_range(
                source, target, min(length, size - offset), offset, offset
            )
        except OSError as error:
            if error.errno in _KERNEL_CAN_NOT:
                return
            raise
        if count == 0:
            return
        took = time.monotonic() - began
        offset += count
        yield offset
        if took < _SHORT_CALL:
            length = min(length * 2, _LARGEST_RANGE)
        elif took > _LONG_CALL:
            length = max(length // 2, _SMALLEST_RANGE)


def _copy_through_memory(
    source: int, target: int, offset: int, size: int
) -> Iterator[int]:
    """Copy with reads and writes, which any pair of file systems can.

    Yields:
        The bytes copied so far.
    """
    while offset < size:
        data = read_at(source, min(_BUFFER, size - offset), offset)
        if not data:
            return  # the file became shorter: the caller compares
        write_at(target, data, offset)
        offset += len(data)
        yield offset


_RUNGS = (_copy_in_kernel, _copy_through_memory)
"""The ways to copy, best first; each goes on where the one before it stopped."""
