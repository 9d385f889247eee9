"""Options of a worker: the command line over the settings."""

import re
import socket
from collections.abc import Mapping
from pathlib import Path

import msgspec

from sleap_rtc.config import Settings, find_shared_root, load_settings
from sleap_rtc.proto.job.script import DEFAULT_PROGRAMS
from sleap_rtc.proto.rendezvous.envelope import Address
from sleap_rtc.rendezvous.rooms import Hosting, parse_listen_address

MAX_SLUG_LENGTH = 32
"""Characters of a worker's name in its peer id."""


class WorkerOptions(msgspec.Struct, frozen=True):
    """The options of a worker.

    Args:
        environ: Environment variables; they name the state directory.
        settings: The configuration file and the environment.
        shared_root: Where this machine mounts the shared storage; None without one.
        slots: Jobs that run at the same time; None for one per GPU.
        gpus: Numbers of the GPUs that jobs may use; None for all.
        programs: Programs that jobs may run.
        name: Name of the worker in lists.
        port: Port number of the links, TCP and UDP; 0 takes a free one.
        listen: Address of its own signaling server, if the user named one.
        public_url: Address of that server for other machines, if the user named one.
        public_address: Address of the links for other machines, where a provider or a
            router maps their port to another one.
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

    @property
    def slug(self) -> str:
        """The name as a part of a peer id."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        return slug[:MAX_SLUG_LENGTH] or "machine"


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
    """Return the options of a worker: the arguments, and the settings for the rest.

    Raises:
        ConfigError: If the configuration is invalid.
        UsageError: If an argument is invalid.
    """
    settings = load_settings(environ)
    defaults = settings.worker
    return WorkerOptions(
        environ=environ,
        settings=settings,
        shared_root=find_shared_root(shared_storage_root, environ),
        slots=slots or defaults.slots,
        gpus=defaults.gpus,
        programs=DEFAULT_PROGRAMS | frozenset(defaults.allow) | frozenset(allow),
        name=name or defaults.name or socket.gethostname(),
        port=defaults.link_port if port is None else port,
        listen=parse_listen_address(listen) if listen else None,
        public_url=public_url,
        public_address=_public_address(public_address or defaults.public_address),
    )


def _public_address(text: str | None) -> Address | None:
    if text is None:
        return None
    where = parse_listen_address(text)
    return Address(where.host, where.port)
