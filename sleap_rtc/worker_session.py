"""One client's link to the worker, and the job that came over it."""

import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path, PurePosixPath
from typing import NoReturn, TypeVar, assert_never

import msgspec
import structlog
import trio
from blake3 import blake3

from sleap_rtc.io.chunk_files import ChunkReader, ChunkWriter
from sleap_rtc.io.copy import SPACE_PERCENT
from sleap_rtc.io.files import human_size
from sleap_rtc.io.folder import (
    PathValidationError,
    SharedStorageError,
    make_directories_beneath,
    open_beneath,
    remove_tree_beneath,
)
from sleap_rtc.io.link import Link, LinkClosedError
from sleap_rtc.io.nursery import open_background_nursery
from sleap_rtc.io.outbox import Outbox
from sleap_rtc.io.probe import ask_storage, read_probe
from sleap_rtc.io.transfers import TransferError, Transfers
from sleap_rtc.proto import job_worker as core
from sleap_rtc.proto import messages as m
from sleap_rtc.proto.errors import RemoteProtocolError
from sleap_rtc.proto.lines import LineEvent
from sleap_rtc.proto.paths import check_file_name_untrusted
from sleap_rtc.proto.script import ScriptKind
from sleap_rtc.runner import Run, run_job
from sleap_rtc.slots import SlotQueue

T = TypeVar("T")

STORAGE_TIMEOUT = 20.0
"""Seconds for one look at the shared storage; the client waits for 30."""

MAX_RESULTS_AT_ONCE = 16
"""Result files that are sent side by side; each holds a file descriptor."""

CHUNK_SIZE = 1024 * 1024
"""Bytes in a chunk of a result file."""


class JobsHome(msgspec.Struct, frozen=True):
    """What all links of a worker share.

    Args:
        directory: Where jobs live that came through the channel.
        shared_root: Where this machine mounts the shared storage, if anywhere.
        programs: Programs that jobs may run.
        queue: The slots.
        nursery: Where jobs run: they outlive the link that they came over.
        greet: Says what the worker can do at present.
        changed: Is called when a slot was taken or left.
        log: Where the worker logs.
    """

    directory: Path
    shared_root: Path | None
    programs: frozenset[str]
    queue: SlotQueue
    nursery: trio.Nursery
    greet: Callable[[], m.Greeting]
    changed: Callable[[], None]
    log: structlog.typing.FilteringBoundLogger


async def serve_link(home: JobsHome, link: Link) -> None:
    """Serve one client until its link ends.

    Args:
        home: What all links share.
        link: An authenticated link; it is closed at the end.
    """
    log = home.log.bind(address=link.statistics().address)
    log.info("client connected")
    session = _Session(home, link, log)
    reason = "the worker was stopped"
    try:
        reason = await session.serve()
    finally:
        session.job.connection_lost(trio.current_time())
        session.drain()
        with trio.CancelScope(shield=True):
            await link.aclose(reason)
        log.info("client gone", reason=reason)


