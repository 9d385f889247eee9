"""Each strategy to copy, on real file systems, and the change to the next one."""

import errno
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from sleap_rtc.io.storage.copy import (
    MIN_RATE,
    CopyReport,
    copy_file,
    copy_timeout,
    copy_with_deadline,
)
from sleap_rtc.io.storage.copy_strategies import (
    STRATEGIES,
    Strategy,
    copy_by_reflink,
    copy_in_kernel,
    copy_plainly,
)
from sleap_rtc.io.storage.folder import (
    CopyTimeoutError,
    InsufficientSpaceError,
    StorageError,
)
from tests.io.storage.places import (
    disk_mount,
    find_program,
    memory_folder,
    read_only_mount,
    small_mount,
)

MEBIBYTE = 1024 * 1024
BLOCK = MEBIBYTE // 2
SIZES = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 25 * MEBIBYTE + 3]

needs_linux = pytest.mark.skipif(
    sys.platform != "linux", reason="NOT TESTED: Linux copies in the kernel"
)

each_strategy = pytest.mark.parametrize(
    "strategy",
    [pytest.param(copy_in_kernel, marks=needs_linux), copy_plainly],
)


@pytest.fixture(params=["xfs", "btrfs"])
def sharing_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Yield a directory where files can share blocks."""
    folder = tmp_path / "disk"
    folder.mkdir()
    with disk_mount(folder, request.param, megabytes=600) as path:
        yield path


@pytest.fixture
def memory() -> Iterator[Path]:
    """Yield a directory to which the kernel cannot copy from a disk (EXDEV)."""
    with memory_folder() as path:
        yield path


def make_file(path: Path, size: int) -> bytes:
    data = random.Random(size).randbytes(size)
    path.write_bytes(data)
    return data


@contextmanager
def opened(source: Path, target: Path) -> Iterator[tuple[int, int]]:
    """Open a source, and a target that is new or has content."""
    with source.open("rb") as reader:
        fd = os.open(target, os.O_RDWR | os.O_CREAT)
        try:
            yield reader.fileno(), fd
        finally:
            os.close(fd)


def copy(source: Path, root: Path) -> CopyReport:
    return copy_file(
        source, root, "copy", progress=lambda done: None, check=lambda: None
    )


# -------------------------------------------------------------- each strategy alone


@each_strategy
@pytest.mark.parametrize("offset", [0, 5 * MEBIBYTE])
@pytest.mark.parametrize("size", SIZES)
def test_a_strategy_copies_the_rest(
    tmp_path: Path, strategy: Strategy, size: int, offset: int
) -> None:
    data = make_file(tmp_path / "a", size)
    (tmp_path / "b").write_bytes(data[:offset])
    offset = min(offset, size)
    with opened(tmp_path / "a", tmp_path / "b") as (source, target):
        steps = list(strategy(source, target, offset, size))
    assert (tmp_path / "b").read_bytes() == data
    assert steps == sorted(steps)
    assert steps[-1:] == ([size] if size > offset else [])


@each_strategy
def test_a_strategy_that_is_closed_writes_no_more(
    tmp_path: Path, strategy: Strategy
) -> None:
    make_file(tmp_path / "a", 40 * MEBIBYTE)
    with opened(tmp_path / "a", tmp_path / "b") as (source, target):
        with closing(strategy(source, target, 0, 40 * MEBIBYTE)) as steps:
            next(steps)
        assert os.fstat(target).st_size < 40 * MEBIBYTE


def test_a_full_disk_is_an_error(tmp_path: Path) -> None:
    make_file(tmp_path / "a", 40 * MEBIBYTE)
    (tmp_path / "full").mkdir()
    with (
        small_mount(tmp_path / "full", megabytes=18) as full,
        opened(tmp_path / "a", full / "b") as (source, target),
        pytest.raises(OSError) as caught,  # noqa: PT011 - the number is checked below
    ):
        list(copy_plainly(source, target, 0, 40 * MEBIBYTE))
    assert caught.value.errno == errno.ENOSPC


@each_strategy
def test_a_strategy_ends_where_the_source_ends(
    tmp_path: Path, strategy: Strategy
) -> None:
    data = make_file(tmp_path / "a", 9 * MEBIBYTE)
    with opened(tmp_path / "a", tmp_path / "b") as (source, target):
        steps = list(strategy(source, target, 0, 30 * MEBIBYTE))
    assert steps[-1] == len(data)
    assert (tmp_path / "b").read_bytes() == data


@needs_linux
def test_reads_and_writes_resume_where_the_kernel_stopped(tmp_path: Path) -> None:
    data = make_file(tmp_path / "a", 40 * MEBIBYTE)
    with opened(tmp_path / "a", tmp_path / "b") as (source, target):
        with closing(copy_in_kernel(source, target, 0, len(data))) as steps:
            copied = next(steps)
        assert 0 < copied < len(data)
        os.pwrite(target, b"kernel", 0)  # copied bytes are not copied again
        assert list(copy_plainly(source, target, copied, len(data)))
    assert (tmp_path / "b").read_bytes() == b"kernel" + data[6:]


@needs_linux
def test_nothing_is_added_to_a_file_that_the_kernel_can_only_append_to(
    tmp_path: Path,
) -> None:
    make_file(tmp_path / "a", BLOCK)
    with (tmp_path / "a").open("rb") as source, (tmp_path / "b").open("ab") as target:
        assert list(copy_in_kernel(source.fileno(), target.fileno(), 0, BLOCK)) == []
    assert (tmp_path / "b").read_bytes() == b""


@needs_linux
def test_a_copy_can_stop_soon(tmp_path: Path) -> None:
    make_file(tmp_path / "a", 40 * MEBIBYTE)
    with opened(tmp_path / "a", tmp_path / "b") as (source, target):
        steps = [0, *copy_in_kernel(source, target, 0, 40 * MEBIBYTE)]
    # At the rate below which storage counts as hanging, each takes under a second.
    longest = max(end - begin for begin, end in pairwise(steps))
    assert longest < MIN_RATE


@needs_linux
def test_the_kernel_cannot_copy_to_another_file_system(
    tmp_path: Path, memory: Path
) -> None:
    make_file(tmp_path / "a", 9 * MEBIBYTE)
    with opened(tmp_path / "a", memory / "b") as (source, target):
        assert list(copy_by_reflink(source, target, 0, 9 * MEBIBYTE)) == []
        assert list(copy_in_kernel(source, target, 0, 9 * MEBIBYTE)) == []


def test_nothing_is_shared_with_a_file_that_has_content(tmp_path: Path) -> None:
    make_file(tmp_path / "a", BLOCK)
    with opened(tmp_path / "a", tmp_path / "b") as (source, target):
        assert list(copy_by_reflink(source, target, 1, BLOCK)) == []


# --------------------------------------------------------------- all in their order


@pytest.mark.parametrize("size", [1, BLOCK + 1, 200 * MEBIBYTE])
def test_a_reflink_takes_no_space(sharing_disk: Path, size: int) -> None:
    data = make_file(sharing_disk / "a", size)
    os.sync()
    before = os.statvfs(sharing_disk).f_bavail * os.statvfs(sharing_disk).f_frsize
    report = copy(sharing_disk / "a", sharing_disk)
    after = os.statvfs(sharing_disk).f_bavail * os.statvfs(sharing_disk).f_frsize
    assert (report.method, report.size) == ("reflink", size)
    assert report.path.read_bytes() == data
    assert before - after < 8 * MEBIBYTE


def test_a_reflink_that_is_not_wanted_leaves_nothing(sharing_disk: Path) -> None:
    make_file(sharing_disk / "a", 9 * MEBIBYTE)
    seen: list[int] = []

    def check() -> None:
        if seen:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copy_file(
            sharing_disk / "a",
            sharing_disk,
            "copy",
            progress=seen.append,
            check=check,
        )
    assert seen == [9 * MEBIBYTE]
    assert os.listdir(sharing_disk) == ["a"]


@needs_linux
@pytest.mark.parametrize("size", [1, 25 * MEBIBYTE + 3])
def test_another_file_system_is_written_with_reads_and_writes(
    tmp_path: Path, memory: Path, size: int
) -> None:
    data = make_file(tmp_path / "a", size)
    report = copy(tmp_path / "a", memory)
    assert report.method == "read/write"
    assert report.path.read_bytes() == data
    assert report.seconds > 0


def test_without_the_kernel_a_file_goes_through_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sleap_rtc.io.storage.copy.STRATEGIES", STRATEGIES[-1:])
    data = make_file(tmp_path / "a", BLOCK + 1)
    (tmp_path / "root").mkdir()
    report = copy(tmp_path / "a", tmp_path / "root")
    assert report.method == "read/write"
    assert report.path.read_bytes() == data


@needs_linux
def test_copies_within_one_file_system_are_left_to_the_kernel(memory: Path) -> None:
    make_file(memory / "a", 9 * MEBIBYTE)
    assert copy(memory / "a", memory).method == "copy_file_range"


def test_holes_are_zeros_in_the_copy(tmp_path: Path, memory: Path) -> None:
    with (tmp_path / "a").open("wb") as file:
        file.seek(20 * MEBIBYTE)
        file.write(b"in the middle")
        file.truncate(50 * MEBIBYTE)
    for root in (tmp_path, memory):
        report = copy(tmp_path / "a", root)
        assert report.path.read_bytes() == (tmp_path / "a").read_bytes()


@needs_linux
def test_a_copy_that_is_too_short_is_not_published(tmp_path: Path) -> None:
    source = Path("/sys/devices/system/cpu/possible")  # holds less than its size
    with pytest.raises(StorageError, match=r"\d+ of \d+ bytes arrived"):
        copy(source, tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_read_only_root_is_an_error(tmp_path: Path) -> None:
    make_file(tmp_path / "a", 9)
    (tmp_path / "root").mkdir()
    with (
        read_only_mount(tmp_path / "root") as root,
        pytest.raises(StorageError, match="copy a: Read-only file system"),
    ):
        copy(tmp_path / "a", root)


async def test_a_full_disk_ends_the_copy(tmp_path: Path) -> None:
    make_file(tmp_path / "a", 40 * MEBIBYTE)
    (tmp_path / "full").mkdir()
    with small_mount(tmp_path / "full", megabytes=50) as root, trio.fail_after(60):

        def fill(copied: int) -> None:
            if not (root / "filler").exists():
                (root / "filler").write_bytes(bytes(20 * MEBIBYTE))

        with pytest.raises(InsufficientSpaceError, match="copy a: No space left"):
            await copy_with_deadline(
                tmp_path / "a", root, "copy", size=40 * MEBIBYTE, on_progress=fill
            )
        assert os.listdir(root) == ["filler"]


async def test_cancellation_ends_the_copy(tmp_path: Path, memory: Path) -> None:
    with (tmp_path / "a").open("wb") as file:
        file.truncate(2**30)
    with trio.fail_after(60), trio.CancelScope() as scope:
        await copy_with_deadline(
            tmp_path / "a",
            memory,
            "copy",
            size=2**30,
            on_progress=lambda copied: scope.cancel(),
        )
    assert scope.cancelled_caught
    assert os.listdir(memory) == []


async def test_a_source_of_another_size_is_refused_before_a_byte(
    tmp_path: Path,
) -> None:
    make_file(tmp_path / "a", 10)
    with (
        trio.fail_after(60),
        pytest.raises(StorageError, match="a has 10 bytes instead of 11"),
    ):
        await copy_with_deadline(
            tmp_path / "a", tmp_path, "copy", size=11, on_progress=lambda copied: None
        )
    assert os.listdir(tmp_path) == ["a"]


async def test_storage_that_hangs_is_given_up(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    if find_program("fsfreeze") is None:
        pytest.skip("NOT TESTED: fsfreeze is not installed")
    with (tmp_path / "a").open("wb") as file:
        file.truncate(400 * MEBIBYTE)  # far from copied when the disk freezes
    mock_clock.rate = 1.0
    (tmp_path / "disk").mkdir()
    with disk_mount(tmp_path / "disk", "xfs", megabytes=1000) as root:
        freezers: list[subprocess.Popen[bytes]] = []
        seen: list[int] = []

        def freeze(copied: int) -> None:
            if not seen:
                freezers.append(freeze_disk(root))
                mock_clock.jump(copy_timeout(400 * MEBIBYTE))
            seen.append(copied)

        with (
            trio.fail_after(300),
            pytest.raises(CopyTimeoutError, match=r"timed out after 70 seconds"),
        ):
            await copy_with_deadline(
                tmp_path / "a",
                root,
                "copy",
                size=400 * MEBIBYTE,
                on_progress=freeze,
            )
        (freezer,) = freezers
        await trio.to_thread.run_sync(freezer.communicate)
        with trio.fail_after(60):
            # The thread cleans up in silence when its call returns.
            while os.listdir(root):  # noqa: ASYNC110
                await trio.sleep(0.01)
        assert seen[-1] < 400 * MEBIBYTE


def freeze_disk(root: Path) -> subprocess.Popen[bytes]:
    """Make every writer hang in the kernel until the returned process ends.

    A shell holds the disk: a test that was killed would leave it frozen for good.
    """
    script = '"$1" --freeze "$2" && echo frozen; read -t 10; "$1" --unfreeze "$2"'
    freezer = subprocess.Popen(
        ["bash", "-c", script, "bash", str(find_program("fsfreeze")), str(root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert freezer.stdout is not None
    assert freezer.stdout.readline() == b"frozen\n"
    return freezer
