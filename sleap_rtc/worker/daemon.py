"""The worker role: register in the room, accept links, own jobs."""

import errno
import shutil
from collections.abc import Callable
from contextlib import AsyncExitStack, closing
from pathlib import Path

import msgspec
import structlog
import trio

import sleap_rtc
from sleap_rtc.config import (
    ConfigError,
    make_state_directory,
    state_directory,
)
from sleap_rtc.errors import RefusedError, UsageError
from sleap_rtc.io.connect.listener import Listener, open_listener
from sleap_rtc.io.hardware import MachineInfo, describe_machine
from sleap_rtc.io.link.certificates import Certificate, make_certificate
from sleap_rtc.io.nursery import open_background_nursery
from sleap_rtc.io.signaling.client import (
    RegistrationRefusedError,
    RoomConnection,
    open_room,
)
from sleap_rtc.io.signals import end_on_signal
from sleap_rtc.io.storage.call import call_storage
from sleap_rtc.proto.job.paths import JOBS
from sleap_rtc.proto.messages import PROTOCOL_VERSION, Greeting
from sleap_rtc.proto.rendezvous.envelope import Address
from sleap_rtc.proto.rendezvous.invite import Invite, RoomKeys
from sleap_rtc.proto.rendezvous.messages import Metadata
from sleap_rtc.proto.rendezvous.workers import WorkerCard
from sleap_rtc.rendezvous.introductions import Authenticator
from sleap_rtc.rendezvous.rooms import (
    LOOPBACK,
    Hosting,
    bind_problem,
    host_room,
    hosting,
    load_invite,
    room_elsewhere,
)
from sleap_rtc.rendezvous.server import run_signaling
from sleap_rtc.worker.identity import Identity, take_identity
from sleap_rtc.worker.job import JobSettings
from sleap_rtc.worker.job_store import StoreError
from sleap_rtc.worker.jobs import open_jobs
from sleap_rtc.worker.options import WorkerOptions
from sleap_rtc.worker.session import serve_link
from sleap_rtc.worker.slots import SlotQueue
from sleap_rtc.worker.store_writer import open_store_writer

STATUS_INTERVAL = 30.0
"""Seconds between two updates of the free disk space in the room."""

STORE_NAME = "jobs.sqlite3"
"""Name of the file in the state directory that stores the jobs."""

TAGS = ("sleap-rtc", "training-worker", "inference-worker")
"""Tags by which SLEAP peers find workers."""

OnReady = Callable[[Invite, bool], None]


async def run_worker(
    options: WorkerOptions, *, on_ready: OnReady | None = None
) -> None:
    """Run a worker until it is cancelled or a signal ends it.

    Args:
        options: The options.
        on_ready: Called once the worker is in its room, with the invite, and True if
            the worker serves the room's signaling itself.

    Raises:
        ConfigError: If a port or the state directory cannot be used.
        RefusedError: If the signaling server does not let the worker in.
    """
    async with open_background_nursery() as nursery:
        await nursery.start(end_on_signal, nursery.cancel_scope)
        directory = await call_storage(make_state_directory, options.environ)
        machine = await call_storage(describe_machine, directory)
        identity = await call_storage(
            take_identity, directory, options.slug, discard=Identity.close
        )
        with closing(identity):
            await Worker(options, machine, identity.peer_id).run(on_ready)


