import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from blake3 import blake3

from sleap_rtc.io.storage.files import PartFile
from sleap_rtc.io.storage.folder import (
    Folder,
    InsufficientSpaceError,
    StorageError,
    open_beneath,
    open_owned,
)
from sleap_rtc.io.transfer.chunk_files import ChunkReader, ChunkWriter
from sleap_rtc.proto.errors import InvalidInput
from tests.io.storage.places import memory_folder, small_mount

CHUNK = 4096


@pytest.fixture(params=["disk", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    if request.param == "disk":
        yield tmp_path
        return
    with memory_folder() as path:
        yield path


def make_file(path: Path, size: int) -> bytes:
    data = random.Random(size).randbytes(size)
    path.write_bytes(data)
    return data


def leftovers(root: Path) -> list[str]:
    return sorted(path.name for path in root.rglob("*") if path.is_file())


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK])
def test_chunks_in_any_order_make_the_same_file(storage: Path, size: int) -> None:
    data = make_file(storage / "source", size)
    reader = ChunkReader(open_owned(storage / "source"), chunk_size=CHUNK)
    writer = ChunkWriter.open(
        storage, "models/run/best.ckpt", size=size, chunk_size=CHUNK
    )
    target = storage / "models/run/best.ckpt"
    for index in reversed(range(-(-size // CHUNK))):
        payload, digest = reader.read(index)
        assert digest == blake3(payload).digest()
        assert writer.write(index, payload, digest)
        assert not target.exists()
    assert reader.check_unchanged()
    reader.close()
    assert writer.publish() == target
    assert target.read_bytes() == data
    assert leftovers(storage) == ["best.ckpt", "source"]


def test_many_threads_write_one_file(storage: Path) -> None:
    data = make_file(storage / "source", 200 * CHUNK + 7)
    reader = ChunkReader(open_owned(storage / "source"), chunk_size=CHUNK)
    writer = ChunkWriter.open(storage, "copy", size=len(data), chunk_size=CHUNK)
    with ThreadPoolExecutor(8) as pool:
        written = pool.map(
            lambda index: writer.write(index, *reader.read(index)), range(201)
        )
        assert all(written)
    reader.close()
    assert writer.publish().read_bytes() == data


def test_a_damaged_chunk_is_refused_and_not_written(storage: Path) -> None:
    data = make_file(storage / "source", CHUNK)
    digest = blake3(data).digest()
    writer = ChunkWriter.open(storage, "copy", size=CHUNK, chunk_size=CHUNK)
    assert writer.write(0, data, digest)
    assert not writer.write(0, b"\0" + data[1:], digest)
    assert not writer.write(0, data[:-1], blake3(data[:-1]).digest())
    assert not writer.write(0, data + b"!", blake3(data + b"!").digest())
    assert writer.publish().read_bytes() == data


@pytest.mark.parametrize("index", [-1, 2, 2**32])
def test_a_chunk_that_no_file_has_is_the_callers_fault(
    tmp_path: Path, index: int
) -> None:
    make_file(tmp_path / "source", 2 * CHUNK)
    reader = ChunkReader(open_owned(tmp_path / "source"), chunk_size=CHUNK)
    writer = ChunkWriter.open(tmp_path, "copy", size=2 * CHUNK, chunk_size=CHUNK)
    with pytest.raises(ValueError, match="no chunk"):
        reader.read(index)
    with pytest.raises(ValueError, match="no chunk"):
        writer.write(index, b"", b"")
    reader.close()
    writer.abandon()


def test_an_abandoned_file_leaves_nothing(storage: Path) -> None:
    writer = ChunkWriter.open(storage, "a/b", size=CHUNK, chunk_size=CHUNK)
    assert leftovers(storage) == [".b.map", ".b.part"]
    writer.abandon()
    writer.abandon()
    assert leftovers(storage) == []
    with pytest.raises(StorageError, match="closed"):
        writer.write(0, b"x" * CHUNK, blake3(b"x" * CHUNK).digest())


def test_abandoning_a_published_file_keeps_it(storage: Path) -> None:
    writer = ChunkWriter.open(storage, "a", size=0, chunk_size=CHUNK)
    path = writer.publish()
    writer.abandon()
    assert path.read_bytes() == b""


def test_no_file_is_ever_replaced(storage: Path) -> None:
    (storage / "taken").write_text("mine")
    with pytest.raises(StorageError, match="taken: File exists"):
        ChunkWriter.open(storage, "taken", size=1, chunk_size=CHUNK)
    writer = ChunkWriter.open(storage, "later", size=0, chunk_size=CHUNK)
    (storage / "later").write_text("mine")
    with pytest.raises(StorageError, match="later: File exists"):
        writer.publish()
    writer.abandon()
    assert (storage / "later").read_text() == "mine"
    assert leftovers(storage) == ["later", "taken"]


@pytest.mark.parametrize(
    "name",
    ["../a", "/etc/a", "a/../b", ".bashrc", "a/.ssh/b", "a\\b", "nul", "a\0b", ""],
)
def test_a_hostile_name_creates_nothing(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidInput):
        ChunkWriter.open(tmp_path, name, size=1, chunk_size=CHUNK)
    assert os.listdir(tmp_path) == []


def test_a_planted_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "root/models").symlink_to(tmp_path / "outside")
    with pytest.raises(InvalidInput, match="outside shared storage"):
        ChunkWriter.open(tmp_path / "root", "models/a", size=1, chunk_size=CHUNK)
    (tmp_path / "root/dead").symlink_to(tmp_path / "outside/dead")
    with pytest.raises(StorageError, match="File exists"):
        ChunkWriter.open(tmp_path / "root", "dead", size=1, chunk_size=CHUNK)
    assert os.listdir(tmp_path / "outside") == []


def test_long_names_leave_room_for_part_files_of_their_own(tmp_path: Path) -> None:
    names = ["ä" * 127, "ä" * 126 + "b"]
    writers = [ChunkWriter.open(tmp_path, n, size=0, chunk_size=CHUNK) for n in names]
    for writer in writers:
        writer.publish()
    assert sorted(os.listdir(tmp_path)) == sorted(names)


def test_a_file_that_does_not_fit_is_refused_at_once(storage: Path) -> None:
    with pytest.raises(InsufficientSpaceError, match=r"need 1024\.0 TiB, have "):
        ChunkWriter.open(storage, "a", size=2**50, chunk_size=2**30)
    assert leftovers(storage) == []


def test_a_file_of_absurdly_many_chunks_is_refused(storage: Path) -> None:
    with pytest.raises(InvalidInput, match="use larger chunks"):
        ChunkWriter.open(storage, "a", size=2**50, chunk_size=CHUNK)
    assert leftovers(storage) == []


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with small_mount(tmp_path, megabytes=2) as full:
        writer = ChunkWriter.open(full, "first", size=1_500_000, chunk_size=CHUNK)
        # The space of the first file is reserved, though nothing was written yet.
        with pytest.raises(InsufficientSpaceError):
            ChunkWriter.open(full, "second", size=1_500_000, chunk_size=CHUNK)
        writer.abandon()
        assert leftovers(full) == []


def test_a_file_that_changes_is_noticed(storage: Path) -> None:
    make_file(storage / "source", 2 * CHUNK)
    reader = ChunkReader(open_owned(storage / "source"), chunk_size=CHUNK)
    assert reader.check_unchanged()
    os.utime(storage / "source", ns=(1, 1))
    assert not reader.check_unchanged()
    os.truncate(storage / "source", CHUNK)
    with pytest.raises(StorageError, match="became shorter"):
        reader.read(1)
    reader.close()


def test_a_reader_takes_an_open_file(tmp_path: Path) -> None:
    data = make_file(tmp_path / "source", 10)
    reader = ChunkReader(open_beneath(tmp_path, "source"), chunk_size=CHUNK)
    assert reader.size == 10
    assert reader.read(0)[0] == data
    reader.close()
    reader.close()
    with pytest.raises(StorageError, match="closed"):
        reader.read(0)


def test_only_a_regular_file_can_be_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, reason in [
        ("pipe", "named pipe"),
        ("no", "not found"),
        (".", "directory"),
    ]:
        with pytest.raises(InvalidInput, match=reason):
            ChunkReader(open_owned(tmp_path / name), chunk_size=CHUNK)


def test_a_file_in_use_is_closed_by_its_last_user(tmp_path: Path) -> None:
    """Otherwise a thread that hung could write into the next file of that number."""
    with closing(Folder.open(tmp_path)) as folder:
        part = PartFile.create(folder, "name")
        with part.use() as fd:
            with part.use():
                part.discard()
            os.fstat(fd)
            with pytest.raises(StorageError, match="closed"), part.use():
                pass
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    assert os.listdir(tmp_path) == []
