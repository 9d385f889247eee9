"""Files that only their owner may read, replaced as a whole."""

import os
import tempfile
from contextlib import closing
from pathlib import Path

from sleap_rtc.io.storage.folder import Folder


def write_private(path: Path, content: bytes) -> None:
    """Write a file for its owner only, whole or not at all (blocking).

    The content and the name are on disk when it returns, so that both outlive a power
    cut, where the file system can sync a directory. A failure before the replacement
    leaves the file as it was; only the sync of the directory comes after it.

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
    with closing(Folder.open(path.parent)) as folder:
        folder.sync()
