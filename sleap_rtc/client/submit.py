"""Submit a job and follow it to its end."""

import os
import secrets
import socket
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import assert_never

import trio

import sleap_rtc
from sleap_rtc.client.events import (
    Event,
    NoteTrouble,
    PackageChanged,
    ResultsChosen,
    ResultsStored,
    WorkerChosen,
)
from sleap_rtc.client.package import PackageFile, look_again, open_package
from sleap_rtc.client.reach import Reach, discover, enter_room
from sleap_rtc.client.request import JobRequest, JobResult
from sleap_rtc.client.session import OpenLink, Plan, run_session
from sleap_rtc.client.submissions import NoteFile, SubmissionNote, open_note
from sleap_rtc.config import find_shared_root, make_state_directory
from sleap_rtc.errors import (
    ConnectionLostError,
    InterruptedJobError,
    JobFailedError,
    JobTimeoutError,
    NoWorkerError,
    RefusedError,
    TransferFailedError,
)
from sleap_rtc.io.link.link import Link, LinkClosedError
from sleap_rtc.io.nursery import open_background_nursery
from sleap_rtc.io.storage.call import call_storage
from sleap_rtc.proto.job.client_outputs import JobEnded, RouteChosen
from sleap_rtc.proto.job.reports import StateChanged
from sleap_rtc.proto.messages import (
    PROTOCOL_VERSION,
    Greeting,
    JobStateName,
    WorkerMessage,
)
from sleap_rtc.proto.rendezvous.invite import Invite, RoomKeys
from sleap_rtc.proto.rendezvous.workers import FIND_TIMEOUT, Candidate
from sleap_rtc.rendezvous.rooms import require_invite

CANCEL_PATIENCE = 25.0
"""Seconds for a cancelled job to end: the worker's own limit, and a few more."""


async def list_workers(
    *, timeout: float = FIND_TIMEOUT, environ: Mapping[str, str] = os.environ
) -> list[Candidate]:
    """List the workers of this machine's room.

    Args:
        timeout: Seconds to wait for the signaling server.
        environ: Environment variables.

    Raises:
        UsageError: If this machine has not joined a room.
        NoWorkerError: If the signaling server cannot be reached.
        RefusedError: If the server refuses this machine.
    """
    invite = await call_storage(require_invite, environ)
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
    """Run a package on a worker of this machine's room, and fetch its results.

    If the task is cancelled, an upload stops, but the worker continues a job whose
    package has arrived. Set `cancel_asked` to end the job as well.

    Args:
        request: The package, and how to run it.
        on_event: Called with each event; it must not block.
        cancel_asked: Set it to cancel the job; `submit` returns once it has ended.
        environ: Environment variables.

    Raises:
        UsageError: If the package or the configuration cannot be used.
        NoWorkerError: If no worker was found or reached.
        RefusedError: If the server or the worker refused.
        TransferFailedError: If the package or the results did not arrive.
        JobFailedError: If the job failed; its partial results have been fetched.
        ConnectionLostError: If the worker went away.
        JobTimeoutError: If the request's timeout ran out.
        InterruptedJobError: If the job was cancelled.
    """
    if cancel_asked is None:
        cancel_asked = trio.Event()
    invite = await call_storage(require_invite, environ)
    root = await call_storage(find_shared_root, request.shared_storage_root, environ)
    async with open_package(request.package) as package:
        state = await call_storage(make_state_directory, environ)
        async with open_note(
            state, package.named, package.size, package.modified_ns
        ) as note:
            submission = _Submission(request, package, root, note, on_event)
            return await submission.run(invite, cancel_asked)


