"""The journal of a file that arrives in chunks: a record of the written ones.

It is beside the part file and outlives the process that writes it. The slot of a chunk
is written after the chunk itself. Each slot has a checksum, so a torn one costs only
its chunk. The next writer of the file compares each chunk with its slot, because a
power cut may lose either.

Slots are 36 bytes each, and all numbers are big-endian. The first one is the header:

=======  =====  ================================================================
offset   bytes  field
=======  =====  ================================================================
0        4      ``SRCJ``
4        4      version, 1
8        8      size of the file in bytes
16       4      size of a chunk in bytes
20       16     checksum over these and the origin of the file
=======  =====  ================================================================

The slot of chunk 0 follows, then that of chunk 1, and so on. Those of chunks that were
not written yet hold zeros:

=======  =====  ================================================================
offset   bytes  field
=======  =====  ================================================================
0        32     BLAKE3 hash of the chunk
32       4      checksum over the number of the chunk, as 4 bytes, and the hash
=======  =====  ================================================================

Checksums are the first bytes of a BLAKE3 hash.
"""

import errno
import os
import struct
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Self

from blake3 import blake3

from sleap_rtc.io.storage.files import (
    OpenFile,
    read_at,
    reserve_space,
    sync_data,
    write_at,
)
from sleap_rtc.io.storage.folder import Folder
from sleap_rtc.proto.transfer.chunk_map import HASH_SIZE

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_MAGIC = b"SRCJ"
_VERSION = 1
_FIELDS = struct.Struct(">4sIQI")
_NUMBER = struct.Struct(">I")
_CHECKSUM = 4
_SLOT = HASH_SIZE + _CHECKSUM
_EMPTY = bytes(_SLOT)
_SLOTS_AT_ONCE = 1024
"""Slots that are read in one call."""

_LOCKED_BYTE = 2**40
"""Offset of the byte that Windows locks, far behind the last slot."""

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""Error numbers of file systems without locks: some network mounts."""


class Journal:
    """The written chunks of a part file, with their hashes.

    Get one from `open`. It is locked as long as it is open, and the lock ends with the
    process. So the lock also keeps a second writer away from the part file. Any number
    of threads may use the journal.
    """

    def __init__(
        self, folder: Folder, name: str, file: OpenFile, *, header: bytes, count: int
    ) -> None:
        self._folder = folder
        self._name = name
        self._file = file
        self._header = header
        self._count = count

    @classmethod
    def open(
        cls, folder: Folder, name: str, *, size: int, chunk_size: int, origin: str = ""
    ) -> Self:
        """Open a journal, create it if it does not exist, and lock it.

        Args:
            folder: Its directory, which the caller keeps open for as long.
            name: Its name.
            size: Bytes of the arriving file.
            chunk_size: Bytes of every chunk but the last, which may be shorter.
            origin: Source that the file is a copy of. A journal with another origin is
                not used.

        Raises:
            BlockingIOError: If another writer has it.
            InvalidInput: If the name belongs to something other than a file.
            OSError: If the storage failed.
        """
        fields = _FIELDS.pack(_MAGIC, _VERSION, size, chunk_size)
        checksum = blake3(fields + origin.encode()).digest(_SLOT - len(fields))
        file = OpenFile(_open_locked(folder, name))
        count = -(-size // chunk_size)
        return cls(folder, name, file, header=fields + checksum, count=count)

    def use(self) -> AbstractContextManager[int]:
        """Keep the journal open and locked while a block runs.

        Raises:
            StorageError: If it was closed.
        """
        return self._file.use()

    def matches(self) -> bool:
        """Return True if this is the journal of the same file."""
        with self.use() as fd:
            return read_at(fd, _SLOT, 0) == self._header

    def restart(self) -> None:
        """Empty the journal.

        Raises:
            OSError: If the disk is full.
        """
        with self.use() as fd:
            os.ftruncate(fd, 0)
            reserve_space(fd, _SLOT * (1 + self._count))
            write_at(fd, self._header, 0)

    def record(self, index: int, digest: bytes) -> None:
        """Record that a chunk was written.

        Args:
            index: The chunk.
            digest: Its BLAKE3 hash.

        Raises:
            OSError: If the storage failed.
        """
        with self.use() as fd:
            write_at(fd, digest + _check(index, digest), _SLOT * (1 + index))

    def written(self) -> Iterator[tuple[int, bytes]]:
        """Yield the recorded chunks and their hashes, in order."""
        with self.use() as fd:
            for first in range(0, self._count, _SLOTS_AT_ONCE):
                wanted = min(_SLOTS_AT_ONCE, self._count - first)
                slots = read_at(fd, _SLOT * wanted, _SLOT * (1 + first))
                for place in range(len(slots) // _SLOT):
                    slot = slots[place * _SLOT : (place + 1) * _SLOT]
                    digest, checksum = slot[:HASH_SIZE], slot[HASH_SIZE:]
                    if slot != _EMPTY and checksum == _check(first + place, digest):
                        yield first + place, digest

    def sync(self) -> None:
        """Sync the journal, so that its records survive a power cut.

        Raises:
            OSError: If the storage failed.
        """
        with self.use() as fd:
            sync_data(fd)

    def remove(self) -> None:
        """Remove the journal from the storage, and close it.

        Raises:
            OSError: If the storage failed; the journal is closed in that case as well.
        """
        if sys.platform == "win32":  # Windows does not remove an open file
            self._file.close()
        try:
            self._folder.unlink(self._name)
        except FileNotFoundError:
            pass
        finally:
            self._file.close()

    def close(self) -> None:
        """Close the journal, which keeps it for a later writer; safe to call again."""
        self._file.close()


def _check(index: int, digest: bytes) -> bytes:
    return blake3(_NUMBER.pack(index) + digest).digest(_CHECKSUM)


def _open_locked(folder: Folder, name: str) -> int:
    """Open a file, create it if it does not exist, and lock it."""
    while True:
        try:
            fd = folder.open_file(name, write=True)
        except FileNotFoundError:
            try:
                fd = folder.create_file(name)
            except FileExistsError:
                continue  # another writer was faster
        try:
            _lock(fd)
            if _is_named(folder, name, fd):
                return fd
        except OSError:
            os.close(fd)
            raise
        os.close(fd)


def _is_named(folder: Folder, name: str, fd: int) -> bool:
    """Return True if an open file still has this name, and no other.

    The last writer may have removed it before this one could lock it. A second name
    would be an attempt to have another file overwritten.
    """
    status = os.fstat(fd)
    try:
        if status.st_nlink > 1:
            folder.unlink(name)
            return False
        return os.path.samestat(status, folder.status(name))
    except FileNotFoundError:
        return False


def _lock(fd: int) -> None:
    """Lock a file against every other writer, as long as it is open.

    Raises:
        BlockingIOError: If another writer has locked it.
    """
    if sys.platform == "win32":
        os.lseek(fd, _LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError(error.errno, error.strerror) from None
    else:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
