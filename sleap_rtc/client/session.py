"""One job from the client's side, over as many links as it takes."""

import random
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, ExitStack, closing
from pathlib import Path
from typing import assert_never

import msgspec
import trio

from sleap_rtc.client.effects import Effects
from sleap_rtc.client.events import (
    JobResumed,
    LinkLost,
    PackageCopied,
    ResultsChosen,
    ResultsStored,
    SessionEvent,
    TransferProgress,
)
from sleap_rtc.client.greeting import exchange_greetings
from sleap_rtc.client.job_folder import JobFolder
from sleap_rtc.client.reach import WorkerGoneError
from sleap_rtc.client.results import Results
from sleap_rtc.errors import NoWorkerError
from sleap_rtc.io.alarm import Alarm
from sleap_rtc.io.link.link import Link, LinkClosedError
from sleap_rtc.io.nursery import open_background_nursery
from sleap_rtc.io.storage.call import call_storage
from sleap_rtc.io.storage.folder import StorageError, open_owned
from sleap_rtc.io.transfer.chunk_files import CHUNK_SIZE, ChunkReader
from sleap_rtc.io.transfer.connection import Connection, open_connection
from sleap_rtc.io.transfer.transfers import TransferError
from sleap_rtc.proto import messages
from sleap_rtc.proto.errors import InvalidInput, RemoteProtocolError
from sleap_rtc.proto.job import client_outputs
from sleap_rtc.proto.job.client import PACKAGE_TRANSFER_ID, ClientJob
from sleap_rtc.proto.job.client_table import ClientState
from sleap_rtc.proto.job.reports import StateChanged
from sleap_rtc.proto.job.route_plan import RoutePlan
from sleap_rtc.proto.route.reconnection import GiveUp, Reconnection, TryAgain
from sleap_rtc.proto.route.routes import RoutePreference
from sleap_rtc.proto.transfer.machine import TransferMessage

FLUSH_TIMEOUT = 10.0
"""Seconds for sending the last messages once the job is over."""

PROGRESS_INTERVAL = 0.1
"""Seconds between two progress events: there are hundreds of chunks in a second."""


class Plan(msgspec.Struct, frozen=True):
    """Everything that is decided about a job before its first link.

    Args:
        job_id: The id of the job.
        package: The zip file.
        size: Its bytes.
        preference: The route that the user asked for.
        shared_root: Where this machine mounts the shared storage, if anywhere.
        output: Directory for the results. On the shared route None leaves them where
            they are.
        default_output: Directory for the results of the channel route otherwise, if it
            does not exist yet.
        patience: Seconds to keep trying to reopen a lost link.
        resumes: True if an earlier process of this client submitted the job.
        route: The route that the earlier process took; None if it took none.
        chosen_output: Directory that the earlier process chose for results; None if it
            chose none.
    """

    job_id: str
    package: Path
    size: int
    preference: RoutePreference
    shared_root: Path | None
    output: Path | None
    default_output: Path
    patience: float
    resumes: bool = False
    route: messages.Route | None = None
    chosen_output: Path | None = None


OpenLink = Callable[[], AbstractAsyncContextManager[Link[messages.WorkerMessage]]]
"""Opens another link; raises `NoWorkerError` or `LinkClosedError`."""


async def run_session(
    plan: Plan,
    link: Link[messages.WorkerMessage],
    open_again: OpenLink,
    *,
    greeting: messages.Greeting,
    on_event: Callable[[SessionEvent], None],
    cancel_asked: trio.Event,
) -> client_outputs.JobEnded:
    """Run one job to its end over a link, and over others when that one is lost.

    Args:
        plan: The job.
        link: The first link; the caller closes it.
        open_again: Opens another link to the same worker, one attempt each time.
        greeting: The greeting of this client.
        on_event: Called with each event.
        cancel_asked: Set by the caller to cancel the job.

    Returns:
        The end of the job. A worker that cannot be reached again is an end as well.
    """
    with ExitStack() as files:
        async with open_background_nursery() as nursery:
            session = _Session(nursery, files, plan, greeting, on_event)
            nursery.start_soon(session.serve_deadlines)
            nursery.start_soon(session.cancel_when, cancel_asked)
            return await session.run(link, open_again)


