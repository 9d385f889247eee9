"""Files that travel in chunks: where they come from, and where they arrive.

All functions here block, and are called in worker threads; any number of threads may
use one `ChunkReader` or `ChunkWriter` at once.

A file that arrives is ``.<name>.part`` at first, and its journal is ``.<name>.map``.
Both outlive the process, so that the next `ChunkWriter` of the file goes on with them.
"""

import errno
import os
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from blake3 import blake3

from sleap_rtc.io.storage.files import (
    Buffer,
    OpenFile,
    file_identity,
    read_at,
    require_space,
    reserve_space,
    sync_data,
    write_at,
)
from sleap_rtc.io.storage.folder import (
    StorageError,
    explain_errors,
    open_folder_beneath,
    open_owned,
)
from sleap_rtc.io.transfer.journal import Journal
from sleap_rtc.proto.paths import check_portable_path_untrusted
from sleap_rtc.proto.transfer.chunk_map import ChunkMap

SAVE_EVERY = 256 * 1024 * 1024
"""Bytes that a power cut may cost. A crash of the process alone costs none."""

_LONGEST_NAME = 255 - len("..part")
_KEPT_OF_NAME = 200


class ChunkReader:
    """A file that is sent chunk by chunk.

    Args:
        source: A path that the owner of this process named, or the file descriptor
            from `open_beneath` for one that a peer named; `close` closes it.
        chunk_size: Bytes in a chunk; the last one may be shorter.

    Raises:
        InvalidInput: If it is no readable file.
        StorageError: If the storage failed.
    """

    def __init__(self, source: Path | int, *, chunk_size: int) -> None:
        fd = source if isinstance(source, int) else open_owned(source)
        self._name = "the file" if isinstance(source, int) else source.name
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
        """Tell whether the file is still as it was when it was opened."""
        with self._file.use() as fd, explain_errors(f"Failed to read {self._name}"):
            return file_identity(fd) == self._opened

    def close(self) -> None:
        """Let go of the file, as soon as no thread reads any more."""
        self._file.close()


def _ignore_progress(_size: int) -> None:
    """What happens with the progress of a check that nobody watches."""


def _go_on() -> None:
    """Default `check`: never stop."""


