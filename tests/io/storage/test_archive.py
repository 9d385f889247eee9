import io
import os
import random
import shutil
import stat
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sleap_rtc.io.storage.archive import (
    extract_package,
    pack_directory,
)
from sleap_rtc.io.storage.archive_plan import (
    LIMITS,
    ArchiveError,
    ArchiveLimits,
    top_folder,
)
from sleap_rtc.io.storage.folder import (
    Folder,
    InsufficientSpaceError,
    StorageError,
    open_beneath,
    open_owned,
)
from tests.io.storage.places import memory_folder, small_mount

MEBIBYTE = 1024 * 1024


@pytest.fixture(params=["disk", "memory"])
def job(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Yield an empty job directory in a directory of the test."""
    if request.param == "disk":
        (tmp_path / "job").mkdir()
        yield tmp_path / "job"
        return
    with memory_folder() as path:
        (path / "job").mkdir()
        yield path / "job"


class Stopped(Exception):
    """Raised by a check."""


def never() -> None:
    """Stop nothing."""


def stop() -> None:
    raise Stopped


def ignore(packed: int) -> None:
    pass


def tree(root: Path) -> dict[str, bytes | None]:
    """Return the content of each file beneath a directory; None for a directory."""
    return {
        path.relative_to(root).as_posix(): None if path.is_dir() else path.read_bytes()
        for path in sorted(root.rglob("*"))
    }


def entry(name: str, *, mode: int = 0o100644, **values: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("placeholder")
    info.filename = info.orig_filename = name  # the constructor would correct it
    info.external_attr = mode << 16
    for key, value in values.items():
        setattr(info, key, value)
    return info


def zip_of(*members: tuple[zipfile.ZipInfo | str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for info, data in members:
            archive.NameToInfo.clear()  # no warning about duplicates
            archive.writestr(entry(info) if isinstance(info, str) else info, data)
    return buffer.getvalue()


def extract(
    package: Path,
    job: Path,
    *,
    check: Callable[[], None] = never,
    limits: ArchiveLimits = LIMITS,
) -> None:
    fd = open_owned(package)
    with closing(Folder.open(job)) as folder:
        extract_package(fd, folder, check=check, limits=limits)


def unpack(job: Path, data: bytes, limits: ArchiveLimits = LIMITS) -> None:
    package = job.parent / "package.zip"
    package.write_bytes(data)
    extract(package, job, limits=limits)


# --------------------------------------------------------------- what should work


def test_a_flat_package_is_unpacked_unchanged(job: Path) -> None:
    data = zip_of(("train-script.sh", b"sleap-nn"), ("models/", b""), ("a/b.slp", b"x"))
    unpack(job, data)
    assert tree(job) == {
        "train-script.sh": b"sleap-nn",
        "models": None,
        "a": None,
        "a/b.slp": b"x",
    }


def test_one_top_folder_is_left_out(job: Path) -> None:
    data = zip_of(("job 1/", b""), ("job 1/a", b"1"), ("job 1/b/c", b"2"))
    unpack(job, data)
    assert tree(job) == {"a": b"1", "b": None, "b/c": b"2"}


@pytest.mark.parametrize(
    ("entries", "top"),
    [
        ([], None),
        ([("a", False)], None),
        ([("t/a", False)], "t"),
        ([("t", True), ("t/a", False)], "t"),
        ([("t", True)], None),
        ([("t/u", True)], None),
        ([("t/a", False), ("b", False)], None),
        ([("t/a", False), ("u/b", False)], None),
        ([("t/a", False), ("u", True)], None),
        ([("t/u/a", False), ("t/u/b", False)], "t"),
    ],
)
def test_the_top_folder_is_found(
    entries: list[tuple[str, bool]], top: str | None
) -> None:
    assert top_folder(entries) == top


def test_the_additions_of_macos_are_left_out(job: Path) -> None:
    data = zip_of(
        ("job/a", b"1"),
        ("job/.DS_Store", b"?"),
        ("__MACOSX/job/._a", b"?"),
        (".DS_Store", b"?"),
    )
    unpack(job, data)
    assert tree(job) == {"a": b"1"}


def test_a_compressed_package_is_the_same(job: Path) -> None:
    content = random.Random(0).randbytes(1000) * 3000
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", content)
    unpack(job, buffer.getvalue())
    assert (job / "a").read_bytes() == content


def test_the_content_of_the_directory_stays(job: Path) -> None:
    (job / "models").mkdir()
    (job / "models/old").write_bytes(b"old")
    unpack(job, zip_of(("models/", b""), ("models/new", b"new"), ("a", b"")))
    assert tree(job)["models/old"] == b"old"
    assert tree(job)["models/new"] == b"new"


def test_only_the_executable_bits_are_kept(job: Path) -> None:
    umask = os.umask(0o022)
    try:
        data = zip_of(
            (entry("setuid", mode=0o104777), b""), (entry("none", mode=0o100000), b"")
        )
        unpack(job, data)
    finally:
        os.umask(umask)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in job.iterdir()}
    assert modes == {"setuid": 0o755, "none": 0o644}


def test_the_file_descriptor_of_the_package_is_closed(job: Path) -> None:
    (job.parent / "package.zip").write_bytes(zip_of(("a", b"1")))
    fd = open_beneath(job.parent, "package.zip")
    with closing(Folder.open(job)) as folder:
        extract_package(fd, folder, check=never)
    assert tree(job) == {"a": b"1"}
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_zip64_package_comes_out(job: Path) -> None:
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(buffer, "w") as archive,
        archive.open(entry("labels.slp"), "w", force_zip64=True) as file,
    ):
        file.write(b"labels")
    unpack(job, buffer.getvalue())
    assert tree(job) == {"labels.slp": b"labels"}


@pytest.mark.parametrize(
    ("name", "stored"),
    [("日本/märz.slp", "日本/märz.slp".encode()), ("märz.slp", b"m\x84rz.slp")],
    ids=["UTF-8", "code page 437"],
)
def test_names_in_both_encodings_of_zip_come_out(
    job: Path, name: str, stored: bytes
) -> None:
    if name.encode() == stored:
        data = zip_of((name, b"1"), ("b", b"2"))
    else:  # Python writes UTF-8 whenever a name is not ASCII
        data = zip_of(("#" * len(stored), b"1"), ("b", b"2"))
        data = patched(data, b"#" * len(stored), stored)
    unpack(job, data)
    assert (job / name).read_bytes() == b"1"
    assert (job / "b").read_bytes() == b"2"


# ------------------------------------------------------------------ hostile zips


def patched(data: bytes, old: bytes, new: bytes) -> bytes:
    assert len(old) == len(new)
    assert old in data
    return data.replace(old, new)


def with_flag(flag: int) -> bytes:
    data = bytearray(zip_of(("a", b"x"), ("b", b"y")))
    struct.pack_into("<H", data, data.find(b"PK\1\2") + 8, flag)
    return bytes(data)


def with_method(method: int) -> bytes:
    data = bytearray(zip_of(("a", b"x"), ("b", b"y")))
    struct.pack_into("<H", data, data.find(b"PK\1\2") + 10, method)
    return bytes(data)


def bomb() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("harmless", b"")
        archive.writestr("bomb", bytes(11 * MEBIBYTE))
    return buffer.getvalue()


def overlapping() -> bytes:
    data = bytearray(zip_of(("a", b"12345"), ("b", b"67890")))
    second = data.find(b"PK\1\2", data.find(b"PK\1\2") + 4)
    struct.pack_into("<L", data, second + 42, 0)
    return bytes(data)


def claiming_entries(count: int) -> bytes:
    data = bytearray(zip_of(("a", b"x")))
    struct.pack_into("<2H", data, data.rfind(b"PK\5\6") + 8, count, count)
    return bytes(data)


def claiming_a_million_entries(comment: bytes = b"") -> bytes:
    data = zip_of(("a", b"x"))
    start, end = data.find(b"PK\1\2"), data.rfind(b"PK\5\6")
    directory = data[start:end]
    count = 1_000_000
    record = struct.pack(
        "<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(directory), start
    )
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, end, 1)
    last = bytearray(data[end:])
    struct.pack_into("<2H", last, 8, 0xFFFF, 0xFFFF)
    struct.pack_into("<H", last, 20, len(comment))
    return data[:end] + record + locator + bytes(last) + comment


def with_wrong_size() -> bytes:
    """Return a zip with an entry that announces fewer bytes than it has."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", b"x")
        archive.writestr("b", bytes(1000))
    data = bytearray(buffer.getvalue())
    second = data.find(b"PK\1\2", data.find(b"PK\1\2") + 4)
    struct.pack_into("<L", data, second + 24, 10)
    return bytes(data)


