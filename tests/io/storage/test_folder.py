import errno
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from sleap_rtc.io.storage.folder import (
    MAX_DEPTH,
    Folder,
    StorageError,
    create_beneath,
    list_tree,
    make_directories_beneath,
    open_beneath,
    open_owned,
    remove_tree_beneath,
)
from sleap_rtc.proto.errors import InvalidInput
from tests.io.storage.places import busy_file, disk_mount, memory_folder


@pytest.fixture(params=["disk", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    if request.param == "disk":
        (tmp_path / "root").mkdir()
        yield tmp_path / "root"
        return
    with memory_folder() as path:
        (path / "root").mkdir()
        yield path / "root"


def content(fd: int) -> bytes:
    with os.fdopen(fd, "rb") as file:
        return file.read()


def test_a_file_beneath_the_root_opens(root: Path) -> None:
    (root / "a/b").mkdir(parents=True)
    (root / "a/b/file").write_bytes(b"inside")
    assert content(open_beneath(root, "a/b/file")) == b"inside"


def test_the_root_itself_may_be_a_link(root: Path) -> None:
    (root / "file").write_bytes(b"inside")
    link = root.parent / "link"
    link.symlink_to(root)
    assert content(open_beneath(link, "file")) == b"inside"


@pytest.mark.parametrize(
    "path", ["../secret", "/etc/passwd", "a/../../secret", "a\\b", "a\0b", "up/secret"]
)
def test_a_path_that_leads_out_opens_nothing(root: Path, path: str) -> None:
    (root.parent / "secret").write_bytes(b"outside")
    (root / "up").symlink_to("..")
    with pytest.raises(InvalidInput, match=r"^Path outside shared storage"):
        open_beneath(root, path)


@pytest.mark.parametrize("target", ["file", "/etc/passwd", "nowhere"])
def test_a_link_is_not_followed_wherever_it_leads(root: Path, target: str) -> None:
    (root / "file").write_bytes(b"inside")
    (root / "link").symlink_to(target)
    with pytest.raises(InvalidInput, match="symbolic link"):
        open_beneath(root, "link")


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        place = os.getcwd()
        os.chdir(path.parent)  # the address of a socket is short
        try:
            server.bind(path.name)
        finally:
            os.chdir(place)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (os.mkfifo, "a named pipe"),
        (make_socket, "a socket"),
        (Path.mkdir, "a directory"),
        (lambda path: None, "File not found: a/name"),
    ],
    ids=["pipe", "socket", "directory", "missing"],
)
def test_anything_but_a_file_is_named_and_never_waited_for(
    root: Path, make: Callable[[Path], None], reason: str
) -> None:
    (root / "a").mkdir()
    make(root / "a/name")
    with pytest.raises(InvalidInput, match=reason):
        open_beneath(root, "a/name")


def test_a_device_is_refused() -> None:
    with pytest.raises(InvalidInput, match="a device"):
        open_beneath(Path("/dev"), "null")


def test_a_file_on_the_way_is_not_a_directory(root: Path) -> None:
    (root / "a").write_bytes(b"")
    for call in (open_beneath, create_beneath, make_directories_beneath):
        with pytest.raises(InvalidInput, match="'a' is a file"):
            call(root, "a/b")


@pytest.mark.unprivileged
def test_a_forbidden_file_is_named_as_such(root: Path) -> None:
    (root / "file").write_bytes(b"")
    (root / "file").chmod(0)
    with pytest.raises(InvalidInput, match="Permission denied: file"):
        open_beneath(root, "file")


def test_creating_never_touches_an_existing_file(root: Path) -> None:
    (root.parent / "victim").write_bytes(b"mine")
    (root / "link").symlink_to("../victim")
    (root / "file").write_bytes(b"mine")
    for name in ("link", "file"):
        with pytest.raises(StorageError, match="File exists"):
            create_beneath(root, name)
    os.close(create_beneath(root, "new"))
    assert (root.parent / "victim").read_bytes() == b"mine"
    assert (root / "new").read_bytes() == b""


