"""Part files and their journals: how they persist, and how writers resume."""

import errno
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from typing_extensions import override

from sleap_rtc.io.storage.folder import (
    Folder,
    InsufficientSpaceError,
    StorageError,
)
from sleap_rtc.io.transfer.chunk_files import ChunkWriter
from sleap_rtc.io.transfer.journal import Journal
from sleap_rtc.proto.errors import InvalidInput
from tests.io.storage.places import MEMORY, small_mount
from tests.io.transfer import doomed_writer

CHUNK = 4096
COUNT = 8
SIZE = (COUNT - 1) * CHUNK + 100
DATA = random.Random(7).randbytes(SIZE)
SLOT = 36
EVERY = set(range(COUNT))


def chunk_of(index: int, data: bytes = DATA) -> bytes:
    return data[index * CHUNK : (index + 1) * CHUNK]


def open_writer(root: Path, size: int = SIZE, chunk_size: int = CHUNK) -> ChunkWriter:
    return ChunkWriter.open(root, "a", size=size, chunk_size=chunk_size)


def write(writer: ChunkWriter, indexes: set[int]) -> None:
    for index in indexes:
        chunk = chunk_of(index)
        assert writer.write(index, chunk, blake3(chunk).digest())


def part(root: Path) -> Path:
    return root / ".a.part"


def journal(root: Path) -> Path:
    return root / ".a.map"


def make_kept(root: Path, indexes: set[int] = EVERY) -> None:
    writer = open_writer(root)
    write(writer, indexes)
    writer.keep()


def flip(path: Path, offset: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ (1 << bit)]))


def found(writer: ChunkWriter) -> set[int]:
    return {index for index in range(COUNT) if writer.chunk_map.has(index)}


def check_goes_on(root: Path, expected: set[int]) -> None:
    """Check that exactly these chunks are found, and that the rest makes the file."""
    writer = open_writer(root)
    assert found(writer) == expected
    for index in expected:
        assert writer.chunk_map.digest(index) == blake3(chunk_of(index)).digest()
    write(writer, EVERY - expected)
    assert writer.publish().read_bytes() == DATA
    assert os.listdir(root) == ["a"]
    (root / "a").unlink()


# ------------------------------------------------------------------------ going on


@pytest.mark.parametrize("written", [set(), {0}, {COUNT - 1}, {1, 3, 4}, EVERY])
def test_the_next_writer_continues_where_the_last_one_stopped(
    tmp_path: Path, written: set[int]
) -> None:
    make_kept(tmp_path, written)
    check_goes_on(tmp_path, written)


def test_a_file_of_no_bytes_can_be_kept(tmp_path: Path) -> None:
    open_writer(tmp_path, size=0).keep()
    writer = open_writer(tmp_path, size=0)
    assert writer.chunk_map.is_complete
    assert writer.publish().read_bytes() == b""
    assert os.listdir(tmp_path) == ["a"]


def test_a_kept_file_can_be_abandoned_by_the_next_writer(tmp_path: Path) -> None:
    make_kept(tmp_path)
    open_writer(tmp_path).abandon()
    assert os.listdir(tmp_path) == []


def test_a_writer_that_has_kept_its_file_does_nothing_more(tmp_path: Path) -> None:
    writer = open_writer(tmp_path)
    write(writer, {2})
    writer.keep()
    writer.keep()
    writer.abandon()
    with pytest.raises(StorageError, match="closed"):
        write(writer, {3})
    with pytest.raises(StorageError, match="closed"):
        writer.publish()
    check_goes_on(tmp_path, {2})


def test_the_check_of_a_part_file_can_be_stopped(tmp_path: Path) -> None:
    make_kept(tmp_path)
    checks = itertools.count(1)

    def stop_at_the_third() -> None:
        if next(checks) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ChunkWriter.open(
            tmp_path, "a", size=SIZE, chunk_size=CHUNK, check=stop_at_the_third
        )
    check_goes_on(tmp_path, EVERY)


# ------------------------------------------------------------ processes that die


