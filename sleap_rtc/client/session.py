"""One job from the client's side, over as many links as it takes."""

import random
import secrets
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import assert_never

import msgspec
import trio
from blake3 import blake3

from sleap_rtc.client.reach import WorkerGoneError
from sleap_rtc.client.results import STORAGE_TIMEOUT, Results
from sleap_rtc.errors import NoWorkerError
from sleap_rtc.io.link.link import Link, LinkClosedError
from sleap_rtc.io.link.outbox import Outbox
from sleap_rtc.io.nursery import open_background_nursery
from sleap_rtc.io.storage.copy import copy_with_deadline
from sleap_rtc.io.storage.folder import (
    StorageError,
    make_directories_beneath,
    open_owned,
    remove_tree_beneath,
)
from sleap_rtc.io.storage.probe import ask_storage, call_in_time, write_probe
from sleap_rtc.io.transfer.chunk_files import ChunkReader
from sleap_rtc.io.transfer.transfers import TransferError, Transfers
from sleap_rtc.proto import messages as m
from sleap_rtc.proto.errors import InvalidInput, RemoteProtocolError
from sleap_rtc.proto.job import client as core
from sleap_rtc.proto.route.reconnection import GiveUp, Reconnection, TryAgain
from sleap_rtc.proto.route.routes import RoutePreference

CHUNK_SIZE = 1024 * 1024
"""Bytes in a chunk of the package."""

GREETING_TIMEOUT = 15.0
"""Seconds for the worker to greet back."""

CLEANUP_TIMEOUT = 10.0
"""Seconds for removing a job directory that will not be used."""

PROGRESS_INTERVAL = 0.1
"""Seconds between two events of progress: there are hundreds of chunks a second."""

PROBE_NAME = "mount-probe"


class TransferProgress(msgspec.Struct, frozen=True):
    """Event: bytes of the package or of the results have moved.

    Args:
        what: Which of them, and where they go, for people.
        done: Bytes so far.
        total: Bytes in all.
    """

    what: str
    done: int
    total: int


class LinkLost(msgspec.Struct, frozen=True):
    """Event: the link is gone, and another one is being opened."""

    reason: str


class JobResumed(msgspec.Struct, frozen=True):
    """Event: a job goes on that an earlier process of this client has begun."""

    job_id: str


class PackageCopied(msgspec.Struct, frozen=True):
    """Event: the package is on the shared storage.

    Args:
        method: How it was copied, such as ``reflink`` or ``copy_file_range``.
        size: Its bytes.
        seconds: How long it took until it was safe on the disk.
    """

    method: str
    size: int
    seconds: float


class ResultsChosen(msgspec.Struct, frozen=True):
    """Event: it was decided where the results go."""

    directory: Path


class ResultsStored(msgspec.Struct, frozen=True):
    """Event: where the results are, and how many files and bytes they have."""

    directory: Path
    files: int
    size: int


SessionEvent = (
    core.RouteChosen
    | core.StateChanged
    | core.LinePrinted
    | core.StageComplete
    | LinkLost
    | JobResumed
    | TransferProgress
    | PackageCopied
    | ResultsChosen
    | ResultsStored
)


class Plan(msgspec.Struct, frozen=True):
    """What to do with a package.

    Args:
        job_id: The id of the job.
        package: The zip file.
        preference: The route that the user asked for.
        shared_root: Where this machine mounts the shared storage, if anywhere.
        output: Where results go. On the shared route None leaves them where they are.
        default_output: Where results of the channel route go otherwise, if free.
        patience: Seconds for which a lost link is tried to be opened again.
        resumes: Whether an earlier process of this client has begun the job.
        route: The route that it took; None if it took none.
        chosen_output: Where it brought results; None if it brought none.
    """

    job_id: str
    package: Path
    preference: RoutePreference
    shared_root: Path | None
    output: Path | None
    default_output: Path
    patience: float
    resumes: bool = False
    route: m.Route | None = None
    chosen_output: Path | None = None


