"""Unpack a package without trusting it, and pack a directory into one.

Both functions block: call them in worker threads.
"""

import os
import stat
import struct
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from sleap_rtc.io.storage.archive_plan import (
    LIMITS,
    ArchiveError,
    ArchiveLimits,
    PlannedEntry,
    check_clashes,
    check_size_of_directory,
    plan_entries,
)
from sleap_rtc.io.storage.files import PartFile, require_space, write_at
from sleap_rtc.io.storage.folder import Folder, explain_errors, open_owned
from sleap_rtc.proto.errors import InvalidInput
from sleap_rtc.proto.paths import check_relative_path_untrusted

_BUFFER = 1024 * 1024

_BROKEN = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    OverflowError,
    ValueError,
)
"""Exceptions of `zipfile` for bytes that are not a zip."""


def extract_package(
    package: int,
    destination: Folder,
    *,
    check: Callable[[], None],
    limits: ArchiveLimits = LIMITS,
) -> None:
    """Unpack a zip into an existing directory, which need not be empty.

    Every entry is checked before the first byte is written. No file is replaced and no
    link in the directory is followed. After a failure or a stop, exactly the files of
    this call are removed.

    Args:
        package: The open zip, from `open_owned` or `open_beneath`; it is closed.
        destination: The directory; the caller closes it.
        check: Called between blocks; it stops the work by raising.
        limits: Limits of the zip.

    Raises:
        ArchiveError: If the zip is broken or refused; it names the entry.
        InsufficientSpaceError: If it does not fit.
        StorageError: If the storage failed.
    """
    with ExitStack() as stack:
        file = stack.enter_context(os.fdopen(package, "rb"))
        with explain_errors("Failed to read the package"), _explain_zip("The package"):
            check_size_of_directory(file, limits)
            archive = stack.enter_context(zipfile.ZipFile(file))
            infos = archive.infolist()
            entries = plan_entries(infos, archive.start_dir, limits)
        with explain_errors("Failed to unpack the package"):
            needed = sum(entry.info.file_size for entry in entries)
            require_space(destination, needed, "for the package")
        unpacking = _Unpacking(archive, destination, check)
        unpacking.run(entries)


def pack_directory(
    source: Path,
    target: Path,
    *,
    progress: Callable[[int], None],
    check: Callable[[], None],
) -> None:
    """Pack the content of a directory into a new zip, without compression.

    Labels and videos are compressed already. Links to files in the directory are
    packed as those files; nothing is left out silently.

    Args:
        source: The directory.
        target: Path of the zip, which appears when it is whole.
        progress: Called at intervals with the bytes packed so far.
        check: Called between blocks; it stops the work by raising.

    Raises:
        ArchiveError: If a file in it cannot be packed; it names the file.
        InsufficientSpaceError: If the zip does not fit.
        StorageError: If `target` is taken, or the storage failed.
    """
    with explain_errors(f"Failed to pack {source}"):
        root = source.resolve(strict=True)
        members = sorted(_members(root, root))
        check_clashes((name, is_folder) for name, is_folder, _ in members)
        needed = sum(path.stat().st_size for _, _, path in members)
        folder = Folder.open(target.resolve().parent)
        with closing(folder):
            require_space(folder, needed, f"for {target.name}")
            part = PartFile.create(folder, target.name)
            try:
                _write_zip(part, members, progress, check)
                part.publish()
            finally:
                part.discard()


class _Unpacking:
    """One run of `extract_package`, with a list of the files that it made."""

    def __init__(
        self,
        archive: zipfile.ZipFile,
        destination: Folder,
        check: Callable[[], None],
    ) -> None:
        self._archive = archive
        self._destination = destination
        self._check = check
        self._made: list[tuple[list[str], bool]] = []

    def run(self, entries: list[PlannedEntry]) -> None:
        """Make all entries, or none."""
        whole = False
        try:
            for entry in entries:
                with explain_errors(f"Failed to unpack {entry.path}"):
                    self._make(entry)
            whole = True
        finally:
            if not whole:
                self._remove_all()

    def _make(self, entry: PlannedEntry) -> None:
        names = entry.path.split("/")
        folders = names if entry.is_folder else names[:-1]
        try:
            with self._open_folder(folders, make=True) as folder:
                if not entry.is_folder:
                    fd = folder.create_file(names[-1], entry.mode)
                    self._made.append((names, False))
                    try:
                        self._write(entry, fd)
                    finally:
                        os.close(fd)
        except FileExistsError:
            raise ArchiveError(
                f"Entry {entry.path!r} refused: the name is taken"
            ) from None
        except InvalidInput as error:
            raise ArchiveError(f"Entry {entry.path!r} refused: {error}") from None

    def _write(self, entry: PlannedEntry, fd: int) -> None:
        """Unpack one file; `zipfile` compares the checksum at its end."""
        size = entry.info.file_size
        offset = 0
        with (
            _explain_zip(f"Entry {entry.path!r}"),
            self._archive.open(entry.info) as source,
        ):
            while data := source.read(_BUFFER):
                offset += len(data)
                if offset > size:
                    break
                write_at(fd, data, offset - len(data))
                self._check()
        if offset != size:
            raise ArchiveError(
                f"Entry {entry.path!r} has another size than the zip declares"
            )

    def _remove_all(self) -> None:
        """Remove the new files and directories, in reverse order."""
        for names, is_folder in reversed(self._made):
            try:
                with self._open_folder(names[:-1], make=False) as folder:
                    if is_folder:
                        folder.remove_folder(names[-1])
                    else:
                        folder.unlink(names[-1])
            except (OSError, InvalidInput):
                # Another process added or removed files: they are not ours.
                continue

    @contextmanager
    def _open_folder(self, names: list[str], *, make: bool) -> Iterator[Folder]:
        """Open a directory beneath the destination."""
        with ExitStack() as stack:
            folder = self._destination
            for depth, name in enumerate(names, 1):
                if make and folder.make_folder(name):
                    self._made.append((names[:depth], True))
                folder = stack.enter_context(closing(folder.open_folder(name)))
            yield folder


