"""Submit a job and follow it to its end."""

import os
import secrets
import socket
import tempfile
import zipfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import trio

import sleap_rtc
from sleap_rtc.client.reach import (
    FIND_TIMEOUT,
    LinkOpened,
    Reach,
    WorkerChosen,
    discover,
    enter_room,
)
from sleap_rtc.client.session import (
    ClientSession,
    Plan,
    ResultsChosen,
    ResultsStored,
    SessionEvent,
)
from sleap_rtc.client.submissions import Note, NoteBook, open_note
from sleap_rtc.config import SharedStorageConfig, make_state_directory
from sleap_rtc.errors import (
    ConnectionLostError,
    InterruptedJobError,
    JobFailedError,
    JobTimeoutError,
    NoWorkerError,
    RefusedError,
    TransferFailedError,
    UsageError,
)
from sleap_rtc.io.link.link import Link, LinkClosedError
from sleap_rtc.io.nursery import open_background_nursery
from sleap_rtc.io.storage.archive import pack_directory
from sleap_rtc.io.storage.archive_plan import ArchiveError
from sleap_rtc.io.storage.folder import StorageError
from sleap_rtc.proto.errors import InvalidInput
from sleap_rtc.proto.job.client import JobEnded, RouteChosen, StateChanged
from sleap_rtc.proto.messages import PROTOCOL_VERSION, Greeting
from sleap_rtc.proto.paths import check_file_name_untrusted
from sleap_rtc.proto.rendezvous.invite import Invite, RoomKeys
from sleap_rtc.proto.rendezvous.workers import Candidate
from sleap_rtc.proto.route.reconnection import PATIENCE
from sleap_rtc.proto.route.routes import RoutePreference
from sleap_rtc.rendezvous.rooms import require_invite

CANCEL_PATIENCE = 25.0
"""Seconds that a cancelled job may take to end: the worker's own limit, and a bit."""


class JobRequest(msgspec.Struct, frozen=True):
    """What to run, and how.

    Args:
        package: A package as SLEAP exports it: a zip file, or a directory.
        worker: Id, name or host name of the worker; None chooses one.
        route: How the package travels, and over which kind of link.
        output: Where results go; None means beside the caller, or, on the shared
            route, where they are.
        timeout: Seconds after which the job is cancelled.
        shared_storage_root: Where this machine mounts the shared storage; None takes
            it from the settings.
        patience: Seconds for which a lost link is tried to be opened again. A worker
            whose process has evidently ended is given up after some seconds.
        fresh: Begin a new job, also if an earlier process has begun one with this
            package.
    """

    package: Path
    worker: str | None = None
    route: RoutePreference = "auto"
    output: Path | None = None
    timeout: float | None = None
    shared_storage_root: Path | None = None
    patience: float = PATIENCE
    fresh: bool = False


class NoteTrouble(msgspec.Struct, frozen=True):
    """Event: nothing was noted of the job, so that a crash would make it start over."""

    reason: str


class PackageChanged(msgspec.Struct, frozen=True):
    """Event: the package is another one than when this job was begun with it."""

    job_id: str


Event = WorkerChosen | LinkOpened | NoteTrouble | PackageChanged | SessionEvent


class JobResult(msgspec.Struct, frozen=True):
    """A job that completed.

    Args:
        job_id: Its id.
        output: The directory with the results; None if it made none.
        seconds: How long each part took, by name.
    """

    job_id: str
    output: Path | None
    seconds: dict[str, float]


async def list_workers(
    *, timeout: float = FIND_TIMEOUT, environ: Mapping[str, str] = os.environ
) -> list[Candidate]:
    """List the workers of this machine's room.

    Args:
        timeout: Seconds to wait for the signaling server.
        environ: Environment variables.

    Raises:
        UsageError: If this machine is in no room.
        NoWorkerError: If the signaling server can't be reached.
        RefusedError: If it does not let this machine in.
    """
    invite = await trio.to_thread.run_sync(require_invite, environ)
    keys = RoomKeys.from_secret(invite.secret)
    async with enter_room(invite, keys, timeout) as room:
        return await discover(room)


