"""Fetching the results of a job: once each, over as many links as it takes."""

from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from sleap_rtc.client.job_folder import JobFolder
from sleap_rtc.filesystem import safe_mkdir
from sleap_rtc.io.link.link import LinkClosedError
from sleap_rtc.io.storage.call import call_storage
from sleap_rtc.io.storage.copy import copy_with_deadline
from sleap_rtc.io.storage.folder import StorageError
from sleap_rtc.io.transfer.chunk_files import ChunkWriter
from sleap_rtc.io.transfer.connection import Connection
from sleap_rtc.io.transfer.transfers import TransferError
from sleap_rtc.proto import messages
from sleap_rtc.proto.errors import InvalidInput

RESULTS_AT_ONCE = 4
"""Result files that are fetched side by side: most are small, and wait for replies."""

Fetch = Callable[[messages.ResultFile, Callable[[int], None]], Awaitable[None]]


class Results:
    """Fetches the results of one job into a directory.

    Args:
        job_id: The job.
        directory: The directory, if an earlier process has chosen it already.
        on_progress: Called with the bytes that have arrived, and those in all.
    """

    def __init__(
        self,
        job_id: str,
        directory: Path | None,
        on_progress: Callable[[int, int], None],
    ) -> None:
        self._directory = directory
        self._job_id = job_id
        self._on_progress = on_progress
        self._fetched: set[str] = set()
        self._offered: dict[int, trio.MemorySendChannel[messages.OfferedFile | str]] = (
            {}
        )
        self._last_transfer = 0

    async def choose_directory(
        self, asked: Path | None, default: Path, files: tuple[messages.ResultFile, ...]
    ) -> Path:
        """Choose and make the directory; later calls return the same one.

        Args:
            asked: The directory that the user named, if any.
            default: The directory otherwise, if it does not exist yet.
            files: The results.

        Raises:
            StorageError: If the directory cannot be made.
        """
        if self._directory is None:
            self._directory = await call_storage(
                _free_directory, asked or default, asked is None, self._job_id, files
            )
        else:
            await call_storage(safe_mkdir, self._directory)
            # A result that an earlier process fetched has its final name.
            self._fetched |= await call_storage(_present, self._directory, files)
        return self._directory

    def start_link(self, last_transfer: int) -> None:
        """Restart transfer numbering; requests on the old link will not be answered.

        Args:
            last_transfer: The highest number that is taken on the new link.
        """
        self._offered.clear()
        self._last_transfer = last_transfer

    def deliver_offer(self, message: messages.Message) -> bool:
        """Deliver the answer to a `FileRequest` to the task that waits for it.

        Returns:
            False if the message is not such an answer.
        """
        match message:
            case messages.FileOffer(transfer_id=transfer_id, file=file):
                answer: messages.OfferedFile | str = file
            case messages.FileError(transfer_id=transfer_id, reason=reason):
                answer = reason
            case _:
                return False
        waiting = self._offered.pop(transfer_id, None)
        if waiting is None:
            return False
        waiting.send_nowait(answer)
        return True

    async def fetch(
        self,
        connection: Connection[messages.WorkerMessage],
        files: tuple[messages.ResultFile, ...],
    ) -> list[str]:
        """Fetch the missing files over a link; return what went wrong, for people.

        Raises:
            LinkClosedError: If the link was lost; everything that arrived is kept.
        """

        async def fetch_one(
            file: messages.ResultFile, progress: Callable[[int], None]
        ) -> None:
            await self._fetch_one(connection, file, progress)

        return await self._all(files, fetch_one)

    async def copy(
        self, folder: JobFolder, files: tuple[messages.ResultFile, ...]
    ) -> list[str]:
        """Copy the missing files from the shared storage; return what went wrong."""

        async def copy_one(
            file: messages.ResultFile, progress: Callable[[int], None]
        ) -> None:
            await copy_with_deadline(
                await folder.find_result(file.path),
                self._chosen(),
                file.path,
                size=file.size,
                on_progress=progress,
            )

        return await self._all(files, copy_one)

    async def _all(
        self, files: tuple[messages.ResultFile, ...], fetch: Fetch
    ) -> list[str]:
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
        self,
        connection: Connection[messages.WorkerMessage],
        file: messages.ResultFile,
        progress: Callable[[int], None],
    ) -> None:
        """Fetch one file through the channel."""
        self._last_transfer += 1
        transfer_id = self._last_transfer
        answer, answered = trio.open_memory_channel[messages.OfferedFile | str](1)
        self._offered[transfer_id] = answer
        request = messages.FileRequest(transfer_id, self._job_id, file.path)
        await connection.link.send_message(request)
        offer = await answered.receive()
        if isinstance(offer, str):
            raise TransferError(offer)
        if offer.size != file.size:
            raise TransferError(f"it has {offer.size} bytes instead of {file.size}")
        try:
            sink = await call_storage(
                self._open_part, file.path, offer, discard=ChunkWriter.keep
            )
        except (InvalidInput, StorageError) as error:
            # Without an answer the worker would wait forever.
            await connection.link.send_message(
                messages.FileError(transfer_id, str(error))
            )
            raise
        await connection.transfers.receive_file(transfer_id, sink, on_progress=progress)

    def _open_part(self, path: str, offer: messages.OfferedFile) -> ChunkWriter:
        """Open the part of a result that an earlier link delivered (blocking)."""
        return ChunkWriter.open(
            self._chosen(),
            path,
            size=offer.size,
            chunk_size=offer.chunk_size,
            origin=self._job_id,
            check=trio.from_thread.check_cancelled,
        )

    def _chosen(self) -> Path:
        if self._directory is None:
            raise RuntimeError("no directory was chosen for the results")
        return self._directory


def _free_directory(
    wanted: Path, is_default: bool, job_id: str, files: tuple[messages.ResultFile, ...]
) -> Path:
    """Choose a directory in which no result overwrites an existing file.

    Raises:
        StorageError: If the directory cannot be made.
    """
    if is_default:
        try:
            wanted.mkdir()
        except FileExistsError:
            wanted /= job_id  # it belongs to another job, which may still fill it
    elif any((wanted / file.path).exists() for file in files):
        wanted /= job_id
    safe_mkdir(wanted)
    return wanted


def _present(directory: Path, files: tuple[messages.ResultFile, ...]) -> set[str]:
    """Return the paths of the results that are complete in their directory."""
    found: set[str] = set()
    for file in files:
        try:
            size = (directory / file.path).stat().st_size
        except OSError:
            continue
        if size == file.size:
            found.add(file.path)
    return found
