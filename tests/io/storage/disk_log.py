"""Record which changes of files and directories reach the disk, and in which order."""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest


class DiskLog:
    """The calls of a process that change or sync files, in order.

    Each is a line such as ``sync a`` or ``link .a.part a``. A file is known by its name
    when it was opened; a directory has a slash at its end. Writes to one file in a row
    count once.
    """

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._names: dict[int, str] = {}

    def note(self, line: str) -> None:
        if self.lines[-1:] != [line] or not line.startswith("write"):
            self.lines.append(line)

    def note_open(self, fd: int, path: str) -> None:
        is_folder = stat.S_ISDIR(os.fstat(fd).st_mode)
        self._names[fd] = os.path.basename(path) + "/" * is_folder

    def name(self, fd: int) -> str:
        return self._names.get(fd, "?")


@contextmanager
def disk_log() -> Iterator[DiskLog]:
    """Record the calls of `os` that change files while the block runs."""
    log = DiskLog()
    with pytest.MonkeyPatch.context() as patch:

        def watch(name: str, note: Callable[..., None]) -> None:
            original = getattr(os, name, None)
            if original is None:
                return  # this system does not have it

            def call(*args: Any, **kwargs: Any) -> Any:
                answer = original(*args, **kwargs)
                note(answer, *args)
                return answer

            patch.setattr(os, name, call)

        watch("open", lambda fd, path, *_: log.note_open(fd, os.fspath(path)))
        for name in ("fsync", "fdatasync"):
            watch(name, lambda _, fd: log.note(f"sync {log.name(fd)}"))
        for name in ("write", "pwrite", "copy_file_range"):
            place = 1 if name == "copy_file_range" else 0
            watch(
                name, lambda _, *args, at=place: log.note(f"write {log.name(args[at])}")
            )
        for name in ("link", "rename", "replace"):
            watch(name, lambda _, old, new, at=name: log.note(f"{at} {old} {new}"))
        for name in ("unlink", "mkdir"):
            watch(name, lambda _, path, *_rest, at=name: log.note(f"{at} {path}"))
        yield log