class _Submission:
    """One call of `submit`: the link to the worker, the job, and the time it takes."""

    def __init__(
        self,
        request: JobRequest,
        package: PackageFile,
        root: Path | None,
        note: NoteFile,
        on_event: Callable[[Event], None],
    ) -> None:
        self._request = request
        self._package = package
        self._root = root
        self._note = note
        self._report = on_event
        self._earlier = None if request.fresh else note.earlier
        self._job_id = f"job_{secrets.token_hex(8)}"
        self._worker_id = ""
        self._output: Path | None = None
        self._timed_out = False
        self._is_noted = False
        self._connecting = trio.CancelScope()
        self._phases = _Phases("connect", trio.current_time())

    async def run(self, invite: Invite, cancel_asked: trio.Event) -> JobResult:
        """Run the job to its end; see `submit` for the errors."""
        if self._note.changed is not None:
            self._report(PackageChanged(self._note.changed.job_id))
        reach = Reach(invite, self._request.route, self._on_event)
        ending = JobEnded(
            "cancelled", "no worker had been reached", confirmed=self._earlier is None
        )
        async with open_background_nursery() as nursery:
            nursery.start_soon(self._watch_time, cancel_asked)
            nursery.start_soon(self._stop_connecting, cancel_asked)
            with self._connecting:
                ending = await self._connect_and_run(reach, cancel_asked)
        self._phases.enter("done", trio.current_time())
        if self._is_noted and not ending.can_be_resumed:
            await self._note.remove()
        self._raise_unless_complete(ending)
        return JobResult(self._job_id, self._output, self._phases.seconds)

    async def _watch_time(self, cancel_asked: trio.Event) -> None:
        if self._request.timeout is not None:
            await trio.sleep(self._request.timeout)
            self._timed_out = True
            cancel_asked.set()

    async def _stop_connecting(self, cancel_asked: trio.Event) -> None:
        """Abort connecting if the user cancels. A started job cancels itself."""
        await cancel_asked.wait()
        self._connecting.cancel(reason="the user cancelled the job")

    async def _connect_and_run(
        self, reach: Reach, cancel_asked: trio.Event
    ) -> JobEnded:
        wanted, because = self._request.worker, ""
        if wanted is None and self._earlier is not None:
            wanted, because = self._earlier.worker_id, "it has the job"
        ending: JobEnded | None = None
        try:
            async with reach.open_first(wanted, because) as (worker_id, link):
                self._connecting = trio.CancelScope()  # the job cancels itself now
                plan = await self._prepare(worker_id)
                ending = await self._run_job(
                    plan, link, partial(reach.open_again, worker_id), cancel_asked
                )
        except NoWorkerError as error:
            if self._earlier is None:
                raise
            raise NoWorkerError(
                f"This package was submitted to {self._earlier.worker_id} as "
                f"{self._earlier.job_id}. {error.message}",
                "Try again when that worker is back, or start a new job with --fresh.",
            ) from None
        except LinkClosedError as error:
            ending = ending or JobEnded("lost", error.reason)
        return ending

    async def _prepare(self, worker_id: str) -> Plan:
        """Choose between the earlier job and a new one, and note it.

        Raises:
            UsageError: If the package is gone.
        """
        if self._earlier is not None:
            if self._earlier.worker_id == worker_id:
                self._job_id = self._earlier.job_id
            else:
                self._earlier = None  # the user has named another worker
        package = await call_storage(look_again, self._package)
        note = self._earlier or SubmissionNote(
            self._job_id,
            worker_id,
            str(package.named),
            package.size,
            package.modified_ns,
        )
        # On the disk before the job starts: a crash must not start it twice.
        await self._note.write(note)
        self._is_noted = True
        if self._note.trouble:
            self._report(NoteTrouble(self._note.trouble))
        return await call_storage(
            _make_plan, self._job_id, self._request, package, self._root, self._earlier
        )

    async def _run_job(
        self,
        plan: Plan,
        link: Link[WorkerMessage],
        open_again: OpenLink,
        cancel_asked: trio.Event,
    ) -> JobEnded:
        """Run the job; once it is cancelled, wait for its end for a limited time."""
        ending = JobEnded("cancelled", "the worker did not confirm it", confirmed=False)
        greeting = Greeting(
            protocol=PROTOCOL_VERSION,
            version=sleap_rtc.__version__,
            role="client",
            hostname=socket.gethostname()[:255],
            shared_storage=self._root is not None,
        )

        async def limit_cancelling(scope: trio.CancelScope) -> None:
            await cancel_asked.wait()
            scope.deadline = trio.current_time() + CANCEL_PATIENCE

        async with open_background_nursery() as nursery:
            with trio.CancelScope() as scope:
                nursery.start_soon(limit_cancelling, scope)
                ending = await run_session(
                    plan,
                    link,
                    open_again,
                    greeting=greeting,
                    on_event=self._on_event,
                    cancel_asked=cancel_asked,
                )
        return ending

    def _on_event(self, event: Event) -> None:
        """Record everything that the note and the result need, and pass it on."""
        match event:
            case WorkerChosen(worker=worker):
                self._worker_id = worker.peer_id
            case RouteChosen(route=route):
                self._note.set_route(route)
                self._phases.enter("transfer", trio.current_time())
            case StateChanged(progress=progress):
                if progress.state != "RECEIVING":
                    phase = _PHASES.get(progress.state, "results")
                    self._phases.enter(phase, trio.current_time())
            case ResultsChosen(directory=directory):
                self._note.set_output(directory)
            case ResultsStored(directory=directory):
                self._output = directory
            case _:
                pass
        self._report(event)

    def _raise_unless_complete(self, ending: JobEnded) -> None:
        worker_id = self._worker_id
        where = f" Partial results are in {self._output}." if self._output else ""
        match ending.outcome:
            case "complete":
                return
            case "failed":
                raise JobFailedError(
                    f"The job failed: {ending.reason}.{where}",
                    "The output above and job.log show the cause. If the package is at "
                    "fault, correct it and send it again.",
                )
            case "rejected":
                raise RefusedError(
                    f"The worker {worker_id} rejected the job: {ending.reason}."
                )
            case "transfer_failed":
                raise TransferFailedError(f"The transfer failed: {ending.reason}.")
            case "cancelled":
                if self._timed_out:
                    raise JobTimeoutError(
                        f"The job was cancelled after {self._request.timeout:g} s "
                        f"(--timeout).{where}"
                    )
                if ending.confirmed:
                    raise InterruptedJobError(f"The job was cancelled.{where}")
                raise InterruptedJobError(
                    f"The job was cancelled, but {ending.reason}.{where}",
                    "Send the package again to see whether the job is still running.",
                )
            case "lost":
                raise ConnectionLostError(
                    f"The connection to {worker_id} was lost: {ending.reason}.",
                    "Check that the worker runs (`sleap-rtc workers`) and send the "
                    "package again: if the worker still has the job, it continues.",
                )
            case _:
                assert_never(ending.outcome)


