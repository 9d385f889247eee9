"""The jobs of a worker: each outlives the links of its client, and a restart."""

import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Protocol, assert_never

import msgspec
import structlog
import trio
from blake3 import blake3

from sleap_rtc.io.link.link import LinkClosedError
from sleap_rtc.io.link.outbox import Outbox
from sleap_rtc.io.storage.call import call_storage
from sleap_rtc.io.storage.folder import (
    StorageError,
    make_directories_beneath,
    remove_tree_beneath,
)
from sleap_rtc.io.storage.probe import read_probe
from sleap_rtc.io.transfer.chunk_files import ChunkReader, ChunkWriter
from sleap_rtc.io.transfer.transfers import LEAVE_TIMEOUT, TransferError, Transfers
from sleap_rtc.proto import messages as m
from sleap_rtc.proto.errors import InvalidInput
from sleap_rtc.proto.job import worker_outputs
from sleap_rtc.proto.job.lines import LineEvent
from sleap_rtc.proto.job.script import ScriptKind
from sleap_rtc.proto.job.worker import WorkerJob
from sleap_rtc.proto.job.worker_table import WorkerState
from sleap_rtc.proto.paths import check_file_name_untrusted
from sleap_rtc.worker.runner import Run, run_job
from sleap_rtc.worker.slots import SlotQueue
from sleap_rtc.worker.storage import (
    CHUNK_SIZE,
    STORAGE_TIMEOUT,
    ask_shared,
    is_package_there,
    look_at_package,
    make_room,
    open_result,
    remove_quietly,
    results_left,
)
from sleap_rtc.worker.store import JobRecord, StoreWriter

MAX_RESULTS_AT_ONCE = 16
"""Result files that are sent side by side; each holds a file descriptor."""

KEEP_PARTS = 3 * 24 * 3600.0
"""Seconds that part of a package waits for its client: a long weekend."""

SWEEP_INTERVAL = 3600.0
"""Seconds between two looks for parts that nobody came back for."""


class JobLink(Protocol):
    """What a job uses of the link that its client has at present."""

    outbox: Outbox
    transfers: Transfers

    def start(self, effect: Callable[..., Awaitable[None]], *args: object) -> None:
        """Start what is of no use without this link."""

    def leave(self, reason: str) -> None:
        """End the link: the client has another one."""


class JobsHome(msgspec.Struct, frozen=True):
    """What all jobs and links of a worker share.

    Args:
        worker_id: The worker's peer id, under which it finds its jobs again.
        directory: Where jobs live that came through the channel.
        shared_root: Where this machine mounts the shared storage, if anywhere.
        programs: Programs that jobs may run.
        queue: The slots.
        store: Remembers the jobs.
        nursery: Where jobs run.
        greet: Says what the worker can do at present.
        changed: Is called when a slot was taken or left.
        log: Where the worker logs.
        jobs: The jobs that a client can come back to, by id.
    """

    worker_id: str
    directory: Path
    shared_root: Path | None
    programs: frozenset[str]
    queue: SlotQueue
    store: StoreWriter
    nursery: trio.Nursery
    greet: Callable[[], m.Greeting]
    changed: Callable[[], None]
    log: structlog.typing.FilteringBoundLogger
    jobs: dict[str, "Job"] = msgspec.field(default_factory=dict)

    async def restore(self, records: list[JobRecord]) -> None:
        """Go on with the jobs of the process before this one."""
        for record in records:
            progress, results = m.JobProgress(record.state, 0, record.detail), {}
            directory = Path(record.directory)
            if record.route == "channel":  # the state directory may have moved
                directory = self.directory / record.job_id
            if record.state == "RECEIVING" and await is_package_there(
                directory, record.package, record.size
            ):
                progress = m.JobProgress("QUEUED")
            if record.state == "RUNNING":
                results = await results_left(directory, record.output_path)
            job = Job(
                self,
                WorkerJob.restored(
                    record.job_id,
                    record.route,
                    m.Submission(record.package, record.size),
                    progress,
                    results=results or record.results,
                    output_path=record.output_path,
                ),
                directory,
                updated=record.updated,
            )
            self.jobs[record.job_id] = job
            state = job.core.progress.state
            self.log.info("job restored", job=record.job_id, state=state)
            job.drain()

    async def sweep(self) -> None:
        """Give up, now and then, what nobody came back for.

        It begins with a pause: while the worker was away, nobody could come back.
        """
        while True:
            await trio.sleep(SWEEP_INTERVAL)
            for job in tuple(self.jobs.values()):
                job.give_up_if_older(time.time() - KEEP_PARTS)


