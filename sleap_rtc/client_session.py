"""One job over one link, from the client's side: carries out what the core decides."""

import os
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import assert_never

import msgspec
import trio
from blake3 import blake3

from sleap_rtc.filesystem import safe_mkdir
from sleap_rtc.io.chunk_files import ChunkReader, ChunkWriter
from sleap_rtc.io.copy import copy_with_deadline
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
from sleap_rtc.io.probe import ask_storage, call_in_time, write_probe
from sleap_rtc.io.transfers import TransferError, Transfers
from sleap_rtc.proto import job_client as core
from sleap_rtc.proto import messages as m
from sleap_rtc.proto.errors import RemoteProtocolError
from sleap_rtc.proto.routes import RoutePreference

CHUNK_SIZE = 1024 * 1024
"""Bytes in a chunk of the package."""

GREETING_TIMEOUT = 15.0
"""Seconds for the worker to greet back."""

STORAGE_TIMEOUT = 20.0
"""Seconds for making the job directory and the probe file."""

CLEANUP_TIMEOUT = 10.0
"""Seconds for removing a job directory that will not be used."""

RESULTS_AT_ONCE = 4
"""Result files that are fetched side by side: most are small, and wait for replies."""

PROGRESS_INTERVAL = 0.1
"""Seconds between two events of progress: there are hundreds of chunks a second."""

PROBE_NAME = "mount-probe"

