"""Check the entries of a zip before a byte is written, and plan where each goes.

Any holder of the room secret can send a package, so its list of entries is hostile
input: names that lead out of the directory, links and devices, entries that share their
data or grow a thousandfold, and names that some system cannot tell apart.
"""

import os
import stat
import struct
import zipfile
from collections.abc import Iterable
from typing import BinaryIO

import msgspec

from sleap_rtc.proto.errors import InvalidInput
from sleap_rtc.proto.paths import check_relative_path_untrusted, fold_path
from sleap_rtc.proto.sizes import human_size

GIBIBYTE = 1024**3

_END = struct.Struct("<4s4H2LH")
_END_SIGNATURE = b"PK\5\6"
_MAX_COMMENT_BYTES = 0x10000
_LOCATOR = struct.Struct("<4sLQL")
_LOCATOR_SIGNATURE = b"PK\6\7"
_END_64 = struct.Struct("<4sQ2H2L4Q")
_END_64_SIGNATURE = b"PK\6\6"
_LOCAL_HEADER_BYTES = 30

_MAX_LEVELS = 64
"""Levels of nested directories; `sleap_rtc.io.storage.folder` can remove twice as
many."""

_ENCRYPTED = 0x1 | 0x40 | 0x2000
_PATCH = 0x20
_UTF_8 = 0x800
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)

_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class ArchiveError(Exception):
    """A zip cannot be unpacked or made; the message names the entry and the reason."""


class ArchiveLimits(msgspec.Struct, frozen=True):
    """Limits of a zip.

    Args:
        entries: Files and directories. Packages in the field hold a dozen.
        directory_bytes: Bytes of the list of entries, which is read into memory.
        total_bytes: Bytes of all files together, unpacked.
        ratio: Unpacked bytes of a file for each packed one. Deflate reaches 1032,
            pictures and labels reach 20.
        ratio_from_bytes: Bytes up to which a file may have any ratio.
    """

    entries: int = 20_000
    directory_bytes: int = 16 * 1024 * 1024
    total_bytes: int = 1024 * GIBIBYTE
    ratio: int = 200
    ratio_from_bytes: int = 10 * 1024 * 1024


LIMITS = ArchiveLimits()


class PlannedEntry(msgspec.Struct, frozen=True):
    """One file or directory to make.

    Args:
        path: Its path, relative to the destination.
        is_folder: True for a directory.
        mode: Permissions of a file, before the umask.
        info: The entry of the zip.
    """

    path: str
    is_folder: bool
    mode: int
    info: zipfile.ZipInfo


def check_size_of_directory(file: BinaryIO, limits: ArchiveLimits) -> None:
    """Refuse a zip whose list of entries alone would fill the memory.

    `zipfile` reads the whole list at once, so this check comes first.

    Raises:
        ArchiveError: If the list is too long, or the file has none.
    """
    size = file.seek(0, os.SEEK_END)
    longest_tail = _END_64.size + _LOCATOR.size + _END.size + _MAX_COMMENT_BYTES
    start = max(0, size - longest_tail)
    file.seek(start)
    tail = file.read()
    # The same order as in zipfile, so that both see the same record.
    place = len(tail) - _END.size
    if not (tail[place:].startswith(_END_SIGNATURE) and tail.endswith(b"\0\0")):
        place = tail.rfind(_END_SIGNATURE)
    if place < 0 or len(tail) - place < _END.size:
        raise ArchiveError("The package is not a zip file, or its end is missing")
    entries, directory_bytes = _END.unpack_from(tail, place)[4:6]
    before = place - _LOCATOR.size - _END_64.size
    if before >= 0 and tail.startswith(_LOCATOR_SIGNATURE, before + _END_64.size):
        record = _END_64.unpack_from(tail, before)
        if record[0] == _END_64_SIGNATURE:
            entries, directory_bytes = record[7:9]
    if entries > limits.entries:
        raise ArchiveError(
            f"The package has {entries} entries, and {limits.entries} are allowed"
        )
    if directory_bytes > limits.directory_bytes:
        raise ArchiveError("The package's list of entries is too long")


def plan_entries(
    infos: list[zipfile.ZipInfo], end: int, limits: ArchiveLimits
) -> list[PlannedEntry]:
    """Check all entries of a zip, and plan where each goes.

    The files that macOS adds to a zip (``__MACOSX/``, ``.DS_Store``) are left out. If
    the rest is in one top folder, the files come out without it.

    Args:
        infos: The entries as `zipfile` read them.
        end: Offset in the file at which the data of the entries must end.
        limits: Limits of the zip.

    Returns:
        The entries to make, in the order of the zip.

    Raises:
        ArchiveError: If an entry is refused; it names the first one.
    """
    if len(infos) > limits.entries:
        raise ArchiveError(
            f"The package has {len(infos)} entries, and {limits.entries} are allowed"
        )
    entries = [_plan_entry(info, limits) for info in infos]
    _check_overlap(infos, end)
    total = sum(info.file_size for info in infos)
    if total > limits.total_bytes:
        raise ArchiveError(
            f"The package unpacks to {human_size(total)},"
            f" and {human_size(limits.total_bytes)} are allowed"
        )
    entries = [entry for entry in entries if not _is_macos_note(entry.path)]
    check_clashes((entry.path, entry.is_folder) for entry in entries)
    top = top_folder((entry.path, entry.is_folder) for entry in entries)
    if top is not None:
        entries = [
            msgspec.structs.replace(entry, path=entry.path.removeprefix(top + "/"))
            for entry in entries
            if entry.path != top
        ]
    return entries