class _Connection:
    """The link of the moment, and what goes over it."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.outbox = Outbox(link)
        self.transfers = Transfers(link)


OpenLink = Callable[[], AbstractAsyncContextManager[Link]]
"""Opens another link; raises `NoWorkerError` or `LinkClosedError`."""


class ClientSession:
    """Runs one job over a link, and over others when that one is lost.

    Args:
        plan: What to do.
        size: Bytes in the package.
        greeting: What this client says of itself.
        on_event: Is told what happens.
    """

    def __init__(
        self,
        plan: Plan,
        size: int,
        greeting: m.Greeting,
        on_event: Callable[[SessionEvent], None],
    ) -> None:
        self._plan = plan
        self._size = size
        self._greeting = greeting
        self._on_event = on_event
        self._job = core.ClientJob(plan.job_id, plan.package.name, size)
        self._results = Results(
            plan.job_id,
            plan.chosen_output,
            lambda done, total: self._progress("Fetching results", done, total),
        )
        self._there_before = 0
        self._source: ChunkReader | None = None
        self._connection: _Connection | None = None
        self._work = trio.CancelScope()
        self._done = trio.Event()
        self._done.set()
        self._progress_told = float("-inf")
        self._changed = trio.Event()
        self._over = trio.Event()
        self._returning = trio.CancelScope()
        self._wants_link = False
        self._silent_for = 0.0
        self._ending = core.JobEnded("lost", "the job has not begun")
        self._nursery: trio.Nursery | None = None

    async def run(
        self, link: Link, open_again: OpenLink, cancel_asked: trio.Event
    ) -> core.JobEnded:
        """Run the job to its end.

        Args:
            link: The first link; its owner closes it.
            open_again: Opens another link to the same worker, one attempt each time.
            cancel_asked: Is set by the owner when the job shall be cancelled.

        Returns:
            How it ended. A worker that can't be reached again is an ending, too.
        """
        try:
            async with open_background_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._watch_deadline)
                nursery.start_soon(self._watch_cancel, cancel_asked)
                await self._serve(link)
                while not self._over.is_set():
                    if self._wants_link:
                        await self._come_back(open_again)
                    else:  # the rest needs no worker
                        await self._over.wait()
        finally:
            if self._source is not None:
                self._source.close()
        return self._ending

    # ---------------------------------------------------------------------- the links

    async def _come_back(self, open_again: OpenLink) -> None:
        """Open another link and serve it, or give up."""
        policy = Reconnection(
            lost_at=trio.current_time(),
            silent_for=self._silent_for,
            patience=self._plan.patience,
        )
        with trio.CancelScope() as self._returning:
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

    async def _serve(self, link: Link) -> bool:
        """Serve a link until it is lost, or the job is over.

        Returns:
            False if it was lost before the worker had greeted.
        """
        connection = _Connection(link)
        has_greeted = False
        async with open_background_nursery() as nursery:
            nursery.start_soon(connection.outbox.run)
            nursery.start_soon(connection.transfers.run)
            nursery.start_soon(self._end_when_over, connection, nursery)
            try:
                connection.outbox.put(m.Hello(self._greeting))
                worker = await self._receive_greeting(link)
                has_greeted = True
                self._returning = trio.CancelScope()  # this link ends by itself
                self._connection, self._wants_link = connection, False
                self._results.new_link(core.PACKAGE_TRANSFER_ID)
                self._begin(worker)
                await self._receive_messages(connection)
            except LinkClosedError as error:
                self._silent_for = error.silent_for
                self._lost(error.reason)
            except RemoteProtocolError as error:
                connection.outbox.put(m.Error(error.reason))
                self._lost(error.reason)
                self._job.give_up(f"the worker broke the protocol: {error.reason}")
                self._drain()
                await trio.sleep_forever()  # until the worker has been told
        return has_greeted

    async def _end_when_over(
        self, connection: _Connection, nursery: trio.Nursery
    ) -> None:
        await self._over.wait()
        with trio.move_on_after(CLEANUP_TIMEOUT):
            await connection.outbox.flush()
        nursery.cancel_scope.cancel(reason="the job is over")

    def _lost(self, reason: str) -> None:
        self._connection = None
        self._job.connection_lost(reason, trio.current_time())
        self._drain()

    async def _receive_messages(self, connection: _Connection) -> None:
        """Take messages until the link ends or the worker breaks the protocol."""
        while True:
            message = await connection.link.receive_message()
            if not self._results.deliver_offer(
                message
            ) and not connection.transfers.deliver_message(message):
                self._job.receive_message(message, trio.current_time())
                self._drain()

    async def _receive_greeting(self, link: Link) -> m.Greeting:
        with trio.move_on_after(GREETING_TIMEOUT):
            message = await link.receive_message()
            if isinstance(message, m.Error):
                raise RemoteProtocolError(message.reason)
            if not isinstance(message, m.Hello):
                raise RemoteProtocolError("it did not greet first")
            if message.greeting.protocol != m.PROTOCOL_VERSION:
                raise RemoteProtocolError(
                    f"it speaks protocol {message.greeting.protocol}, this side "
                    f"{m.PROTOCOL_VERSION}: update the older one"
                )
            return message.greeting
        raise LinkClosedError("the worker did not greet in time")

    def _begin(self, worker: m.Greeting) -> None:
        """Begin the job, or go on with it over a new link."""
        now, plan = trio.current_time(), self._plan
        client_root, worker_root = plan.shared_root is not None, worker.shared_storage
        if self._job.state is not core.State.IDLE:
            self._job.link_restored(now)
        elif plan.resumes:
            self._on_event(JobResumed(plan.job_id))
            self._job.resume(
                plan.preference,
                now,
                client_root=client_root,
                worker_root=worker_root,
                route=plan.route,
            )
        else:
            self._job.submit(
                plan.preference, now, client_root=client_root, worker_root=worker_root
            )
        self._drain()

    # ---------------------------------------------------------------------- the clock

    async def _watch_deadline(self) -> None:
        """Wake the core at its deadline; one task for the life of the session."""
        while True:
            self._changed = trio.Event()
            deadline = self._job.deadline()
            with trio.move_on_at(float("inf") if deadline is None else deadline):
                await self._changed.wait()
                continue
            self._job.handle_timeout(trio.current_time())
            self._drain()

    async def _watch_cancel(self, cancel_asked: trio.Event) -> None:
        await cancel_asked.wait()
        self._job.cancel("cancelled", trio.current_time())
        self._drain()

    # ------------------------------------------------------------ effects of the core

    def _drain(self) -> None:
        """Carry out everything that the core wants."""
        while (output := self._job.next_output()) is not None:
            self._carry_out(output)
        self._changed.set()

    def _carry_out(self, output: core.Output) -> None:
        match output:
            case core.SendMessage(message=message):
                if self._connection is not None:
                    self._connection.outbox.put(message)
            case core.PrepareShared(job_id=job_id):
                self._start(self._prepare_shared, job_id)
            case core.CopyPackage(path=path):
                self._start(self._copy_package, path)
            case core.DiscardShared(job_id=job_id):
                self._stop_work()
                self._start(self._discard_shared, job_id)
            case core.SendPackage(transfer_id=transfer_id):
                self._start(self._send_package, transfer_id)
            case core.StopSending():
                self._stop_work()
            case core.FetchResults(job_id=job_id, route=route, files=files):
                self._start(self._fetch_results, job_id, route, files)
            case core.Reconnect(reason=reason):
                self._wants_link = True
                self._on_event(LinkLost(reason))
            case core.JobEnded():
                self._ending = output
                self._over.set()
                self._returning.cancel(reason="the job is over")
            case core.StateChanged(progress=progress):
                self._there_before = progress.received
                self._on_event(output)
            case core.RouteChosen() | core.LinePrinted() | core.StageComplete():
                self._on_event(output)
            case _:
                assert_never(output)

    def _start(self, effect: Callable[..., Awaitable[None]], *args: object) -> None:
        """Start an effect; there is one at a time, and `_stop_work` ends it."""
        if self._nursery is not None:
            before, self._done, self._work = (
                self._done,
                trio.Event(),
                trio.CancelScope(),
            )
            self._nursery.start_soon(
                self._run_effect, self._work, before, self._done, effect, args
            )

    async def _run_effect(
        self,
        scope: trio.CancelScope,
        before: trio.Event,
        done: trio.Event,
        effect: Callable[..., Awaitable[None]],
        args: tuple[object, ...],
    ) -> None:
        try:
            with scope:
                # What was stopped has to be over before its traces are removed.
                with trio.CancelScope(shield=True):
                    await before.wait()
                await effect(*args)
        finally:
            done.set()
        self._drain()

    def _stop_work(self) -> None:
        self._work.cancel(reason="it is not wanted any more")

    # ------------------------------------------------------------- the shared storage

    async def _prepare_shared(self, job_id: str) -> None:
        """Make the job directory, with a probe file in it."""
        root, path = self._root(), f"jobs/{job_id}/{PROBE_NAME}"
        nonce = secrets.token_hex(16).encode()

        def write() -> None:
            make_directories_beneath(root, f"jobs/{job_id}")
            write_probe(root, path, nonce)

        try:
            await ask_storage(root, write, timeout=STORAGE_TIMEOUT)
        except (InvalidInput, StorageError) as error:
            self._shared_failed(str(error))
        else:
            content = blake3(nonce).hexdigest()
            self._job.probe_written(path, content, trio.current_time())

    async def _copy_package(self, path: str) -> None:
        root, name = self._root(), self._plan.package.name
        what = f"Copying {name} to shared storage"
        probe = path.removesuffix(name) + PROBE_NAME
        try:
            await call_in_time(
                root, remove_tree_beneath, root, probe, timeout=STORAGE_TIMEOUT
            )
            report = await copy_with_deadline(
                self._plan.package,
                root,
                path,
                size=self._size,
                on_progress=lambda done: self._progress(what, done, self._size),
            )
        except (InvalidInput, StorageError) as error:
            self._shared_failed(str(error))
        else:
            self._on_event(
                PackageCopied(report.method, report.size, round(report.seconds, 3))
            )
            self._job.package_copied(path, trio.current_time())

    async def _discard_shared(self, job_id: str) -> None:
        """Remove the job directory, if the storage lets us; nobody depends on it."""
        with trio.CancelScope(shield=True) as scope:
            scope.deadline = trio.current_time() + CLEANUP_TIMEOUT
            try:
                await trio.to_thread.run_sync(
                    remove_tree_beneath,
                    self._root(),
                    f"jobs/{job_id}",
                    abandon_on_cancel=True,
                )
            except (InvalidInput, StorageError):
                return

    def _shared_failed(self, reason: str) -> None:
        self._job.shared_failed(reason, trio.current_time())

    def _root(self) -> Path:
        root = self._plan.shared_root
        if root is None:
            raise RuntimeError("the shared route was chosen without a shared root")
        return root

    # -------------------------------------------------------------- the channel route

    async def _send_package(self, transfer_id: int) -> None:
        package, connection = self._plan.package, self._connection
        what = f"Sending {package.name}"
        if connection is None:
            return  # the link was lost meanwhile
        try:
            if self._source is None:  # it stays open, so that a change is noticed
                self._source = await trio.to_thread.run_sync(
                    lambda: ChunkReader(
                        open_owned(package), chunk_size=CHUNK_SIZE, name=package.name
                    )
                )
            if self._source.size != self._size:
                raise TransferError(f"{package.name} changed meanwhile")
            await connection.transfers.send_file(
                transfer_id,
                m.OfferedFile(package.name, self._size, CHUNK_SIZE),
                self._source,
                on_progress=lambda done: self._progress(
                    what, min(done + self._there_before, self._size), self._size
                ),
            )
            await trio.lowlevel.checkpoint_if_cancelled()
        except (TransferError, InvalidInput, StorageError) as error:
            self._job.transfer_failed(str(error))
        except LinkClosedError:
            return  # whoever receives messages says so to the core
        else:
            self._job.package_sent()

    # -------------------------------------------------------------------- the results

    async def _fetch_results(
        self, job_id: str, route: m.Route, files: tuple[m.ResultFile, ...]
    ) -> None:
        plan, connection = self._plan, self._connection
        try:
            if route == "shared" and plan.output is None:
                directory, failures = self._root() / "jobs" / job_id, list[str]()
            else:
                directory = await self._results.choose_directory(
                    plan.output, plan.default_output, files
                )
                self._on_event(ResultsChosen(directory))
                if route == "shared":
                    failures = await self._results.copy(self._root(), files)
                elif connection is not None:
                    failures = await self._results.fetch(connection, files)
                else:
                    return  # the link was lost meanwhile
            await trio.lowlevel.checkpoint_if_cancelled()
        except LinkClosedError:
            return  # whoever receives messages says so to the core
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
        """Tell how far a transfer is, now and then, and at its end."""
        now = trio.current_time()
        if done >= total or now - self._progress_told >= PROGRESS_INTERVAL:
            self._progress_told = now
            self._on_event(TransferProgress(what, done, total))
