"""The files that are moved, and their directories."""

import mmap
import os
import shlex
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from blake3 import blake3

from bench.measures import GIBIBYTE, MEBIBYTE, BenchError, Load

PROGRAM = "ln"
"""Program of a package's job: it keeps a hard link to the package that has arrived,
because the worker removes its own once the job is done."""

MEMORY = Path("/dev/shm")
"""Directory of Linux' file system in memory."""

_ADMINISTRATION = "/usr/sbin:/sbin"
"""Directories of an administrator's tools, which are not on every PATH."""


def make_load(directory: Path, size: int, *, reserve_only: bool = False) -> Load:
    """Write a package: random bytes with a small zip at their end.

    It is an archive like those that unpack themselves: the worker stores all of it, and
    unpacks only a script.

    Args:
        directory: The directory to write it to.
        size: Bytes before the zip.
        reserve_only: True for blocks that are allocated and never written.

    Raises:
        BenchError: If the storage is too small.
    """
    free = shutil.disk_usage(directory).free
    if free < size * 5 // 2 and not reserve_only:
        raise BenchError(
            f"{directory} has {free / GIBIBYTE:.1f} GiB free, but 2.5 times the size "
            f"of {size / GIBIBYTE:.1f} GiB are needed; choose another place or size"
        )
    path, arrived = directory / "package.zip", directory / "arrived.zip"
    command = shlex.join((PROGRAM, path.name, str(arrived)))
    with path.open("wb") as file:
        if reserve_only:
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            for start in range(0, size, MEBIBYTE):
                file.write(os.urandom(min(MEBIBYTE, size - start)))
    with zipfile.ZipFile(path, "a") as package:
        package.writestr("train-script.sh", f"#!/bin/bash\n{command}\n")
    with path.open("rb") as file:
        os.fsync(file.fileno())
    whole = path.stat().st_size
    hashed = whole - size if reserve_only else whole
    return Load(path, whole, hashed, _hash_of(path, hashed), arrived)


def take_away(load: Load) -> bool:
    """Remove the file that has arrived; return whether it is the one that was sent."""
    if not load.arrived.exists():
        raise BenchError(f"nothing has arrived at {load.arrived}")
    is_intact = (
        load.arrived.stat().st_size == load.size
        and _hash_of(load.arrived, load.hashed) == load.digest
    )
    load.arrived.unlink()
    return is_intact


def warm_memory(size: int) -> None:
    """Touch more memory than a copy will fill.

    A virtual machine may have given its free memory back to its host; the next program
    to use it would pay for that, a second or more for each gigabyte.
    """
    size = min(size * 3 // 2, psutil.virtual_memory().available // 2)
    with mmap.mmap(-1, size + MEBIBYTE) as memory:
        for _ in range(size // MEBIBYTE):
            memory.write(b"\1" * MEBIBYTE)


def file_system_of(directory: Path) -> str:
    """Name the type of the file system that holds a directory."""
    mounts = [
        mount
        for mount in psutil.disk_partitions(all=True)
        if directory.resolve().is_relative_to(mount.mountpoint)
    ]
    nearest = max(mounts, key=lambda mount: len(mount.mountpoint), default=None)
    return nearest.fstype if nearest else "unknown"


@contextmanager
def fresh_directory(parent: Path) -> Iterator[Path]:
    """Make a directory, and remove it after the body."""
    directory = parent / "fresh"
    directory.mkdir()
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


@contextmanager
def loop_mount(kind: str, directory: Path, size: int) -> Iterator[Path]:
    """Mount a new file system in a file, for as long as the body runs.

    Args:
        kind: Its type, such as ``xfs``.
        directory: The directory for the file and the mount point.
        size: Bytes of the file system; the file only takes those that are written.

    Raises:
        BenchError: If it cannot be made or mounted here; the text says why.
    """
    make = shutil.which(f"mkfs.{kind}", path=f"{os.environ['PATH']}:{_ADMINISTRATION}")
    if os.name != "posix" or os.geteuid() != 0:
        raise BenchError("only root can mount a file system")
    if make is None:
        raise BenchError(f"there is no mkfs.{kind} here")
    image, mount_point = directory / f"{kind}.image", directory / kind
    mount_point.mkdir()
    try:
        with image.open("wb") as file:
            file.truncate(size)
        _administer(make, "-q", str(image))
        _administer("mount", "-o", "loop", str(image), str(mount_point))
        try:
            yield mount_point
        finally:
            _administer("umount", str(mount_point))
    finally:
        image.unlink()
        mount_point.rmdir()


def _administer(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        said = done.stderr.strip() or f"exit status {done.returncode}"
        raise BenchError(f"{Path(command[0]).name}: {said}")


def _hash_of(path: Path, hashed: int) -> str:
    """Return the BLAKE3 hash of the last bytes of a file."""
    digest = blake3(max_threads=blake3.AUTO)
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        memoryview(content) as view,
        view[len(view) - hashed :] as tail,
    ):
        return digest.update(tail).hexdigest()
