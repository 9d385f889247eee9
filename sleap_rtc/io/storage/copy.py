"""Copy a file to shared storage: fast, whole or not at all, and in limited time.

A copy is published when all of its bytes are on the disk (fsync), it has the size of
the source, and the source was not changed meanwhile. Its content is not hashed; for the
reason see `sleap_rtc.io.storage.copy_strategies`.
"""

import math
import os
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import msgspec
import trio

from sleap_rtc.io.storage.call import call_storage
from sleap_rtc.io.storage.copy_strategies import STRATEGIES
from sleap_rtc.io.storage.files import PartFile, file_identity, start_part_file
from sleap_rtc.io.storage.folder import (
    CopyTimeoutError,
    StorageError,
    explain_errors,
    open_owned,
    split_path,
)

SPACE_PERCENT = 120
"""Percent of the file that must be free for a copy, because results follow it."""

MIN_RATE = 10 * 1024 * 1024
"""Bytes per second below which storage counts as hanging."""

MIN_TIMEOUT = 60.0
"""Seconds that even a small copy may take: network mounts fail over in about 30."""

_REPORT_INTERVAL = 0.1
"""Seconds between reports to the event loop: one takes as long as copying a block."""


class CopyReport(msgspec.Struct, frozen=True):
    """Result of a copy.

    Args:
        path: The copy.
        method: The strategies that made it, such as ``reflink`` or ``read/write``.
        size: Its bytes.
        seconds: The time until it was on the disk.
    """

    path: Path
    method: str
    size: int
    seconds: float


def copy_file(
    source: Path,
    root: Path,
    relative: str,
    *,
    progress: Callable[[int], None],
    check: Callable[[], None],
    size: int | None = None,
    replace: bool = False,
) -> CopyReport:
    """Copy a file to a new one beneath a root, in the calling thread.

    The copy gets its name when all of its content is on the disk. After a failure or a
    stop, at most new directories are left.

    Args:
        source: A file that the owner of this process named.
        root: An existing directory that the owner named.
        relative: Path of the copy beneath it; missing directories are made.
        progress: Called at intervals with the bytes copied so far.
        check: Called between calls to the system; it stops the copy by raising.
        size: Bytes that the source must have; by default any number.
        replace: Replace a file of that name instead of refusing.

    Returns:
        The path of the copy, and its method.

    Raises:
        InvalidInput: If the source is not a readable file, or the path leads out.
        InsufficientSpaceError: If less than 120 % of the size is free.
        StorageError: If the name is taken, the source has another size or
            changes meanwhile, or storage failed.
    """
    began = time.monotonic()
    check()
    fd = open_owned(source)
    try:
        with explain_errors(f"Failed to copy {source.name}"):
            before = file_identity(fd)
            found = before[0]
            if size not in (None, found):
                raise StorageError(
                    f"{source.name} has {found} bytes instead of {size}:"
                    " it changed meanwhile"
                )
            part = start_part_file(
                root,
                split_path(relative),
                needed=found * SPACE_PERCENT // 100,
                where="on shared storage",
                replace=replace,
            )
            try:
                method = _fill(part, fd, found, progress=progress, check=check)
                if file_identity(fd) != before:
                    raise StorageError(
                        f"{source.name} changed while it was copied: wait until"
                        " nothing writes to it, and try again"
                    )
                _settle(part, source.name, found)
                # Storage that hung may answer after the caller has given up.
                check()
                path = part.publish()
                return CopyReport(path, method, found, time.monotonic() - began)
            finally:
                part.discard()
    finally:
        os.close(fd)


async def copy_with_deadline(
    source: Path,
    root: Path,
    relative: str,
    *,
    size: int,
    on_progress: Callable[[int], None],
) -> CopyReport:
    """Copy a file to a new one beneath a root, in a worker thread.

    The copy may take 30 seconds and one for each 10 MiB, but at least 60. The event
    loop stays responsive when storage hangs; the thread is then left behind.
    Cancellation stops the copy and removes the part that was written.

    Args:
        source: A file that the owner of this process named.
        root: An existing directory that the owner named.
        relative: Path of the copy beneath it; missing directories are made.
        size: Bytes that the source must have.
        on_progress: Called in the event loop with the bytes copied so far.

    Returns:
        The path of the copy, and its method.

    Raises:
        CopyTimeoutError: If it took longer.
        InvalidInput: As `copy_file`.
        InsufficientSpaceError: As `copy_file`.
        StorageError: As `copy_file`.
    """
    limit = copy_timeout(size)
    with trio.move_on_after(limit):
        return await _copy_in_thread(
            source, root, relative, size=size, on_progress=on_progress
        )
    raise CopyTimeoutError(
        f"File copy timed out after {round(limit, 1):g} seconds:"
        f" {relative}. Check that the shared storage answers"
    )


def copy_timeout(size: int) -> float:
    """Return the seconds that the copy of a file of `size` bytes may take."""
    return max(MIN_TIMEOUT, size / MIN_RATE + 30)


async def _copy_in_thread(
    source: Path,
    root: Path,
    relative: str,
    *,
    size: int,
    on_progress: Callable[[int], None],
) -> CopyReport:
    """Run `copy_file`; once cancelled, it stops and cleans up."""
    is_over = False
    told = -math.inf

    def tell(copied: int) -> None:
        if not is_over:
            on_progress(copied)

    def report(copied: int) -> None:
        nonlocal told
        now = time.monotonic()
        if copied == size or now - told >= _REPORT_INTERVAL:
            told = now
            trio.from_thread.run_sync(tell, copied)

    def run() -> CopyReport:
        return copy_file(
            source,
            root,
            relative,
            progress=report,
            check=trio.from_thread.check_cancelled,
            size=size,
        )

    try:
        return await call_storage(run)
    finally:
        is_over = True


def _fill(
    part: PartFile,
    source: int,
    size: int,
    *,
    progress: Callable[[int], None],
    check: Callable[[], None],
) -> str:
    """Copy by each strategy; each resumes where the one before it stopped.

    Returns:
        The names of the strategies that copied something.
    """
    copied, used = 0, []
    with part.use() as target:
        for method, strategy in STRATEGIES:
            start = copied
            with closing(strategy(source, target, copied, size)) as steps:
                for copied in steps:
                    progress(copied)
                    check()
            if copied > start:
                used.append(method)
            if copied == size:
                break
    return ", then ".join(used) or "nothing to copy"


def _settle(part: PartFile, name: str, size: int) -> None:
    """Sync a copy to the disk, and check that all of it arrived."""
    with part.use() as target:
        os.fsync(target)
        arrived = os.fstat(target).st_size
    if arrived != size:
        raise StorageError(
            f"Failed to copy {name}: {arrived} of {size} bytes arrived on the storage"
        )
