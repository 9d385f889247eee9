"""Submit a job and follow it: the public Python API.

``python -m sleap_rtc.client PACKAGE ...`` is ``sleap-rtc send PACKAGE ...``.

Example:
    >>> import trio
    >>> from pathlib import Path
    >>> from sleap_rtc import client
    >>> request = client.JobRequest(package=Path("job.zip"))
    >>> result = trio.run(client.submit, request, print)
"""

import os
import secrets
import socket
import sys
import tempfile
import zipfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import structlog
import trio

import sleap_rtc
from sleap_rtc.client_session import (
    ClientSession,
    PackageCopied,
    Plan,
    ResultsStored,
    SessionEvent,
    TransferProgress,
)
from sleap_rtc.config import SharedStorageConfig
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
from sleap_rtc.introductions import Introduction, ask_worker
from sleap_rtc.io.archive import pack_directory
from sleap_rtc.io.archive_plan import ArchiveError
from sleap_rtc.io.dial import dial
from sleap_rtc.io.folder import SharedStorageError
from sleap_rtc.io.link import DialError, Link, LinkClosedError
from sleap_rtc.io.nursery import open_background_nursery
from sleap_rtc.io.signaling import RegistrationRefusedError, Room, open_room
from sleap_rtc.proto.errors import RemoteProtocolError
from sleap_rtc.proto.invite import Invite, RoomKeys
from sleap_rtc.proto.job_client import JobEnded, LinePrinted, RouteChosen, StateChanged
from sleap_rtc.proto.messages import PROTOCOL_VERSION, Greeting
from sleap_rtc.proto.paths import check_file_name_untrusted
from sleap_rtc.proto.rendezvous import Metadata
from sleap_rtc.proto.routes import (
    GiveUp,
    RoutePreference,
    asked_kinds,
    choose_kinds,
)
from sleap_rtc.proto.workers import (
    Candidate,
    Choice,
    NoChoice,
    choose_worker,
    read_card,
)
from sleap_rtc.rooms import require_invite

__all__ = [
    "Event",
    "JobRequest",
    "JobResult",
    "LinePrinted",
    "LinkOpened",
    "PackageCopied",
    "ResultsStored",
    "RouteChosen",
    "StateChanged",
    "TransferProgress",
    "WorkerChosen",
    "list_workers",
    "submit",
]

FIND_TIMEOUT = 15.0
"""Seconds to find a worker: a signaling server that restarts is back by then."""

RETURN_TIMEOUT = 15.0
"""Seconds for workers to come back to a signaling server that has restarted."""

RETURN_INTERVAL = 0.5
"""Seconds between two looks at who has come back."""

ANSWER_TIMEOUT = 10.0
"""Seconds for the worker to answer an offer."""

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
    """

    package: Path
    worker: str | None = None
    route: RoutePreference = "auto"
    output: Path | None = None
    timeout: float | None = None
    shared_storage_root: Path | None = None


class WorkerChosen(msgspec.Struct, frozen=True):
    """Event: which worker the job goes to, and why."""

    worker: Candidate
    reason: str


class LinkOpened(msgspec.Struct, frozen=True):
    """Event: the connection to the worker stands, and why it is this one."""

    kind: str
    address: str
    reason: str


Event = WorkerChosen | LinkOpened | SessionEvent


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
    invite = require_invite(environ)
    keys = RoomKeys.from_secret(invite.secret)
    async with _enter_room(invite, keys, timeout) as room:
        return await _discover(room)


async def submit(
    request: JobRequest,
    on_event: Callable[[Event], None],
    *,
    cancel_asked: trio.Event | None = None,
    environ: Mapping[str, str] = os.environ,
) -> JobResult:
    """Run a package on a worker of this machine's room, and get its results.

    If the task is cancelled, the job goes on without it; set `cancel_asked` to end it.

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
    invite = require_invite(environ)
    root = await trio.to_thread.run_sync(
        SharedStorageConfig.get_shared_storage_root,
        request.shared_storage_root,
        abandon_on_cancel=True,
    )
    wish = trio.Event() if cancel_asked is None else cancel_asked
    submission = _Submission(request, root, on_event, wish)
    async with _as_file(request.package) as package:
        return await submission.run(invite, package)


