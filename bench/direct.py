"""A copy that writes past the page cache (`O_DIRECT`), for comparison."""

import mmap
import os
import threading
from collections.abc import Iterator
from queue import Queue

from sleap_rtc.io.storage.copy_strategies import Steps

BLOCK = 4 * 1024 * 1024
ALIGNMENT = 4096
"""Bytes of which file offsets, lengths and addresses have to be multiples."""


def copy_directly(source: int, target: int, offset: int, size: int) -> Steps:
    """Copy a file: another thread reads while this one writes.

    Yields:
        The bytes copied so far.

    Raises:
        OSError: If the file system does not offer it.
    """
    flags = os.O_WRONLY | os.O_DIRECT
    direct = os.open(f"/proc/self/fd/{target}", flags)
    # Memory maps begin at a page.
    free: Queue[mmap.mmap] = Queue()
    for _ in range(2):
        free.put(mmap.mmap(-1, BLOCK))
    try:
        for buffer, length in _read_ahead(source, offset, size, free):
            aligned = length // ALIGNMENT * ALIGNMENT
            with memoryview(buffer) as view:
                _write(direct, view[:aligned], offset)
                _write(target, view[aligned:length], offset + aligned)
            offset += length
            yield offset
            free.put(buffer)
    finally:
        os.close(direct)


def _read_ahead(
    source: int, offset: int, size: int, free: "Queue[mmap.mmap]"
) -> Iterator[tuple[mmap.mmap, int]]:
    """Read blocks in another thread, as long as there are free buffers."""
    full: Queue[tuple[mmap.mmap, int]] = Queue()

    def read() -> None:
        for begin in range(offset, size, BLOCK):
            buffer = free.get()
            with memoryview(buffer) as view:
                length = os.preadv(source, [view[: size - begin]], begin)
            full.put((buffer, length))

    threading.Thread(target=read, daemon=True).start()
    for _ in range(offset, size, BLOCK):
        yield full.get()


def _write(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written