def test_directories_are_made_and_found_again(root: Path) -> None:
    assert make_directories_beneath(root, "a/b/c") == root / "a/b/c"
    assert make_directories_beneath(root, "a/b/c").is_dir()
    (root / "a/link").symlink_to("b")
    with pytest.raises(InvalidInput, match="symbolic link"):
        make_directories_beneath(root, "a/link/d")


def test_removing_a_tree_leaves_the_targets_of_its_links(root: Path) -> None:
    outside = root.parent / "outside"
    outside.mkdir()
    (outside / "kept").write_bytes(b"")
    (root / "tree/a/b").mkdir(parents=True)
    (root / "tree/a/file").write_bytes(b"")
    (root / "tree/a/link").symlink_to(outside)
    remove_tree_beneath(root, "tree")
    remove_tree_beneath(root, "tree")
    assert os.listdir(root) == []
    (root / "link").symlink_to(outside)
    remove_tree_beneath(root, "link")
    assert os.listdir(root) == []
    assert os.listdir(outside) == ["kept"]


def test_the_leftover_of_an_open_file_on_nfs_stays(tmp_path: Path) -> None:
    (tmp_path / "job/models").mkdir(parents=True)
    (tmp_path / "job/other").mkdir()
    (tmp_path / "job/package").touch()
    with busy_file(tmp_path / "job/models/.nfs0001"):
        remove_tree_beneath(tmp_path, "job")
        left = sorted(path.name for path in tmp_path.rglob("*"))
        assert left == [".nfs0001", "job", "models"]
    remove_tree_beneath(tmp_path, "job")
    assert os.listdir(tmp_path) == []
    (tmp_path / "job").mkdir()
    with busy_file(tmp_path / "job/used"), pytest.raises(StorageError):
        remove_tree_beneath(tmp_path, "job")


def test_a_list_names_files_and_nothing_else(root: Path) -> None:
    (root / "models/run").mkdir(parents=True)
    (root / "models/run/best.ckpt").write_bytes(b"12345")
    (root / "labels.slp").write_bytes(b"")
    (root / ".labels.slp.0123.part").write_bytes(b"half")
    (root / "outside").symlink_to("/etc")
    (root / "link").symlink_to("labels.slp")
    os.mkfifo(root / "pipe")
    os.utime(root / "labels.slp", ns=(0, 7))
    listed = list_tree(root)
    assert [entry[:2] for entry in listed] == [
        ("labels.slp", 0),
        ("models/run/best.ckpt", 5),
    ]
    assert listed[0][2] == 7


def test_a_tree_without_end_is_an_error(root: Path) -> None:
    deep = root
    for _ in range(MAX_DEPTH + 1):
        deep /= "d"
    deep.mkdir(parents=True)
    with pytest.raises(StorageError, match="too deeply"):
        list_tree(root)
    with pytest.raises(StorageError, match="too deeply"):
        remove_tree_beneath(root, "d")


def test_files_of_the_owner_may_be_links(root: Path) -> None:
    (root / "file").write_bytes(b"mine")
    (root / "link").symlink_to("file")
    assert content(open_owned(root / "link")) == b"mine"
    with pytest.raises(InvalidInput, match="File not found"):
        open_owned(root / "missing")


def test_a_closed_folder_is_not_used_again(root: Path) -> None:
    with closing(Folder.open(root)) as folder:
        assert folder.names() == []
    with pytest.raises(ValueError, match="was closed"):
        folder.status("a")


def test_no_open_escapes_while_a_directory_is_swapped_for_a_link(root: Path) -> None:
    """A checked path may lead elsewhere when it is opened; the walk must notice."""
    outside = root.parent / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"outside")
    (root / "real").mkdir()
    (root / "real/file").write_bytes(b"inside")
    (root / "trap").symlink_to(outside)
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            for first, second in [("real", "trap"), ("trap", "real")]:
                os.rename(root / first, root / "name")
                os.rename(root / "name", root / first)
                os.rename(root / first, root / "name")
                os.rename(root / second, root / first)
                os.rename(root / "name", root / second)

    thread = threading.Thread(target=swap)
    thread.start()
    outcomes: dict[bytes, int] = {b"inside": 0, b"outside": 0, b"refused": 0}
    try:
        for turn in range(2000):
            name = ("name", "real", "trap")[turn % 3]
            try:
                outcomes[content(open_beneath(root, f"{name}/file"))] += 1
            except InvalidInput:
                outcomes[b"refused"] += 1
    finally:
        stop.set()
        thread.join(10)
    assert outcomes[b"outside"] == 0
    assert outcomes[b"inside"] > 0
    assert outcomes[b"refused"] > 0


