"""Files that travel in chunks: the source that is sent, and the target that is written.

All functions here block: call them in worker threads. Any number of threads may use one
`ChunkReader` or `ChunkWriter` at once.

An arriving file is ``.<name>.part`` at first, and its journal is ``.<name>.map``. Both
outlive the process, so that the next `ChunkWriter` of the file resumes from them.
"""

import errno
import os
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import msgspec
from blake3 import blake3

from sleap_rtc.io.storage.files import (
    Buffer,
    OpenFile,
    file_identity,
    read_at,
    require_space,
    reserve_space,
    shortened_name,
    sync_data,
    write_at,
)
from sleap_rtc.io.storage.folder import (
    Folder,
    StorageError,
    explain_errors,
    open_folder_beneath,
)
from sleap_rtc.io.transfer.journal import Journal
from sleap_rtc.proto.paths import check_portable_path_untrusted
from sleap_rtc.proto.transfer.chunk_map import ChunkMap

CHUNK_SIZE = 1024 * 1024
"""Bytes in a chunk of the files that this side sends."""


class WriterLimits(msgspec.Struct, frozen=True):
    """Limits of a `ChunkWriter`.

    Args:
        save_every: Bytes between two syncs, which a power cut may cost. A crash of the
            process alone costs none.
    """

    save_every: int = 256 * 1024 * 1024


LIMITS = WriterLimits()

_MAX_NAME_BYTES = 255 - len("..part")
"""Bytes of the longest name that its hidden files repeat in full."""


class ChunkReader:
    """A file that is sent chunk by chunk.

    Args:
        fd: The open file, from `open_owned` or `open_beneath`. `close` closes it.
        chunk_size: Bytes in a chunk; the last one may be shorter.
        name: Name of the file in messages.
    """

    def __init__(self, fd: int, *, chunk_size: int, name: str = "the file") -> None:
        self._name = name
        self._file = OpenFile(fd)
        self._chunk_size = chunk_size
        self._opened = file_identity(fd)

    @property
    def size(self) -> int:
        """Bytes in the file when it was opened."""
        return self._opened[0]

    def read(self, index: int) -> tuple[bytes, bytes]:
        """Read one chunk.

        Args:
            index: Its place in the file, from 0.

        Returns:
            The chunk, and its BLAKE3 hash.

        Raises:
            StorageError: If the storage failed, or the file became shorter.
        """
        length = _chunk_length(index, self.size, self._chunk_size)
        with self._file.use() as fd, explain_errors(f"Failed to read {self._name}"):
            payload = read_at(fd, length, index * self._chunk_size)
        if len(payload) < length:
            raise StorageError(f"{self._name} became shorter while it was sent")
        return payload, blake3(payload).digest()

    def check_unchanged(self) -> bool:
        """Return True if the file is as it was when it was opened."""
        with self._file.use() as fd, explain_errors(f"Failed to read {self._name}"):
            return file_identity(fd) == self._opened

    def close(self) -> None:
        """Close the file as soon as no thread reads it; safe to call again."""
        self._file.close()


def _go_on() -> None:
    """Default `check`: never stop."""


