"""Files that only their owner may read, replaced as a whole."""

import os
import sys
import tempfile
from pathlib import Path


def write_private(path: Path, content: bytes) -> None:
    """Write a file for its owner only, whole or not at all (blocking).

    The content and the name are on disk when it returns, so that both outlive a power
    cut. After a failure the file is as it was.

    Raises:
        OSError: If it cannot be written.
    """
    # A file made by mkstemp is new and has mode 0600 from the start.
    fd, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    if sys.platform != "win32":  # Windows cannot sync a directory
        fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
