"""The sections of a report, and the ways in each."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import msgspec

from bench.contestants import copies, ends, paths, product, ssh, wormhole
from bench.contestants.product import Way
from bench.files import file_system_of, fresh_directory, loop_mount, make_load
from bench.measures import (
    GIBIBYTE,
    KIBIBYTE,
    Absent,
    BenchError,
    Contestant,
    Load,
    Row,
    Section,
)
from bench.rounds import take_turns

INTERNET_DATAGRAM, JUMBO_DATAGRAM = 1350, 8900
"""Bytes of a QUIC datagram that passes through most tunnels, and of a large one."""

REFLINKED = 5 * GIBIBYTE
"""Bytes of the file whose blocks are shared."""

LONG = GIBIBYTE
"""Bytes of a file that is long enough to show that memory does not grow with it."""

SHARED = Way("shared", "shared")
TCP = Way("tcp", "tcp")
QUIC = Way(f"quic, {INTERNET_DATAGRAM} B", "quic", datagram_size=INTERNET_DATAGRAM)
JUMBO = Way(f"quic, {JUMBO_DATAGRAM} B", "quic", datagram_size=JUMBO_DATAGRAM)
OWN_QUIC = Way("quic, its own choice", "quic")

Ways = list[Contestant | Absent]


class Settings(msgspec.Struct, frozen=True):
    """The choices of the user.

    Args:
        disk: A directory on the storage of interest.
        memory: A directory in memory; None where there is no such file system.
        size: Bytes of the file.
        quic_size: Bytes of the file for the slower ways.
        rounds: Measurements of each way.
        peers_python: A Python that has aiortc, or None.
        wormhole: The command of magic-wormhole, or None.
        say: Shows the current step.
    """

    disk: Path
    memory: Path | None
    size: int
    quic_size: int
    rounds: int
    peers_python: str | None
    wormhole: Path | None
    say: Callable[[str], object]


def shared_on_disk(settings: Settings) -> Section:
    """The shared route beside plain copies, on the storage of interest."""
    return _shared(settings, "disk", settings.disk)


def shared_in_memory(settings: Settings) -> Section:
    """The same where the storage costs nothing."""
    return _shared(settings, "memory", settings.memory or settings.disk)


def over_tcp(settings: Settings) -> Section:
    """A link over TCP, from memory to memory."""
    place = settings.memory or settings.disk
    with ExitStack() as stack:
        directory = stack.enter_context(fresh_directory(place))
        load = make_load(directory, settings.size)
        ways: Ways = [
            *product.deliveries(load, [TCP]),
            ends.tls_stream(load),
            *_over_ssh(stack, load, directory),
            _wormhole(stack, settings, load, directory),
        ]
        return _measure(settings, Section("tcp", "over TCP", "", load.size), load, ways)


def over_quic(settings: Settings) -> Section:
    """A link over QUIC, from memory to memory, with a smaller file."""
    place = settings.memory or settings.disk
    with fresh_directory(place) as directory:
        load = make_load(directory, settings.quic_size)
        ways: Ways = [
            *product.deliveries(load, [QUIC, JUMBO, OWN_QUIC]),
            ends.engine_in_memory(load, INTERNET_DATAGRAM),
            ends.data_channel(load, settings.peers_python),
        ]
        section = Section("quic", "over QUIC", "", load.size)
        return _measure(settings, section, load, ways)


def over_a_path(settings: Settings) -> Section:
    """Links through a proxy that delays and loses; see `impaired.py` for more of it."""
    section = Section("path", "on a path, once warm", "", settings.quic_size)
    ways = [*paths.links(settings.quic_size)]
    return take_turns(section, ways, settings.rounds, settings.say)


def long_over_quic(settings: Settings) -> Section:
    """A long file over QUIC, once: what counts is the memory."""
    place = settings.memory or settings.disk
    section = Section("long", "a long file over QUIC", "", settings.size)
    if settings.size < LONG:
        reason = f"only with --size of {LONG // GIBIBYTE} GiB or more"
        section.rows = [Row(OWN_QUIC.name, absent=reason)]
        return section
    with fresh_directory(place) as directory:
        load = make_load(directory, settings.size)
        once = msgspec.structs.replace(settings, rounds=1)
        return _measure(once, section, load, [*product.deliveries(load, [OWN_QUIC])])


def start_of_a_job(settings: Settings) -> Section:
    """From the command to the running job, with next to no data."""
    with fresh_directory(settings.disk) as directory:
        load = make_load(directory, KIBIBYTE)
        section = Section("start", "from `send` to a running job", "", None)
        return _measure(
            settings, section, load, [*product.starts(load, [SHARED, TCP, OWN_QUIC])]
        )


def shared_blocks(settings: Settings) -> Section:
    """The shared route where a copy can share its blocks with the original.

    The blocks of the file are reserved and not written, so a small disk is enough;
    sharing them is the same work.
    """
    size = f"{REFLINKED // GIBIBYTE} GiB"
    section = Section("reflink", f"{size}, shared blocks", "loop device", None)
    section.rows = [
        row for kind in ("xfs", "btrfs") for row in _shared_blocks(settings, kind)
    ]
    return section


SECTIONS: dict[str, Callable[[Settings], Section]] = {
    "disk": shared_on_disk,
    "memory": shared_in_memory,
    "tcp": over_tcp,
    "quic": over_quic,
    "path": over_a_path,
    "start": start_of_a_job,
    "reflink": shared_blocks,
    "long": long_over_quic,
}
"""Every section, by the name that the command line takes."""


def _shared(settings: Settings, key: str, place: Path) -> Section:
    with fresh_directory(place) as directory:
        load = make_load(directory, settings.size)
        ways: Ways = [*product.deliveries(load, [SHARED]), *copies.copies(load)]
        section = Section(key, "shared storage", "", load.size)
        return _measure(settings, section, load, ways)


def _measure(settings: Settings, section: Section, load: Load, ways: Ways) -> Section:
    section.place = file_system_of(load.path.parent)
    return take_turns(section, ways, settings.rounds, settings.say)


def _shared_blocks(settings: Settings, kind: str) -> list[Row]:
    way = Way(f"shared ({kind})", "shared")
    with fresh_directory(settings.disk) as directory:
        try:
            with loop_mount(kind, directory, REFLINKED * 3) as mounted:
                load = make_load(mounted, REFLINKED, reserve_only=True)
                section = Section("", f"shared blocks on {kind}", kind, None)
                ways = product.deliveries(load, [way])
                return take_turns(section, ways, settings.rounds, settings.say).rows
        except BenchError as error:
            return [Row(way.name, absent=str(error))]


def _over_ssh(stack: ExitStack, load: Load, directory: Path) -> Ways:
    names = ("scp", "rsync -e ssh")
    if missing := ssh.why_not():
        return [Absent(name, missing) for name in names]
    keys = directory / "ssh"
    keys.mkdir(mode=0o700)
    try:
        server = stack.enter_context(ssh.open_server(keys))
    except BenchError as error:
        return [Absent(name, str(error)) for name in names]
    return [*ssh.copies_over_ssh(load, keys, server)]


def _wormhole(
    stack: ExitStack, settings: Settings, load: Load, directory: Path
) -> Contestant | Absent:
    name = "magic-wormhole"
    if settings.wormhole is None:
        return Absent(name, "no `wormhole` on the PATH or beside --peers-python")
    files = directory / "wormhole"
    files.mkdir()
    try:
        servers = stack.enter_context(wormhole.open_servers(settings.wormhole, files))
    except (BenchError, FileNotFoundError) as error:
        return Absent(name, f"its servers do not start: {error}")
    return wormhole.wormhole(load, servers)