class ChunkWriter:
    """A file that is received chunk by chunk, in any order, by one process or several.

    Get one from `open`. No file has the final name before `publish`. End with
    `publish`, `keep` or `abandon`; the files of a killed process are kept.

    Attributes:
        chunk_map: The chunks that an earlier writer stored. It belongs to the caller;
            `write` does not change it.
    """

    def __init__(
        self,
        hidden: "_HiddenFiles",
        chunk_map: ChunkMap,
        file: OpenFile,
        journal: Journal,
        limits: WriterLimits,
    ) -> None:
        self.chunk_map = chunk_map
        self._limits = limits
        self._hidden = hidden
        self._size = chunk_map.size
        self._chunk_size = chunk_map.chunk_size
        self._file = file
        self._journal = journal
        self._unsaved = 0
        self._unsaved_lock = threading.Lock()
        self._ending = threading.Lock()
        self._has_ended = False

    @classmethod
    def open(
        cls,
        root: Path,
        relative: str,
        *,
        size: int,
        chunk_size: int,
        origin: str = "",
        check: Callable[[], None] = _go_on,
        limits: WriterLimits = LIMITS,
    ) -> Self:
        """Open the writer of a file, and resume the work of an earlier writer.

        If an earlier writer of this file left its part file and a journal of the same
        size, chunk size and origin, this one resumes from them. It reads and checks
        every chunk in the journal, which takes about a second for 2 GiB. Otherwise it
        starts from the beginning.

        Args:
            root: An existing directory that the owner of this process named.
            relative: Path of the file beneath it, as the peer sent it. Missing
                directories are made.
            size: Bytes in the file.
            chunk_size: Bytes in a chunk; the last one may be shorter.
            origin: Source that the file is a copy of, such as the id of a job.
            check: Called between chunks; it stops the opening by raising. The files are
                kept then.
            limits: How often it syncs.

        Raises:
            InvalidInput: If not every system can store the path, it leads through a
                link or a file, or there are too many chunks.
            InsufficientSpaceError: If the file does not fit.
            StorageError: If the name is taken, another writer of this file is at work,
                or the storage failed.
        """
        *parents, name = check_portable_path_untrusted(relative).split("/")
        chunk_map = ChunkMap(size, chunk_size)
        with explain_errors(f"Failed to create {relative}"), ExitStack() as undo:
            folder = open_folder_beneath(root, parents, create=True)
            undo.callback(folder.close)
            hidden = _HiddenFiles(
                folder, name, relative, size, save_every=limits.save_every
            )
            require_space(folder, size - hidden.bytes_reserved(), f"for {relative}")
            journal = hidden.open_journal(chunk_size, origin)
            undo.callback(journal.close)
            file = OpenFile(hidden.open_part(journal))
            undo.callback(file.close)
            for index, digest in journal.written():
                check()
                offset = index * chunk_size
                with file.use() as fd:
                    payload = read_at(fd, chunk_map.length(index), offset)
                if blake3(payload).digest() == digest:
                    chunk_map.set(index, digest)
            undo.pop_all()
        return cls(hidden, chunk_map, file, journal, limits)

    def write(self, index: int, payload: Buffer, digest: bytes) -> bool:
        """Check one chunk, then write it and record it in the journal if it is good.

        Args:
            index: Its place in the file, from 0.
            payload: The bytes that arrived.
            digest: The BLAKE3 hash that came with them.

        Returns:
            False if it is damaged; nothing was written then.

        Raises:
            InsufficientSpaceError: If the storage or the quota is used up.
            StorageError: If the storage failed.
        """
        length = _chunk_length(index, self._size, self._chunk_size)
        if len(payload) != length or blake3(payload).digest() != digest:
            return False
        with (
            explain_errors(f"Failed to write {self._hidden.relative}"),
            self._journal.use(),  # stay locked even if this thread hangs
            self._file.use() as fd,
        ):
            write_at(fd, payload, index * self._chunk_size)
            self._journal.record(index, digest)
            if self._is_time_to_save(length):
                sync_data(fd)
                self._journal.sync()
        return True

    def publish(self) -> Path:
        """Sync the content to the disk, then give the file its name.

        Returns:
            The path of the file.

        Raises:
            StorageError: If the name was taken meanwhile, the part file is gone, or
                the storage failed. Call `keep` or `abandon` then.
        """
        # A thread that hangs here keeps the others out until it is done.
        with self._ending:
            return self._publish()

    def keep(self) -> None:
        """Leave the part file to a later writer; safe to call again."""
        with self._ending:
            self._end()

    def abandon(self) -> None:
        """Remove the part file unless the writer has ended; safe to call again.

        Raises:
            StorageError: If the storage failed.
        """
        with self._ending:
            if not self._has_ended:
                self._abandon()

    def _publish(self) -> Path:
        with explain_errors(f"Failed to write {self._hidden.relative}"):
            with self._file.use() as fd:
                os.fsync(fd)
                self._hidden.check_part(fd)
            # Network file systems may report a full quota only here.
            self._file.close()
            path = self._hidden.rename_part()
        try:
            self._journal.remove()
        except OSError:
            pass  # the file is whole; the next writer of that name removes the journal
        self._end()
        return path

    def _abandon(self) -> None:
        self._file.close()
        what = f"Failed to remove the part file of {self._hidden.relative}"
        try:
            with explain_errors(what):
                self._hidden.remove_part()
                self._journal.remove()
        finally:
            self._end()

    def _is_time_to_save(self, written: int) -> bool:
        """Count written bytes; return True in one thread when it has to sync."""
        with self._unsaved_lock:
            self._unsaved += written
            if self._unsaved < self._limits.save_every:
                return False
            self._unsaved = 0
            return True

    def _end(self) -> None:
        self._has_ended = True
        self._file.close()
        self._journal.close()
        self._hidden.folder.close()