Opener = Callable[[Path], int]

open_in_both_ways = pytest.mark.parametrize(
    "open_file",
    [lambda root: open_beneath(root, "file"), lambda root: open_owned(root / "file")],
    ids=["beneath", "owned"],
)


@contextmanager
def exchanged_after_stat(path: Path, make: Callable[[Path], None]) -> Iterator[None]:
    """Exchange a file between the check of its kind and its opening."""
    stat = os.stat

    def stat_and_exchange(name: Any, **options: Any) -> os.stat_result:
        status = stat(name, **options)
        if name == path.name:
            path.unlink()
            make(path)
        return status

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "stat", stat_and_exchange)
        yield


@open_in_both_ways
def test_a_link_that_takes_the_place_of_a_file_is_not_followed(
    root: Path, open_file: Opener
) -> None:
    (root.parent / "secret").write_bytes(b"outside")
    (root / "file").write_bytes(b"inside")
    with (
        exchanged_after_stat(root / "file", lambda path: path.symlink_to("../secret")),
        pytest.raises(InvalidInput, match="symbolic link"),
    ):
        open_file(root)


@open_in_both_ways
@pytest.mark.timeout(60)
def test_a_pipe_that_takes_the_place_of_a_file_is_neither_waited_for_nor_read(
    root: Path, open_file: Opener
) -> None:
    (root / "file").write_bytes(b"inside")
    with (
        exchanged_after_stat(root / "file", os.mkfifo),
        pytest.raises(InvalidInput, match="a named pipe"),
    ):
        open_file(root)


@contextmanager
def without_hard_links(error: int) -> Iterator[None]:
    """Refuse hard links as file systems without them do."""

    def refuse(*_names: object, **_options: object) -> None:
        raise OSError(error, os.strerror(error))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "link", refuse)
        yield


def check_renaming_never_replaces(root: Path) -> None:
    (root / "old").write_bytes(b"new content")
    with closing(Folder.open(root)) as folder:
        folder.rename_new("old", "new")
        assert (root / "new").read_bytes() == b"new content"
        (root / "old").write_bytes(b"other content")
        with pytest.raises(FileExistsError):
            folder.rename_new("old", "new")
    assert (root / "new").read_bytes() == b"new content"
    assert (root / "old").read_bytes() == b"other content"


def test_renaming_never_replaces_a_file(root: Path) -> None:
    check_renaming_never_replaces(root)


@pytest.mark.parametrize("error", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS])
def test_without_hard_links_renaming_never_replaces_a_file(
    root: Path, error: int
) -> None:
    with without_hard_links(error):
        check_renaming_never_replaces(root)


def test_on_a_disk_without_hard_links_renaming_never_replaces_a_file(
    tmp_path: Path,
) -> None:
    with disk_mount(tmp_path, "exfat", megabytes=64) as root:
        (root / "a").touch()
        with pytest.raises(PermissionError):
            os.link(root / "a", root / "b")
        check_renaming_never_replaces(root)


def test_any_other_failure_to_link_is_an_error(root: Path) -> None:
    (root / "old").touch()
    with (
        closing(Folder.open(root)) as folder,
        without_hard_links(errno.EIO),
        pytest.raises(OSError, match="Input/output error"),
    ):
        folder.rename_new("old", "new")
    assert os.listdir(root) == ["old"]


def test_a_link_whose_answer_was_lost_is_our_own(root: Path) -> None:
    """An NFS client repeats the request, and the server answers that it exists."""
    link = os.link

    def link_twice(*names: Any, **options: Any) -> None:
        link(*names, **options)
        link(*names, **options)

    (root / "old").write_bytes(b"content")
    with closing(Folder.open(root)) as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "link", link_twice)
        folder.rename_new("old", "new")
    assert os.listdir(root) == ["new"]
    assert (root / "new").read_bytes() == b"content"