def top_folder(entries: Iterable[tuple[str, bool]]) -> str | None:
    """Return the one top folder that all entries are in.

    Args:
        entries: Path of each, and True for a directory.

    Returns:
        Its name, or None if it does not exist or has no files.
    """
    tops: set[str] = set()
    has_file = False
    for path, is_folder in entries:
        top, slash, _ = path.partition("/")
        if not slash and not is_folder:
            return None
        tops.add(top)
        has_file = has_file or not is_folder
    return tops.pop() if len(tops) == 1 and has_file else None


def check_clashes(entries: Iterable[tuple[str, bool]]) -> None:
    """Refuse names that some system cannot tell apart, and files used as directories.

    Args:
        entries: Path of each, and True for a directory.

    Raises:
        ArchiveError: If two entries clash.
    """
    named: dict[str, tuple[str, bool]] = {}
    folders: set[str] = set()
    for path, is_folder in entries:
        key = fold_path(path)
        if key in named:
            raise _refused(path, f"clashes with {_quoted(named[key][0])}")
        named[key] = path, is_folder
        while "/" in key:
            key = key.rpartition("/")[0]
            folders.add(key)
    for key in folders & named.keys():
        path, is_folder = named[key]
        if not is_folder:
            raise _refused(path, "is both a file and a directory")


def _plan_entry(info: zipfile.ZipInfo, limits: ArchiveLimits) -> PlannedEntry:
    """Check one entry, and return where it goes."""
    # Not info.filename: there zipfile has already cut and replaced characters.
    name = info.orig_filename
    is_folder = name.endswith("/")
    path = name.removesuffix("/")
    try:
        check_relative_path_untrusted(path)
    except InvalidInput as error:
        raise ArchiveError(f"Entry {_quoted(name)} refused: {error.reason}") from None
    if path.count("/") >= _MAX_LEVELS:
        raise _refused(name, "is nested too deeply")
    if info.flag_bits & _ENCRYPTED:
        raise _refused(name, "is encrypted")
    if info.compress_type not in _METHODS or info.flag_bits & _PATCH:
        raise _refused(name, "is packed by a method that is not supported")
    mode = info.external_attr >> 16
    kind = stat.S_IFMT(mode)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise _refused(name, f"is {_KINDS.get(kind, 'of an unknown kind')}")
    if (kind == stat.S_IFDIR and not is_folder) or (is_folder and info.file_size):
        raise _refused(name, "is both a file and a directory")
    _check_ratio(info, limits)
    permissions = 0o755 if mode & 0o111 else 0o644
    return PlannedEntry(path, is_folder, permissions, info)


def _check_ratio(info: zipfile.ZipInfo, limits: ArchiveLimits) -> None:
    """Refuse an entry that unpacks to far more than its packed size."""
    if info.file_size <= limits.ratio_from_bytes:
        return
    if info.file_size > limits.ratio * info.compress_size:
        raise _refused(
            info.orig_filename,
            f"unpacks {human_size(info.compress_size)} to {human_size(info.file_size)},"
            f" more than {limits.ratio} times as much",
        )


def _check_overlap(infos: list[zipfile.ZipInfo], end: int) -> None:
    """Refuse entries that share data, with which a small zip unpacks to a huge one."""
    free_from = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        encoding = "utf-8" if info.flag_bits & _UTF_8 else "cp437"
        name_bytes = len(info.orig_filename.encode(encoding))
        if info.header_offset < free_from:
            raise _refused(info.orig_filename, "shares its data with another entry")
        free_from = (
            info.header_offset + _LOCAL_HEADER_BYTES + name_bytes + info.compress_size
        )
        if free_from > end:
            raise _refused(info.orig_filename, "is longer than the package")


def _is_macos_note(path: str) -> bool:
    return path.split("/")[0] == "__MACOSX" or path.split("/")[-1] == ".DS_Store"


def _refused(name: str, why: str) -> ArchiveError:
    return ArchiveError(f"Entry {_quoted(name)} refused: it {why}")


def _quoted(name: str) -> str:
    return repr(name if len(name) <= 120 else name[:120] + "...")