def claiming_a_size_over_four_gibibytes() -> bytes:
    data = bytearray(zip_of(("labels.slp", b"x")))
    start = data.find(b"PK\1\2")
    size = 2**32 + 5
    extra = struct.pack("<2H2Q", 1, 16, size, size)
    struct.pack_into("<2L", data, start + 20, 0xFFFFFFFF, 0xFFFFFFFF)
    struct.pack_into("<H", data, start + 30, len(extra))
    place = start + 46 + len("labels.slp")
    data[place:place] = extra
    end = data.rfind(b"PK\5\6")
    struct.pack_into("<L", data, end + 12, end - start)
    return bytes(data)


ATTACKS: dict[str, tuple[bytes, str]] = {
    "parent": (zip_of(("../evil", b"x")), r"'\.\./evil' refused: Path outside"),
    "parent inside": (zip_of(("a/../../evil", b"x")), "contains '..'"),
    "absolute": (zip_of(("/tmp/evil", b"x")), "is absolute"),
    "drive": (zip_of(("C:/evil", b"x")), "is absolute"),
    "backslash": (zip_of(("..\\evil", b"x")), "contains a backslash"),
    "nul": (patched(zip_of(("ok#../evil", b"x")), b"#", b"\0"), "NUL"),
    "control": (zip_of(("a\x1b[2J", b"x")), "control character"),
    "dot": (zip_of(("./a", b"x")), "empty name or '.'"),
    "only a slash": (zip_of(("/", b"")), "empty"),
    "double slash": (zip_of(("a//b", b"x")), "empty name"),
    "long name": (zip_of(("n" * 256, b"x")), "255 bytes"),
    "deep": (zip_of(("d/" * 64 + "a", b"x")), "nested too deeply"),
    "link": (zip_of((entry("l", mode=0o120777), b"/etc/passwd")), "'l'.*symbolic link"),
    "device": (zip_of((entry("d", mode=0o020666), b"")), "'d' refused: it is a device"),
    "disk": (zip_of((entry("d", mode=0o060666), b"")), "'d' refused: it is a device"),
    "pipe": (zip_of((entry("p", mode=0o010666), b"")), "a named pipe"),
    "socket": (zip_of((entry("s", mode=0o140666), b"")), "a socket"),
    "odd type": (zip_of((entry("s", mode=0o170666), b"")), "of an unknown kind"),
    "twice": (zip_of(("a", b"1"), ("b", b""), ("a", b"2")), "'a' refused: it clashes"),
    "case": (zip_of(("Straße", b"1"), ("STRASSE", b"2")), "clashes with 'Straße'"),
    "accent": (zip_of(("\u00e9", b"1"), ("e\u0301", b"2")), "clashes"),
    "prefix": (zip_of(("x", b"1"), ("x/y", b"2")), "'x'.*both a file and a directory"),
    "prefix later": (zip_of(("X/y", b"1"), ("x", b"2")), "both a file and a directory"),
    "folder type": (zip_of((entry("d", mode=0o040755), b"")), "both a file and a dir"),
    "folder data": (zip_of((entry("d/"), b"data")), "both a file and a directory"),
    "encrypted": (with_flag(0x1), "'a' refused: it is encrypted"),
    "strongly encrypted": (with_flag(0x41), "is encrypted"),
    "hidden headers": (with_flag(0x2000), "is encrypted"),
    "patch": (with_flag(0x20), "method that is not supported"),
    "bzip2": (with_method(12), "'a' refused: it is packed by a method"),
    "unknown method": (with_method(97), "method that is not supported"),
    "bomb": (bomb(), "'bomb' refused: it unpacks .* to 11.0 MiB"),
    "overlap": (overlapping(), "'b' refused: it shares its data"),
    "too short": (claiming_a_size_over_four_gibibytes(), "longer than the package"),
    "wrong checksum": (
        patched(zip_of(("a", b"12345")), b"12345", b"12346"),
        "'a'.*CRC",
    ),
    "wrong size": (with_wrong_size(), "'b' is broken"),
    "cut at the end": (zip_of(("a", b"x" * 100))[:-10], "not a zip file"),
    "cut at the start": (zip_of(("a", b"x" * 100))[50:], "broken|refused"),
    "empty": (b"", "not a zip file"),
    "text": (b"#!/bin/sh\n" * 100, "not a zip file"),
    "many": (claiming_entries(50_000), "50000 entries"),
    "a million": (claiming_a_million_entries(), "1000000 entries"),
    "a million behind": (claiming_a_million_entries(b"c" * 65535), "1000000 entries"),
    "bad name": (
        patched(zip_of(("ä", b"x")), "ä".encode(), b"\xff\xfe"),
        "The package is broken",
    ),
}