async def submit(
    request: JobRequest,
    on_event: Callable[[Event], None],
    *,
    cancel_asked: trio.Event | None = None,
    environ: Mapping[str, str] = os.environ,
) -> JobResult:
    """Run a package on a worker of this machine's room, and get its results.

    If the task is cancelled, a job whose package the worker has goes on without it, and
    an upload is given up; set `cancel_asked` to end the job as well.

    Args:
        request: What to run.
        on_event: Is told what happens; it must not block.
        cancel_asked: Set it to cancel the job; `submit` returns once it has ended.
        environ: Environment variables.

    Raises:
        UsageError: If the package or the configuration can't be used.
        NoWorkerError: If no worker was found or reached.
        RefusedError: If the server or the worker refused.
        TransferFailedError: If the package or the results did not arrive.
        JobFailedError: If the job failed; its results so far have been fetched.
        ConnectionLostError: If the worker went away.
        JobTimeoutError: If the request's timeout ran out.
        InterruptedJobError: If it was cancelled.
    """
    invite = await trio.to_thread.run_sync(require_invite, environ)
    root = await trio.to_thread.run_sync(
        SharedStorageConfig.get_shared_storage_root,
        request.shared_storage_root,
        abandon_on_cancel=True,
    )
    wish = trio.Event() if cancel_asked is None else cancel_asked
    async with (
        _as_file(request.package) as package,
        _noted(request.package, package, environ) as book,
    ):
        submission = _Submission(request, package, root, book, on_event, wish)
        return await submission.run(invite)


