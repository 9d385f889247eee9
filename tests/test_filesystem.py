import os
import stat
from pathlib import Path

import pytest

from sleap_rtc.filesystem import (
    PathValidationError,
    SharedStorageError,
    check_disk_space,
    get_disk_usage,
    safe_copy,
    safe_mkdir,
    to_absolute_path,
    to_relative_path,
    validate_path_in_root,
)


def test_a_copy_has_the_content_and_leaves_no_other_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    safe_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"content"
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_a_copy_replaces_a_file_and_goes_into_a_directory(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"new")
    (tmp_path / "b").write_bytes(b"old")
    (tmp_path / "c").mkdir()
    safe_copy(str(tmp_path / "a"), str(tmp_path / "b"))
    safe_copy(tmp_path / "a", tmp_path / "c")
    assert (tmp_path / "b").read_bytes() == b"new"
    assert (tmp_path / "c/a").read_bytes() == b"new"


def test_a_copy_keeps_permissions_and_times_when_asked(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    (tmp_path / "a").chmod(0o751)
    os.utime(tmp_path / "a", ns=(10**18, 10**18))
    safe_copy(tmp_path / "a", tmp_path / "b", preserve_metadata=True)
    status = (tmp_path / "b").stat()
    assert stat.S_IMODE(status.st_mode) == 0o751
    assert status.st_mtime_ns == 10**18
    safe_copy(tmp_path / "a", tmp_path / "c")
    assert (tmp_path / "c").stat().st_mtime_ns != 10**18


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        ("missing", "b", "Failed to copy .*missing: File not found"),
        ("folder", "b", "Failed to copy .*folder: .*directory"),
        ("pipe", "b", "Failed to copy .*pipe: .*a named pipe"),
        ("a", "no/b", "Failed to copy .*a: No directory .*no"),
    ],
)
def test_the_error_of_a_failed_copy_has_the_reason(
    tmp_path: Path, source: str, target: str, reason: str
) -> None:
    (tmp_path / "a").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SharedStorageError, match=reason):
        safe_copy(tmp_path / source, tmp_path / target)
    assert sorted(os.listdir(tmp_path)) == ["a", "folder", "pipe"]


@pytest.mark.unprivileged
def test_the_error_of_a_forbidden_copy_names_the_permission(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(SharedStorageError, match="Permission denied"):
        safe_copy(tmp_path / "a", tmp_path / "closed/a")
    with pytest.raises(SharedStorageError, match="Permission denied"):
        safe_mkdir(tmp_path / "closed/b")
    (tmp_path / "a").chmod(0)
    with pytest.raises(SharedStorageError, match="Permission denied"):
        safe_copy(tmp_path / "a", tmp_path / "b")


def test_a_directory_that_the_system_refuses_is_named() -> None:
    # Not even root can make directories there.
    with pytest.raises(SharedStorageError, match="create directory /dev/null/a"):
        safe_mkdir("/dev/null/a")


def test_directories_are_made(tmp_path: Path) -> None:
    safe_mkdir(tmp_path / "a/b")
    safe_mkdir(tmp_path / "a/b")
    assert (tmp_path / "a/b").is_dir()
    with pytest.raises(SharedStorageError, match="File exists"):
        safe_mkdir(tmp_path / "a/b", exist_ok=False)
    with pytest.raises(SharedStorageError, match="No such file"):
        safe_mkdir(tmp_path / "c/d", parents=False)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SharedStorageError, match="Not a directory"):
        safe_mkdir(tmp_path / "file/d")


def test_the_space_of_a_path_that_does_not_exist_yet(tmp_path: Path) -> None:
    assert check_disk_space(tmp_path / "not/yet/there", 1)
    assert not check_disk_space(tmp_path, 2**60)
    usage = get_disk_usage(tmp_path / "not/yet/there")
    assert 0 < usage["free"] < usage["total"]
    assert 0 < usage["used"] < usage["total"]
    assert 0 < usage["percent_used"] < 100


def test_storage_that_does_not_answer_has_no_space(tmp_path: Path) -> None:
    (tmp_path / "dead").symlink_to("nowhere")
    assert not check_disk_space(tmp_path / "dead", 1)
    with pytest.raises(SharedStorageError, match=r"disk usage of .*dead"):
        get_disk_usage(tmp_path / "dead")


@pytest.mark.parametrize("resolve", [True, False])
def test_a_path_in_the_root_is_returned_absolute(tmp_path: Path, resolve: bool) -> None:
    for path in ("jobs/a.zip", tmp_path / "jobs/a.zip", "jobs/../jobs/./a.zip"):
        found = validate_path_in_root(path, tmp_path, resolve_symlinks=resolve)
        assert found == tmp_path / "jobs/a.zip"
    assert validate_path_in_root(".", tmp_path) == tmp_path


@pytest.mark.parametrize("resolve", [True, False])
@pytest.mark.parametrize("path", ["..", "../root2", "a/../../b", "/etc/passwd", "/"])
def test_a_path_outside_is_refused_with_the_root(
    tmp_path: Path, path: str, resolve: bool
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    with pytest.raises(PathValidationError, match="outside") as caught:
        validate_path_in_root(path, root, resolve_symlinks=resolve)
    assert str(root) in str(caught.value)


def test_links_count_when_they_are_resolved(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "out").symlink_to(tmp_path)
    (tmp_path / "mount").symlink_to(root)
    assert validate_path_in_root(tmp_path / "mount/a", root) == root / "a"
    found = validate_path_in_root("out/a", root, resolve_symlinks=False)
    assert found == root / "out/a"
    with pytest.raises(PathValidationError, match="outside"):
        validate_path_in_root("out/a", root)
    (root / "loop").symlink_to("loop")
    assert validate_path_in_root("loop", root) == root / "loop"
    with pytest.raises(PathValidationError, match="null"):
        validate_path_in_root("a\0b", root)


def test_paths_survive_a_round_trip(tmp_path: Path) -> None:
    (tmp_path / "mount").symlink_to(tmp_path)
    path = to_absolute_path("jobs/a.zip", tmp_path / "mount")
    assert path == tmp_path / "mount/jobs/a.zip"
    assert to_relative_path(path, tmp_path).as_posix() == "jobs/a.zip"
    for outside in ("../a", "/a", "a\\b"):
        with pytest.raises(PathValidationError, match="outside"):
            to_absolute_path(outside, tmp_path)
    with pytest.raises(PathValidationError, match="outside"):
        to_relative_path("/etc/passwd", tmp_path)