class _Submission:
    """One call of `submit`: the way to the worker, the job, and its clock."""

    def __init__(
        self,
        request: JobRequest,
        root: Path | None,
        on_event: Callable[[Event], None],
        cancel_asked: trio.Event,
    ) -> None:
        self._request = request
        self._root = root
        self._tell = on_event
        self._cancel_asked = cancel_asked
        self._job_id = f"job_{secrets.token_hex(8)}"
        self._output: Path | None = None
        self._timed_out = False
        self._worker_id = ""
        self._connecting = trio.CancelScope()
        self._connected = False
        self._began = trio.current_time()
        self._seconds: dict[str, float] = {}
        self._phase = "connect"

    async def run(self, invite: Invite, package: Path) -> JobResult:
        """Go all the way; see `submit` for what it raises."""
        ending = JobEnded("cancelled", "no worker had been reached")
        async with open_background_nursery() as nursery:
            nursery.start_soon(self._watch_time)
            nursery.start_soon(self._stop_connecting)
            with self._connecting:
                ending = await self._connect_and_run(invite, package)
        self._enter_phase("done")
        self._raise_unless_complete(ending)
        return JobResult(self._job_id, self._output, self._seconds)

    async def _stop_connecting(self) -> None:
        """Let a wish to cancel end what comes before the job; then the job does it."""
        await self._cancel_asked.wait()
        if not self._connected:
            self._connecting.cancel(reason="the user asked for the end")

    async def _connect_and_run(self, invite: Invite, package: Path) -> JobEnded:
        size = (await trio.to_thread.run_sync(package.stat)).st_size
        introduction = await self._meet(invite)
        ending: JobEnded | None = None
        try:
            async with self._dial(introduction) as (link, reason):
                self._connected = True
                opened = link.statistics()
                self._tell(LinkOpened(opened.kind, opened.address, reason))
                session = ClientSession(link, self._plan(package), size, self._on_event)
                ending = await self._run_session(session)
        except LinkClosedError as error:
            ending = ending or JobEnded("lost", error.reason)
        return ending

    async def _run_session(self, session: ClientSession) -> JobEnded:
        """Run the job; once it is cancelled, do not wait for ever."""
        greeting = Greeting(
            protocol=PROTOCOL_VERSION,
            version=sleap_rtc.__version__,
            role="client",
            hostname=socket.gethostname()[:255],
            shared_storage=self._root is not None,
        )
        ending = JobEnded("cancelled", "the worker did not confirm that it stopped")
        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as patience:
                nursery.start_soon(self._limit_cancelling, patience)
                ending = await session.run(greeting, self._cancel_asked)
            nursery.cancel_scope.cancel(reason="the job has ended")
        return ending

    async def _watch_time(self) -> None:
        if self._request.timeout is not None:
            await trio.sleep_until(self._began + self._request.timeout)
            self._timed_out = True
            self._cancel_asked.set()

    async def _limit_cancelling(self, patience: trio.CancelScope) -> None:
        await self._cancel_asked.wait()
        patience.deadline = trio.current_time() + CANCEL_PATIENCE

    # ---------------------------------------------------------------- to the worker

    async def _meet(self, invite: Invite) -> Introduction:
        """Find a worker in the room, and be introduced to it."""
        keys = RoomKeys.from_secret(invite.secret)
        async with _enter_room(invite, keys, FIND_TIMEOUT) as room:
            choice = await self._choose_worker(room)
            if isinstance(choice, NoChoice):
                raise NoWorkerError(
                    f"Can't send the job: {choice.reason}.",
                    "Start a worker with `sleap-rtc daemon --role worker` on the GPU "
                    "machine; `sleap-rtc workers` lists who is there.",
                )
            self._worker_id = choice.worker.peer_id
            self._tell(WorkerChosen(choice.worker, choice.reason))
            with trio.move_on_after(ANSWER_TIMEOUT):
                kinds = asked_kinds(self._request.route)
                return await ask_worker(room, keys, choice.worker, kinds)
            raise NoWorkerError(
                f"The worker {self._worker_id} did not answer for "
                f"{ANSWER_TIMEOUT:.0f} s.",
                "Its log says whether the offer was refused: both sides need the same "
                "invite, and clocks that differ by less than two minutes.",
            )

    async def _choose_worker(self, room: Room) -> Choice | NoChoice:
        """Choose a worker; behind a server that was away, wait for one to come back."""
        wanted = self._request.worker
        choice = choose_worker(await _discover(room), wanted)
        if room.trouble:
            with trio.move_on_after(RETURN_TIMEOUT):
                while isinstance(choice, NoChoice):
                    await trio.sleep(RETURN_INTERVAL)
                    choice = choose_worker(await _discover(room), wanted)
        return choice

    @asynccontextmanager
    async def _dial(
        self, introduction: Introduction
    ) -> AsyncIterator[tuple[Link, str]]:
        """Open the link, and say why it is this one."""
        answer = introduction.answer
        choice = choose_kinds(self._request.route, answer.kinds)
        if isinstance(choice, GiveUp):
            raise NoWorkerError(
                f"The worker can't be reached: {choice.reason}.",
                "Send the package without --route.",
            )
        addresses = [(address.host, address.port) for address in answer.addresses]
        try:
            async with dial(
                addresses,
                certificate_der=answer.certificate,
                auth=introduction.auth,
                kinds=choice.kinds,
            ) as (link, reason):
                yield link, choice.reason or reason
        except DialError as error:
            raise NoWorkerError(
                f"The worker can't be reached: {error}.",
                "Its port, TCP or UDP, must be open to this machine: see the "
                "troubleshooting guide, or use a shared network or VPN.",
            ) from None

    def _plan(self, package: Path) -> Plan:
        stem = self._request.package.resolve().name.removesuffix(".zip")
        output = self._request.output
        return Plan(
            job_id=self._job_id,
            package=package,
            preference=self._request.route,
            shared_root=self._root,
            output=None if output is None else output.absolute(),
            default_output=Path.cwd() / f"{stem}-results",
        )

    # --------------------------------------------------------------------- the story

    def _on_event(self, event: SessionEvent) -> None:
        match event:
            case RouteChosen():
                self._enter_phase("transfer")
            case StateChanged(progress=progress):
                if progress.state == "QUEUED":
                    self._enter_phase("queue")
                elif progress.state == "RUNNING":
                    self._enter_phase("run")
                elif progress.state != "RECEIVING":
                    self._enter_phase("results")
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

    def _raise_unless_complete(self, ending: JobEnded) -> None:
        where = (
            f" What it made until then is in {self._output}." if self._output else ""
        )
        match ending.outcome:
            case "complete":
                return
            case "failed":
                raise JobFailedError(
                    f"The job failed: {ending.reason}.{where}",
                    "The output above and job.log say more. Correct the package and "
                    "send it again.",
                )
            case "rejected":
                raise RefusedError(
                    f"The worker {self._worker_id} does not take the job: "
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
                raise InterruptedJobError(f"The job was cancelled.{where}")
            case "lost":
                raise ConnectionLostError(
                    f"The connection to {self._worker_id} was lost: {ending.reason}.",
                    "Check that the worker runs (`sleap-rtc workers`) and send the "
                    "package again.",
                )


async def _discover(room: Room) -> list[Candidate]:
    peers = await room.discover(role="worker")
    return [
        Candidate(peer.peer_id, read_card(peer.metadata.properties)) for peer in peers
    ]


@asynccontextmanager
async def _enter_room(
    invite: Invite, keys: RoomKeys, timeout: float
) -> AsyncIterator[Room]:
    """Be in the room for as long as the body runs.

    Raises:
        NoWorkerError: If the signaling server can't be reached in time.
        RefusedError: If it does not let this machine in.
    """
    peer_id = f"client-{secrets.token_hex(6)}"
    async with open_room(
        invite.url,
        keys,
        peer_id=peer_id,
        role="client",
        metadata=Metadata(tags=("sleap-rtc", "training-client")),
        log=structlog.get_logger(),
    ) as room:
        with trio.move_on_after(timeout) as scope:
            try:
                await room.wait_registered()
            except RegistrationRefusedError as error:
                raise RefusedError(
                    f"The signaling server at {invite.url} refused this machine: "
                    f"{error.reason}.",
                    "Join again with a fresh invite: `sleap-rtc invite` on the worker.",
                ) from None
        if scope.cancelled_caught:
            raise NoWorkerError(
                f"The signaling server at {invite.url} can't be reached: "
                f"{room.trouble or 'it does not answer'}.",
                "Check that the worker, or its signaling server, runs and that this "
                "machine can reach it; `sleap-rtc doctor` tests it.",
            )
        yield room


@asynccontextmanager
async def _as_file(package: Path) -> AsyncIterator[Path]:
    """Give a package as a zip file; a directory is packed for the time of the body.

    Raises:
        UsageError: If it is none.
    """
    directory = tempfile.TemporaryDirectory(prefix="sleap-rtc-")
    try:
        yield await trio.to_thread.run_sync(
            _find_package, package, Path(directory.name)
        )
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(directory.cleanup)


def _check_cancelled() -> bool:
    """Let the thread that packs notice that its task is cancelled."""
    trio.from_thread.check_cancelled()
    return False


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
                package, packed, progress=lambda size: None, cancelled=_check_cancelled
            )
            return packed
        if not package.is_file():
            raise UsageError(
                f"There is no package {package}.",
                "Give the zip file that SLEAP exported, or its directory.",
            )
        if not zipfile.is_zipfile(package):
            raise UsageError(f"{package} is not a zip file.", "Export it from SLEAP.")
    except RemoteProtocolError as error:
        raise UsageError(
            f"{package} can't be sent: {error.reason}.", "Rename it."
        ) from None
    except (ArchiveError, SharedStorageError) as error:
        raise UsageError(f"{package} can't be packed: {error}.") from None
    except OSError as error:
        raise UsageError(f"{package} can't be read: {error.strerror}.") from None
    return package


if __name__ == "__main__":
    from sleap_rtc.cli import main

    main(["send", *sys.argv[1:]])
