"""New files that appear whole or not at all, and the calls that fill them.

All functions here block: call them in worker threads.
"""

import ctypes
import errno
import os
import secrets
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from sleap_rtc.io.storage.folder import (
    Folder,
    InsufficientSpaceError,
    StorageError,
    open_folder_beneath,
)
from sleap_rtc.proto.sizes import human_size

Buffer = bytes | bytearray | memoryview

_MAX_KEPT_OF_NAME = 200
"""Bytes of a long name that its hidden files repeat: with the rest at most 255."""


class PartFile:
    """A new file that has its name only when it is whole.

    Get one from `create`. Until `publish` it is ``.<name>.<random>.part`` in the same
    directory.
    """

    def __init__(
        self, folder: Folder, name: str, part: str, fd: int, *, replace: bool
    ) -> None:
        self._folder = folder
        self._name = name
        self._part = part
        self._handle = OpenFile(fd)
        self._replace = replace
        self._done = False

    @classmethod
    def create(cls, folder: Folder, name: str, *, replace: bool = False) -> Self:
        """Create an empty part file.

        Args:
            folder: Its directory, which is closed together with the part file.
            name: A checked name.
            replace: Replace a file of that name instead of refusing.

        Raises:
            FileExistsError: If the name is taken.
            OSError: If the file cannot be created. The directory stays open.
        """
        if not replace and folder.exists(name):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        part = f".{shortened_name(name)}.{secrets.token_hex(6)}.part"
        return cls(folder, name, part, folder.create_file(part), replace=replace)

    @property
    def path(self) -> Path:
        """Path of the published file."""
        return self._folder.path / self._name

    @contextmanager
    def use(self) -> Iterator[int]:
        """Keep the file open while the block runs."""
        with self._handle.use() as fd:
            yield fd

    def publish(self) -> Path:
        """Sync the content to the disk, then rename the file.

        Returns:
            Its path.

        Raises:
            FileExistsError: If the name was taken meanwhile.
            OSError: If the storage failed. The part file is kept in both cases.
        """
        with self._handle.use() as fd:
            os.fsync(fd)
        # Network file systems may report a full quota only here.
        self._handle.close()
        rename = self._folder.rename if self._replace else self._folder.rename_new
        rename(self._part, self._name)
        self._folder.sync()
        self._finish()
        return self.path

    def discard(self) -> None:
        """Remove the part file unless it was published; safe to call again."""
        if self._done:
            return
        self._handle.close()
        try:
            self._folder.unlink(self._part)
        except FileNotFoundError:
            pass
        finally:
            self._finish()

    def _finish(self) -> None:
        self._done = True
        self._folder.close()


def start_part_file(
    root: Path, names: list[str], *, needed: int, where: str, replace: bool = False
) -> PartFile:
    """Create a part file beneath a root if there is space.

    Args:
        root: An existing directory that the owner of this process named.
        names: The checked names of the path; missing directories are made.
        needed: Bytes that must be free.
        where: How a message names the storage, such as ``on shared storage``.
        replace: Replace a file of that name instead of refusing.

    Raises:
        InvalidInput: If the path leads through a link or a file.
        InsufficientSpaceError: If there is less space.
        OSError: If the name is taken, or the storage failed.
    """
    folder = open_folder_beneath(root, names[:-1], create=True)
    try:
        require_space(folder, needed, where)
        return PartFile.create(folder, names[-1], replace=replace)
    except (OSError, InsufficientSpaceError):
        folder.close()
        raise


def shortened_name(name: str) -> str:
    """Return the beginning of a file name: with 55 more bytes it is still a name."""
    return name.encode()[:_MAX_KEPT_OF_NAME].decode(errors="ignore")


def read_at(fd: int, length: int, offset: int) -> bytes:
    """Read bytes at a place of a file, fewer only at its end."""
    pieces: list[bytes] = []
    while length:
        if hasattr(os, "pread"):
            piece = os.pread(fd, length, offset)
        else:
            with _seek_lock:
                os.lseek(fd, offset, os.SEEK_SET)
                piece = os.read(fd, length)
        if not piece:
            break
        pieces.append(piece)
        length -= len(piece)
        offset += len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


_WRITE_SIZE = 256 * 1024
"""Bytes that one call writes: more take up to twice as long where memory is cold."""


def write_at(fd: int, data: Buffer, offset: int) -> None:
    """Write bytes to a place of a file."""
    view = memoryview(data)
    while view:
        piece = view[:_WRITE_SIZE]
        if hasattr(os, "pwrite"):
            written = os.pwrite(fd, piece, offset)
        else:
            with _seek_lock:
                os.lseek(fd, offset, os.SEEK_SET)
                written = os.write(fd, piece)
        view = view[written:]
        offset += written


def sync_data(fd: int) -> None:
    """Sync the content of a file, so that it survives a power cut."""
    if hasattr(os, "fdatasync"):
        os.fdatasync(fd)
    else:
        os.fsync(fd)


def require_space(folder: Folder, needed: int, where: str) -> None:
    """Check that the storage has space, before a byte is written.

    Args:
        folder: A directory on the storage.
        needed: Bytes that must be free.
        where: How the message names the storage.

    Raises:
        InsufficientSpaceError: If there is less.
    """
    free = folder.free_bytes()
    if free < needed:
        raise InsufficientSpaceError(
            f"Insufficient disk space {where}: need {human_size(needed)},"
            f" have {human_size(free)}"
        )


def file_identity(fd: int) -> tuple[int, int, int]:
    """Return the size, the time of the last change and the number of a file.

    The file is unchanged as long as they are equal.
    """
    status = os.fstat(fd)
    return status.st_size, status.st_mtime_ns, status.st_ino


class OpenFile:
    """A file descriptor that is closed when no thread uses it.

    A thread may be abandoned while it hangs in a call. Then it must not write into the
    next file that gets the same number.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lock = threading.Lock()
        self._users = 0
        self._closed = False

    @contextmanager
    def use(self) -> Iterator[int]:
        """Keep the file open while the block runs.

        Raises:
            StorageError: If it was closed.
        """
        with self._lock:
            if self._closed:
                raise StorageError("the file was closed")
            self._users += 1
        try:
            yield self._fd
        finally:
            with self._lock:
                self._users -= 1
                last = self._closed and self._users == 0
            if last:
                os.close(self._fd)

    def close(self) -> None:
        """Close the file when its last user ends; safe to call again."""
        with self._lock:
            unused = not self._closed and self._users == 0
            self._closed = True
        if unused:
            os.close(self._fd)


def reserve_space(fd: int, size: int) -> None:
    """Set the size of a file, so that a full disk is noticed before it is written.

    Raises:
        OSError: If the disk is full.
    """
    os.ftruncate(fd, size)
    if sys.platform != "linux" or size == 0:
        return
    # Where the file system has no better way, posix_fallocate() would write to every
    # block, which takes minutes on NFS 3.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(size)) == 0:
        return
    code = ctypes.get_errno()
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        raise OSError(code, os.strerror(code))


_seek_lock = threading.Lock()
"""Protects the position in a file, which all threads share on Windows."""
