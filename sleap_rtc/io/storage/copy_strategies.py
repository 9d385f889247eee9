"""The strategies to copy the content of one open file into another, best first.

A strategy is a generator: it yields the bytes copied so far, counted from the start of
the file, and ends where it cannot continue; the next strategy resumes there. Its caller
may close it at any yield. A pair of files that a strategy cannot serve is not an error;
every other failure of the storage is.

Written ranges go to the disk, or to the server, at once. Otherwise most of them would
wait in memory for the fsync at the end.

No strategy hashes the content. In the first two the kernel or the server moves the
bytes, and this process never sees them. Hashing costs far more than a few percent. On
two busy cores, copies of 256 MiB took this many times as long (tmpfs to ext4, ext4 to
tmpfs, tmpfs to NFS):

- with BLAKE3 of each block that ``read/write`` moves: 1.4, 1.6, not measured
- with BLAKE3 of the source in another thread: 1.3, 1.3, 1.6
- with BLAKE3 of the copy, read back without the page cache: 1.7, 4.6, 1.4

The first two prove only which bytes were read, not which arrived. The third asks the
machine that wrote them. The worker that unpacks a package reads all of it, often on
another machine, and compares the CRC-32 of each file (`sleap_rtc.io.storage.archive`).
"""

import ctypes
import errno
import functools
import os
import sys
import time
from collections.abc import Callable, Generator

from sleap_rtc.io.storage.files import read_at, write_at

Steps = Generator[int, None, None]
"""The bytes copied so far, after each step."""

Strategy = Callable[[int, int, int, int], Steps]
"""A copy from a source to a target, from an offset on, up to the size of the source."""

_MEBIBYTE = 1024 * 1024
_BUFFER = _MEBIBYTE // 2
"""Bytes that are read at once. They are still in the processor's cache when written.

Writes of 1 MiB and more make Linux look for large pages, which takes longer.
"""

_MAX_RANGE = 8 * _MEBIBYTE
_MIN_RANGE = _MEBIBYTE
"""Bytes of a range. Even where 10 MiB take a second, the largest range takes less than
that, so that a copy can stop soon. Larger ranges make no copy faster."""

_SHORT_CALL = 0.05
"""Seconds below which a call makes the next range larger."""

_LONG_CALL = 0.25
"""Seconds above which a call makes the next range smaller."""

_FICLONE = 0x40049409
"""``_IOW(0x94, 9, int)``, see ioctl_ficlone(2)."""

_SYNC_FILE_RANGE_WRITE = 2
"""Flag of sync_file_range(2): start to write, and do not wait."""

_KERNEL_CANNOT = frozenset(
    [
        errno.EXDEV,
        errno.EOPNOTSUPP,
        errno.ENOTSUP,
        errno.ENOSYS,
        errno.ENOTTY,
        errno.EINVAL,
        errno.EPERM,  # old sandboxes return this for unknown calls
        errno.EBADF,
    ]
)
"""Answers of the kernel for a pair of file systems that it cannot serve."""


def copy_by_reflink(source: int, target: int, offset: int, size: int) -> Steps:
    """Share the blocks of the source: XFS, Btrfs, NFS 4.2 on top of those.

    Yields:
        The size, once.
    """
    if sys.platform != "linux" or offset > 0 or size == 0:
        return
    import fcntl  # not every system has it

    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as error:
        if error.errno in _KERNEL_CANNOT:
            return
        raise
    yield size


def copy_in_kernel(source: int, target: int, offset: int, size: int) -> Steps:
    """Copy without moving the data through this process, where the kernel can.

    On NFS 4.2 and SMB 3 the server copies.

    Yields:
        The bytes copied so far.
    """
    if sys.platform != "linux" or not hasattr(os, "copy_file_range"):
        return
    length = _MAX_RANGE
    while offset < size:
        began = time.monotonic()
        wanted = min(length, size - offset)
        try:
            count = os.copy_file_range(source, target, wanted, offset, offset)
        except OSError as error:
            if error.errno in _KERNEL_CANNOT:
                return
            raise
        if count == 0:
            return
        _start_flushing(target, offset, count)
        took = time.monotonic() - began
        offset += count
        yield offset
        if took < _SHORT_CALL:
            length = min(length * 2, _MAX_RANGE)
        elif took > _LONG_CALL:
            length = max(length // 2, _MIN_RANGE)


def copy_plainly(source: int, target: int, offset: int, size: int) -> Steps:
    """Copy with reads and writes, which any system can.

    Yields:
        The bytes copied so far.
    """
    buffer = memoryview(bytearray(min(_BUFFER, size - offset)))
    flushed = offset
    while data := _read_block(source, buffer[: size - offset], offset):
        write_at(target, data, offset)
        offset += len(data)
        if offset - flushed >= _MAX_RANGE:
            _start_flushing(target, flushed, offset - flushed)
            flushed = offset
        yield offset


STRATEGIES: tuple[tuple[str, Strategy], ...] = (
    ("reflink", copy_by_reflink),
    ("copy_file_range", copy_in_kernel),
    ("read/write", copy_plainly),
)
"""The strategies in the order in which they are tried, with their names for people."""


def _read_block(fd: int, buffer: memoryview, offset: int) -> memoryview:
    """Read the bytes at a place of a file, fewer only at its end."""
    if hasattr(os, "preadv"):
        return buffer[: os.preadv(fd, [buffer], offset)] if buffer else buffer
    return memoryview(read_at(fd, len(buffer), offset))


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _start_flushing(fd: int, offset: int, length: int) -> None:
    """Start to write a range of a file to the disk, without waiting for it.

    Raises:
        OSError: If the storage failed.
    """
    if sys.platform != "linux":
        return
    begin, count = ctypes.c_int64(offset), ctypes.c_int64(length)
    if _libc().sync_file_range(fd, begin, count, _SYNC_FILE_RANGE_WRITE) != 0:
        code = ctypes.get_errno()
        if code not in _KERNEL_CANNOT:
            raise OSError(code, os.strerror(code))
