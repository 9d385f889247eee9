"""New files that appear whole or not at all, and what is needed to fill them.

All functions here block, and are called in worker threads.
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

Buffer = bytes | bytearray | memoryview

_KEPT_OF_NAME = 200
"""Bytes of a name that its part file repeats: the rest must fit into 255 too."""


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
        kept = name.encode()[:_KEPT_OF_NAME].decode(errors="ignore")
        part = f".{kept}.{secrets.token_hex(6)}.part"
        return cls(folder, name, part, folder.create_file(part), replace=replace)

    @property
    def path(self) -> Path:
        """Where the file appears when it is published."""
        return self._folder.path / self._name

    @contextmanager
    def use(self) -> Iterator[int]:
        """Borrow the file descriptor for one call."""
        with self._handle.use() as fd:
            yield fd

    def publish(self) -> Path:
        """Bring the content to the disk, then give the file its name.

        Returns:
            Its path.

        Raises:
            FileExistsError: If the name was taken meanwhile.
            OSError: If the storage failed. In both cases the part file is still there.
        """
        with self._handle.use() as fd:
            os.fsync(fd)
        # Network file systems report a full quota as late as here.
        self._handle.close()
        rename = self._folder.rename if self._replace else self._folder.rename_new
        rename(self._part, self._name)
        self._folder.sync()
        self._finish()
        return self.path

    def discard(self) -> None:
        """Remove the part file, unless it was published; safe to call again."""
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
    """Make a part file beneath a root, if there is space.

    Args:
        root: An existing directory that the owner of this process named.
        names: The checked names of the path; missing directories are made.
        needed: Bytes that must be free.
        where: How a message names the storage, such as ``on shared storage``.
        replace: Take the place of a file of that name, instead of refusing.

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


def read_at(fd: int, length: int, offset: int) -> bytes:
    """Read some bytes of a file, fewer only at its end."""
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
"""Bytes in one call: larger ones take up to twice as long where memory is cold."""


def write_at(fd: int, data: Buffer, offset: int) -> None:
    """Write all of some bytes at a place of a file."""
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
    """Make what was written to a file survive a power cut."""
    if hasattr(os, "fdatasync"):
        os.fdatasync(fd)
    else:
        os.fsync(fd)


def require_space(folder: Folder, needed: int, where: str) -> None:
    """Refuse what does not fit, before a byte is written.

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
    """Describe a file by its size, its last change and its number.

    Equal descriptions mean that nobody changed it in between.
    """
    status = os.fstat(fd)
    return status.st_size, status.st_mtime_ns, status.st_ino


def human_size(size: int) -> str:
    """Write a number of bytes for people, such as ``1.5 GiB``."""
    amount = float(size)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{size} bytes" if unit == "bytes" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


class OpenFile:
    """A file descriptor that is closed when the last thread lets go of it.

    A thread that was given up while it hung in a call must not write into whatever
    file gets the same number next.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lock = threading.Lock()
        self._users = 0
        self._closed = False

    @contextmanager
    def use(self) -> Iterator[int]:
        """Keep the file open for the length of the block."""
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
        """Let nobody begin to use it; safe to call again."""
        with self._lock:
            unused = not self._closed and self._users == 0
            self._closed = True
        if unused:
            os.close(self._fd)


def reserve_space(fd: int, size: int) -> None:
    """Give a file its size, so that a full disk is noticed before it is written.

    Raises:
        OSError: If there is no room.
    """
    os.ftruncate(fd, size)
    if sys.platform != "linux" or size == 0:
        return
    # posix_fallocate() would write to every block where the file system knows no
    # better way, which takes minutes on NFS 3.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(size)) == 0:
        return
    code = ctypes.get_errno()
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        raise OSError(code, os.strerror(code))


_seek_lock = threading.Lock()
"""Windows has one position in a file, whichever thread moves it."""
