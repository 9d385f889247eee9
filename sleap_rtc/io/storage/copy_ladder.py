"""The ways to move the content of one open file into another, best first.

A rung is a generator: it yields the bytes copied so far, counted from the start of the
file, and ends where it can't go on; the next rung goes on there. Its owner may close it
at any yield. What storage answers to a pair of files that a rung can't serve is no
error; everything else is.

No rung hashes what it copies. The first three never see the bytes: the kernel or the
server moves them. To hash them all the same costs far more than a few percent. On two
busy cores, copies of 256 MiB took so many times as long (tmpfs to ext4, ext4 to tmpfs,
tmpfs to NFS):

- with BLAKE3 of each block that ``read/write`` moves: 1.4, 1.6, not measured
- with BLAKE3 of the source, in a thread beside ``sendfile``: 1.3, 1.3, 1.6
- with BLAKE3 of the copy, read back without the page cache: 1.7, 4.6, 1.4

The first two say only what was read, not what arrived. The third one asks the same
machine that wrote. The worker that unpacks a package reads all of it, often on another
machine, and compares the CRC-32 of each file in it: see `sleap_rtc.io.storage.archive`.
"""

import ctypes
import errno
import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager

from sleap_rtc.io.storage.files import read_at, write_at

Steps = Generator[int, None, None]
"""The bytes copied so far, after each step."""

Rung = Callable[[int, int, int, int], Steps]
"""Takes source, target, the offset to go on at, and the size of the source."""

_MEBIBYTE = 1024 * 1024
_BUFFER = _MEBIBYTE // 2
"""Bytes that are read at once, and are still in the processor's cache when written.

Writes of 1 MiB and more make Linux look for large pages, which takes longer.
"""

_LARGEST_RANGE = 8 * _MEBIBYTE
_SMALLEST_RANGE = _MEBIBYTE
_SHORT_CALL = 0.05
_LONG_CALL = 0.25
"""Seconds. A range grows while calls are short, so that a stop is never far.

Even where 10 MiB take a second the largest one takes less than that. Larger ones make
no copy faster.
"""

_FICLONE = 0x40049409
"""``_IOW(0x94, 9, int)``, see ioctl_ficlone(2)."""

_SYNC_FILE_RANGE_WRITE = 2
"""See sync_file_range(2)."""

_KERNEL_CAN_NOT = frozenset(
    [
        errno.EXDEV,
        errno.EOPNOTSUPP,
        errno.ENOTSUP,
        errno.ENOSYS,
        errno.ENOTTY,
        errno.EINVAL,
        errno.EPERM,  # old sandboxes answer so for calls that they do not know
        errno.EBADF,
    ]
)
"""What the kernel answers for a pair of file systems that it can't serve."""


def copy_by_reflink(source: int, target: int, offset: int, size: int) -> Steps:
    """Let both files share their blocks: XFS, Btrfs, NFS 4.2 on top of those.

    Yields:
        The size, once.
    """
    if sys.platform != "linux" or offset > 0 or size == 0:
        return
    import fcntl  # only where there is one

    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as error:
        if error.errno in _KERNEL_CAN_NOT:
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

    def move(begin: int, length: int) -> int:
        return os.copy_file_range(source, target, length, begin, begin)

    yield from _move_ranges(move, offset, size)


def copy_by_sendfile(source: int, target: int, offset: int, size: int) -> Steps:
    """Let the kernel read and write, also from one file system to another.

    What has been written goes to the disk, or to the server, at once: else most of it
    waits in memory for the fsync at the end.

    Yields:
        The bytes copied so far.
    """
    if sys.platform != "linux":
        return  # others send only to sockets
    os.lseek(target, offset, os.SEEK_SET)

    def move(begin: int, length: int) -> int:
        count = os.sendfile(target, source, begin, length)
        _start_flushing(target, begin, count)
        return count

    yield from _move_ranges(move, offset, size)