_BROKEN = (RemoteProtocolError, PathValidationError, SharedStorageError)


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
    | TransferProgress
    | PackageCopied
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
        default_output: Where results of the channel route go otherwise.
    """

    job_id: str
    package: Path
    preference: RoutePreference
    shared_root: Path | None
    output: Path | None
    default_output: Path


class ClientSession:
    """Runs one job over a link that stands.

    Args:
        link: The link; the owner keeps it, and closes it.
        plan: What to do.
        size: Bytes in the package.
        on_event: Is told what happens.
    """

    def __init__(
        self,
        link: Link,
        plan: Plan,
        size: int,
        on_event: Callable[[SessionEvent], None],
    ) -> None:
        self._link = link
        self._plan = plan
        self._size = size
        self._on_event = on_event
        self._job = core.ClientJob(plan.job_id, plan.package.name, size)
        self._outbox = Outbox(link)
        self._transfers = Transfers(link)
        self._offered: dict[int, trio.MemorySendChannel[m.OfferedFile | str]] = {}
        self._last_transfer = core.PACKAGE_TRANSFER_ID
        self._work = trio.CancelScope()
        self._done = trio.Event()
        self._done.set()
        self._progress_told = float("-inf")
        self._changed = trio.Event()
        self._over = trio.Event()
        self._ending = core.JobEnded("lost", "the job has not begun")
        self._nursery: trio.Nursery | None = None

    async def run(
        self, greeting: m.Greeting, cancel_asked: trio.Event
    ) -> core.JobEnded:
        """Run the job to its end.

        Args:
            greeting: What this client says of itself.
            cancel_asked: Is set by the owner when the job shall be cancelled.

        Returns:
            How it ended. A link that is lost is an ending, too.
        """
        async with open_background_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._outbox.run)
            nursery.start_soon(self._transfers.run)
            nursery.start_soon(self._receive_messages, greeting)
            nursery.start_soon(self._watch_deadline)
            nursery.start_soon(self._watch_cancel, cancel_asked)
            await self._over.wait()
            with trio.move_on_after(CLEANUP_TIMEOUT):
                await self._outbox.flush()
        return self._ending

    # ------------------------------------------------------------------- what arrives

    async def _receive_messages(self, greeting: m.Greeting) -> None:
        """Take messages until the link ends or the worker breaks the protocol."""
        try:
            self._outbox.put(m.Hello(greeting))
            self._begin(await self._receive_greeting())
            while True:
                message = await self._link.receive_message()
                if not self._deliver_offer(
                    message
                ) and not self._transfers.deliver_message(message):
                    self._job.receive_message(message, trio.current_time())
                    self._drain()
        except LinkClosedError as error:
            self._job.connection_lost(error.reason, trio.current_time())
        except RemoteProtocolError as error:
            self._outbox.put(m.Error(error.reason))
            reason = f"the worker broke the protocol: {error.reason}"
            self._job.connection_lost(reason, trio.current_time())
        self._drain()

    async def _receive_greeting(self) -> m.Greeting:
        with trio.move_on_after(GREETING_TIMEOUT):
            message = await self._link.receive_message()
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
        raise RemoteProtocolError("it did not greet in time")

    def _begin(self, worker: m.Greeting) -> None:
        self._job.submit(
            self._plan.preference,
            trio.current_time(),
            client_root=self._plan.shared_root is not None,
            worker_root=worker.shared_storage,
        )
        self._drain()

    def _deliver_offer(self, message: m.Message) -> bool:
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
                self._outbox.put(message)
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
            case core.JobEnded():
                self._ending = output
                self._over.set()
            case (
                core.RouteChosen()
                | core.StateChanged()
                | core.LinePrinted()
                | core.StageComplete()
            ):
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
        except _BROKEN as error:
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
        except _BROKEN as error:
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
            except _BROKEN:
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
        package = self._plan.package
        what = f"Sending {package.name}"
        try:
            source = await trio.to_thread.run_sync(
                lambda: ChunkReader(package, chunk_size=CHUNK_SIZE)
            )
            try:
                if source.size != self._size:
                    raise TransferError(f"{package.name} changed meanwhile")
                await self._transfers.send_file(
                    transfer_id,
                    m.OfferedFile(package.name, source.size, CHUNK_SIZE),
                    source,
                    on_progress=lambda done: self._progress(what, done, self._size),
                )
            finally:
                source.close()
        except (TransferError, *_BROKEN) as error:
            self._job.transfer_failed(str(error))
        except LinkClosedError:
            return  # whoever receives messages says so to the core
        else:
            self._job.package_sent()

    # -------------------------------------------------------------------- the results

    async def _fetch_results(
        self, job_id: str, route: m.Route, files: tuple[m.ResultFile, ...]
    ) -> None:
        if route == "shared" and self._plan.output is None:
            directory = self._root() / "jobs" / job_id
        else:
            wanted = self._plan.output or self._plan.default_output
            directory = await trio.to_thread.run_sync(
                _free_directory, wanted, job_id, files
            )
            fetch = self._fetch_one if route == "channel" else self._copy_one
            failures = await self._fetch_all(directory, files, fetch)
            if failures:
                self._job.transfer_failed(
                    f"{len(failures)} of {len(files)} results did not arrive in "
                    f"{directory}: {failures[0]}"
                )
                return
        size = sum(file.size for file in files)
        self._on_event(ResultsStored(directory, len(files), size))
        self._job.results_fetched()

    async def _fetch_all(
        self,
        directory: Path,
        files: tuple[m.ResultFile, ...],
        fetch: Callable[[Path, m.ResultFile, Callable[[int], None]], Awaitable[None]],
    ) -> list[str]:
        """Fetch files side by side; returns what went wrong, for people."""
        failures: list[str] = []
        done: dict[str, int] = {}
        total = sum(file.size for file in files)
        waiting = iter(files)

        async def fetch_some() -> None:
            for file in waiting:

                def progress(size: int, path: str = file.path) -> None:
                    done[path] = size
                    self._progress("Fetching results", sum(done.values()), total)

                try:
                    await fetch(directory, file, progress)
                except (TransferError, *_BROKEN) as error:
                    failures.append(f"{file.path}: {error}")
                except LinkClosedError as error:
                    failures.append(f"{file.path}: {error.reason}")

        async with trio.open_nursery() as nursery:
            for _ in range(min(RESULTS_AT_ONCE, len(files))):
                nursery.start_soon(fetch_some)
        return failures

    async def _fetch_one(
        self, directory: Path, file: m.ResultFile, progress: Callable[[int], None]
    ) -> None:
        """Fetch one file through the channel."""
        self._last_transfer += 1
        transfer_id = self._last_transfer
        answer, answered = trio.open_memory_channel[m.OfferedFile | str](1)
        self._offered[transfer_id] = answer
        request = m.FileRequest(transfer_id, self._plan.job_id, file.path)
        await self._link.send_message(request)
        offer = await answered.receive()
        if isinstance(offer, str):
            raise TransferError(offer)
        if offer.size != file.size:
            raise TransferError(f"it has {offer.size} bytes instead of {file.size}")
        try:
            sink = await trio.to_thread.run_sync(
                lambda: ChunkWriter(
                    directory,
                    file.path,
                    size=offer.size,
                    chunk_size=offer.chunk_size,
                    origin=self._plan.job_id,
                )
            )
        except _BROKEN as error:
            # The worker would wait for ever to send it.
            await self._link.send_message(m.FileError(transfer_id, str(error)))
            raise
        await self._transfers.receive_file(
            transfer_id, offer, sink, on_progress=progress
        )

    async def _copy_one(
        self, directory: Path, file: m.ResultFile, progress: Callable[[int], None]
    ) -> None:
        """Copy one file out of the shared storage."""
        relative = f"jobs/{self._plan.job_id}/{file.path}"
        root = self._root()
        source = await call_in_time(
            root, _path_beneath, root, relative, timeout=STORAGE_TIMEOUT
        )
        await copy_with_deadline(
            source, directory, file.path, size=file.size, on_progress=progress
        )

    def _progress(self, what: str, done: int, total: int) -> None:
        """Tell how far a transfer is, now and then, and at its end."""
        now = trio.current_time()
        if done >= total or now - self._progress_told >= PROGRESS_INTERVAL:
            self._progress_told = now
            self._on_event(TransferProgress(what, done, total))


def _free_directory(wanted: Path, job_id: str, files: tuple[m.ResultFile, ...]) -> Path:
    """Choose where results go: nothing that is there already is overwritten.

    Raises:
        SharedStorageError: If the directory can't be made.
    """
    clash = any((wanted / file.path).exists() for file in files)
    directory = wanted / job_id if clash else wanted
    safe_mkdir(directory)
    return directory


def _path_beneath(root: Path, relative: str) -> Path:
    """Check that a result lies beneath the root, and is a file.

    Raises:
        PathValidationError: If it does not.
        SharedStorageError: If the storage failed.
    """
    os.close(open_beneath(root, relative))
    return root / relative
