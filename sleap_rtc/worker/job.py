"""One job of a worker, which outlives the links of its client."""

import time
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import assert_never

import msgspec
import structlog
import trio
from blake3 import blake3

from sleap_rtc.io.link.link import LinkClosedError
from sleap_rtc.io.storage.call import STORAGE_TIMEOUT, call_storage
from sleap_rtc.io.storage.folder import (
    StorageError,
    make_directories_beneath,
    remove_tree_beneath,
)
from sleap_rtc.io.storage.probe import read_probe
from sleap_rtc.io.transfer.chunk_files import CHUNK_SIZE, ChunkReader, ChunkWriter
from sleap_rtc.io.transfer.transfers import LEAVE_TIMEOUT, TransferError
from sleap_rtc.proto import messages
from sleap_rtc.proto.errors import InvalidInput, RemoteProtocolError
from sleap_rtc.proto.job import worker_outputs
from sleap_rtc.proto.job.worker import RunEvent, WorkerJob
from sleap_rtc.proto.job.worker_table import WorkerState
from sleap_rtc.proto.paths import check_file_name_untrusted
from sleap_rtc.worker.client_link import ClientLink
from sleap_rtc.worker.job_storage import (
    ask_shared,
    look_at_package,
    make_room,
    open_result,
)
from sleap_rtc.worker.job_store import JobRecord
from sleap_rtc.worker.runner import Run, run_job
from sleap_rtc.worker.slots import SlotQueue
from sleap_rtc.worker.store_writer import StoreWriter

MAX_RESULTS_AT_ONCE = 16
"""Result files that one link sends at once; each holds a file descriptor."""

TAKEN_OVER = "a newer connection has taken over the job"
"""Reason for the client whose link is ended by a newer one."""


class JobSettings(msgspec.Struct, frozen=True):
    """Decisions of the worker's owner about its jobs.

    Args:
        worker_id: The worker's peer id; its jobs are stored under it.
        directory: Parent of the job directories of the channel route.
        shared_root: Where this machine mounts the shared storage; None without one.
        programs: Programs that jobs may run.
    """

    worker_id: str
    directory: Path
    shared_root: Path | None
    programs: frozenset[str]


class JobContext(msgspec.Struct, frozen=True):
    """The part of a worker that its jobs share.

    Args:
        settings: The decisions of the worker's owner.
        queue: The slots.
        store: Stores each change of a job.
        nursery: Runs the tasks that outlive the link of a client.
        log: The worker's log.
        by_id: Each job under its id, from the moment it is recorded, or has claimed the
            id, until it is removed.
    """

    settings: JobSettings
    queue: SlotQueue
    store: StoreWriter
    nursery: trio.Nursery
    log: structlog.typing.FilteringBoundLogger
    by_id: dict[str, "Job"]


