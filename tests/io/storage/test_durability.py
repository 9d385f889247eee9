"""A power cut at any moment leaves a whole file under its name, or none."""

import os
import random
import sys
from pathlib import Path

import pytest
from blake3 import blake3

from sleap_rtc.io.storage.copy import copy_file
from sleap_rtc.io.storage.files import PartFile, write_at
from sleap_rtc.io.storage.folder import Folder, make_directories_beneath
from sleap_rtc.io.storage.probe import write_probe
from sleap_rtc.io.transfer.chunk_files import ChunkWriter, WriterLimits
from tests.io.storage.disk_log import disk_log

CHUNK = 4096

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="NOT TESTED: Windows cannot sync a directory"
)


def go_on() -> None:
    pass


def write_part(root: Path, *, replace: bool) -> list[str]:
    with disk_log() as log:
        part = PartFile.create(Folder.open(root), "a", replace=replace)
        with part.use() as fd:
            write_at(fd, b"content", 0)
        part.publish()
    (name,) = {line.split()[1] for line in log.lines if line.startswith("write")}
    return [line.replace(name, "PART") for line in log.lines]


def test_a_new_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path) -> None:
    assert write_part(tmp_path, replace=False) == [
        "write PART",
        "sync PART",
        "link PART a",
        "unlink PART",
        f"sync {tmp_path.name}/",
    ]


def test_a_file_that_replaces_another_is_on_the_disk_before(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    assert write_part(tmp_path, replace=True) == [
        "write PART",
        "sync PART",
        "replace PART a",
        f"sync {tmp_path.name}/",
    ]


def test_a_copy_is_on_the_disk_before_it_has_its_name(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"content")
    with disk_log() as log:
        copy_file(
            tmp_path / "source", tmp_path, "a", progress=lambda size: None, check=go_on
        )
    verbs = [line.split()[0] for line in log.lines]
    # Its size is checked between the first two syncs. A reflink writes nothing.
    written = ["write"] * verbs.count("write")
    assert verbs == [*written, "sync", "sync", "link", "unlink", "sync"]
    assert log.lines[-1] == f"sync {tmp_path.name}/"


def test_a_new_directory_is_on_the_disk_before_anything_is_in_it(
    tmp_path: Path,
) -> None:
    with disk_log() as log:
        make_directories_beneath(tmp_path, "a/b")
    assert log.lines == ["mkdir a", f"sync {tmp_path.name}/", "mkdir b", "sync a/"]


def test_a_mount_probe_is_synced_before_it_is_announced(tmp_path: Path) -> None:
    with disk_log() as log:
        write_probe(tmp_path, "probe", b"nonce")
    assert log.lines == ["write probe", "sync probe"]


def write_chunks(writer: ChunkWriter, data: bytes) -> None:
    for index in range(writer.chunk_map.count):
        payload = data[index * CHUNK : (index + 1) * CHUNK]
        assert writer.write(index, payload, blake3(payload).digest())


def test_an_arriving_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path,
) -> None:
    data = random.Random(1).randbytes(CHUNK)
    with disk_log() as log:
        writer = ChunkWriter.open(tmp_path, "a", size=len(data), chunk_size=CHUNK)
        log.lines.clear()
        write_chunks(writer, data)
        writer.publish()
    assert log.lines == [
        "write .a.part",
        "write .a.map",
        "sync .a.part",
        "link .a.part a",
        "unlink .a.part",
        f"sync {tmp_path.name}/",
        "unlink .a.map",
    ]


def test_a_large_arriving_file_is_synced_at_intervals(tmp_path: Path) -> None:
    """The data comes first, so that a power cut leaves no slot without its chunk."""
    limits = WriterLimits(save_every=3 * CHUNK)
    data = random.Random(1).randbytes(8 * CHUNK)
    with disk_log() as log:
        writer = ChunkWriter.open(
            tmp_path, "a", size=len(data), chunk_size=CHUNK, limits=limits
        )
        # The names of both hidden files outlive a power cut, or the data would be lost.
        assert log.lines == ["write .a.map", f"sync {tmp_path.name}/"]
        log.lines.clear()
        write_chunks(writer, data)
        writer.keep()
    three_chunks = ["write .a.part", "write .a.map"] * 3
    synced = ["sync .a.part", "sync .a.map"]
    assert (
        log.lines
        == [*three_chunks, *synced, *three_chunks, *synced]
        + [
            "write .a.part",
            "write .a.map",
        ]
        * 2
    )


def test_file_systems_that_cannot_sync_directories_are_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder.open(tmp_path)

    def refuse(fd: int) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    folder.sync()
    folder.close()