@pytest.mark.parametrize(("data", "reason"), ATTACKS.values(), ids=ATTACKS.keys())
def test_a_hostile_package_leaves_nothing(job: Path, data: bytes, reason: str) -> None:
    (job / "mine").write_bytes(b"mine")
    with pytest.raises(ArchiveError, match=reason):
        unpack(job, data)
    assert tree(job.parent) == {
        "job": None,
        "job/mine": b"mine",
        "package.zip": data,
    }


def test_entries_that_are_not_announced_are_counted(job: Path) -> None:
    data = zip_of(*((f"n{number}", b"") for number in range(20)))
    with pytest.raises(ArchiveError, match="20 entries, and 10 are allowed"):
        unpack(
            job, patched(data, b"\x14\0\x14\0", b"\1\0\1\0"), ArchiveLimits(entries=10)
        )


def test_the_bytes_of_the_list_of_entries_are_limited(job: Path) -> None:
    """`zipfile` reads the list into memory before any entry can be counted."""
    data = zip_of(("a" * 100, b""), ("b" * 100, b""))
    size = 2 * (46 + 100)  # an entry of the list and its name
    with pytest.raises(ArchiveError, match="list of entries is too long"):
        unpack(job, data, ArchiveLimits(directory_bytes=size - 1))
    assert tree(job) == {}
    unpack(job, data, ArchiveLimits(directory_bytes=size))


