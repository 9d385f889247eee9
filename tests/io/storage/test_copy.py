import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from sleap_rtc.io.storage.copy import copy_file, copy_timeout, copy_with_deadline
from sleap_rtc.io.storage.folder import (
    CopyTimeoutError,
    InsufficientSpaceError,
    StorageError,
)
from sleap_rtc.proto.errors import InvalidInput
from tests.io.storage.places import memory_folder, small_mount

MEBIBYTE = 1024 * 1024


@pytest.fixture(params=["disk to disk", "memory to memory", "disk to memory"])
def places(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[tuple[Path, Path]]:
    """Return a source directory and a shared root."""
    if request.param == "disk to disk":
        (tmp_path / "root").mkdir()
        yield tmp_path, tmp_path / "root"
        return
    with memory_folder() as path:
        (path / "root").mkdir()
        source = path if request.param == "memory to memory" else tmp_path
        yield source, path / "root"


class Stopped(Exception):
    """Raised by a check."""


def never() -> None:
    """Stop nothing."""


def stop() -> None:
    raise Stopped


def ignore(copied: int) -> None:
    pass


def make_file(path: Path, size: int) -> bytes:
    data = random.Random(size).randbytes(size)
    path.write_bytes(data)
    return data


def files(root: Path) -> list[str]:
    return sorted(
        str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()
    )


@pytest.mark.parametrize("size", [0, 1, 4 * MEBIBYTE, 25 * MEBIBYTE + 3])
def test_a_copy_is_equal(places: tuple[Path, Path], size: int) -> None:
    source, root = places
    data = make_file(source / "a.zip", size)
    seen: list[int] = []
    report = copy_file(
        source / "a.zip", root, "jobs/j/a.zip", progress=seen.append, check=never
    )
    path = report.path
    assert path == root / "jobs/j/a.zip"
    assert path.read_bytes() == data
    assert files(root) == ["jobs/j/a.zip"]
    assert seen == sorted(seen)
    assert report.size == size
    assert seen[-1:] == ([size] if size else [])


def test_a_copy_never_replaces_a_file(places: tuple[Path, Path]) -> None:
    source, root = places
    make_file(source / "a.zip", 10)
    (root / "a.zip").write_text("mine")
    with pytest.raises(StorageError, match=r"Failed to copy a\.zip: File exists"):
        copy_file(source / "a.zip", root, "a.zip", progress=ignore, check=never)
    assert (root / "a.zip").read_text() == "mine"
    assert files(root) == ["a.zip"]


def test_a_stopped_copy_leaves_nothing(places: tuple[Path, Path]) -> None:
    source, root = places
    make_file(source / "a.zip", 25 * MEBIBYTE)
    seen: list[int] = []
    with pytest.raises(Stopped):
        copy_file(
            source / "a.zip",
            root,
            "a.zip",
            progress=seen.append,
            check=lambda: stop() if seen else None,
        )
    assert 0 < seen[-1] < 25 * MEBIBYTE
    assert files(root) == []


@pytest.mark.parametrize("change", ["longer", "shorter", "touched"])
def test_a_source_that_changes_is_not_published(
    places: tuple[Path, Path], change: str
) -> None:
    source, root = places
    make_file(source / "a.zip", 25 * MEBIBYTE)

    def edit(copied: int) -> None:
        if change == "touched":
            os.utime(source / "a.zip", ns=(1, 1))
        else:
            os.truncate(source / "a.zip", 1 if change == "shorter" else 2**25)

    with pytest.raises(StorageError, match="changed while it was copied"):
        copy_file(source / "a.zip", root, "a.zip", progress=edit, check=never)
    assert files(root) == []


@pytest.mark.parametrize("relative", ["../a.zip", "/tmp/a.zip", "link/a.zip"])
def test_a_copy_stays_beneath_the_root(tmp_path: Path, relative: str) -> None:
    make_file(tmp_path / "a.zip", 10)
    (tmp_path / "root").mkdir()
    (tmp_path / "root/link").symlink_to("..")
    with pytest.raises(InvalidInput, match="outside shared storage"):
        copy_file(
            tmp_path / "a.zip",
            tmp_path / "root",
            relative,
            progress=ignore,
            check=never,
        )


async def test_a_disk_without_120_percent_is_refused_before_a_byte(
    tmp_path: Path,
) -> None:
    make_file(tmp_path / "a.zip", 7 * MEBIBYTE)
    (tmp_path / "full").mkdir()
    with small_mount(tmp_path / "full", megabytes=8) as root, trio.fail_after(60):
        with pytest.raises(InsufficientSpaceError) as caught:
            await copy_with_deadline(
                tmp_path / "a.zip", root, "a.zip", size=7 * MEBIBYTE, on_progress=ignore
            )
        assert str(caught.value) == (
            "Insufficient disk space on shared storage: need 8.4 MiB, have 8.0 MiB"
        )
        assert os.listdir(root) == []


def test_a_disk_that_becomes_full_is_an_error(tmp_path: Path) -> None:
    make_file(tmp_path / "a.zip", 40 * MEBIBYTE)
    (tmp_path / "full").mkdir()
    with small_mount(tmp_path / "full", megabytes=50) as root:

        def fill(copied: int) -> None:
            if not (root / "filler").exists():
                (root / "filler").write_bytes(bytes(20 * MEBIBYTE))

        with pytest.raises(
            InsufficientSpaceError, match=r"Failed to copy a\.zip: No space"
        ):
            copy_file(tmp_path / "a.zip", root, "a.zip", progress=fill, check=never)
        assert files(root) == ["filler"]


async def test_progress_is_reported_in_the_event_loop(tmp_path: Path) -> None:
    data = make_file(tmp_path / "a.zip", 9 * MEBIBYTE)
    threads: set[threading.Thread] = set()
    with trio.fail_after(60):
        report = await copy_with_deadline(
            tmp_path / "a.zip",
            tmp_path,
            "copy/a.zip",
            size=9 * MEBIBYTE,
            on_progress=lambda copied: threads.add(threading.current_thread()),
        )
    assert report.path.read_bytes() == data
    assert threads == {threading.current_thread()}


async def test_a_failing_progress_display_stops_the_copy(tmp_path: Path) -> None:
    make_file(tmp_path / "a.zip", MEBIBYTE)
    (tmp_path / "root").mkdir()

    def fail(copied: int) -> None:
        raise LookupError("no display")

    with trio.fail_after(60), pytest.raises(LookupError):
        await copy_with_deadline(
            tmp_path / "a.zip",
            tmp_path / "root",
            "a.zip",
            size=MEBIBYTE,
            on_progress=fail,
        )
    assert files(tmp_path / "root") == []


async def test_a_copy_that_takes_too_long_times_out(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    (tmp_path / "root").mkdir()
    reported = trio.Event()

    async def let_time_pass() -> None:
        await reported.wait()  # the event loop runs while the thread copies
        mock_clock.jump(copy_timeout(2**31))

    with memory_folder() as source:
        # From one file system to another no block can be shared: it takes seconds.
        with (source / "a.zip").open("wb") as file:
            file.truncate(2**31)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(let_time_pass)
            with pytest.raises(
                CopyTimeoutError, match=r"^File copy timed out after 234\.8 seconds"
            ):
                await copy_with_deadline(
                    source / "a.zip",
                    tmp_path / "root",
                    "a.zip",
                    size=2**31,
                    on_progress=lambda copied: reported.set(),
                )
    assert files(tmp_path / "root") == []


async def test_cancellation_removes_the_partial_copy(tmp_path: Path) -> None:
    with (tmp_path / "a.zip").open("wb") as file:
        file.truncate(2**30)
    (tmp_path / "root").mkdir()
    with trio.fail_after(60), trio.CancelScope() as scope:
        await copy_with_deadline(
            tmp_path / "a.zip",
            tmp_path / "root",
            "a.zip",
            size=2**30,
            on_progress=lambda copied: scope.cancel(),
        )
    assert scope.cancelled_caught
    assert files(tmp_path / "root") == []


async def test_a_missing_source_is_named(tmp_path: Path) -> None:
    with trio.fail_after(60), pytest.raises(InvalidInput, match="not found"):
        await copy_with_deadline(
            tmp_path / "a.zip", tmp_path, "b.zip", size=1, on_progress=ignore
        )


def test_the_time_for_a_copy_grows_with_its_size() -> None:
    assert copy_timeout(0) == 60
    assert copy_timeout(300 * MEBIBYTE) == 60
    assert copy_timeout(6000 * MEBIBYTE) == 630