class ChunkWriter:
    """A file that is received chunk by chunk, in any order, by one process or several.

    If an earlier writer of this file left its part file and a journal of the same size,
    chunk size and origin, this one goes on with them. It reads and checks every chunk
    that the journal names, which takes about a second for 2 GiB. Otherwise it starts
    anew. Nothing has the file's name before `publish`. End with `publish`, `keep` or
    `abandon`; a process that is killed has kept it.

    Args:
        root: An existing directory that the owner of this process named.
        relative: Where beneath it the file goes, as the peer sent it. Directories that
            are missing are made.
        size: Bytes in the file.
        chunk_size: Bytes in a chunk; the last one may be shorter.
        origin: What the file is a copy of, such as the id of a job.
        progress: Called with the bytes of the file that were checked so far.
        check: Called between chunks; it stops the opening by raising. What was
            written before is kept.

    Attributes:
        chunk_map: What was there when the writer was made. It belongs to the caller;
            `write` does not change it.

    Raises:
        InvalidInput: If not every system can store the path, it leads through a link
            or a file, or there are too many chunks.
        InsufficientSpaceError: If the file does not fit.
        StorageError: If the name is taken, another writer of this file is at
            work, or the storage failed.
    """

    def __init__(
        self,
        root: Path,
        relative: str,
        *,
        size: int,
        chunk_size: int,
        origin: str = "",
        progress: Callable[[int], None] = _ignore_progress,
        check: Callable[[], None] = _go_on,
    ) -> None:
        *parents, self._name = check_portable_path_untrusted(relative).split("/")
        self.chunk_map = ChunkMap(size, chunk_size)
        self._relative = relative
        self._size = size
        self._chunk_size = chunk_size
        self._part, journal = _hidden_names(self._name)
        self._unsaved = 0
        self._unsaved_lock = threading.Lock()
        self._has_ended = False
        with explain_errors(f"Failed to create {relative}"), ExitStack() as undo:
            self._folder = open_folder_beneath(root, parents, create=True)
            undo.callback(self._folder.close)
            needed = size - self._bytes_reserved()
            require_space(self._folder, needed, f"for {relative}")
            try:
                self._journal = Journal(
                    self._folder,
                    journal,
                    size=size,
                    chunk_size=chunk_size,
                    origin=origin,
                )
            except BlockingIOError:
                raise StorageError(
                    f"{relative} is being received already, by another transfer or "
                    "another process; wait until it ends, or stop it"
                ) from None
            undo.callback(self._journal.close)
            self._file = OpenFile(self._open_part())
            undo.callback(self._file.close)
            self._check_chunks(progress, check)
            undo.pop_all()

    def write(self, index: int, payload: Buffer, digest: bytes) -> bool:
        """Check one chunk, and write and note it if it is good.

        Args:
            index: Its place in the file, from 0.
            payload: What arrived.
            digest: The BLAKE3 hash that came with it.

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
            explain_errors(f"Failed to write {self._relative}"),
            self._journal.use(),  # stay locked, also if this thread hangs
            self._file.use() as fd,
        ):
            write_at(fd, payload, index * self._chunk_size)
            self._journal.note(index, digest)
            if self._is_time_to_save(length):
                sync_data(fd)
                self._journal.sync()
        return True

    def publish(self) -> Path:
        """Bring the content to the disk, and let the file appear under its name.

        Returns:
            The path of the file.

        Raises:
            StorageError: If the name was taken meanwhile, the part file is gone,
                or the storage failed; `keep` or `abandon` is still to be called.
        """
        with explain_errors(f"Failed to write {self._relative}"):
            with self._file.use() as fd:
                os.fsync(fd)
                written = os.fstat(fd)
            if not os.path.samestat(written, self._folder.status(self._part)):
                raise StorageError(
                    f"Failed to write {self._relative}: somebody replaced its part file"
                )
            # Network file systems report a full quota as late as here.
            self._file.close()
            self._folder.rename_new(self._part, self._name)
            self._folder.sync()
        try:
            self._journal.remove()
        except OSError:
            pass  # the file is there, and the next writer of that name removes it
        self._end()
        return self._folder.path / self._name

    def keep(self) -> None:
        """Leave what was written to a later writer; safe to call again."""
        self._end()

    def abandon(self) -> None:
        """Remove what was written, unless the writer has ended; safe to call again.

        Raises:
            StorageError: If the storage failed.
        """
        if self._has_ended:
            return
        self._file.close()
        try:
            with explain_errors(f"Failed to remove the part file of {self._relative}"):
                self._remove_part()
                self._journal.remove()
        finally:
            self._end()

    def _bytes_reserved(self) -> int:
        """Say how much of the file's space an earlier writer has taken already."""
        try:
            status = self._folder.status(self._part)
        except FileNotFoundError:
            return 0
        blocks = getattr(status, "st_blocks", -(-status.st_size // 512))
        return min(self._size, blocks * 512)

    def _open_part(self) -> int:
        """Open the part file of an earlier writer, or start anew."""
        if self._folder.exists(self._name):
            self._remove_part()
            self._journal.remove()
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        fd = self._reopen_part() if self._journal.matches() else None
        if fd is not None:
            return fd
        try:
            return self._start_anew()
        except OSError:
            self._remove_part()
            self._journal.remove()
            raise

    def _reopen_part(self) -> int | None:
        """Open the part file of an earlier writer; None if there is none to trust."""
        try:
            fd = self._folder.open_file(self._part, write=True)
        except FileNotFoundError:
            return None
        # One that has a second name is another file, which would be overwritten.
        if os.fstat(fd).st_nlink == 1:
            return self._reserved(fd)
        os.close(fd)
        return None

    def _start_anew(self) -> int:
        """Make an empty part file, and an empty journal."""
        self._remove_part()
        self._journal.restart()
        fd = self._reserved(self._folder.create_file(self._part))
        if self._size >= SAVE_EVERY:
            self._folder.sync()
        return fd

    def _reserved(self, fd: int) -> int:
        """Give a part file its size; it is closed if that fails."""
        try:
            reserve_space(fd, self._size)
        except OSError:
            os.close(fd)
            raise
        return fd

    def _check_chunks(
        self, progress: Callable[[int], None], check: Callable[[], None]
    ) -> None:
        """Find out which of the chunks in the journal are good."""
        with self._file.use() as fd:
            for index, digest in self._journal.written():
                check()
                offset = index * self._chunk_size
                payload = read_at(fd, self.chunk_map.length(index), offset)
                if blake3(payload).digest() == digest:
                    self.chunk_map.set(index, digest)
                progress(offset + len(payload))

    def _is_time_to_save(self, written: int) -> bool:
        """Count what was written, and tell one thread when it is enough."""
        with self._unsaved_lock:
            self._unsaved += written
            if self._unsaved < SAVE_EVERY:
                return False
            self._unsaved = 0
            return True

    def _remove_part(self) -> None:
        try:
            self._folder.unlink(self._part)
        except FileNotFoundError:
            pass

    def _end(self) -> None:
        self._has_ended = True
        self._file.close()
        self._journal.close()
        self._folder.close()


def _hidden_names(name: str) -> tuple[str, str]:
    """Return the names of a file's part file and of its journal."""
    encoded = name.encode()
    if len(encoded) > _LONGEST_NAME:
        # Names that differ only at their end must not share a part file.
        kept = encoded[:_KEPT_OF_NAME].decode(errors="ignore")
        name = f"{kept}.{blake3(encoded).hexdigest(8)}"
    return f".{name}.part", f".{name}.map"


def _chunk_length(index: int, size: int, chunk_size: int) -> int:
    length = min(chunk_size, size - index * chunk_size)
    if index < 0 or length <= 0:
        raise ValueError(f"a file of {size} bytes has no chunk {index}")
    return length