def test_the_bytes_of_a_long_zip64_list_are_limited(job: Path) -> None:
    data = bytearray(claiming_a_million_entries())
    record = data.find(b"PK\6\6")
    struct.pack_into("<2Q", data, record + 24, 1, 1)
    struct.pack_into("<Q", data, record + 40, 2**40)
    with pytest.raises(ArchiveError, match="list of entries is too long"):
        unpack(job, bytes(data))


def test_the_sum_of_all_files_is_limited(job: Path) -> None:
    data = zip_of(("a", bytes(1000)), ("b", bytes(1000)))
    with pytest.raises(ArchiveError, match=r"unpacks to 2\.0 KiB, and 1\.5 KiB"):
        unpack(job, data, ArchiveLimits(total_bytes=1536))
    assert tree(job) == {}


@pytest.mark.parametrize("where", ["file", "folder", "deep"])
def test_a_planted_link_is_neither_followed_nor_removed(job: Path, where: str) -> None:
    victim = job.parent / "victim"
    victim.mkdir()
    (victim / "file").write_bytes(b"mine")
    (job / "sub").mkdir()
    if where == "file":
        (job / "out").symlink_to("../victim/file")
        name = "out"
    else:
        (job / "sub/out").symlink_to("../../victim")
        name = "sub/out/file" if where == "folder" else "sub/out/a/b"
    with pytest.raises(ArchiveError, match=f"'{name}' refused"):
        unpack(job, zip_of(("first", b""), ("new/a", b""), (name, b"evil")))
    assert tree(victim) == {"file": b"mine"}
    left = ["out", "sub"] if where == "file" else ["sub"]
    assert sorted(os.listdir(job)) == left
    assert os.path.lexists(job / ("out" if where == "file" else "sub/out"))


def test_an_existing_file_is_not_replaced(job: Path) -> None:
    (job / "b").write_bytes(b"mine")
    with pytest.raises(ArchiveError, match="'b' refused: the name is taken"):
        unpack(job, zip_of(("a", b"1"), ("b", b"2")))
    assert tree(job) == {"b": b"mine"}


def test_a_stopped_unpacking_leaves_nothing(job: Path) -> None:
    (job.parent / "package.zip").write_bytes(
        zip_of(("a/b", b"1"), ("c", bytes(3 * MEBIBYTE)))
    )
    asked = iter([never, never, stop])
    with pytest.raises(Stopped):
        extract(job.parent / "package.zip", job, check=lambda: next(asked)())
    assert tree(job) == {}


def test_a_package_that_does_not_fit_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    data = zip_of(("a", b""), ("b", bytes(3 * MEBIBYTE)))
    with small_mount(tmp_path / "full", megabytes=2) as full:
        with pytest.raises(InsufficientSpaceError, match=r"need 3\.0 MiB, have 2\.0"):
            unpack_to(tmp_path, full, data)
        assert tree(full) == {}