class _Submission:
    """One call of `submit`: the way to the worker, the job, and its clock."""

    def __init__(
        self,
        request: JobRequest,
        package: Path,
        root: Path | None,
        book: NoteBook,
        on_event: Callable[[Event], None],
        cancel_asked: trio.Event,
    ) -> None:
        self._request = request
        self._package = package
        self._root = root
        self._tell = on_event
        self._cancel_asked = cancel_asked
        self._notes = _Notes(book)
        self._earlier = None if request.fresh else book.earlier
        self._job_id = f"job_{secrets.token_hex(8)}"
        if book.changed is not None:
            self._tell(PackageChanged(book.changed.job_id))
        self._output: Path | None = None
        self._timed_out = False
        self._connecting = trio.CancelScope()
        self._connected = False
        self._began = trio.current_time()
        self._seconds: dict[str, float] = {}
        self._phase = "connect"

    async def run(self, invite: Invite) -> JobResult:
        """Go all the way; see `submit` for what it raises."""
        wanted, because = self._request.worker, ""
        if wanted is None and self._earlier is not None:
            wanted, because = self._earlier.worker_id, "it has the job"
        reach = Reach(
            invite,
            self._request.route,
            wanted,
            self._tell,
            because,
        )
        ending = JobEnded("cancelled", "no worker had been reached")
        async with open_background_nursery() as nursery:
            nursery.start_soon(self._watch_time)
            nursery.start_soon(self._stop_connecting)
            nursery.start_soon(self._notes.keep)
            with self._connecting:
                ending = await self._connect_and_run(reach)
        self._enter_phase("done")
        # What was lost, or did not fit here, goes on when `send` is typed again.
        if not ending.can_be_resumed:
            await self._notes.remove()
        self._raise_unless_complete(ending, reach.worker_id)
        return JobResult(self._job_id, self._output, self._seconds)

    async def _stop_connecting(self) -> None:
        """Let a wish to cancel end what comes before the job; then the job does it."""
        await self._cancel_asked.wait()
        if not self._connected:
            self._connecting.cancel(reason="the user asked for the end")

    async def _connect_and_run(self, reach: Reach) -> JobEnded:
        ending: JobEnded | None = None
        try:
            async with reach.open_first() as link:
                self._connected = True
                self._take_up(reach.worker_id)
                note, plan = await trio.to_thread.run_sync(
                    self._look_at_package, reach.worker_id
                )
                # On the disk before the job is: a crash must not begin it twice.
                trouble = await self._notes.begin(self._earlier or note)
                if trouble:
                    self._tell(NoteTrouble(trouble))
                session = ClientSession(
                    plan, note.size, self._greeting(), self._on_event
                )
                ending = await self._run_session(session, link, reach)
        except NoWorkerError as error:
            if self._earlier is None:
                raise
            raise NoWorkerError(
                f"{self._job_id} was begun with this package on "
                f"{self._earlier.worker_id}. {error.message}",
                "Try again when that worker is back, or begin a new job with --fresh.",
            ) from None
        except LinkClosedError as error:
            ending = ending or JobEnded("lost", error.reason)
        return ending

    def _take_up(self, worker_id: str) -> None:
        """Go on with the job of an earlier process, if it was for this worker."""
        if self._earlier is not None:
            if self._earlier.worker_id == worker_id:
                self._job_id = self._earlier.job_id
            else:
                self._earlier = None  # the user has named another worker

    async def _run_session(
        self, session: ClientSession, link: Link, reach: Reach
    ) -> JobEnded:
        """Run the job; once it is cancelled, do not wait for ever."""
        ending = JobEnded("cancelled", "the worker did not confirm it", confirmed=False)
        async with open_background_nursery() as nursery:
            with trio.CancelScope() as patience:
                nursery.start_soon(self._limit_cancelling, patience)
                ending = await session.run(link, reach.open_again, self._cancel_asked)
        return ending

    def _greeting(self) -> Greeting:
        return Greeting(
            protocol=PROTOCOL_VERSION,
            version=sleap_rtc.__version__,
            role="client",
            hostname=socket.gethostname()[:255],
            shared_storage=self._root is not None,
        )

    async def _watch_time(self) -> None:
        if self._request.timeout is not None:
            await trio.sleep_until(self._began + self._request.timeout)
            self._timed_out = True
            self._cancel_asked.set()

    async def _limit_cancelling(self, patience: trio.CancelScope) -> None:
        await self._cancel_asked.wait()
        patience.deadline = trio.current_time() + CANCEL_PATIENCE

    def _look_at_package(self, worker_id: str) -> tuple[Note, Plan]:
        """Say what is sent, and how; it blocks.

        Raises:
            UsageError: If the package is gone.
        """
        try:
            status = self._package.stat()
        except OSError as error:
            raise UsageError(
                f"{self._package} can't be read: {error.strerror}."
            ) from None
        named = self._request.package
        note = Note(
            self._job_id,
            worker_id,
            str(named.absolute()),
            status.st_size,
            _modified(named, status),
        )
        return note, self._plan()

    def _plan(self) -> Plan:
        stem = self._request.package.resolve().name.removesuffix(".zip")
        output, earlier = self._request.output, self._earlier
        chosen = None if earlier is None or not earlier.output else Path(earlier.output)
        if output is not None and chosen is not None:
            asked = output.absolute()
            if chosen not in (asked, asked / self._job_id):
                chosen = None  # this time the user wants them elsewhere
        return Plan(
            job_id=self._job_id,
            package=self._package,
            preference=self._request.route,
            shared_root=self._root,
            output=None if output is None else output.absolute(),
            default_output=Path.cwd() / f"{stem}-results",
            patience=self._request.patience,
            resumes=earlier is not None,
            route=None if earlier is None else earlier.route_tried or None,
            chosen_output=chosen,
        )

    # --------------------------------------------------------------------- the story

    def _on_event(self, event: SessionEvent) -> None:
        match event:
            case RouteChosen(route=route):
                self._notes.change(route_tried=route)
                self._enter_phase("transfer")
            case StateChanged(progress=progress):
                if progress.state == "QUEUED":
                    self._enter_phase("queue")
                elif progress.state == "RUNNING":
                    self._enter_phase("run")
                elif progress.state != "RECEIVING":
                    self._enter_phase("results")
            case ResultsChosen(directory=directory):
                self._notes.change(output=str(directory))
            case ResultsStored(directory=directory):
                self._output = directory
            case _:
                pass
        self._tell(event)

    def _enter_phase(self, phase: str) -> None:
        """Note how long the phase before took."""
        now = trio.current_time()
        spent = now - self._began - sum(self._seconds.values())
        self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + spent
        self._phase = phase

    def _raise_unless_complete(self, ending: JobEnded, worker_id: str) -> None:
        where = (
            f" What it made until then is in {self._output}." if self._output else ""
        )
        match ending.outcome:
            case "complete":
                return
            case "failed":
                raise JobFailedError(
                    f"The job failed: {ending.reason}.{where}",
                    "The output above and job.log say more. If the package is at "
                    "fault, correct it; then send it again.",
                )
            case "rejected":
                raise RefusedError(
                    f"The worker {worker_id} does not take the job: "
                    f"{ending.reason}."
                )
            case "transfer_failed":
                raise TransferFailedError(f"The transfer failed: {ending.reason}.")
            case "cancelled":
                if self._timed_out:
                    raise JobTimeoutError(
                        f"The job was cancelled after {self._request.timeout:g} s, as "
                        f"--timeout said.{where}"
                    )
                if ending.confirmed:
                    raise InterruptedJobError(f"The job was cancelled.{where}")
                raise InterruptedJobError(
                    f"The job was cancelled, but {ending.reason}.{where}",
                    "Send the package again to see whether it goes on.",
                )
            case "lost":
                raise ConnectionLostError(
                    f"The connection to {worker_id} was lost: {ending.reason}.",
                    "Check that the worker runs (`sleap-rtc workers`) and send the "
                    "package again: it goes on where it was, if the worker has it.",
                )