class _Session:
    """The state of `run_session`: the machine, the link in use, and their helpers."""

    def __init__(
        self,
        nursery: trio.Nursery,
        files: ExitStack,
        plan: Plan,
        greeting: messages.Greeting,
        on_event: Callable[[SessionEvent], None],
    ) -> None:
        self._files = files
        self._plan = plan
        self._greeting = greeting
        self._on_event = on_event
        self._job = ClientJob(plan.job_id, plan.package.name, plan.size)
        self._alarm = Alarm()
        self._effects = Effects(nursery, self._drain)
        self._results = Results(
            plan.job_id,
            plan.chosen_output,
            lambda done, total: self._progress("Fetching results", done, total),
        )
        self._begun = trio.Event()
        self._there_before = 0
        self._source: ChunkReader | None = None
        self._connection: Connection[messages.WorkerMessage] | None = None
        self._last_progress = float("-inf")
        self._over = trio.Event()
        self._attempt = trio.CancelScope()
        self._wants_link = False
        self._silent_for = 0.0
        self._ending = client_outputs.JobEnded("lost", "the job has not begun")

    async def run(
        self, link: Link[messages.WorkerMessage], open_again: OpenLink
    ) -> client_outputs.JobEnded:
        """Serve links until the job has ended."""
        await self._serve(link)
        while not self._over.is_set():
            if self._wants_link:
                await self._reconnect(open_again)
            else:  # the rest needs no worker
                await self._over.wait()
        return self._ending

    # ---------------------------------------------------------------------- the links

    async def _reconnect(self, open_again: OpenLink) -> None:
        """Open another link and serve it, or give up."""
        policy = Reconnection(
            lost_at=trio.current_time(),
            silent_for=self._silent_for,
            patience=self._plan.patience,
        )
        with trio.CancelScope() as self._attempt:
            while not self._over.is_set():
                is_gone = False
                try:
                    async with open_again() as link:
                        if await self._serve(link):
                            return
                except (NoWorkerError, LinkClosedError) as error:
                    is_gone = isinstance(error, WorkerGoneError)
                match policy.attempt_failed(
                    is_gone, random.random(), trio.current_time()
                ):
                    case TryAgain(at=at):
                        await trio.sleep_until(at)
                    case GiveUp(reason=reason):
                        self._job.give_up(reason)
                        self._drain()

    async def _serve(self, link: Link[messages.WorkerMessage]) -> bool:
        """Serve a link until it is lost, or the job is over.

        Returns:
            False if it was lost before the worker had greeted.
        """
        has_greeted = False
        async with (
            open_connection(link) as connection,
            open_background_nursery() as nursery,
        ):
            nursery.start_soon(self._end_when_over, connection, nursery.cancel_scope)
            try:
                worker = await exchange_greetings(connection, self._greeting)
                has_greeted = True
                self._attempt = trio.CancelScope()  # `_end_when_over` ends this link
                self._connection, self._wants_link = connection, False
                self._results.start_link(PACKAGE_TRANSFER_ID)
                self._begin(worker)
                await self._receive_messages(connection)
            except LinkClosedError as error:
                self._silent_for = error.silent_for
                self._lost(error.reason)
            except RemoteProtocolError as error:
                connection.outbox.put(messages.Error(error.reason))
                self._lost(error.reason)
                self._job.give_up(f"the worker broke the protocol: {error.reason}")
                self._drain()
                await trio.sleep_forever()  # `_end_when_over` sends the error first
        return has_greeted

    async def _end_when_over(
        self, connection: Connection[messages.WorkerMessage], scope: trio.CancelScope
    ) -> None:
        await self._over.wait()
        with trio.move_on_after(FLUSH_TIMEOUT):
            await connection.outbox.flush()
        scope.cancel(reason="the job is over")

    def _lost(self, reason: str) -> None:
        self._connection = None
        self._job.connection_lost(reason, trio.current_time())
        self._drain()

    async def _receive_messages(
        self, connection: Connection[messages.WorkerMessage]
    ) -> None:
        """Deliver messages until the link ends or the worker breaks the protocol."""
        while True:
            message = await connection.link.receive_message()
            if self._results.deliver_offer(message):
                continue
            if isinstance(message, TransferMessage):
                connection.transfers.receive_message(message)
            elif isinstance(message, messages.WorkerJobMessage | messages.Error):
                self._job.receive_message(message, trio.current_time())
                self._drain()
            elif isinstance(
                message, messages.Hello | messages.FileOffer | messages.Unknown
            ):
                raise RemoteProtocolError(f"{type(message).__name__} is not expected")
            else:
                assert_never(message)

    def _begin(self, worker: messages.Greeting) -> None:
        """Start the job, or continue it over a new link."""
        now, plan = trio.current_time(), self._plan
        route_plan = RoutePlan(
            plan.preference, plan.shared_root is not None, worker.shared_storage
        )
        if self._job.state is not ClientState.IDLE:
            self._job.connection_restored(now)
        elif plan.resumes:
            self._on_event(JobResumed(plan.job_id))
            self._job.resume(route_plan, now, route=plan.route)
        else:
            self._job.submit(route_plan, now)
        self._begun.set()
        self._drain()

    # ---------------------------------------------------------------- background tasks

    async def serve_deadlines(self) -> None:
        """Call the machine at each of its deadlines, until cancelled."""
        while True:
            await self._alarm.wait()
            self._job.handle_timeout(trio.current_time())
            self._drain()

    async def cancel_when(self, asked: trio.Event) -> None:
        """Cancel the job once the event is set."""
        await asked.wait()
        if self._plan.resumes:
            await self._begun.wait()  # the worker has the job, and has to stop it
        self._job.cancel("cancelled", trio.current_time())
        self._drain()

    # ---------------------------------------------------------- outputs of the machine

    def _drain(self) -> None:
        """Carry out all outputs of the machine, and set its next deadline."""
        while (output := self._job.next_output()) is not None:
            self._carry_out(output)
        self._alarm.set(self._job.deadline())

    def _carry_out(self, output: client_outputs.Output) -> None:
        if isinstance(output, client_outputs.JobEvent):
            if isinstance(output, StateChanged):
                self._there_before = output.progress.received
            self._on_event(output)
            return
        match output:
            case client_outputs.SendMessage(message=message):
                if self._connection is not None:
                    self._connection.outbox.put(message)
            case client_outputs.PrepareShared():
                self._effects.start(self._prepare_shared)
            case client_outputs.CopyPackage(path=path):
                self._effects.start(self._copy_package, path)
            case client_outputs.DiscardShared():
                self._effects.stop()
                self._effects.start(self._folder().discard)
            case client_outputs.SendPackage(transfer_id=transfer_id):
                self._effects.start(self._send_package, transfer_id)
            case client_outputs.StopTransfer():
                self._effects.stop()
            case client_outputs.FetchResults(route=route, files=files):
                self._effects.start(self._fetch_results, route, files)
            case client_outputs.Reconnect(reason=reason):
                self._wants_link = True
                self._on_event(LinkLost(reason))
            case client_outputs.JobEnded():
                self._ending = output
                self._over.set()
                self._attempt.cancel(reason="the job is over")
            case _:
                assert_never(output)

    # ------------------------------------------------------------- the shared storage

    def _folder(self) -> JobFolder:
        root = self._plan.shared_root
        if root is None:
            raise RuntimeError("the shared route was chosen without a shared root")
        return JobFolder(root, self._plan.job_id)

    async def _prepare_shared(self) -> None:
        try:
            path, content = await self._folder().make()
        except (InvalidInput, StorageError) as error:
            self._job.shared_failed(str(error), trio.current_time())
        else:
            self._job.probe_written(path, content, trio.current_time())

    async def _copy_package(self, path: str) -> None:
        package, size = self._plan.package, self._plan.size
        what = f"Copying {package.name} to shared storage"
        try:
            report = await self._folder().copy_package(
                package,
                path,
                size=size,
                on_progress=lambda done: self._progress(what, done, size),
            )
        except (InvalidInput, StorageError) as error:
            self._job.shared_failed(str(error), trio.current_time())
        else:
            self._on_event(
                PackageCopied(report.method, report.size, round(report.seconds, 3))
            )
            self._job.package_copied(path, trio.current_time())

    # -------------------------------------------------------------- the channel route

    async def _send_package(self, transfer_id: int) -> None:
        package, size, connection = (
            self._plan.package,
            self._plan.size,
            self._connection,
        )
        what = f"Sending {package.name}"
        if connection is None:
            return  # the link was lost in the meantime
        try:
            source = await self._open_source()
            if source.size != size:
                raise TransferError(f"{package.name} changed in the meantime")
            await connection.transfers.send_file(
                transfer_id,
                messages.OfferedFile(package.name, size, CHUNK_SIZE),
                source,
                on_progress=lambda done: self._progress(
                    what, min(done + self._there_before, size), size
                ),
            )
            await trio.lowlevel.checkpoint_if_cancelled()
        except (TransferError, InvalidInput, StorageError) as error:
            self._job.transfer_failed(str(error))
        except LinkClosedError:
            return  # the receiver of messages reports it to the machine
        else:
            self._job.package_sent()

    async def _open_source(self) -> ChunkReader:
        """Open the package once, and keep it open, so that a change is noticed."""
        if self._source is None:
            package = self._plan.package
            reader = await call_storage(
                lambda: ChunkReader(
                    open_owned(package), chunk_size=CHUNK_SIZE, name=package.name
                ),
                discard=ChunkReader.close,
            )
            self._source = self._files.enter_context(closing(reader))
        return self._source

    # -------------------------------------------------------------------- the results

    async def _fetch_results(
        self, route: messages.Route, files: tuple[messages.ResultFile, ...]
    ) -> None:
        try:
            if route == "shared" and self._plan.output is None:
                directory, failures = self._folder().path, list[str]()
            else:
                directory = await self._results.choose_directory(
                    self._plan.output, self._plan.default_output, files
                )
                self._on_event(ResultsChosen(directory))
                if route == "shared":
                    failures = await self._results.copy(self._folder(), files)
                elif (connection := self._connection) is not None:
                    failures = await self._results.fetch(connection, files)
                else:
                    return  # the link was lost in the meantime
            await trio.lowlevel.checkpoint_if_cancelled()
        except LinkClosedError:
            return  # the receiver of messages reports it to the machine
        except (InvalidInput, StorageError) as error:
            self._job.transfer_failed(str(error))
            return
        if failures:
            self._job.transfer_failed(
                f"{len(failures)} of {len(files)} results did not arrive in "
                f"{directory}: {failures[0]}"
            )
            return
        size = sum(file.size for file in files)
        self._on_event(ResultsStored(directory, len(files), size))
        self._job.results_fetched()

    def _progress(self, what: str, done: int, total: int) -> None:
        """Report the progress of a transfer at intervals, and its end."""
        now = trio.current_time()
        if done >= total or now - self._last_progress >= PROGRESS_INTERVAL:
            self._last_progress = now
            self._on_event(TransferProgress(what, done, total))
