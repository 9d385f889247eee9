"""The worker role: be found in the room, accept links, own jobs."""

import errno
import re
import shutil
import socket
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
import structlog
import trio

import sleap_rtc
from sleap_rtc.config import (
    ConfigError,
    Settings,
    SharedStorageConfig,
    load_settings,
    make_state_directory,
    state_directory,
)
from sleap_rtc.errors import RefusedError, UsageError
from sleap_rtc.io.connect.listener import Listener, open_listener
from sleap_rtc.io.hardware import MachineInfo, describe_machine
from sleap_rtc.io.link.certificates import make_certificate
from sleap_rtc.io.nursery import open_background_nursery
from sleap_rtc.io.signaling.client import (
    RegistrationRefusedError,
    RoomConnection,
    open_room,
)
from sleap_rtc.io.signals import end_on_signal
from sleap_rtc.proto.job.script import DEFAULT_PROGRAMS
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
    parse_listen_address,
    room_elsewhere,
)
from sleap_rtc.rendezvous.server import run_signaling
from sleap_rtc.worker.identity import take_identity
from sleap_rtc.worker.jobs import JobSettings, open_jobs
from sleap_rtc.worker.session import serve_link
from sleap_rtc.worker.slots import SlotQueue
from sleap_rtc.worker.store import StoreError, open_store_writer

STATUS_INTERVAL = 30.0
"""Seconds after which the room is told anew how much disk is free."""

STORE_NAME = "jobs.sqlite3"
"""The file in the state directory that remembers the jobs."""

TAGS = ("sleap-rtc", "training-worker", "inference-worker")
"""By which SLEAP peers look for workers."""

OnReady = Callable[[Invite, bool], None]


class WorkerOptions(msgspec.Struct, frozen=True):
    """What a worker needs to know.

    Args:
        environ: Environment variables; they say where the state directory is.
        settings: The configuration file and the environment.
        shared_root: Where this machine mounts the shared storage, if anywhere.
        slots: Jobs at the same time; None for one per GPU.
        gpus: Numbers of the GPUs that jobs may use; None for all.
        programs: Programs that jobs may run.
        name: What the worker is called in lists.
        port: Port number of the links, TCP and UDP; 0 takes a free one.
        listen: Where its own signaling server listens, if the user said so.
        public_url: How others reach that server, if the user said so.
        public_address: How others reach the links, where a provider or a router maps
            their port to another one.
    """

    environ: Mapping[str, str]
    settings: Settings
    shared_root: Path | None
    slots: int | None
    gpus: tuple[int, ...] | None
    programs: frozenset[str]
    name: str
    port: int
    listen: Hosting | None
    public_url: str | None
    public_address: Address | None


def read_options(
    environ: Mapping[str, str],
    *,
    listen: str | None = None,
    public_url: str | None = None,
    public_address: str | None = None,
    shared_storage_root: Path | None = None,
    slots: int | None = None,
    allow: tuple[str, ...] = (),
    name: str | None = None,
    port: int | None = None,
) -> WorkerOptions:
    """Put the command line over the settings.

    Raises:
        ConfigError: If the configuration can't be used.
        UsageError: If an option can't.
    """
    settings = load_settings(environ)
    mine = settings.worker
    return WorkerOptions(
        environ=environ,
        settings=settings,
        shared_root=SharedStorageConfig.get_shared_storage_root(shared_storage_root),
        slots=slots or mine.slots,
        gpus=mine.gpus,
        programs=DEFAULT_PROGRAMS | frozenset(mine.allow) | frozenset(allow),
        name=name or mine.name or socket.gethostname(),
        port=mine.link_port if port is None else port,
        listen=parse_listen_address(listen) if listen else None,
        public_url=public_url,
        public_address=_public_address(public_address or mine.public_address),
    )


def _public_address(text: str | None) -> Address | None:
    if text is None:
        return None
    where = parse_listen_address(text)
    return Address(where.host, where.port)