_PHASES: dict[JobStateName, str] = {"QUEUED": "queue", "RUNNING": "run"}
"""Phases of `JobResult.seconds` that begin with a state of the job."""


class _Phases:
    """Measures how long each phase of a submission takes."""

    def __init__(self, first: str, now: float) -> None:
        self.seconds: dict[str, float] = {}
        self._phase = first
        self._since = now

    def enter(self, phase: str, now: float) -> None:
        """End the current phase, and start or continue another one."""
        spent = self.seconds.get(self._phase, 0.0) + now - self._since
        self.seconds[self._phase] = spent
        self._phase, self._since = phase, now


def _make_plan(
    job_id: str,
    request: JobRequest,
    package: PackageFile,
    root: Path | None,
    earlier: SubmissionNote | None,
) -> Plan:
    """Combine the request with the note of an earlier process (blocking)."""
    stem = package.named.resolve().name.removesuffix(".zip")
    output = None if request.output is None else request.output.absolute()
    chosen = None if earlier is None or not earlier.output else Path(earlier.output)
    if output is not None and chosen not in (output, output / job_id):
        chosen = None  # this time the user asks for another directory
    return Plan(
        job_id=job_id,
        package=package.zip_path,
        size=package.size,
        preference=request.route,
        shared_root=root,
        output=output,
        default_output=Path.cwd() / f"{stem}-results",
        patience=request.patience,
        resumes=earlier is not None,
        route=None if earlier is None else earlier.route_tried or None,
        chosen_output=chosen,
    )