def _members(root: Path, folder: Path) -> Iterator[tuple[str, bool, Path]]:
    """Yield the content of a directory: name in the zip, if a directory, and path."""
    for path in folder.iterdir():
        name = path.relative_to(root).as_posix()
        try:
            check_relative_path_untrusted(name)
        except InvalidInput as error:
            raise ArchiveError(f"{path} cannot be packed: {error.reason}") from None
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            yield name, True, path
            yield from _members(root, path)
        elif stat.S_ISLNK(mode):
            yield name, False, _follow_link(root, path)
        elif stat.S_ISREG(mode):
            yield name, False, path
        else:
            raise ArchiveError(f"{path} is not a regular file")


def _follow_link(root: Path, path: Path) -> Path:
    """Return the target of a link, which must be a file in the package itself."""
    try:
        real = Path(os.path.realpath(path, strict=True))
    except OSError as error:
        raise ArchiveError(f"{path} cannot be read: {error.strerror}") from None
    if not (real.is_relative_to(root) and real.is_file()):
        raise ArchiveError(
            f"{path} links to {real}, which is not a file in the"
            " package. Put a copy of that file in its place"
        )
    return real


def _write_zip(
    part: PartFile,
    members: list[tuple[str, bool, Path]],
    progress: Callable[[int], None],
    check: Callable[[], None],
) -> None:
    packed = 0

    def advance(count: int) -> None:
        nonlocal packed
        packed += count
        progress(packed)
        check()

    with (
        part.use() as fd,
        os.fdopen(os.dup(fd), "wb") as file,
        zipfile.ZipFile(file, "w") as archive,
    ):
        for name, is_folder, path in members:
            if is_folder:
                info = _zip_info(name + "/", path.stat())
                archive.writestr(info, b"")
            else:
                _pack_file(archive, name, path, advance)


def _pack_file(
    archive: zipfile.ZipFile, name: str, path: Path, advance: Callable[[int], None]
) -> None:
    try:
        fd = open_owned(path)
    except InvalidInput as error:
        raise ArchiveError(f"{name} cannot be read: {error}") from None
    with os.fdopen(fd, "rb") as source:
        info = _zip_info(name, os.fstat(fd))
        left = info.file_size
        with archive.open(info, "w") as target:
            while left and (data := source.read(min(_BUFFER, left))):
                target.write(data)
                left -= len(data)
                advance(len(data))
        if left or source.read(1):
            raise ArchiveError(f"{name} changed while it was packed")


def _zip_info(name: str, status: os.stat_result) -> zipfile.ZipInfo:
    """Return the entry of a file or a directory."""
    # A zip can write years from 1980 to 2107.
    changed = time.localtime(status.st_mtime)[:6]
    changed = min(max(changed, (1980, 1, 1, 0, 0, 0)), (2107, 12, 31, 23, 59, 58))
    info = zipfile.ZipInfo(name, changed)
    info.create_system = 3  # made on Unix: the permissions are valid
    permissions = 0o755 if status.st_mode & 0o111 else 0o644
    info.external_attr = (stat.S_IFMT(status.st_mode) | permissions) << 16
    info.file_size = 0 if info.is_dir() else status.st_size
    return info


@contextmanager
def _explain_zip(what: str) -> Iterator[None]:
    """Turn the exceptions of `zipfile` for broken files into `ArchiveError`."""
    try:
        yield
    except _BROKEN as error:
        raise ArchiveError(f"{what} is broken: {error}") from error