class _Session:
    """Carries out what the `WorkerJob` of one link decides."""

    def __init__(
        self, home: JobsHome, link: Link, log: structlog.typing.FilteringBoundLogger
    ) -> None:
        self.job = core.WorkerJob()
        self._home = home
        self._link = link
        self._log = log
        self._outbox = Outbox(link)
        self._transfers = Transfers(link)
        self._receiving = trio.CancelScope()
        self._waiting = trio.CancelScope()
        self._stop = trio.CancelScope()
        self._nursery: trio.Nursery | None = None
        self._directory: Path | None = None

    async def serve(self) -> str:
        """Serve the link; returns why it ended."""
        reason = ""
        async with open_background_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._outbox.run)
            nursery.start_soon(self._transfers.run)
            self._outbox.put(m.Hello(self._home.greet()))
            try:
                await self._receive_messages()
            except LinkClosedError as error:
                reason = error.reason
            except RemoteProtocolError as error:
                reason = error.reason
                self._log.warning("client broke the protocol", reason=reason)
                self._outbox.put(m.Error(reason))
                with trio.move_on_after(1):
                    await self._outbox.flush()
            finally:
                self._nursery = None
        return reason

    async def _receive_messages(self) -> NoReturn:
        """Take messages until the link ends."""
        greeted = False
        while True:
            message = await self._link.receive_message()
            if isinstance(message, m.Error):
                raise RemoteProtocolError(f"the client gave up: {message.reason}")
            if isinstance(message, m.Hello) is greeted:
                raise RemoteProtocolError("one HELLO comes first, and only one")
            greeted = True
            if isinstance(message, m.Hello) or self._transfers.deliver_message(message):
                continue
            self.job.receive_message(message, trio.current_time())
            self.drain()

    # ------------------------------------------------------------ effects of the core

    def drain(self) -> None:
        """Carry out everything that the core wants."""
        while (output := self.job.next_output()) is not None:
            self._carry_out(output)

    def _carry_out(self, output: core.Output) -> None:
        match output:
            case core.SendMessage(message=message):
                self._outbox.put(message)
            case core.ReadProbe(path=path):
                self._start(self._read_probe, path)
            case core.CheckInput(path=path):
                self._start(self._check_input, path)
            case core.MakeOutput(path=path):
                self._start(self._make_output, path)
            case core.Admit(job_id=job_id, submission=submission):
                self._start(self._admit, job_id, submission)
            case core.ReceivePackage(transfer_id=transfer_id, file=file):
                self._start(self._receive_package, transfer_id, file)
            case core.SendResult(transfer_id=transfer_id, path=path):
                self._start(self._send_result, transfer_id, path)
            case core.Enqueue(job_id=job_id, route=route, package=package):
                self._enqueue(job_id, route, package)
            case core.StopRun():
                self._waiting.cancel(reason="the job was cancelled")
                self._stop.cancel(reason="the job was cancelled")
            case core.Discard():
                self._receiving.cancel(reason="the job was given up")
                self._home.nursery.start_soon(self._remove_copy)
            case _:
                assert_never(output)

    def _start(self, function: Callable[..., Awaitable[None]], *args: object) -> None:
        """Start an effect that is of no use without the link."""
        if self._nursery is not None:
            self._nursery.start_soon(function, *args)

    # ------------------------------------------------------------- the shared storage

    async def _read_probe(self, path: str) -> None:
        root = self._home.shared_root
        if root is None:
            self.job.probe_failed("Shared storage not configured on the worker")
        else:
            try:
                content = await self._ask_storage(root, read_probe, root, path)
                self.job.probe_read(blake3(content).hexdigest())
            except (RemoteProtocolError, PathValidationError, SharedStorageError) as e:
                self.job.probe_failed(str(e))
        self.drain()

    async def _check_input(self, path: str) -> None:
        root = self._home.shared_root
        if root is None:
            self.job.path_refused("Shared storage not configured on the worker")
        else:
            try:
                await self._ask_storage(root, _look_at_package, root, path)
                if self.job.state is core.State.CHECKING_INPUT:
                    self._directory = root / PurePosixPath(path).parent
                self.job.input_valid()
            except (RemoteProtocolError, PathValidationError, SharedStorageError) as e:
                self.job.path_refused(str(e))
        self.drain()

    async def _make_output(self, path: str) -> None:
        root, directory = self._home.shared_root, self._directory
        try:
            if root is None or directory is None:
                raise SharedStorageError("Shared storage not configured on the worker")
            if directory not in ((root / path), (root / path).parent):
                raise PathValidationError(
                    f"{path} is not in the job directory, beside the package"
                )
            if self.job.state is core.State.MAKING_OUTPUT:
                await self._ask_storage(root, make_directories_beneath, root, path)
            self.job.output_made()
        except (RemoteProtocolError, PathValidationError, SharedStorageError) as error:
            self.job.path_refused(str(error))
        self.drain()

    async def _ask_storage(
        self, root: Path, function: Callable[..., T], *args: object
    ) -> T:
        """Touch the shared storage; the errors say that it is the worker's."""
        try:
            return await ask_storage(root, function, *args, timeout=STORAGE_TIMEOUT)
        except SharedStorageError as error:
            raise SharedStorageError(f"the worker's shared storage: {error}") from None

    # -------------------------------------------------------------- the channel route

    async def _admit(self, job_id: str, submission: m.Submission) -> None:
        try:
            check_file_name_untrusted(submission.name)
            directory = self._home.directory / job_id
            await trio.to_thread.run_sync(_make_room, directory, submission.size)
            self._directory = directory
            if self.job.has_ended:  # it was given up meanwhile
                await self._remove_copy()
            self.job.admitted()
        except (RemoteProtocolError, SharedStorageError) as error:
            self.job.rejected(str(error))
        self.drain()

    async def _receive_package(self, transfer_id: int, file: m.OfferedFile) -> None:
        directory = self._directory
        with self._receiving:
            try:
                if directory is None:
                    raise TransferError("the worker has no room for it")
                sink = await trio.to_thread.run_sync(
                    lambda: ChunkWriter(
                        directory, file.name, size=file.size, chunk_size=file.chunk_size
                    )
                )
                await self._transfers.receive_file(transfer_id, file, sink)
                self.job.package_received()
            except (TransferError, SharedStorageError, PathValidationError) as error:
                self.job.package_failed(str(error))
            except LinkClosedError:
                return  # the session ends, too
        self.drain()

    async def _send_result(self, transfer_id: int, path: str) -> None:
        directory = self._directory
        if directory is None or self._transfers.active >= MAX_RESULTS_AT_ONCE:
            reason = f"only {MAX_RESULTS_AT_ONCE} files are sent at once"
            self._outbox.put(m.FileError(transfer_id, reason))
            return
        try:
            source = await trio.to_thread.run_sync(_open_result, directory, path)
            try:
                offer = m.OfferedFile(PurePosixPath(path).name, source.size, CHUNK_SIZE)
                await self._transfers.send_file(transfer_id, offer, source)
            finally:
                source.close()
        except (SharedStorageError, PathValidationError) as error:
            self._outbox.put(m.FileError(transfer_id, str(error)))
        except TransferError as error:
            self._log.warning("result not sent", path=path, reason=error.reason)
        except LinkClosedError:
            return  # the session ends, too

    # ------------------------------------------------------------------------ the run

    def _enqueue(self, job_id: str, route: m.Route, package: str) -> None:
        self._log.info("job queued", job=job_id, route=route, package=package)
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
                self.job.slot_granted()
                self.drain()
                self._log.info("job runs", job=job_id, gpus=gpus)
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
        self.job.queue_moved(position)
        self.drain()
        self._home.changed()

    def _line_printed(self, event: LineEvent) -> None:
        self.job.output(event.line, event.text)
        self.drain()

    def _stage_complete(self, stage: ScriptKind) -> None:
        self.job.stage_complete(stage)
        self.drain()

    def _ended(self, job_id: str, failure: str | None, results: dict[str, int]) -> None:
        outcome = self.job.cancel_reason or failure or "complete"
        self._log.info(
            "job ended", job=job_id, outcome=outcome, directory=str(self._directory)
        )
        self.job.run_ended(failure, results)
        self.drain()

    async def _remove_copy(self) -> None:
        """Remove the job directory, if the package came through the channel."""
        directory, self._directory = self._directory, None
        if directory is None or self.job.route != "channel":
            return
        home = self._home.directory
        if not directory.is_relative_to(home):
            return  # the package was on its way over shared storage before
        try:
            await trio.to_thread.run_sync(remove_tree_beneath, home, directory.name)
        except (SharedStorageError, PathValidationError) as error:
            self._log.warning("job directory not removed", reason=str(error))