class Worker:
    """One worker, from its certificate to its last job.

    Args:
        options: The options.
        machine: The machine that it runs on.
        peer_id: Its name in the room, the same as before a restart.
    """

    def __init__(
        self, options: WorkerOptions, machine: MachineInfo, peer_id: str
    ) -> None:
        gpus = tuple(range(len(machine.gpus))) if options.gpus is None else options.gpus
        self._options = options
        self._machine = machine
        self._peer_id = peer_id
        self._log = structlog.get_logger().bind(worker=peer_id)
        self._state = state_directory(options.environ)
        self._jobs = self._state / JOBS
        self._disk_free = machine.disk_free
        self._queue = SlotQueue(options.slots or max(1, len(gpus)), gpus)

    async def run(self, on_ready: OnReady | None) -> None:
        """Serve until cancelled."""
        async with open_background_nursery() as servants, AsyncExitStack() as stack:
            invite, hosted = await self._find_room(servants)
            certificate = await trio.to_thread.run_sync(make_certificate)
            keys = RoomKeys.from_secret(invite.secret)
            authenticator = Authenticator(
                keys, self._peer_id, certificate.certificate_der, self._log
            )
            listener = await self._listen(stack, invite, certificate, authenticator)
            room = await self._enter_room(stack, invite, keys, authenticator)
            self._log.info(
                "worker ready",
                room=invite.url,
                port=listener.port,
                slots=self._queue.slots,
                gpus=len(self._machine.gpus),
                sleap_nn=self._machine.sleap_nn or "not found",
                shared_storage=str(self._options.shared_root or "not configured"),
            )
            if on_ready is not None:
                on_ready(invite, hosted)
            servants.start_soon(
                authenticator.answer_offers,
                room,
                lambda: self._addresses(listener),
                listener.kinds,
            )
            servants.start_soon(self._update_card, room, authenticator)
            await self._serve_links(listener)

    async def _listen(
        self,
        stack: AsyncExitStack,
        invite: Invite,
        certificate: Certificate,
        authenticator: Authenticator,
    ) -> Listener:
        """Listen for links as long as the stack is open.

        Raises:
            ConfigError: If the port cannot be used.
        """
        # Only clients that reach the room need to reach the links.
        host = LOOPBACK if invite.is_loopback else ""
        try:
            return await stack.enter_async_context(
                open_listener(
                    host,
                    self._options.port,
                    certificate,
                    authenticator.authenticate,
                )
            )
        except OSError as error:
            raise ConfigError(
                f"Cannot listen for links: {error.strerror}. "
                "Choose another port with --port."
            ) from None

    # ----------------------------------------------------------------------- the room

    async def _enter_room(
        self,
        stack: AsyncExitStack,
        invite: Invite,
        keys: RoomKeys,
        authenticator: Authenticator,
    ) -> RoomConnection:
        """Register in the room, and stay there as long as the stack is open.

        Raises:
            RefusedError: If the signaling server does not let the worker in.
        """
        card = msgspec.to_builtins(self._card(authenticator))
        room = await stack.enter_async_context(
            open_room(
                invite.url,
                keys,
                peer_id=self._peer_id,
                role="worker",
                metadata=Metadata(TAGS, card),
                log=self._log,
            )
        )
        try:
            await room.wait_registered()
        except RegistrationRefusedError as error:
            raise RefusedError(
                f"The signaling server at {invite.url} refused this worker: "
                f"{error.reason}."
            ) from None
        return room

    async def _find_room(self, servants: trio.Nursery) -> tuple[Invite, bool]:
        """Find the room, and serve its signaling if no other process does.

        Returns:
            The invite, and True if this worker serves the room.
        """
        options = self._options
        elsewhere = await call_storage(
            room_elsewhere, options.settings, options.environ
        )
        if elsewhere is not None and options.listen is not None:
            raise UsageError(
                f"This machine's room is at {elsewhere.url}, so the worker runs no "
                "signaling server and --listen has no meaning.",
                "Leave it out. To start a room of its own instead, remove the stored "
                "invite (`sleap-rtc config show` names the state directory) and the "
                "configured signaling_websocket.",
            )
        if elsewhere is not None:
            return elsewhere, False
        known = await call_storage(hosting, options.environ)
        where = options.listen or known or Hosting(LOOPBACK, 0)
        try:
            port = await servants.start(run_signaling, where.host, where.port)
        except OSError as error:
            invite = await call_storage(load_invite, options.environ)
            if error.errno == errno.EADDRINUSE and where == known and invite:
                self._log.info("another worker of this user serves the room")
                return invite, False
            raise bind_problem(where, error) from None
        bound = Hosting(where.host, port)
        invite = await call_storage(
            host_room, bound, options.environ, options.public_url
        )
        return invite, True

    def _card(self, authenticator: Authenticator) -> WorkerCard:
        """Return the current description of the worker."""
        gpus = self._machine.gpus
        largest = max(gpus, key=lambda gpu: gpu.memory_mb, default=None)
        return WorkerCard(
            hostname=self._machine.hostname,
            gpu_model=largest.model if largest else "CPU",
            gpu_memory_mb=largest.memory_mb if largest else 0,
            status="available" if self._queue.free else "busy",
            name=self._options.name,
            sleap_nn_version=self._machine.sleap_nn,
            version=sleap_rtc.__version__,
            slots=self._queue.slots,
            slots_free=self._queue.free,
            queued=self._queue.waiting,
            disk_free=self._disk_free,
            shared_storage=self._options.shared_root is not None,
            nonce=authenticator.nonce.hex(),
        )

    async def _update_card(
        self, room: RoomConnection, authenticator: Authenticator
    ) -> None:
        """Update the description of the worker in the room, until cancelled."""
        while True:
            with trio.move_on_after(STATUS_INTERVAL):
                await self._queue.wait_changed()
            self._disk_free = await call_storage(_free_bytes, self._jobs)
            await room.update_metadata(msgspec.to_builtins(self._card(authenticator)))

    # ---------------------------------------------------------------------- the links

    async def _serve_links(self, listener: Listener) -> None:
        """Restore the jobs of an earlier process, then accept clients."""
        settings = JobSettings(
            worker_id=self._peer_id,
            directory=self._jobs,
            shared_root=self._options.shared_root,
            programs=self._options.programs,
        )
        async with AsyncExitStack() as stack:
            try:
                store, writer = await stack.enter_async_context(
                    open_store_writer(self._state / STORE_NAME, self._log)
                )
                loaded = await call_storage(store.load, self._peer_id)
            except StoreError as error:
                raise ConfigError(str(error)) from None
            for reason in loaded.unreadable:
                self._log.warning("job not restored", reason=reason)
            jobs = await stack.enter_async_context(
                open_jobs(settings, self._queue, writer, self._log)
            )
            await jobs.restore(loaded.records)
            async with trio.open_nursery() as nursery:
                while True:
                    link = await listener.accept()
                    nursery.start_soon(serve_link, jobs, self._greet, link)

    def _addresses(self, listener: Listener) -> tuple[Address, ...]:
        """Return the addresses of the links, the likeliest first."""
        found = [Address(host, port) for host, port in listener.local_addresses()]
        public = self._options.public_address
        return tuple(found if public is None else [public, *found])

    def _greet(self) -> Greeting:
        return Greeting(
            protocol=PROTOCOL_VERSION,
            version=sleap_rtc.__version__,
            role="worker",
            hostname=self._machine.hostname,
            shared_storage=self._options.shared_root is not None,
            disk_free=self._disk_free,
            slots=self._queue.slots,
            gpus=self._machine.gpus,
            sleap_nn=self._machine.sleap_nn,
        )


def _free_bytes(directory: Path) -> int:
    directory = directory if directory.exists() else directory.parent
    return shutil.disk_usage(directory).free
