"""Only its owner can read a private file, and no reader sees it half-written."""

import errno
import os
import stat
import sys
from pathlib import Path

import pytest

from sleap_rtc.io.storage.private import write_private


def test_the_content_replaces_an_older_one(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    write_private(path, b"old and longer")
    write_private(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["secret"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no modes")
def test_only_the_owner_may_read_the_file(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.touch(mode=0o644)
    write_private(path, b"x")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.mkdir()  # a directory cannot be replaced by a file
    with pytest.raises(OSError, match="secret"):
        write_private(path, b"x")
    assert os.listdir(tmp_path) == ["secret"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot sync a directory")
def test_the_content_is_synced_before_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(fd: int) -> None:
        is_directory = stat.S_ISDIR(os.fstat(fd).st_mode)
        order.append("fsync directory" if is_directory else "fsync file")
        fsync(fd)

    def record_replace(source: str, target: Path) -> None:
        order.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    write_private(tmp_path / "secret", b"x")
    assert order == ["fsync file", "replace", "fsync directory"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot sync a directory")
def test_a_file_system_need_not_be_able_to_sync_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    fsync = os.fsync

    def refuse_directories(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", refuse_directories)
    write_private(tmp_path / "secret", b"x")
    assert (tmp_path / "secret").read_bytes() == b"x"
