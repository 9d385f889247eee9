"""Bringing the results of a job home: once each, whatever happens to the link."""

import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

import trio

from sleap_rtc.filesystem import safe_mkdir
from sleap_rtc.io.link.link import Link, LinkClosedError
from sleap_rtc.io.storage.copy import copy_with_deadline
from sleap_rtc.io.storage.folder import StorageError, open_beneath
from sleap_rtc.io.storage.probe import call_in_time
from sleap_rtc.io.transfer.chunk_files import ChunkWriter
from sleap_rtc.io.transfer.transfers import TransferError, Transfers
from sleap_rtc.proto import messages as m
from sleap_rtc.proto.errors import InvalidInput

RESULTS_AT_ONCE = 4
"""Result files that are fetched side by side: most are small, and wait for replies."""

STORAGE_TIMEOUT = 20.0
"""Seconds for one look at the shared storage."""

Fetch = Callable[[m.ResultFile, Callable[[int], None]], Awaitable[None]]


class ResultLink(Protocol):
    """The link over which results come at present."""

    link: Link
    transfers: Transfers


class Results:
    """The results of one job, on their way to where the user wants them.

    Args:
        job_id: The job.
        directory: Where they go, if an earlier process has chosen that already.
        on_progress: Is told how many bytes of how many have arrived.
    """

    def __init__(
        self,
        job_id: str,
        directory: Path | None,
        on_progress: Callable[[int, int], None],
    ) -> None:
        self.directory = directory
        self._job_id = job_id
        self._on_progress = on_progress
        self._fetched: set[str] = set()
        self._offered: dict[int, trio.MemorySendChannel[m.OfferedFile | str]] = {}
        self._last_transfer = 0

    async def choose_directory(
        self, asked: Path | None, default: Path, files: tuple[m.ResultFile, ...]
    ) -> Path:
        """Decide where the results go; it is the same whenever it is asked again.

        Args:
            asked: The directory that the user named, if any.
            default: The one to take otherwise, unless there is one of that name.
            files: The results.

        Raises:
            StorageError: If the directory can't be made.
        """
        if self.directory is None:
            self.directory = await trio.to_thread.run_sync(
                _free_directory, asked or default, asked is None, self._job_id, files
            )
        else:
            await trio.to_thread.run_sync(safe_mkdir, self.directory)
            # What an earlier process has brought home is there under its name.
            self._fetched |= await trio.to_thread.run_sync(
                _present, self.directory, files
            )
        return self.directory

    def new_link(self, last_transfer: int) -> None:
        """Begin anew to number transfers; nothing of an older link will be answered."""
        self._offered.clear()
        self._last_transfer = last_transfer

    def deliver_offer(self, message: m.Message) -> bool:
        """Bring the answer to a `FileRequest` to the task that waits for it."""
        match message:
            case m.FileOffer(transfer_id=transfer_id, file=file):
                answer: m.OfferedFile | str = file
            case m.FileError(transfer_id=transfer_id, reason=reason):
                answer = reason
            case _:
                return False
        waiting = self._offered.pop(transfer_id, None)
        if waiting is None:
            return False
        waiting.send_nowait(answer)
        return True

    async def fetch(
        self, over: ResultLink, files: tuple[m.ResultFile, ...]
    ) -> list[str]:
        """Fetch what is missing over a link; returns what went wrong, for people.

        Raises:
            LinkClosedError: If the link was lost; what has arrived is kept.
        """

        async def fetch_one(
            file: m.ResultFile, progress: Callable[[int], None]
        ) -> None:
            await self._fetch_one(over, file, progress)

        return await self._all(files, fetch_one)

    async def copy(self, root: Path, files: tuple[m.ResultFile, ...]) -> list[str]:
        """Copy what is missing out of the shared storage; returns what went wrong."""

        async def copy_one(file: m.ResultFile, progress: Callable[[int], None]) -> None:
            relative = f"jobs/{self._job_id}/{file.path}"
            source = await call_in_time(
                root, _path_beneath, root, relative, timeout=STORAGE_TIMEOUT
            )
            await copy_with_deadline(
                source,
                self._chosen(),
                file.path,
                size=file.size,
                on_progress=progress,
            )

        return await self._all(files, copy_one)

    async def _all(self, files: tuple[m.ResultFile, ...], fetch: Fetch) -> list[str]:
        """Fetch files side by side."""
        failures: list[str] = []
        lost: list[LinkClosedError] = []
        done = {file.path: file.size for file in files if file.path in self._fetched}
        total = sum(file.size for file in files)
        waiting = iter([file for file in files if file.path not in self._fetched])

        async def fetch_some() -> None:
            for file in waiting:

                def progress(size: int, path: str = file.path) -> None:
                    done[path] = size
                    self._on_progress(sum(done.values()), total)

                try:
                    await fetch(file, progress)
                except (TransferError, InvalidInput, StorageError) as error:
                    failures.append(f"{file.path}: {error}")
                except LinkClosedError as error:
                    lost.append(error)
                    return
                else:
                    self._fetched.add(file.path)

        async with trio.open_nursery() as nursery:
            for _ in range(min(RESULTS_AT_ONCE, len(files))):
                nursery.start_soon(fetch_some)
        if lost:
            raise lost[0]
        return failures

    async def _fetch_one(
        self, over: ResultLink, file: m.ResultFile, progress: Callable[[int], None]
    ) -> None:
        """Fetch one file through the channel."""
        self._last_transfer += 1
        transfer_id = self._last_transfer
        answer, answered = trio.open_memory_channel[m.OfferedFile | str](1)
        self._offered[transfer_id] = answer
        request = m.FileRequest(transfer_id, self._job_id, file.path)
        await over.link.send_message(request)
        offer = await answered.receive()
        if isinstance(offer, str):
            raise TransferError(offer)
        if offer.size != file.size:
            raise TransferError(f"it has {offer.size} bytes instead of {file.size}")
        try:
            sink = await trio.to_thread.run_sync(self._open_part, file.path, offer)
        except (InvalidInput, StorageError) as error:
            # The worker would wait for ever to send it.
            await over.link.send_message(m.FileError(transfer_id, str(error)))
            raise
        await over.transfers.receive_file(
            transfer_id, offer, sink, keep_part=True, on_progress=progress
        )

    def _open_part(self, path: str, offer: m.OfferedFile) -> ChunkWriter:
        """Open what is there of a result, in a worker thread."""
        return ChunkWriter.open(
            self._chosen(),
            path,
            size=offer.size,
            chunk_size=offer.chunk_size,
            origin=self._job_id,
            check=trio.from_thread.check_cancelled,
        )

    def _chosen(self) -> Path:
        if self.directory is None:
            raise RuntimeError("results are fetched before it was decided where to")
        return self.directory


def _free_directory(
    wanted: Path, is_default: bool, job_id: str, files: tuple[m.ResultFile, ...]
) -> Path:
    """Choose where results go: nothing that is there already is overwritten.

    Raises:
        StorageError: If the directory can't be made.
    """
    if is_default:
        try:
            wanted.mkdir()
        except FileExistsError:
            wanted /= job_id  # another job has taken it, which may still fill it
    elif any((wanted / file.path).exists() for file in files):
        wanted /= job_id
    safe_mkdir(wanted)
    return wanted


def _present(directory: Path, files: tuple[m.ResultFile, ...]) -> set[str]:
    """List the results that are in their directory, whole."""
    found: set[str] = set()
    for file in files:
        try:
            size = (directory / file.path).stat().st_size
        except OSError:
            continue
        if size == file.size:
            found.add(file.path)
    return found


def _path_beneath(root: Path, relative: str) -> Path:
    """Check that a result lies beneath the root, and is a file.

    Raises:
        InvalidInput: If it does not.
        StorageError: If the storage failed.
    """
    os.close(open_beneath(root, relative))
    return root / relative