class Job:
    """Carries out the decisions of one `WorkerJob`.

    Args:
        context: The part of the worker that its jobs share.
        machine: The machine that decides.
        link: The link of the client, if it is connected.
        directory: The job directory, if it exists already.
        updated: Time of the last change, or of the end of the last link, in seconds
            since the epoch.
    """

    def __init__(
        self,
        context: JobContext,
        machine: WorkerJob,
        *,
        link: ClientLink | None = None,
        directory: Path | None = None,
        updated: float = 0.0,
    ) -> None:
        self._context = context
        self._machine = machine
        self._link = link
        self._directory = directory
        self._updated = updated
        self._log = context.log
        self._attaching = trio.Lock()
        self._receiving = trio.CancelScope()
        self._settled = trio.Event()
        self._settled.set()
        self._removed = trio.Event()
        self._waiting = trio.CancelScope()
        self._running = trio.CancelScope()

    @property
    def job_id(self) -> str:
        """Its id; empty before the client has named it."""
        return self._machine.job_id

    @property
    def state(self) -> WorkerState:
        """The state of its machine."""
        return self._machine.state

    @property
    def can_resume(self) -> bool:
        """True if a client may come back to it."""
        return self._machine.can_resume

    @property
    def progress(self) -> messages.JobProgress:
        """Its progress as clients see it."""
        return self._machine.progress

    # -------------------------------------------------------------------- its links

    async def attach(self, link: ClientLink, request: messages.JobResume) -> bool:
        """Serve a client that comes back; from then on it uses only this link.

        The client of an older link that is still open gets an error, so that it does
        not resume the job at once.

        Args:
            link: The link of the request.
            request: The request, with the first line of output that the client lacks.

        Returns:
            False if the job cannot be resumed.
        """
        async with self._attaching:
            if self._link is not None and self._machine.can_resume:
                self._link.end(TAKEN_OVER)
                self.detach(self._link, TAKEN_OVER)
            await self._settled.wait()
            if not self._machine.can_resume:
                return False
            self._link = link
            try:
                now = trio.current_time()
                self._machine.connection_restored(now)
                self._machine.receive_message(request, now)
                self.drain()
            except BaseException:
                self._link = None  # the session does not have this job
                raise
            return True

    def detach(self, link: ClientLink, reason: str) -> None:
        """Handle the end of a link; nothing happens if it is not the link in use."""
        if self._link is link:
            self._machine.connection_lost(reason, trio.current_time())
            self.drain()
            self._link = None
            self._updated = time.time()

    def receive_message(
        self, link: ClientLink, message: messages.ClientJobMessage
    ) -> None:
        """Handle a message of the client; one from an older link is ignored.

        Raises:
            RemoteProtocolError: If the client may not send it now, or starts a job
                under the id of another one. JOB_SUBMIT gets an answer instead.
        """
        if self._link is link:
            if isinstance(message, messages.MountProbe | messages.JobIdentity):
                self._check_is_free(message.job_id)
            self._machine.receive_message(message, trio.current_time())
            self.drain()

    def _check_is_free(self, job_id: str) -> None:
        other = self._context.by_id.get(job_id)
        if other is not None and other is not self and other.can_resume:
            raise RemoteProtocolError(f"{job_id} is known; it can be resumed")

    def discard_if_older(self, moment: float) -> None:
        """Discard the part of a package whose client has been away since a moment."""
        if self.state is WorkerState.SUSPENDED and self._updated < moment:
            self._log.warning("part of a package removed", job=self.job_id)
            self._machine.cancel("the rest of the package did not come")
            self.drain()

    async def wait_removed(self) -> None:
        """Wait until a discarded job is removed."""
        await self._removed.wait()

    # --------------------------------------------------------- effects of the machine

    def drain(self) -> None:
        """Carry out all effects of the machine."""
        while (output := self._machine.next_output()) is not None:
            self._carry_out(output)

    def _carry_out(self, output: worker_outputs.Output) -> None:
        match output:
            case worker_outputs.SendMessage(message=message):
                self._client().outbox.put(message)
            case worker_outputs.ReadProbe(path=path):
                self._client().start(self._read_probe, path)
            case worker_outputs.CheckInput(path=path):
                self._client().start(self._check_input, path)
            case worker_outputs.MakeOutput(path=path):
                self._client().start(self._make_output, path)
            case worker_outputs.Admit(job_id=job_id, submission=submission):
                self._directory = None  # the shared route used another one
                self._settled = trio.Event()
                self._context.nursery.start_soon(self._admit, job_id, submission)
            case worker_outputs.ReceivePackage(transfer_id=transfer_id, file=file):
                self._receiving, self._settled = trio.CancelScope(), trio.Event()
                link = self._client()
                link.start(self._receive_package, link, transfer_id, file)
            case worker_outputs.StopReceiving():
                self._receiving.cancel(reason="the link was lost")
            case worker_outputs.SendResult(transfer_id=transfer_id, path=path):
                link = self._client()
                link.start(self._send_result, link, transfer_id, path)
            case worker_outputs.Remember():
                self._remember()
            case worker_outputs.Enqueue(job_id=job_id, route=route, package=package):
                self._enqueue(job_id, route, package)
            case worker_outputs.StopRun():
                self._waiting.cancel(reason="the job was cancelled")
                self._running.cancel(reason="the job was cancelled")
            case worker_outputs.Discard():
                self._discard()
            case _:
                assert_never(output)

    def _client(self) -> ClientLink:
        """Return the link, which the machine needs for this effect."""
        if self._link is None:
            raise RuntimeError("the job needs its client, which is not connected")
        return self._link

    # --------------------------------------------------------------------- the record

    def _remember(self) -> None:
        machine, progress = self._machine, self._machine.progress
        self._updated = time.time()
        self._context.by_id[self.job_id] = self
        self._context.store.put(
            JobRecord(
                job_id=machine.job_id,
                worker_id=self._context.settings.worker_id,
                route=machine.route,
                directory=str(self._directory),
                package=machine.submission.name,
                size=machine.submission.size,
                state=progress.state,
                detail=progress.detail,
                output_path=machine.output_path,
                results=machine.results,
                updated=self._updated,
            )
        )

    def _discard(self) -> None:
        self._receiving.cancel(reason="the job was discarded")
        if self._context.by_id.get(self.job_id) is self:
            self._context.store.remove(self.job_id)
        self._context.nursery.start_soon(self._remove)

    async def _remove(self) -> None:
        """Remove the directory of the channel route; then the id is free."""
        await self._settled.wait()
        if self._directory is not None and self._machine.route == "channel":
            try:
                await call_storage(
                    remove_tree_beneath, self._context.settings.directory, self.job_id
                )
            except (StorageError, InvalidInput) as error:
                self._log.warning("job directory not removed", reason=str(error))
        if self._context.by_id.get(self.job_id) is self:
            del self._context.by_id[self.job_id]
        self._removed.set()

    # ------------------------------------------------------------- the shared storage

    async def _read_probe(self, path: str) -> None:
        try:
            content = await ask_shared(self._shared_root, read_probe, path)
            self._machine.probe_read(blake3(content).hexdigest())
        except (InvalidInput, StorageError) as error:
            self._machine.probe_failed(str(error))
        self.drain()

    async def _check_input(self, path: str) -> None:
        root = self._shared_root
        try:
            await ask_shared(root, look_at_package, path)
            if root is not None and self.state is WorkerState.SHARING:
                self._directory = root / PurePosixPath(path).parent
            self._machine.input_valid()
        except (InvalidInput, StorageError) as error:
            self._machine.path_refused(str(error))
        self.drain()

    async def _make_output(self, path: str) -> None:
        try:
            if self.state is WorkerState.SHARING:
                await ask_shared(self._shared_root, make_directories_beneath, path)
            self._machine.output_made()
        except (InvalidInput, StorageError) as error:
            self._machine.path_refused(str(error))
        self.drain()

    @property
    def _shared_root(self) -> Path | None:
        return self._context.settings.shared_root

    # -------------------------------------------------------------- the channel route

    async def _admit(self, job_id: str, submission: messages.Submission) -> None:
        """Admit or reject a package; the client may disconnect and return meanwhile."""
        directory = self._context.settings.directory / job_id
        try:
            check_file_name_untrusted(submission.name)
            if await self._claim(job_id):
                await call_storage(
                    make_room, directory, submission.size, timeout=STORAGE_TIMEOUT
                )
                self._directory = directory
                self._machine.admitted()
            else:
                self._machine.rejected(f"{job_id} is known to the worker")
        except (InvalidInput, StorageError) as error:
            self._machine.rejected(str(error))
        finally:
            self._settled.set()
        self.drain()

    async def _claim(self, job_id: str) -> bool:
        """Register this job under an id, once a discarded job of that id is removed.

        Returns:
            False if another job has the id.
        """
        while (other := self._context.by_id.setdefault(job_id, self)) is not self:
            if other.state is not WorkerState.DISCARDED:
                return False
            await other.wait_removed()
        return True

    async def _receive_package(
        self, link: ClientLink, transfer_id: int, file: messages.OfferedFile
    ) -> None:
        """Receive the package, or the rest of it. A part outlives the link."""
        try:
            with self._receiving:
                sink = await call_storage(
                    self._open_part, file, discard=ChunkWriter.keep
                )
                await self._send_received(link, sink)
                await link.transfers.receive_file(transfer_id, sink)
                self._machine.package_received()
        except (TransferError, StorageError, InvalidInput) as error:
            self._machine.package_failed(str(error))
        except LinkClosedError:
            pass  # the session reports it to the machine
        finally:
            self._settled.set()
        self.drain()

    async def _send_received(self, link: ClientLink, sink: ChunkWriter) -> None:
        """Send the number of bytes from earlier links before the first grant."""
        if sink.chunk_map.bytes_there == 0:
            return
        self._machine.package_opened(sink.chunk_map.bytes_there)
        self.drain()
        try:
            await link.outbox.flush()
        except trio.Cancelled:
            # Otherwise the next link would find the part in use.
            with suppress(StorageError):
                await call_storage(sink.keep, timeout=LEAVE_TIMEOUT, shield=True)
            raise

    def _open_part(self, file: messages.OfferedFile) -> ChunkWriter:
        """Open the part of the package that an earlier link left (blocking)."""
        return ChunkWriter.open(
            self._known_directory(),
            file.name,
            size=file.size,
            chunk_size=file.chunk_size,
            origin=self.job_id,
            check=trio.from_thread.check_cancelled,
        )

    async def _send_result(self, link: ClientLink, transfer_id: int, path: str) -> None:
        if link.transfers.active >= MAX_RESULTS_AT_ONCE:
            reason = f"only {MAX_RESULTS_AT_ONCE} files are sent at once"
            link.outbox.put(messages.FileError(transfer_id, reason))
            return
        try:
            source = await call_storage(
                open_result, self._known_directory(), path, discard=ChunkReader.close
            )
            try:
                offer = messages.OfferedFile(
                    PurePosixPath(path).name, source.size, CHUNK_SIZE
                )
                await link.transfers.send_file(transfer_id, offer, source)
            finally:
                source.close()
        except (StorageError, InvalidInput) as error:
            link.outbox.put(messages.FileError(transfer_id, str(error)))
        except TransferError as error:
            self._log.warning("result not sent", path=path, reason=error.reason)
        except LinkClosedError:
            return  # the client asks again when it is back

    def _known_directory(self) -> Path:
        if self._directory is None:
            raise StorageError("the job has no directory")
        return self._directory

    # ------------------------------------------------------------------------ the run

    def _enqueue(self, job_id: str, route: messages.Route, package: str) -> None:
        self._log.info("job queued", job=job_id, route=route, package=package)
        self._context.nursery.start_soon(self._run, job_id, package)

    async def _run(self, job_id: str, package: str) -> None:
        """Wait for a slot and run the job, with or without its client."""
        failure: str | None = "cancelled before it ran"
        results: dict[str, int] = {}
        with self._waiting:
            async with self._context.queue.slot(self._queue_moved) as gpus:
                # From here on only `_running` ends the job, and it keeps its results.
                self._waiting = trio.CancelScope()
                self._machine.slot_granted()
                self.drain()
                self._log.info("job runs", job=job_id, gpus=gpus)
                run = Run(
                    directory=self._known_directory(),
                    package=PurePosixPath(package).name,
                    programs=self._context.settings.programs,
                    gpus=gpus,
                    on_event=self._progressed,
                )
                report = await run_job(run, self._running)
                failure, results = report.failure, report.results
        self._log.info(
            "job ended",
            job=job_id,
            outcome=self._machine.cancel_reason or failure or "complete",
            directory=str(self._directory),
        )
        self._machine.run_ended(failure, results)
        self.drain()

    def _queue_moved(self, position: int) -> None:
        self._machine.queue_moved(position)
        self.drain()

    def _progressed(self, event: RunEvent) -> None:
        self._machine.progressed(event)
        self.drain()