@contextmanager
def doomed_process(source: Path, target: Path) -> Iterator["Doomed"]:
    command = [sys.executable, "-m", doomed_writer.__name__]
    with subprocess.Popen(
        [*command, str(source), str(target), str(CHUNK)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
    ) as process:
        try:
            yield Doomed(process)
        finally:
            process.kill()


class Doomed:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._pid = 0
        self.begun: set[int] = set()
        self.stored: set[int] = set()

    def write_some(self, reports: int) -> None:
        """Start a process; return after n of its reports, or when it has kept all."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"go\n")
        self._pid = int(self._next_words()[0])
        self.begun, self.stored = set(), set()
        for _ in range(reports):
            if not self._note(self._next_words()):
                break

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        while (words := self._next_words()) != ["gone"]:
            self._note(words)

    def _note(self, words: list[str]) -> bool:
        match words:
            case ["begun", index]:
                self.begun.add(int(index))
            case ["stored", index]:
                self.stored.add(int(index))
            case _:
                assert words == ["kept"]
                return False
        return True

    def _next_words(self) -> list[str]:
        assert self._process.stdout is not None
        return self._process.stdout.readline().decode().split()


@pytest.mark.skipif(sys.platform == "win32", reason="it has no fork()")
def test_a_writer_may_be_killed_at_any_moment(tmp_path: Path) -> None:
    count = 3000
    data = random.Random(8).randbytes(count * CHUNK - 1)
    (tmp_path / "source").write_bytes(data)
    root = tmp_path / "root"
    root.mkdir()
    there: set[int] = set()
    kills_amid = 0
    with doomed_process(tmp_path / "source", root / "a") as doomed:
        for _ in range(50):
            doomed.write_some(random.randrange(1, 70))
            doomed.kill()
            writer = open_writer(root, len(data))
            expected = there | doomed.stored
            there = {i for i in range(count) if writer.chunk_map.has(i)}
            for index in there:
                good = blake3(chunk_of(index, data)).digest()
                assert writer.chunk_map.digest(index) == good
            assert expected <= there <= expected | doomed.begun
            assert len(doomed.begun - there) <= doomed_writer.THREADS
            if writer.chunk_map.is_complete:
                assert writer.publish().read_bytes() == data
                (root / "a").unlink()
                there = set()
            else:
                writer.keep()
                kills_amid += 1
    assert kills_amid > 10


@pytest.mark.skipif(sys.platform == "win32", reason="it has no fork()")
def test_only_a_living_process_keeps_others_out(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(bytes(20_000 * CHUNK))
    with doomed_process(tmp_path / "source", tmp_path / "a") as doomed:
        doomed.write_some(1)
        with pytest.raises(StorageError, match="a is being received already"):
            open_writer(tmp_path, 20_000 * CHUNK)
        doomed.kill()
        open_writer(tmp_path, 20_000 * CHUNK).abandon()


# --------------------------------------------------------------------- two writers


def test_a_second_writer_of_the_same_file_is_refused(tmp_path: Path) -> None:
    writer = open_writer(tmp_path)
    write(writer, {1})
    with pytest.raises(StorageError, match="wait until it ends, or stop it"):
        open_writer(tmp_path)
    write(writer, {2})
    writer.keep()
    check_goes_on(tmp_path, {1, 2})


def test_only_one_of_many_concurrent_writers_publishes(tmp_path: Path) -> None:
    """Even if one starts just when another one ends and removes its files."""

    def race(_number: int) -> bool:
        try:
            writer = open_writer(tmp_path)
        except StorageError:
            return False
        write(writer, EVERY)
        writer.publish()
        return True

    for _ in range(20):
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(race, range(16))).count(True) == 1
        assert (tmp_path / "a").read_bytes() == DATA
        assert os.listdir(tmp_path) == ["a"]
        (tmp_path / "a").unlink()


def test_a_journal_that_is_removed_before_it_is_locked_is_made_again(
    tmp_path: Path,
) -> None:
    class FolderOfAnEndingWriter(Folder):
        @override
        def open_file(self, name: str, *, write: bool = False) -> int:
            opened = super().open_file(name, write=write)
            ending.remove()
            return opened

    with (
        closing(Folder.open(tmp_path)) as folder,
        closing(FolderOfAnEndingWriter.open(tmp_path)) as racing_folder,
    ):
        ending = Journal.open(folder, "j", size=SIZE, chunk_size=CHUNK)
        racing = Journal.open(racing_folder, "j", size=SIZE, chunk_size=CHUNK)
        with pytest.raises(BlockingIOError):
            Journal.open(folder, "j", size=SIZE, chunk_size=CHUNK)
        racing.remove()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("replacement", [None, b"", DATA])
def test_a_part_file_that_was_exchanged_is_not_published(
    tmp_path: Path, replacement: bytes | None
) -> None:
    writer = open_writer(tmp_path)
    write(writer, EVERY)
    part(tmp_path).rename(tmp_path / "elsewhere")
    if replacement is not None:
        part(tmp_path).write_bytes(replacement)
    with pytest.raises(StorageError, match="Failed to write a"):
        writer.publish()
    writer.abandon()
    assert os.listdir(tmp_path) == ["elsewhere"]


def test_a_part_file_whose_name_was_taken_is_removed(tmp_path: Path) -> None:
    make_kept(tmp_path)
    (tmp_path / "a").write_text("mine")
    with pytest.raises(StorageError, match="File exists"):
        open_writer(tmp_path)
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "mine"


# ------------------------------------------------------------------- harm of all kinds


@pytest.mark.parametrize("there", range(SLOT + 1))
def test_a_torn_slot_costs_its_chunk(tmp_path: Path, there: int) -> None:
    """The process died while it wrote; either end of the slot may exist."""
    make_kept(tmp_path)
    content = journal(tmp_path).read_bytes()
    start, end = SLOT * 4, SLOT * 5  # of chunk 3
    expected = EVERY if there == SLOT else EVERY - {3}
    for torn in (
        content[: start + there] + bytes(SLOT - there) + content[end:],
        content[:start] + bytes(SLOT - there) + content[end - there :],
    ):
        assert len(torn) == len(content)
        journal(tmp_path).write_bytes(torn)
        writer = open_writer(tmp_path)
        assert found(writer) == expected
        writer.keep()
    check_goes_on(tmp_path, expected)


@pytest.mark.parametrize("place", range(SLOT))
def test_a_flipped_bit_in_a_slot_costs_its_chunk(tmp_path: Path, place: int) -> None:
    make_kept(tmp_path)
    flip(journal(tmp_path), SLOT * 4 + place, bit=place % 8)
    check_goes_on(tmp_path, EVERY - {3})


@pytest.mark.parametrize("place", range(SLOT))
def test_a_flipped_bit_in_the_header_costs_all(tmp_path: Path, place: int) -> None:
    make_kept(tmp_path)
    flip(journal(tmp_path), place, bit=place % 8)
    check_goes_on(tmp_path, set())


@pytest.mark.parametrize("index", [0, 3, COUNT - 1])
@pytest.mark.parametrize("place", [0, 50, -1])
def test_a_flipped_bit_in_the_part_file_costs_its_chunk(
    tmp_path: Path, index: int, place: int
) -> None:
    make_kept(tmp_path)
    flip(part(tmp_path), index * CHUNK + place % len(chunk_of(index)), bit=6)
    check_goes_on(tmp_path, EVERY - {index})


def test_swapped_slots_cost_their_chunks(tmp_path: Path) -> None:
    make_kept(tmp_path)
    content = journal(tmp_path).read_bytes()
    slots = [content[start : start + SLOT] for start in range(0, len(content), SLOT)]
    slots[2], slots[5] = slots[5], slots[2]
    journal(tmp_path).write_bytes(b"".join(slots))
    check_goes_on(tmp_path, EVERY - {1, 4})


@pytest.mark.parametrize("length", [0, 1, SLOT - 1, SLOT, SLOT + 1, 4 * SLOT - 1])
def test_a_journal_that_was_cut_costs_the_missing_chunks(
    tmp_path: Path, length: int
) -> None:
    make_kept(tmp_path)
    os.truncate(journal(tmp_path), length)
    check_goes_on(tmp_path, set(range(length // SLOT - 1)))


@pytest.mark.parametrize("length", [0, 1, 3 * CHUNK - 1, 3 * CHUNK, SIZE - 1])
def test_a_part_file_that_was_cut_costs_the_missing_chunks(
    tmp_path: Path, length: int
) -> None:
    make_kept(tmp_path)
    os.truncate(part(tmp_path), length)
    check_goes_on(tmp_path, set(range(length // CHUNK)))


def test_a_part_file_that_grew_gets_its_size_back(tmp_path: Path) -> None:
    make_kept(tmp_path)
    with part(tmp_path).open("ab") as file:
        file.write(b"more")
    check_goes_on(tmp_path, EVERY)


@pytest.mark.parametrize("lost", [part, journal])
def test_a_part_file_or_a_journal_alone_is_useless(
    tmp_path: Path, lost: Callable[[Path], Path]
) -> None:
    make_kept(tmp_path)
    lost(tmp_path).unlink()
    check_goes_on(tmp_path, set())


@pytest.mark.parametrize(
    "foreign",
    [b"", b"\0", bytes(SLOT * (1 + COUNT)), b"x" * 100_000, b'{"json": true}'],
)
def test_a_foreign_journal_is_replaced(tmp_path: Path, foreign: bytes) -> None:
    make_kept(tmp_path)
    journal(tmp_path).write_bytes(foreign)
    check_goes_on(tmp_path, set())
    journal(tmp_path).write_bytes(foreign)  # and no part file at all
    check_goes_on(tmp_path, set())


def test_a_part_file_of_another_file_is_not_resumed(tmp_path: Path) -> None:
    for size, chunk_size, origin in (
        (SIZE + 1, CHUNK, ""),
        (SIZE, CHUNK * 2, ""),
        (SIZE, CHUNK, "job_12345678"),
    ):
        make_kept(tmp_path)
        writer = ChunkWriter.open(
            tmp_path, "a", size=size, chunk_size=chunk_size, origin=origin
        )
        assert writer.chunk_map.bytes_there == 0
        assert part(tmp_path).stat().st_size == size
        assert not any(part(tmp_path).read_bytes())
        writer.abandon()
        assert os.listdir(tmp_path) == []


# ------------------------------------------------------------- what others put there


@pytest.mark.parametrize("planted", [part, journal])
def test_a_planted_link_is_never_written_through(
    tmp_path: Path, planted: Callable[[Path], Path]
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    victim = tmp_path / "victim"
    victim.write_text("precious")
    make_kept(root)
    planted(root).unlink()
    planted(root).symlink_to(victim)
    with pytest.raises(InvalidInput, match="outside shared storage"):
        open_writer(root)
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("planted", [part, journal])
def test_a_second_name_of_a_file_is_never_written_to(
    tmp_path: Path, planted: Callable[[Path], Path]
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    victim = tmp_path / "victim"
    make_kept(root)
    os.link(planted(root), victim)
    content = victim.read_bytes()
    check_goes_on(root, set())
    assert victim.read_bytes() == content


@pytest.mark.parametrize("planted", [part, journal])
def test_anything_but_a_file_is_refused_at_once(
    tmp_path: Path, planted: Callable[[Path], Path]
) -> None:
    make_kept(tmp_path)
    planted(tmp_path).unlink()
    os.mkfifo(planted(tmp_path))
    with pytest.raises(InvalidInput, match="named pipe"):
        open_writer(tmp_path)


# ------------------------------------------------------------------------ full disks


def test_the_space_for_the_journal_is_reserved(tmp_path: Path) -> None:
    with small_mount(tmp_path, megabytes=1) as full:
        with pytest.raises(InsufficientSpaceError):
            open_writer(full, size=100_000, chunk_size=1)
        assert os.listdir(full) == []


def test_a_disk_that_is_too_small_for_journal_and_file_is_an_error(
    tmp_path: Path,
) -> None:
    with small_mount(tmp_path, megabytes=1) as full:
        # The free space is enough for the file, but not for its journal as well.
        size = os.statvfs(full).f_bavail * os.statvfs(full).f_frsize
        with pytest.raises(InsufficientSpaceError, match="No space left"):
            open_writer(full, size=size, chunk_size=size)
        assert os.listdir(full) == []


def test_a_disk_that_is_full_when_a_chunk_is_recorded_is_an_error(
    tmp_path: Path,
) -> None:
    with small_mount(tmp_path, megabytes=1) as full:
        writer = open_writer(full)
        write(writer, {0, 1})
        os.truncate(journal(full), 0)  # as on storage that cannot reserve space
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            (full / "filler").write_bytes(bytes(2**20))
        with pytest.raises(InsufficientSpaceError, match="Failed to write a"):
            write(writer, {2})
        writer.abandon()
        assert os.listdir(full) == ["filler"]


def test_a_part_file_needs_only_the_room_that_is_missing(tmp_path: Path) -> None:
    with small_mount(tmp_path, megabytes=1) as full:
        writer = open_writer(full, size=800_000)
        writer.keep()
        open_writer(full, size=800_000).abandon()
        assert os.listdir(full) == []


# ----------------------------------------------------------------------- all together

WRITE = st.tuples(st.just("write"), st.integers(0, COUNT - 1))
FLIP_PART = st.tuples(st.just("part"), st.integers(0, SIZE - 1))
FLIP_JOURNAL = st.tuples(st.just("map"), st.integers(0, SLOT * (COUNT + 1) - 1))
KILL = st.tuples(st.just("kill"), st.just(0))


@settings(max_examples=60, deadline=None)
@given(st.lists(WRITE | WRITE | FLIP_PART | FLIP_JOURNAL | KILL, max_size=30))
def test_whatever_happens_the_right_file_comes_out(
    steps: list[tuple[str, int]],
) -> None:
    fast = MEMORY if MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(dir=fast) as name:
        root = Path(name) / "0"
        root.mkdir()
        writer = open_writer(root)
        unharmed: set[int] = set()
        for number, (what, place) in enumerate(steps, 1):
            if what == "write":
                write(writer, {place})
                unharmed.add(place)
                continue
            # The files that a process leaves if it is killed now.
            after = Path(name) / str(number)
            shutil.copytree(root, after)
            writer.abandon()
            root = after
            if what != "kill":
                flip(root / f".a.{what}", place)
                unharmed -= harmed_chunks(what, place)
            writer = open_writer(root)
            # A second flip of the same bit may have brought a chunk back.
            assert unharmed <= found(writer)
            for index in found(writer):
                assert chunk_of(index, part(root).read_bytes()) == chunk_of(index)
            unharmed = found(writer)
        writer.keep()
        check_goes_on(root, unharmed)


def harmed_chunks(what: str, place: int) -> set[int]:
    if what == "part":
        return {place // CHUNK}
    return {place // SLOT - 1} if place >= SLOT else EVERY
