"""The package that the user named, as one zip file."""

import tempfile
import zipfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import msgspec
import trio

from sleap_rtc.errors import UsageError
from sleap_rtc.io.storage.archive import pack_directory
from sleap_rtc.io.storage.archive_plan import ArchiveError
from sleap_rtc.io.storage.call import call_storage
from sleap_rtc.io.storage.folder import StorageError
from sleap_rtc.proto.errors import InvalidInput
from sleap_rtc.proto.paths import check_file_name_untrusted

CLEANUP_TIMEOUT = 10.0
"""Seconds for removing a packed directory; after that the system has to do it."""


class PackageFile(msgspec.Struct, frozen=True):
    """A package that is ready to be sent.

    Args:
        named: The path that the user named, absolute.
        zip_path: The zip file; a packed directory is a temporary one.
        size: Bytes of the zip file.
        modified_ns: Time of its last change, in nanoseconds since 1970. It is 0 for a
            directory, which is packed into the same bytes each time.
    """

    named: Path
    zip_path: Path
    size: int
    modified_ns: int


@asynccontextmanager
async def open_package(named: Path) -> AsyncIterator[PackageFile]:
    """Check a package; a directory is packed for as long as the body runs.

    Raises:
        UsageError: If it is not a package, or cannot be read.
    """
    directory = await call_storage(
        _make_temporary_directory, discard=tempfile.TemporaryDirectory.cleanup
    )
    try:
        yield await call_storage(_find_package, named, Path(directory.name))
    finally:
        with suppress(StorageError):  # the system removes what hangs
            await call_storage(directory.cleanup, timeout=CLEANUP_TIMEOUT, shield=True)


def _make_temporary_directory() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="sleap-rtc-")


def _find_package(named: Path, directory: Path) -> PackageFile:
    named = named.absolute()
    try:
        check_file_name_untrusted(named.name)
        if named.is_dir():
            return _packed(named, directory / f"{named.name}.zip")
        if not named.is_file():
            raise UsageError(
                f"There is no package {named}.",
                "Name the zip file that SLEAP exported, or its directory.",
            )
        if not zipfile.is_zipfile(named):
            raise UsageError(f"{named} is not a zip file.", "Export it from SLEAP.")
        status = named.stat()
    except InvalidInput as error:
        raise UsageError(
            f"Cannot send {named}: {error.reason}.", "Rename it."
        ) from None
    except (ArchiveError, StorageError) as error:
        raise UsageError(f"Cannot pack {named}: {error}.") from None
    except OSError as error:
        raise UsageError(f"Cannot read {named}: {error.strerror}.") from None
    return PackageFile(named, named, status.st_size, status.st_mtime_ns)


def look_again(package: PackageFile) -> PackageFile:
    """Return the current state of the package (blocking).

    Raises:
        UsageError: If it is gone.
    """
    try:
        status = package.zip_path.stat()
    except OSError as error:
        raise UsageError(f"Cannot read {package.zip_path}: {error.strerror}.") from None
    modified_ns = status.st_mtime_ns if package.modified_ns else 0
    return PackageFile(package.named, package.zip_path, status.st_size, modified_ns)


def _packed(named: Path, packed: Path) -> PackageFile:
    pack_directory(
        named,
        packed,
        progress=lambda size: None,
        check=trio.from_thread.check_cancelled,
    )
    return PackageFile(named, packed, packed.stat().st_size, 0)