async def run_worker(
    options: WorkerOptions, *, on_ready: OnReady | None = None
) -> None:
    """Run a worker until it is cancelled or told to end by a signal.

    Args:
        options: What it needs to know.
        on_ready: Is told once the worker is in its room: the invite, and whether the
            worker serves the room's signaling itself.

    Raises:
        ConfigError: If a port or the state directory can't be used.
        RefusedError: If the signaling server does not let it in.
    """
    async with trio.open_nursery() as nursery:
        await nursery.start(end_on_signal, nursery.cancel_scope)
        directory = await trio.to_thread.run_sync(make_state_directory, options.environ)
        machine = await trio.to_thread.run_sync(describe_machine, directory)
        with await trio.to_thread.run_sync(
            take_identity, directory, _slug(options.name)
        ) as identity:
            await Worker(options, machine, identity.peer_id).run(on_ready)
        nursery.cancel_scope.cancel(reason="the worker has ended")


class Worker:
    """One worker, from its certificate to its last job.

    Args:
        options: What it needs to know.
        machine: What it runs on.
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
        self._jobs = self._state / "jobs"
        self._disk_free = machine.disk_free
        self._queue = SlotQueue(options.slots or max(1, len(gpus)), gpus)

    async def run(self, on_ready: OnReady | None) -> None:
        """Serve until cancelled."""
        async with open_background_nursery() as servants:
            invite, hosted = await self._find_room(servants)
            certificate = await trio.to_thread.run_sync(make_certificate)
            keys = RoomKeys.from_secret(invite.secret)
            authenticator = Authenticator(
                keys, self._peer_id, certificate.certificate_der, self._log
            )
            # The links need to be reachable from no further than the room itself.
            host = LOOPBACK if invite.is_loopback else ""
            async with AsyncExitStack() as stack:
                try:
                    listener = await stack.enter_async_context(
                        open_listener(
                            host,
                            self._options.port,
                            certificate,
                            authenticator.authenticate,
                        )
                    )
                except OSError as error:
                    raise ConfigError(
                        f"Links can't be listened for: {error.strerror}. "
                        "Choose another port with --port."
                    ) from None
                room = await stack.enter_async_context(
                    open_room(
                        invite.url,
                        keys,
                        peer_id=self._peer_id,
                        role="worker",
                        metadata=Metadata(
                            TAGS, msgspec.to_builtins(self._card(authenticator))
                        ),
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
                    authenticator.answer_offers, room, lambda: self._addresses(listener)
                )
                servants.start_soon(self._tell_room, room, authenticator)
                await self._serve_links(listener)

    # ----------------------------------------------------------------------- the room

    async def _find_room(self, servants: trio.Nursery) -> tuple[Invite, bool]:
        """Find the room, and serve its signaling if nobody else does.

        Returns:
            The invite, and whether this worker serves the room.
        """
        options = self._options
        elsewhere = await trio.to_thread.run_sync(
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
        known = await trio.to_thread.run_sync(hosting, options.environ)
        where = options.listen or known or Hosting(LOOPBACK, 0)
        try:
            port = await servants.start(run_signaling, where.host, where.port)
        except OSError as error:
            invite = await trio.to_thread.run_sync(load_invite, options.environ)
            if error.errno == errno.EADDRINUSE and where == known and invite:
                self._log.info("another worker of this user serves the room")
                return invite, False
            raise bind_problem(where, error) from None
        bound = Hosting(where.host, port)
        invite = await trio.to_thread.run_sync(
            host_room, bound, options.environ, options.public_url
        )
        return invite, True

    def _card(self, authenticator: Authenticator) -> WorkerCard:
        """Describe the worker as it is at present."""
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

    async def _tell_room(
        self, room: RoomConnection, authenticator: Authenticator
    ) -> None:
        """Keep what the room knows of this worker true."""
        while True:
            with trio.move_on_after(STATUS_INTERVAL):
                await self._queue.wait_changed()
            self._disk_free = await trio.to_thread.run_sync(
                _free_bytes, self._jobs, abandon_on_cancel=True
            )
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
                loaded = await trio.to_thread.run_sync(store.load, self._peer_id)
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
        """Say where the links can be reached, the likeliest first."""
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


def _slug(name: str) -> str:
    """Make a part of a peer id out of a name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:32] or "machine"