def _look_at_package(root: Path, path: str) -> None:
    """See that a package is there and can be read.

    Raises:
        PathValidationError: If it is none, or lies at the top of the shared storage.
        SharedStorageError: If the storage failed.
    """
    source = ChunkReader(open_beneath(root, path), chunk_size=CHUNK_SIZE)
    source.close()
    if len(PurePosixPath(path).parts) < 2:
        raise PathValidationError(f"{path} must lie in a directory of its own")


def _make_room(directory: Path, size: int) -> None:
    """Make the directory of a job for a package of so many bytes.

    Raises:
        SharedStorageError: If there is no room, or the job is there already.
    """
    try:
        directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        free = shutil.disk_usage(directory.parent).free
        needed = size * SPACE_PERCENT // 100
        if free < needed:
            raise SharedStorageError(
                f"Insufficient disk space on the worker: need {human_size(needed)}, "
                f"have {human_size(free)}"
            )
        directory.mkdir(mode=0o700)
    except FileExistsError:
        raise SharedStorageError(f"{directory.name} is known to the worker") from None
    except OSError as error:
        raise SharedStorageError(
            f"The worker can't make {directory}: {error.strerror}"
        ) from None


def _open_result(directory: Path, path: str) -> ChunkReader:
    return ChunkReader(open_beneath(directory, path), chunk_size=CHUNK_SIZE)