class _Notes:
    """Keeps the note about a job true, without making the job wait for the disk."""

    def __init__(self, book: NoteBook) -> None:
        self._book = book
        self._note: Note | None = None
        self._changed = trio.Event()

    async def begin(self, note: Note) -> str:
        """Note which job it is, and where; returns what was wrong, if anything."""
        self._note = note
        await trio.to_thread.run_sync(self._book.write, note)
        return self._book.trouble

    def change(self, **changes: object) -> None:
        """Note what has become true."""
        if self._note is not None:
            note = msgspec.structs.replace(self._note, **changes)
            if note != self._note:
                self._note = note
                self._changed.set()

    async def keep(self) -> None:
        """Write what has changed, until cancelled."""
        while True:
            await self._changed.wait()
            self._changed = trio.Event()
            if self._note is not None:
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(self._book.write, self._note)

    async def remove(self) -> None:
        """Forget the job: there is nothing to go on with."""
        await trio.to_thread.run_sync(self._book.remove)


def _modified(named: Path, package: os.stat_result) -> int:
    """Say when a package changed; a directory is packed anew into the same bytes."""
    return package.st_mtime_ns if named.is_file() else 0


@asynccontextmanager
async def _noted(
    named: Path, package: Path, environ: Mapping[str, str]
) -> AsyncIterator[NoteBook]:
    """Open what earlier processes have noted about a package."""

    def enter() -> NoteBook:
        status = package.stat()
        return open_note(
            make_state_directory(environ),
            named.absolute(),
            status.st_size,
            _modified(named, status),
        )

    book = await trio.to_thread.run_sync(enter)
    try:
        yield book
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(book.close)


@asynccontextmanager
async def _as_file(package: Path) -> AsyncIterator[Path]:
    """Give a package as a zip file; a directory is packed for the time of the body.

    Raises:
        UsageError: If it is none.
    """
    directory = await trio.to_thread.run_sync(_make_temporary_directory)
    try:
        yield await trio.to_thread.run_sync(
            _find_package, package, Path(directory.name)
        )
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(directory.cleanup)


def _make_temporary_directory() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="sleap-rtc-")


def _find_package(package: Path, directory: Path) -> Path:
    """Look at what the user gave, and pack it if it is a directory.

    Raises:
        UsageError: If it is no package.
    """
    package = package.absolute()
    try:
        check_file_name_untrusted(package.name)
        if package.is_dir():
            packed = directory / f"{package.name}.zip"
            pack_directory(
                package,
                packed,
                progress=lambda size: None,
                check=trio.from_thread.check_cancelled,
            )
            return packed
        if not package.is_file():
            raise UsageError(
                f"There is no package {package}.",
                "Give the zip file that SLEAP exported, or its directory.",
            )
        if not zipfile.is_zipfile(package):
            raise UsageError(f"{package} is not a zip file.", "Export it from SLEAP.")
    except InvalidInput as error:
        raise UsageError(
            f"{package} can't be sent: {error.reason}.", "Rename it."
        ) from None
    except (ArchiveError, StorageError) as error:
        raise UsageError(f"{package} can't be packed: {error}.") from None
    except OSError as error:
        raise UsageError(f"{package} can't be read: {error.strerror}.") from None
    return package
