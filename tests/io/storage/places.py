"""Storage for tests: disk and memory, full, read-only, and hanging."""

import errno
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import pytest
import trio
from trio.testing import MockClock

MEMORY = Path("/dev/shm")
"""A tmpfs on Linux: copy_file_range() and fallocate() differ there."""


def ignores_permissions() -> bool:
    """Return True if this user may read and write everything, as root may."""
    with tempfile.TemporaryDirectory() as path:
        os.chmod(path, 0)
        try:
            os.listdir(path)
        except PermissionError:
            return False
        finally:
            os.chmod(path, 0o700)
    return True


@contextmanager
def memory_folder() -> Iterator[Path]:
    """Yield a fresh directory on a tmpfs; skip where no tmpfs exists."""
    if not os.path.ismount(MEMORY):
        pytest.skip("this system has no tmpfs at /dev/shm")
    path = Path(tempfile.mkdtemp(dir=MEMORY, prefix="sleap-rtc-test-"))
    try:
        yield path
    finally:
        shutil.rmtree(path)


@contextmanager
def small_mount(path: Path, megabytes: int) -> Iterator[Path]:
    """Mount a tmpfs that is really full after some MiB; skip where that is refused."""
    with _mounted("-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(path)):
        yield path


@contextmanager
def busy_file(path: Path) -> Iterator[None]:
    """Create a file that cannot be removed (EBUSY); skip where that is refused."""
    path.touch()
    with _mounted("--bind", "/dev/null", str(path)):
        yield


@contextmanager
def read_only_mount(path: Path) -> Iterator[Path]:
    """Mount a read-only tmpfs; skip where that is refused."""
    with _mounted("-t", "tmpfs", "-o", "ro", "none", str(path)):
        yield path


def find_program(name: str) -> str | None:
    """Return the path of a program, even of one for administrators."""
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


@contextmanager
def disk_mount(folder: Path, kind: str, megabytes: int) -> Iterator[Path]:
    """Mount a new file system in a file; skip where that is refused.

    Args:
        folder: An empty directory for the file and the mount point.
        kind: ``xfs`` or ``btrfs``, which can share blocks between files, or ``exfat``,
            which has no hard links.
        megabytes: Its size; unused parts take no space.
    """
    maker = find_program(f"mkfs.{kind}")
    if maker is None:
        pytest.skip(f"NOT TESTED: mkfs.{kind} is not installed")
    image, path = folder / "image", folder / "mount"
    path.mkdir()
    with image.open("wb") as file:
        file.truncate(megabytes * 2**20)
    subprocess.run([maker, str(image)], check=True, capture_output=True)
    # Few kernels have exFAT, but the FUSE program serves it on any.
    driver = "exfat-fuse" if kind == "exfat" else kind
    with _mounted("-t", driver, "-o", "loop", str(image), str(path)):
        yield path


@contextmanager
def _mounted(*arguments: str) -> Iterator[None]:
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("NOT TESTED: only root on Linux may mount")
    answer = subprocess.run(
        ["mount", *arguments], capture_output=True, text=True, check=False
    )
    if answer.returncode != 0:
        pytest.skip(f"NOT TESTED: mount says {answer.stderr.strip()}")
    try:
        yield
    finally:
        # Lazily: a test that failed may still have an open file there.
        subprocess.run(["umount", "-l", arguments[-1]], check=True)


class HangingStorage:
    """Storage whose server does not answer: each touch waits inside the kernel.

    Use it in a ``with`` block, which releases all threads at its end.
    """

    def __init__(self, fifo: Path) -> None:
        self._fifo = fifo
        self._lock = threading.Condition()
        self._waiting = 0
        self.touched = threading.Event()
        self.hangs = True
        os.mkfifo(fifo)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.recover()

    def touch(self) -> str:
        """Wait until the storage answers, in a system call that nothing interrupts."""
        with self._lock:
            self._waiting += 1
        self.touched.set()
        if self.hangs:
            os.close(os.open(self._fifo, os.O_RDONLY))
        with self._lock:
            self._waiting -= 1
            self._lock.notify_all()
        return "answered"

    def recover(self) -> None:
        """Answer all calls, and wait until their threads continue."""
        self.hangs = False
        with self._lock:
            while self._waiting:
                try:
                    os.close(os.open(self._fifo, os.O_WRONLY | os.O_NONBLOCK))
                except OSError as error:
                    if error.errno != errno.ENXIO:  # no thread is in the call yet
                        raise
                self._lock.wait(0.01)

    async def wait_touched(self) -> None:
        """Wait until a thread hangs."""
        while not self.touched.is_set():
            await trio.lowlevel.checkpoint()
        self.touched.clear()


async def ends_while_reading(
    call: Callable[[], Awaitable[object]], fifo: Path, clock: MockClock
) -> bool:
    """Cancel a call whose thread hangs while it reads a FIFO.

    Returns:
        True if the call ended before its thread did.
    """
    scope, ended = trio.CancelScope(), trio.Event()

    async def run() -> None:
        with scope:
            await call()
        ended.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        writer = await wait_read(fifo)
        scope.cancel()
        clock.rate = 50
        with trio.move_on_after(500):  # only for a call that waits for its thread
            await ended.wait()
        has_ended = ended.is_set()
        os.close(writer)
    return has_ended


async def wait_read(fifo: Path) -> int:
    """Open a FIFO for writing as soon as a thread has opened it to read."""
    while True:
        try:
            return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO:  # no thread reads it yet
                raise
            await trio.lowlevel.checkpoint()