class Job:
    """Carries out what a `WorkerJob` decides.

    Args:
        home: What all jobs share.
        core: The job; a new one by default.
        directory: The job directory, if it has one already.
        updated: When it was last changed, or had a link, in seconds since the epoch.
    """

    def __init__(
        self,
        home: JobsHome,
        machine: WorkerJob | None = None,
        directory: Path | None = None,
        updated: float = 0.0,
    ) -> None:
        self.core = machine or WorkerJob()
        self._home = home
        self._directory = directory
        self._updated = updated
        self._link: JobLink | None = None
        self._attaching = trio.Lock()
        self._receiving = trio.CancelScope()
        self._settled = trio.Event()
        self._settled.set()
        self._gone = trio.Event()
        self._waiting = trio.CancelScope()
        self._stop = trio.CancelScope()

    # -------------------------------------------------------------------- its links

    def begin(self, link: JobLink) -> None:
        """Serve the first client of a new job."""
        self._link = link

    async def attach(self, link: JobLink, message: m.JobResume) -> bool:
        """Serve a client that comes back, and no other link from now on.

        A client that is still there over an older link is told, so that it does not
        take the job back at once.

        Args:
            link: The link over which it came.
            message: Its request, with what it misses.

        Returns:
            False if there is nothing to come back to any more.
        """
        async with self._attaching:
            if self._link is not None and self.core.can_resume:
                self._link.leave("a newer connection has taken over the job")
                self.detach(self._link, "a newer connection has taken over the job")
            await self._settled.wait()
            if not self.core.can_resume:
                return False
            self._link = link
            now = trio.current_time()
            self.core.connection_restored(now)
            self.core.receive_message(message, now)
            self.drain()
            return True

    def detach(self, link: JobLink, reason: str) -> None:
        """A link has ended; it matters only if the client has no newer one."""
        if self._link is link:
            self.core.connection_lost(reason, trio.current_time())
            self.drain()
            self._link = None
            self._updated = time.time()

    def receive_message(self, link: JobLink, message: m.ClientJobMessage) -> None:
        """Take a message of the client; one from an older link changes nothing.

        Raises:
            RemoteProtocolError: If it does not belong here.
        """
        if self._link is link:
            self.core.receive_message(message, trio.current_time())
            self.drain()

    def give_up_if_older(self, moment: float) -> None:
        """Remove the part of a package whose client has been away since a moment."""
        if self.core.state is WorkerState.SUSPENDED and self._updated < moment:
            self._home.log.warning("part of a package removed", job=self.core.job_id)
            self.core.cancel("nobody came back to send the rest of the package")
            self.drain()

    # ------------------------------------------------------------ effects of the core

    def drain(self) -> None:
        """Carry out everything that the core wants."""
        while (output := self.core.next_output()) is not None:
            self._carry_out(output)

    def _carry_out(self, output: worker_outputs.Output) -> None:
        match output:
            case worker_outputs.SendMessage(message=message):
                if self._link is not None:
                    self._link.outbox.put(message)
            case worker_outputs.ReadProbe(path=path):
                self._start(self._read_probe, path)
            case worker_outputs.CheckInput(path=path):
                self._start(self._check_input, path)
            case worker_outputs.MakeOutput(path=path):
                self._start(self._make_output, path)
            case worker_outputs.Admit(job_id=job_id, submission=submission):
                self._directory = None  # a client that fell back had one elsewhere
                self._settled = trio.Event()
                self._home.nursery.start_soon(self._admit, job_id, submission)
            case worker_outputs.ReceivePackage(transfer_id=transfer_id, file=file):
                self._start_receiving(transfer_id, file)
            case worker_outputs.StopReceiving():
                self._receiving.cancel(reason="the link was lost")
            case worker_outputs.SendResult(transfer_id=transfer_id, path=path):
                self._start(self._send_result, transfer_id, path)
            case worker_outputs.Remember():
                self._remember()
            case worker_outputs.Enqueue(job_id=job_id, route=route, package=package):
                self._enqueue(job_id, route, package)
            case worker_outputs.StopRun():
                self._waiting.cancel(reason="the job was cancelled")
                self._stop.cancel(reason="the job was cancelled")
            case worker_outputs.Discard():
                self._forget()
            case _:
                assert_never(output)

    def _start(self, effect: Callable[..., Awaitable[None]], *args: object) -> None:
        """Start an effect that is of no use without the link."""
        if self._link is not None:
            self._link.start(effect, *args)

    # -------------------------------------------------------------- what is remembered

    def _remember(self) -> None:
        job, progress = self.core, self.core.progress
        self._updated = time.time()
        self._home.jobs[job.job_id] = self
        self._home.store.put(
            JobRecord(
                job_id=job.job_id,
                worker_id=self._home.worker_id,
                route=job.route,
                directory=str(self._directory),
                package=job.submission.name,
                size=job.submission.size,
                state=progress.state,
                detail=progress.detail,
                output_path=job.output_path,
                results=job.results,
                updated=self._updated,
            )
        )

    def _forget(self) -> None:
        self._receiving.cancel(reason="the job was given up")
        if self._home.jobs.get(self.core.job_id) is self:
            self._home.store.remove(self.core.job_id)
        self._home.nursery.start_soon(self._remove)

    async def _remove(self) -> None:
        """Remove the package that came through the channel; then its id is free."""
        await self._settled.wait()
        home, job_id = self._home, self.core.job_id
        if self._directory is not None and self.core.route == "channel":
            await remove_quietly(
                lambda: remove_tree_beneath(home.directory, job_id),
                lambda reason: home.log.warning(
                    "job directory not removed", reason=reason
                ),
            )
        if home.jobs.get(job_id) is self:
            del home.jobs[job_id]
        self._gone.set()

    # ------------------------------------------------------------- the shared storage

    async def _read_probe(self, path: str) -> None:
        root = self._home.shared_root
        try:
            content = await ask_shared(root, read_probe, path)
            self.core.probe_read(blake3(content).hexdigest())
        except (InvalidInput, StorageError) as error:
            self.core.probe_failed(str(error))
        self.drain()

    async def _check_input(self, path: str) -> None:
        root = self._home.shared_root
        try:
            await ask_shared(root, look_at_package, path)
            if root is not None and self.core.state is WorkerState.SHARING:
                self._directory = root / PurePosixPath(path).parent
            self.core.input_valid()
        except (InvalidInput, StorageError) as error:
            self.core.path_refused(str(error))
        self.drain()

    async def _make_output(self, path: str) -> None:
        root, directory = self._home.shared_root, self._directory
        try:
            if root is None or directory not in (root / path, (root / path).parent):
                raise InvalidInput(
                    f"{path} is not in the job directory, beside the package"
                )
            if self.core.state is WorkerState.SHARING:
                await ask_shared(root, make_directories_beneath, path)
            self.core.output_made()
        except (InvalidInput, StorageError) as error:
            self.core.path_refused(str(error))
        self.drain()

    # -------------------------------------------------------------- the channel route

    async def _admit(self, job_id: str, submission: m.Submission) -> None:
        """Decide about a package; its client may have gone, and come back."""
        try:
            check_file_name_untrusted(submission.name)
            await self._take_id(job_id)
            directory = self._home.directory / job_id
            await call_storage(
                make_room, directory, submission.size, timeout=STORAGE_TIMEOUT
            )
            self._directory = directory
            self.core.admitted()
        except (InvalidInput, StorageError) as error:
            self.core.rejected(str(error))
        finally:
            self._settled.set()
        self.drain()

    async def _take_id(self, job_id: str) -> None:
        """Be the only job of this id, as soon as nothing is left of an earlier one.

        Raises:
            StorageError: If there is another.
        """
        while (other := self._home.jobs.setdefault(job_id, self)) is not self:
            if other.core.state is not WorkerState.DISCARDED:
                raise StorageError(f"{job_id} is known to the worker")
            await other._gone.wait()

    def _start_receiving(self, transfer_id: int, file: m.OfferedFile) -> None:
        link, directory = self._link, self._directory
        if link is not None and directory is not None:
            self._receiving, self._settled = trio.CancelScope(), trio.Event()
            link.start(self._receive_package, link, directory, transfer_id, file)

    async def _receive_package(
        self, link: JobLink, directory: Path, transfer_id: int, file: m.OfferedFile
    ) -> None:
        """Receive the package, or the rest of it; a part outlives the link."""
        try:
            with self._receiving:
                sink = await call_storage(
                    self._open_part, directory, file, discard=ChunkWriter.keep
                )
                await self._tell_what_is_there(link, sink)
                await link.transfers.receive_file(transfer_id, sink)
                self.core.package_received()
        except (TransferError, StorageError, InvalidInput) as error:
            self.core.package_failed(str(error))
        except LinkClosedError:
            pass  # the link's session tells the core
        finally:
            self._settled.set()
        self.drain()

    async def _tell_what_is_there(self, link: JobLink, sink: ChunkWriter) -> None:
        """Say how much of the package is here, before the first grant."""
        if sink.chunk_map.bytes_there == 0:
            return
        self.core.package_opened(sink.chunk_map.bytes_there)
        self.drain()
        try:
            await link.outbox.flush()
        except trio.Cancelled:
            # Else the next link would find the part in use.
            with suppress(StorageError):
                await call_storage(sink.keep, timeout=LEAVE_TIMEOUT, shield=True)
            raise

    def _open_part(self, directory: Path, file: m.OfferedFile) -> ChunkWriter:
        """Open what is there of the package, in a worker thread."""
        return ChunkWriter.open(
            directory,
            file.name,
            size=file.size,
            chunk_size=file.chunk_size,
            origin=self.core.job_id,
            check=trio.from_thread.check_cancelled,
        )

    async def _send_result(self, transfer_id: int, path: str) -> None:
        link, directory = self._link, self._directory
        if link is None:
            return
        if directory is None or link.transfers.active >= MAX_RESULTS_AT_ONCE:
            reason = f"only {MAX_RESULTS_AT_ONCE} files are sent at once"
            link.outbox.put(m.FileError(transfer_id, reason))
            return
        try:
            source = await call_storage(
                open_result, directory, path, discard=ChunkReader.close
            )
            try:
                offer = m.OfferedFile(PurePosixPath(path).name, source.size, CHUNK_SIZE)
                await link.transfers.send_file(transfer_id, offer, source)
            finally:
                source.close()
        except (StorageError, InvalidInput) as error:
            link.outbox.put(m.FileError(transfer_id, str(error)))
        except TransferError as error:
            self._home.log.warning("result not sent", path=path, reason=error.reason)
        except LinkClosedError:
            return  # the client asks again when it is back

    # ------------------------------------------------------------------------ the run

    def _enqueue(self, job_id: str, route: m.Route, package: str) -> None:
        self._home.log.info("job queued", job=job_id, route=route, package=package)
        self._home.nursery.start_soon(self._run, job_id, package)

    async def _run(self, job_id: str, package: str) -> None:
        """Wait for a slot and run the job; its client may be long gone."""
        home, directory = self._home, self._directory
        if directory is None:
            self._ended(job_id, "the job has no directory", {})
            return
        failure: str | None = "cancelled before it ran"
        results: dict[str, int] = {}
        with self._waiting:
            async with home.queue.slot(self._queue_moved) as gpus:
                # From here on only `_stop` ends the job, and it keeps its results.
                self._waiting = trio.CancelScope()
                home.changed()
                self.core.slot_granted()
                self.drain()
                home.log.info("job runs", job=job_id, gpus=gpus)
                report = await run_job(
                    Run(
                        directory=directory,
                        package=PurePosixPath(package).name,
                        programs=home.programs,
                        gpus=gpus,
                        on_line=self._line_printed,
                        on_stage=self._stage_complete,
                    ),
                    self._stop,
                )
                failure, results = report.failure, report.results
        home.changed()
        self._ended(job_id, failure, results)

    def _queue_moved(self, position: int) -> None:
        self.core.queue_moved(position)
        self.drain()
        self._home.changed()

    def _line_printed(self, event: LineEvent) -> None:
        self.core.output(event.line, event.text)
        self.drain()

    def _stage_complete(self, stage: ScriptKind) -> None:
        self.core.stage_complete(stage)
        self.drain()

    def _ended(self, job_id: str, failure: str | None, results: dict[str, int]) -> None:
        outcome = self.core.cancel_reason or failure or "complete"
        self._home.log.info(
            "job ended", job=job_id, outcome=outcome, directory=str(self._directory)
        )
        self.core.run_ended(failure, results)
        self.drain()
