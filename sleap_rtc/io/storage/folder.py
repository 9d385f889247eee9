"""Open and create files beneath a root, and nothing outside it.

Other users may write to shared storage while it is read, so a path that was checked
may lead elsewhere when it is opened. Hence a path is walked name by name. Each name is
opened relative to the directory before it, and never through a symbolic link. Callers
use the file descriptor at the end, not the path.

Opening every directory on the way has a second use: NFS remembers for 30 seconds that a
name did not exist, until its directory is opened again.

Windows has no file descriptors of directories. There the resolved path of each step is
compared with its directory, which leaves a moment in which it can be exchanged.
"""

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NoReturn, Self

from sleap_rtc.proto.errors import InvalidInput
from sleap_rtc.proto.paths import check_relative_path_untrusted

MAX_DEPTH = 128
"""Levels of directories that are listed or removed; each holds a file descriptor."""

_HAS_DIRECTORY_FDS = os.open in os.supports_dir_fd
_NO_LINKS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
_DIRECTORY = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0)
_BINARY = getattr(os, "O_BINARY", 0)
_NEVER_WAIT = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)

_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""Error numbers of file systems without hard links: exFAT, some network mounts."""

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFREG: "a file",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class StorageError(Exception):
    """Storage failed or refused a request; the message names the file and the cause."""


class InsufficientSpaceError(StorageError):
    """A file does not fit on the storage."""


class CopyTimeoutError(StorageError):
    """A copy took too long; the storage may hang."""


@contextmanager
def explain_errors(what: str) -> Iterator[None]:
    """Turn an `OSError` into one of this module's errors, for people.

    Args:
        what: The beginning of the message, such as ``Failed to write a.zip``.

    Raises:
        InsufficientSpaceError: If the storage or the quota is used up.
        StorageError: If anything else failed.
    """
    try:
        yield
    except PermissionError as error:
        raise StorageError(f"{what}: Permission denied") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InsufficientSpaceError(f"{what}: {error.strerror}") from error
        raise StorageError(f"{what}: {error.strerror or error}") from error


class Folder:
    """An open directory. Names are looked up in it and never lead out of it.

    A name is one component that passed `sleap_rtc.proto.paths`, or that `names`
    returned. Failures are plain `OSError`, but a symbolic link or a wrong kind of
    file raises `InvalidInput`. Close it, for example with `contextlib.closing`.
    """

    def __init__(self, path: Path, fd: int | None) -> None:
        self.path = path
        self._fd = fd

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a directory that the owner of this process named; links are followed."""
        if not _HAS_DIRECTORY_FDS:
            return cls(path.resolve(strict=True), None)
        fd = os.open(path, _DIRECTORY | getattr(os, "O_CLOEXEC", 0))
        return cls(path, fd)

    def close(self) -> None:
        """Close the directory; safe to call again."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def open_folder(self, name: str) -> "Folder":
        """Open a directory in this one."""
        where, fd = self._at(name)
        if fd is None:
            if not os.path.isdir(where):
                self._refuse(name, self.status(name))
            return Folder(Path(where), None)
        try:
            opened = os.open(where, _DIRECTORY | _NO_LINKS, dir_fd=fd)
        except OSError as error:
            if error.errno in (errno.ENOTDIR, errno.ELOOP):
                self._refuse(name, self.status(name))
            raise
        return Folder(self.path / name, opened)

    def make_folder(self, name: str) -> bool:
        """Create a directory in this one.

        Returns:
            True if it is new, False if the name was taken.
        """
        where, fd = self._at(name)
        try:
            os.mkdir(where, dir_fd=fd)
        except FileExistsError:
            return False
        self.sync()
        return True

    def create_file(self, name: str, mode: int = 0o666) -> int:
        """Create a new file, and open it for reading and writing.

        Args:
            name: Its name.
            mode: Its permissions, before the umask.
        """
        where, fd = self._at(name)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | _NO_LINKS | _BINARY
        return os.open(where, flags, mode, dir_fd=fd)

    def open_file(self, name: str, *, write: bool = False) -> int:
        """Open a regular file for reading, or also for writing, without waiting."""
        self._require_regular(name, self.status(name))
        where, fd = self._at(name)
        flags = os.O_RDWR if write else os.O_RDONLY
        flags |= _NO_LINKS | _NEVER_WAIT | _BINARY
        try:
            opened = os.open(where, flags, dir_fd=fd)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise _link_error(name) from None
            raise
        try:
            # The file may have been exchanged since its status was read.
            self._require_regular(name, os.fstat(opened))
        except InvalidInput:
            os.close(opened)
            raise
        return opened

    def status(self, name: str) -> os.stat_result:
        """Return the status of a name, and not of the target of a link."""
        where, fd = self._at(name)
        return os.stat(where, dir_fd=fd, follow_symlinks=False)

    def exists(self, name: str) -> bool:
        """Return True if the name is taken, even by a dead link."""
        try:
            self.status(name)
        except FileNotFoundError:
            return False
        return True

    def names(self) -> list[str]:
        """Return the names in the directory, sorted."""
        return sorted(os.listdir(self.path if self._fd is None else self._fd))

    def free_bytes(self) -> int:
        """Return the bytes that an ordinary user may still write here."""
        if self._fd is None:
            return shutil.disk_usage(self.path).free
        status = os.fstatvfs(self._fd)
        return status.f_bavail * status.f_frsize

    def unlink(self, name: str) -> None:
        """Remove a file or a link."""
        where, fd = self._at(name)
        os.unlink(where, dir_fd=fd)

    def remove_folder(self, name: str) -> None:
        """Remove an empty directory."""
        where, fd = self._at(name)
        os.rmdir(where, dir_fd=fd)

    def rename_new(self, old: str, new: str) -> None:
        """Rename a file to a name that must be free.

        Raises:
            FileExistsError: If the name is taken; nothing changed then.
        """
        source, fd = self._at(old)
        target, _ = self._at(new)
        if fd is None:
            os.rename(source, target)  # Windows: never replaces
            return
        status = self.status(old)
        try:
            os.link(source, target, src_dir_fd=fd, dst_dir_fd=fd, follow_symlinks=False)
        except FileExistsError:
            # An NFS server whose answer was lost reports our own link.
            if not os.path.samestat(status, self.status(new)):
                raise
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            if self.exists(new):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
            os.rename(source, target, src_dir_fd=fd, dst_dir_fd=fd)
            return
        os.unlink(source, dir_fd=fd)

    def rename(self, old: str, new: str) -> None:
        """Rename a file, and replace a file that has the new name."""
        source, fd = self._at(old)
        target, _ = self._at(new)
        os.replace(source, target, src_dir_fd=fd, dst_dir_fd=fd)

    def sync(self) -> None:
        """Sync created and changed names, so that they survive a power cut."""
        if self._fd is None:
            return
        try:
            os.fsync(self._fd)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise

    def _at(self, name: str) -> tuple[str, int | None]:
        """Return a name as the functions of `os` take it, and their ``dir_fd``."""
        if self._fd is not None:
            return name, self._fd
        if _HAS_DIRECTORY_FDS:
            raise ValueError(f"{self.path} was closed")
        full = self.path / name
        if full.resolve().parent != self.path:
            raise _link_error(name)
        return str(full), None

    def _require_regular(self, name: str, status: os.stat_result) -> None:
        if not stat.S_ISREG(status.st_mode):
            self._refuse(name, status)

    def _refuse(self, name: str, status: os.stat_result) -> NoReturn:
        """Raise the error for a name of another kind than required."""
        if stat.S_ISLNK(status.st_mode):
            raise _link_error(name)
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "of an unknown kind")
        raise InvalidInput(f"Path refused: {name!r} is {kind}")


def open_owned(path: Path) -> int:
    """Open a regular file that the owner of this process named, for reading.

    Links are followed.

    Returns:
        The file descriptor; the caller closes it.

    Raises:
        InvalidInput: If it is not a readable file.
        StorageError: If the storage failed.
    """
    with _explain_path(str(path)):
        target = path.resolve(strict=True)
        with closing(Folder.open(target.parent)) as folder:
            return folder.open_file(target.name)


def open_beneath(root: Path, relative: str) -> int:
    """Open a regular file beneath a root for reading.

    It never waits for the other end of a pipe, and finds a file that another host just
    made. Read through the file descriptor, because the path may lead to another file.

    Args:
        root: A directory that the owner of this process named.
        relative: A path from a peer.

    Returns:
        The file descriptor; the caller closes it.

    Raises:
        InvalidInput: If the path leads elsewhere, or not to a readable file.
        StorageError: If the storage failed.
    """
    *parents, name = split_path(relative)
    with _explain_path(relative), closing(open_folder_beneath(root, parents)) as folder:
        return folder.open_file(name)


def create_beneath(root: Path, relative: str) -> int:
    """Create a file beneath a root, in an existing directory.

    Returns:
        A file descriptor for reading and writing; the caller closes it.

    Raises:
        InvalidInput: If the path leads elsewhere.
        StorageError: If the name is taken, or the storage failed.
    """
    *parents, name = split_path(relative)
    with _explain_path(relative), closing(open_folder_beneath(root, parents)) as folder:
        return folder.create_file(name)


def make_directories_beneath(root: Path, relative: str) -> Path:
    """Create a directory beneath a root, with the missing ones above it.

    Returns:
        The path of the directory, which may be an old one.

    Raises:
        InvalidInput: If the path leads elsewhere, or through a file.
        StorageError: If the storage failed.
    """
    names = split_path(relative)
    with (
        _explain_path(relative),
        closing(open_folder_beneath(root, names, create=True)),
    ):
        return root.joinpath(*names)


def remove_tree_beneath(root: Path, relative: str) -> None:
    """Remove a file or a directory with its content; links are not followed.

    A missing file is not an error. NFS keeps a removed file that is still open as
    ``.nfs...``: it stays behind, and so do the directories around it.

    Raises:
        InvalidInput: If the path leads elsewhere.
        StorageError: If the storage failed, or the tree is too deep.
    """
    *parents, name = split_path(relative)
    with explain_errors(f"Failed to remove {relative}"):
        try:
            with closing(open_folder_beneath(root, parents)) as folder:
                _remove_tree(folder, name, MAX_DEPTH)
        except FileNotFoundError:
            pass


def list_tree(root: Path) -> list[tuple[str, int, int]]:
    """Return the regular files beneath a directory; links are not followed.

    Hidden files and directories are left out: files that are being written, leftovers
    of NFS, and the notes of file managers.

    Returns:
        The relative POSIX path, the size in bytes and the time of the last change in
        nanoseconds of each, sorted by path.

    Raises:
        StorageError: If the storage failed, or the tree is too deep.
    """
    found: list[tuple[str, int, int]] = []
    with explain_errors(f"Failed to list {root}"), closing(Folder.open(root)) as folder:
        _list_tree(folder, "", found, MAX_DEPTH)
    return sorted(found)


def split_path(relative: str) -> list[str]:
    """Split a peer's path into names that are harmless.

    Raises:
        InvalidInput: If it is not a relative path beneath the root.
    """
    return check_relative_path_untrusted(relative).split("/")


def open_folder_beneath(
    root: Path, names: list[str], *, create: bool = False
) -> Folder:
    """Open a directory beneath a root.

    Args:
        root: A directory that the owner of this process named.
        names: Checked names, from `split_path`; none means the root itself.
        create: Make missing directories.

    Raises:
        InvalidInput: If a name is a link, or not a directory.
        OSError: If a directory is missing, or the storage failed.
    """
    folder = Folder.open(root)
    for name in names:
        with closing(folder):
            try:
                inner = folder.open_folder(name)
            except FileNotFoundError:
                if not create:
                    raise
                folder.make_folder(name)
                inner = folder.open_folder(name)
        folder = inner
    return folder


@contextmanager
def _explain_path(relative: str) -> Iterator[None]:
    """Turn the failures that a wrong path causes into `InvalidInput`."""
    with explain_errors(f"Failed to open {relative}"):
        try:
            yield
        except FileNotFoundError:
            raise InvalidInput(f"File not found: {relative}") from None
        except PermissionError:
            raise InvalidInput(f"Permission denied: {relative}") from None


def _link_error(name: str) -> InvalidInput:
    return InvalidInput(
        f"Path outside shared storage: {name!r} is a symbolic link,"
        " and those are not followed"
    )


def _remove_tree(parent: Folder, name: str, depth: int) -> bool:
    """Remove a tree; return False if NFS keeps a file of it."""
    if not stat.S_ISDIR(parent.status(name).st_mode):
        return _unlink_or_leave(parent, name)
    if depth == 0:
        raise StorageError(f"{parent.path} is nested too deeply to remove")
    with closing(parent.open_folder(name)) as folder:
        gone = [_remove_tree(folder, child, depth - 1) for child in folder.names()]
        # A file that was open just got a new name, which was not in the list.
        empty = all(gone) and not any(map(_is_nfs_leftover, folder.names()))
    if empty:
        parent.remove_folder(name)
    return empty


def _unlink_or_leave(parent: Folder, name: str) -> bool:
    try:
        parent.unlink(name)
    except OSError as error:
        if _is_nfs_leftover(name) and error.errno == errno.EBUSY:
            return False
        raise
    return True


def _is_nfs_leftover(name: str) -> bool:
    return name.startswith(".nfs")


def _list_tree(
    folder: Folder, prefix: str, found: list[tuple[str, int, int]], depth: int
) -> None:
    if depth == 0:
        raise StorageError(f"{folder.path} is nested too deeply to list")
    for name in folder.names():
        if name.startswith("."):
            continue
        try:
            status = folder.status(name)
            if stat.S_ISREG(status.st_mode):
                found.append((prefix + name, status.st_size, status.st_mtime_ns))
            elif stat.S_ISDIR(status.st_mode):
                with closing(folder.open_folder(name)) as inner:
                    _list_tree(inner, f"{prefix}{name}/", found, depth - 1)
        except FileNotFoundError:
            continue  # removed while the list was made
