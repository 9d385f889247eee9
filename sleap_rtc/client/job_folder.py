"""The directory of one job on the storage that client and worker share."""

import os
import secrets
from collections.abc import Callable
from pathlib import Path

from blake3 import blake3

from sleap_rtc.io.storage.call import STORAGE_TIMEOUT, call_storage
from sleap_rtc.io.storage.copy import CopyReport, copy_with_deadline
from sleap_rtc.io.storage.folder import (
    StorageError,
    make_directories_beneath,
    open_beneath,
    remove_tree_beneath,
)
from sleap_rtc.io.storage.probe import ask_storage, write_probe
from sleap_rtc.proto.errors import InvalidInput
from sleap_rtc.proto.job.paths import JobPaths

CLEANUP_TIMEOUT = 10.0
"""Seconds for removing a job directory that will not be used."""


class JobFolder:
    """Prepares, fills, reads and discards the directory of one job.

    All methods but `discard` raise `InvalidInput` for a path that leads out of the
    root, and `StorageError` if the storage fails or does not answer.

    Args:
        root: Where this machine mounts the shared storage.
        job_id: The job.
    """

    def __init__(self, root: Path, job_id: str) -> None:
        self._root = root
        self._paths = JobPaths(job_id)

    @property
    def path(self) -> Path:
        """Absolute path of the directory on this machine."""
        return self._root / self._paths.directory

    async def make(self) -> tuple[str, str]:
        """Make the directory with a probe file in it.

        Returns:
            The path of the file beneath the root, and the BLAKE3 hash of its content in
            hexadecimal digits.
        """
        probe = self._paths.probe
        nonce = secrets.token_hex(16).encode()

        def write() -> None:
            make_directories_beneath(self._root, self._paths.directory)
            write_probe(self._root, probe, nonce)

        await ask_storage(self._root, write, timeout=STORAGE_TIMEOUT)
        return probe, blake3(nonce).hexdigest()

    async def copy_package(
        self,
        package: Path,
        path: str,
        *,
        size: int,
        on_progress: Callable[[int], None],
    ) -> CopyReport:
        """Remove the probe file, and copy the package.

        Args:
            package: The zip file.
            path: Path of the copy beneath the root.
            size: Bytes that the zip file must have.
            on_progress: Called with the number of bytes copied so far.
        """
        probe = self._paths.probe
        await call_storage(
            remove_tree_beneath,
            self._root,
            probe,
            root=self._root,
            timeout=STORAGE_TIMEOUT,
        )
        return await copy_with_deadline(
            package, self._root, path, size=size, on_progress=on_progress
        )

    async def find_result(self, path: str) -> Path:
        """Return the absolute path of a result after checking that it is a file."""

        def check() -> Path:
            relative = self._paths.file(path)
            os.close(open_beneath(self._root, relative))
            return self._root / relative

        return await call_storage(check, root=self._root, timeout=STORAGE_TIMEOUT)

    async def discard(self) -> None:
        """Remove the directory if the storage allows it. Not cancellable, but short."""
        try:
            await call_storage(
                remove_tree_beneath,
                self._root,
                self._paths.directory,
                timeout=CLEANUP_TIMEOUT,
                shield=True,
            )
        except (InvalidInput, StorageError):
            return