def test_a_disk_that_becomes_full_is_cleaned_up(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    data = zip_of(("a", bytes(1 * MEBIBYTE)), ("b", bytes(2 * MEBIBYTE)))
    with small_mount(tmp_path / "full", megabytes=4) as full:

        def fill() -> None:
            if not (full / "filler").exists():
                (full / "filler").write_bytes(bytes(2 * MEBIBYTE))

        with pytest.raises(
            InsufficientSpaceError, match="Failed to unpack b: No space"
        ):
            unpack_to(tmp_path, full, data, fill)
        assert os.listdir(full) == ["filler"]


def unpack_to(
    place: Path, target: Path, data: bytes, check: Callable[[], None] = never
) -> None:
    (place / "package.zip").write_bytes(data)
    extract(place / "package.zip", target, check=check)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=8)
)
def test_a_damaged_package_never_crashes(
    tmp_path: Path, flips: list[tuple[int, int]]
) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/b", b"some text " * 20)
        archive.writestr("c", b"more")
    data = bytearray(buffer.getvalue())
    for place, value in flips:
        data[place % len(data)] = value
    job = tmp_path / "job"
    job.mkdir()
    try:
        unpack(job, bytes(data))
    except (ArchiveError, InsufficientSpaceError):
        assert tree(job) == {}
    finally:
        shutil.rmtree(job)


# ----------------------------------------------------------------------- packing


def test_a_packed_directory_comes_out_the_same(job: Path) -> None:
    source = job.parent / "source"
    (source / "models/empty").mkdir(parents=True)
    (source / "models/config.yaml").write_bytes(b"a: 1")
    (source / ".hidden").write_bytes(b"kept")
    (source / "big").write_bytes(random.Random(1).randbytes(3 * MEBIBYTE))
    (source / "train-script.sh").write_bytes(b"#!/bin/sh")
    (source / "train-script.sh").chmod(0o700)
    (source / "link").symlink_to("models/config.yaml")
    os.utime(source / "big", (0, 0))
    seen: list[int] = []
    package = job.parent / "package.zip"
    pack_directory(source, package, progress=seen.append, check=never)
    extract(package, job)
    assert tree(job) == tree(source)
    assert (job / "train-script.sh").stat().st_mode & 0o100
    assert seen[-1] == sum(len(data or b"") for data in tree(source).values())
    pack_directory(source, job.parent / "again", progress=ignore, check=never)
    assert (job.parent / "again").read_bytes() == package.read_bytes()


def plant_link_out(source: Path) -> None:
    (source.parent / "secret").write_bytes(b"")
    (source / "odd").symlink_to("../secret")


@pytest.mark.parametrize(
    ("plant", "reason"),
    [
        (plant_link_out, "odd links to .*secret"),
        (lambda source: (source / "odd").symlink_to("nowhere"), "odd cannot be read"),
        (lambda source: (source / "odd").symlink_to("odd"), "odd cannot be read"),
        (lambda source: (source / "odd").symlink_to("."), "odd links to"),
        (lambda source: os.mkfifo(source / "odd"), "odd is not a regular"),
        (lambda source: (source / "a\\b").touch(), "cannot be packed.*backslash"),
        (lambda source: (source / "FILE").touch(), "clashes with"),
    ],
    ids=["out", "dead", "loop", "folder", "pipe", "backslash", "case"],
)
def test_a_file_that_cannot_be_packed_is_named(
    tmp_path: Path, plant: Callable[[Path], None], reason: str
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_bytes(b"")
    plant(source)
    with pytest.raises(ArchiveError, match=reason):
        pack_directory(source, tmp_path / "a.zip", progress=ignore, check=never)
    assert not list(tmp_path.glob("*.zip")) + list(tmp_path.glob(".*"))


def test_a_stopped_packing_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source/a").write_bytes(bytes(3 * MEBIBYTE))
    with pytest.raises(Stopped):
        pack_directory(
            tmp_path / "source",
            tmp_path / "a.zip",
            progress=ignore,
            check=stop,
        )
    assert os.listdir(tmp_path) == ["source"]


def test_a_zip_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "a.zip").write_bytes(b"mine")
    with pytest.raises(StorageError, match="File exists"):
        pack_directory(
            tmp_path / "source", tmp_path / "a.zip", progress=ignore, check=never
        )
    assert (tmp_path / "a.zip").read_bytes() == b"mine"