class _HiddenFiles:
    """The part file and the journal of an arriving file, in its open directory."""

    def __init__(
        self, folder: Folder, name: str, relative: str, size: int, *, save_every: int
    ) -> None:
        self.folder = folder
        self.relative = relative
        self._name = name
        self._size = size
        self._save_every = save_every
        self._part, self._journal = _hidden_names(name)

    def bytes_reserved(self) -> int:
        """Return the bytes that the part file of an earlier writer takes up."""
        try:
            status = self.folder.status(self._part)
        except FileNotFoundError:
            return 0
        blocks = getattr(status, "st_blocks", -(-status.st_size // 512))
        return min(self._size, blocks * 512)

    def open_journal(self, chunk_size: int, origin: str) -> Journal:
        """Open and lock the journal."""
        try:
            return Journal.open(
                self.folder,
                self._journal,
                size=self._size,
                chunk_size=chunk_size,
                origin=origin,
            )
        except BlockingIOError:
            raise StorageError(
                f"{self.relative} is being received already, by another transfer or "
                "another process; wait until it ends, or stop it"
            ) from None

    def open_part(self, journal: Journal) -> int:
        """Open the part file of an earlier writer, or start from the beginning."""
        if self.folder.exists(self._name):
            self.remove_part()
            journal.remove()
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        fd = self._reopen_part() if journal.matches() else None
        if fd is not None:
            return fd
        try:
            return self._start_over(journal)
        except OSError:
            self.remove_part()
            journal.remove()
            raise

    def check_part(self, fd: int) -> None:
        """Check that the part file is still the open file.

        Raises:
            StorageError: If another file has its name.
        """
        if not os.path.samestat(os.fstat(fd), self.folder.status(self._part)):
            raise StorageError(
                f"Failed to write {self.relative}: its part file was replaced"
            )

    def rename_part(self) -> Path:
        """Rename the part file to the file, and return the path."""
        self.folder.rename_new(self._part, self._name)
        self.folder.sync()
        return self.folder.path / self._name

    def remove_part(self) -> None:
        """Remove the part file if it exists."""
        try:
            self.folder.unlink(self._part)
        except FileNotFoundError:
            pass

    def _reopen_part(self) -> int | None:
        """Open the part file of an earlier writer; None if none can be trusted."""
        try:
            fd = self.folder.open_file(self._part, write=True)
        except FileNotFoundError:
            return None
        # One that has a second name is another file, which would be overwritten.
        if os.fstat(fd).st_nlink == 1:
            return self._reserved(fd)
        os.close(fd)
        return None

    def _start_over(self, journal: Journal) -> int:
        """Make an empty part file, and empty the journal."""
        self.remove_part()
        journal.restart()
        fd = self._reserved(self.folder.create_file(self._part))
        if self._size >= self._save_every:
            self.folder.sync()
        return fd

    def _reserved(self, fd: int) -> int:
        """Reserve the space of a part file; close it if that fails."""
        try:
            reserve_space(fd, self._size)
        except OSError:
            os.close(fd)
            raise
        return fd


def _hidden_names(name: str) -> tuple[str, str]:
    """Return the names of a file's part file and of its journal."""
    encoded = name.encode()
    if len(encoded) > _MAX_NAME_BYTES:
        # Names that differ only at their end must not share a part file.
        name = f"{shortened_name(name)}.{blake3(encoded).hexdigest(8)}"
    return f".{name}.part", f".{name}.map"


def _chunk_length(index: int, size: int, chunk_size: int) -> int:
    length = min(chunk_size, size - index * chunk_size)
    if index < 0 or length <= 0:
        raise ValueError(f"a file of {size} bytes has no chunk {index}")
    return length