def copy_in_parallel(source: int, target: int, offset: int, size: int) -> Steps:
    """Copy with two threads, so that one reads while the other writes.

    Yields:
        The bytes copied so far.
    """
    if size - offset <= _BUFFER or not hasattr(os, "pread"):
        return
    blocks = _Blocks(source, target, offset, size)
    with blocks.moved_by_a_helper():
        yield from blocks.move()
    yield blocks.copied


def copy_plainly(source: int, target: int, offset: int, size: int) -> Steps:
    """Copy with reads and writes, which any system can.

    Yields:
        The bytes copied so far.
    """
    return _Blocks(source, target, offset, size).move()


LADDER: tuple[tuple[str, Rung], ...] = (
    ("reflink", copy_by_reflink),
    ("copy_file_range", copy_in_kernel),
    ("sendfile", copy_by_sendfile),
    ("parallel read/write", copy_in_parallel),
    ("read/write", copy_plainly),
)
"""The rungs in the order in which they are tried, with their names for people."""


def _move_ranges(move: Callable[[int, int], int], offset: int, size: int) -> Steps:
    """Move range by range, as long as the kernel can.

    Args:
        move: Takes an offset and a length; returns the bytes it moved, 0 at the end.
        offset: Where to begin.
        size: Where to end.

    Yields:
        The bytes copied so far.
    """
    length = _LARGEST_RANGE
    while offset < size:
        began = time.monotonic()
        try:
            count = move(offset, min(length, size - offset))
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


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _start_flushing(fd: int, offset: int, length: int) -> None:
    """Let Linux write a range of a file to the disk, without waiting for it.

    Raises:
        OSError: If the storage failed.
    """
    begin, count = ctypes.c_int64(offset), ctypes.c_int64(length)
    if _libc().sync_file_range(fd, begin, count, _SYNC_FILE_RANGE_WRITE) != 0:
        code = ctypes.get_errno()
        if code not in _KERNEL_CAN_NOT:
            raise OSError(code, os.strerror(code))


class _Blocks:
    """The blocks of a file, each moved by whichever thread is free.

    One thread at a time reads, in order, which suits the read-ahead of the system. File
    systems let one thread at a time write to a file, so two threads are enough.
    """

    def __init__(self, source: int, target: int, offset: int, size: int) -> None:
        self.copied = offset
        self._source = source
        self._target = target
        self._next = offset
        self._size = size
        self._reading = threading.Lock()
        self._counting = threading.Lock()
        self._failure: OSError | MemoryError | None = None

    def move(self) -> Steps:
        """Move blocks until none is left.

        Yields:
            The bytes copied so far, by all threads, after each block of this one.
        """
        buffer = memoryview(bytearray(min(_BUFFER, self._size - self._next)))
        while True:
            with self._reading:
                offset = self._next
                data = self._read_next(buffer)
            if not data:
                return
            write_at(self._target, data, offset)
            with self._counting:
                self.copied += len(data)
            yield self.copied

    @contextmanager
    def moved_by_a_helper(self) -> Iterator[None]:
        """Let a second thread move blocks during the ``with`` block.

        Raises:
            OSError: If the storage failed in that thread.
        """
        # A thread that hangs in a call must not keep the process from ending.
        helper = threading.Thread(target=self._help, daemon=True)
        helper.start()
        try:
            yield
        finally:
            self._stop()
            helper.join()
        if self._failure is not None:
            raise self._failure

    def _help(self) -> None:
        try:
            for _ in self.move():
                pass
        except (OSError, MemoryError) as error:
            self._failure = error
            self._stop()

    def _stop(self) -> None:
        """Let nobody find another block."""
        with self._reading:
            self._size = self._next

    def _read_next(self, buffer: memoryview) -> memoryview:
        """Read the next block; a source that became shorter has fewer."""
        view = buffer[: self._size - self._next]
        if hasattr(os, "preadv"):
            view = view[: os.preadv(self._source, [view], self._next)]
        else:
            view = memoryview(read_at(self._source, len(view), self._next))
        self._next += len(view)
        return view
