"""A command of `sleap-rtc` whose job directories are on storage that may hang.

``HANG`` names a FIFO. While it exists, every call that opens a file or a directory
beneath the folder ``HANG_BENEATH`` waits for the FIFO, inside the kernel.
"""

import os
import sys
from typing import Any

from sleap_rtc.cli import main

_open = os.open
_ours: set[int] = set()
"""Descriptors of directories beneath the folder."""


def _open_slowly(
    path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None
) -> int:
    is_beneath = dir_fd in _ours or (
        isinstance(path, str | os.PathLike)
        and os.environ["HANG_BENEATH"] in os.fspath(path)
    )
    if is_beneath and os.path.exists(fifo := os.environ["HANG"]):
        print("the storage hangs", file=sys.stderr, flush=True)
        os.close(_open(fifo, os.O_RDONLY))
    fd = _open(path, flags, mode, dir_fd=dir_fd)
    (_ours.add if is_beneath else _ours.discard)(fd)
    return fd


if __name__ == "__main__":
    os.open = _open_slowly
    os.supports_dir_fd.add(_open_slowly)
    main(sys.argv[1:])
