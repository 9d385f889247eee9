"""Measure shared storage: any mounted directory, such as your own NFS.

    python -m bench.nfs /mnt/lab --size 1GiB --json report.json
    python -m bench.nfs /mnt/lab --second /mnt/lab-again

A file is copied from `--source` (by default the folder of temporary files) by each
method of sleap-rtc and by common tools, in turns, each time until it is on the disk
(fsync). Then it is fetched back. `--second` is another mount of the same storage, best
with `nosharecache`; it acts as another machine, and shows how long a new file takes to
be seen there. Everything is removed at the end, even after Ctrl-C.
"""

import argparse
import os
import platform
import re
import secrets
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import msgspec
import trio
from rich import box
from rich.console import Console
from rich.table import Table

from bench.direct import copy_directly
from bench.measures import MEBIBYTE, BenchError, parse_size
from sleap_rtc.io.storage.copy import copy_file
from sleap_rtc.io.storage.copy_strategies import STRATEGIES, Strategy
from sleap_rtc.io.storage.folder import StorageError
from sleap_rtc.io.storage.probe import probe_storage, read_probe, write_probe
from sleap_rtc.proto.errors import InvalidInput

PROBE_TIMEOUT = 30.0
"""Seconds in which storage has to answer, and a new file has to be seen."""

LOOKS = 20
"""Number of measurements of short operations."""

console = Console(highlight=False)

Copy = Callable[[Path, Path], object]


class Mount(msgspec.Struct, frozen=True):
    """The mount of a directory."""

    directory: str
    file_system: str
    options: str


class Row(msgspec.Struct):
    """One way to move a file, and its measurements.

    Args:
        name: Its name in the table.
        seconds: Seconds of each round.
        failure: The reason why it is not possible here.
    """

    name: str
    seconds: list[float] = []
    failure: str = ""


class Latency(msgspec.Struct, frozen=True):
    """Seconds of a short operation, each time."""

    name: str
    seconds: list[float]


class Report(msgspec.Struct):
    """Everything that was measured, as it is written with `--json`."""

    system: str
    size: int
    mounts: list[Mount]
    copies: list[Row]
    latencies: list[Latency]


def main() -> int:
    """Run the command line; return the exit code."""
    arguments = _parse_arguments()
    # SIGTERM cleans up as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        report = measure(
            arguments.directory,
            arguments.second,
            arguments.source,
            arguments.size,
            arguments.rounds,
        )
    except (BenchError, OSError, StorageError) as error:
        console.print(f"The measurement failed: {error}", style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("Interrupted; everything is cleaned up.")
        return 130
    show(report)
    if arguments.json is not None:
        arguments.json.write_bytes(
            msgspec.json.format(msgspec.json.encode(report)) + b"\n"
        )
    return 0


def measure(
    directory: Path, second: Path | None, source: Path, size: int, rounds: int
) -> Report:
    """Measure everything.

    Args:
        directory: A directory on the storage.
        second: The same directory by way of another mount.
        source: A local directory.
        size: Bytes of the file.
        rounds: Measurements of each way.

    Raises:
        BenchError: If there is no room, or the second directory is another one.
        OSError: If storage fails.
        StorageError: If storage fails.
    """
    for place in (source, directory):
        if shutil.disk_usage(place).free < size * 5 // 2:
            raise BenchError(
                f"{place} has no room: 2.5 times {size / MEBIBYTE:.0f} MiB are"
                " needed; name a smaller --size"
            )
    mounts = [find_mount(place) for place in (source, directory, second) if place]
    with _scratch(source) as local, _scratch(directory) as there:
        here_again = there if second is None else second / there.name
        if not here_again.is_dir():
            raise BenchError(f"{second} does not show new files of {directory}")
        latencies = [measure_probe(there)]
        if second is not None:
            latencies += measure_visibility(there, here_again)
        package = local / "package.bin"
        with package.open("wb") as file:
            for _ in range(0, size, MEBIBYTE):
                file.write(os.urandom(MEBIBYTE))
            os.fsync(file.fileno())
        copies = take_turns(package, there, here_again, rounds)
    system = f"{platform.system()} {platform.release()}, {os.cpu_count()} cores"
    return Report(system, package_size(size), mounts, copies, latencies)


def package_size(size: int) -> int:
    """Return the bytes of the file: whole MiB."""
    return -(-size // MEBIBYTE) * MEBIBYTE


def take_turns(package: Path, there: Path, again: Path, rounds: int) -> list[Row]:
    """Copy a file in every way, and fetch it, in turns.

    Args:
        package: The file.
        there: A directory on the storage.
        again: The same directory as another machine sees it.
        rounds: Measurements of each way.
    """
    ways = [(Row(name), copy) for name, copy in list_copies().items()]
    fetched = Row("fetch")
    for number in range(rounds):
        shift = number % len(ways)
        for row, copy in ways[shift:] + ways[:shift]:
            if not row.failure:
                console.print(f"[dim]round {number + 1} of {rounds}: {row.name}[/]")
                _copy_once(row, copy, package, there / "copy.bin")
        _copy_by_product(package, there / "result.bin")
        # A client that fetches has not written the file: drop it from the page cache.
        _forget_content(again / "result.bin")
        _copy_once(
            fetched, _copy_by_product, again / "result.bin", package.parent / "back.bin"
        )
        (there / "result.bin").unlink()
    return [*(row for row, _ in ways), fetched]


def list_copies() -> dict[str, Copy]:
    """List the ways to copy a file; each returns when the copy is on the disk."""
    copies: dict[str, Copy] = {"sleap-rtc": _copy_by_product}
    for name, strategy in STRATEGIES:
        copies[f"  {name}"] = partial(_copy_by_strategy, strategy)
    if hasattr(os, "O_DIRECT"):
        copies["O_DIRECT"] = partial(_copy_by_strategy, copy_directly)
    copies["shutil.copy2"] = _copy_by_python
    for tool, arguments in (
        ("cp", "{source} {target}"),
        ("dd", f"if={{source}} of={{target}} bs={MEBIBYTE}"),
        ("rsync", "--whole-file {source} {target}"),
    ):
        if shutil.which(tool) is not None:
            copies[tool] = partial(_copy_by_tool, tool, arguments.split())
    return copies


def measure_probe(there: Path) -> Latency:
    """Measure how long storage takes to answer the probe of sleap-rtc."""
    seconds = []
    for _ in range(LOOKS):
        began = time.monotonic()
        health = trio.run(probe_storage, there, PROBE_TIMEOUT)
        if not health.ok:
            raise BenchError(health.reason)
        seconds.append(time.monotonic() - began)
    return Latency("probe of the storage", seconds)


def measure_visibility(there: Path, again: Path) -> list[Latency]:
    """Measure how long a new file takes to be seen through the other mount.

    Raises:
        BenchError: If it is never seen: the two are not the same storage.
    """
    fresh, asked = [], []
    for number in range(LOOKS):
        fresh.append(_see(there, again, f"probe-{number}"))
        _is_there(
            again, f"asked-{number}"
        )  # NFS caches for a while that it did not exist
        asked.append(_see(there, again, f"asked-{number}"))
    return [
        Latency("a new file is seen", fresh),
        Latency("the same, after it was looked for", asked),
    ]


def _see(there: Path, again: Path, name: str) -> float:
    """Write a small file, and wait until it is read by way of the other mount."""
    nonce = secrets.token_bytes(32)
    write_probe(there, name, nonce)
    began = time.monotonic()
    while not _is_there(again, name):
        if time.monotonic() > began + PROBE_TIMEOUT:
            raise BenchError(f"{again} does not show files that are written to {there}")
        time.sleep(0.001)
    if read_probe(again, name) != nonce:
        raise BenchError(f"{again} shows something else than {there}")
    return time.monotonic() - began


def _is_there(root: Path, name: str) -> bool:
    try:
        read_probe(root, name)
    except InvalidInput:
        return False
    return True


def _copy_once(row: Row, copy: Copy, source: Path, target: Path) -> None:
    began = time.monotonic()
    try:
        copy(source, target)
        row.seconds.append(time.monotonic() - began)
        if target.stat().st_size != source.stat().st_size:
            raise BenchError(f"{row.name} did not copy everything")
    except (BenchError, OSError, StorageError) as error:
        row.failure = str(error)
    finally:
        target.unlink(missing_ok=True)


def _copy_by_product(source: Path, target: Path) -> None:
    copy_file(
        source,
        target.parent,
        target.name,
        progress=lambda _: None,
        check=lambda: None,
    )


def _copy_by_strategy(strategy: Strategy, source: Path, target: Path) -> None:
    with source.open("rb") as origin, target.open("xb") as copy:
        size, copied = os.fstat(origin.fileno()).st_size, 0
        for so_far in strategy(origin.fileno(), copy.fileno(), 0, size):
            copied = so_far
        if copied != size:
            raise BenchError("not possible here")
        os.fsync(copy.fileno())


def _copy_by_python(source: Path, target: Path) -> None:
    shutil.copy2(source, target)
    _sync(target)


def _copy_by_tool(tool: str, arguments: list[str], source: Path, target: Path) -> None:
    filled = [part.format(source=source, target=target) for part in arguments]
    done = subprocess.run([tool, *filled], capture_output=True, text=True)
    if done.returncode != 0:
        raise BenchError(done.stderr.strip() or f"exit status {done.returncode}")
    _sync(target)


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _forget_content(path: Path) -> None:
    with path.open("rb") as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="sleap-rtc-bench-", dir=parent) as name:
        yield Path(name)


def find_mount(directory: Path) -> Mount:
    """Return the mount of a directory, from /proc or from the output of `mount`."""
    place = directory.resolve()
    table = Path("/proc/self/mountinfo")
    lines: list[tuple[str, str, str]] = []
    if table.exists():
        for line in table.read_text().splitlines():
            # proc_pid_mountinfo(5): blanks are written as \040.
            left, _, right = line.partition(" - ")
            point = re.sub(
                r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), left.split()[4]
            )
            kind, _, rest = right.partition(" ")
            lines.append((point, kind, f"{left.split()[5]} {rest.split()[-1]}"))
    elif shutil.which("mount") is not None:
        out = subprocess.run(["mount"], capture_output=True, text=True).stdout
        for found in re.finditer(r" on (.+) \((\w+),? ?(.*)\)", out):
            lines.append((found[1], found[2], found[3]))
    # The last mount covers those before it.
    beneath = [line for line in lines if place.is_relative_to(line[0])]
    point, kind, options = max(
        reversed(beneath), key=lambda line: len(line[0]), default=("", "unknown", "")
    )
    return Mount(str(directory), kind, options)


def show(report: Report) -> None:
    """Print tables."""
    for mount in report.mounts:
        console.print(
            f"{mount.directory}: {mount.file_system} {mount.options}",
            markup=False,
            soft_wrap=True,
        )
    table = Table(box=box.SIMPLE, show_edge=False, title="until it is on the disk")
    for title in (f"{report.size / 1e6:,.0f} MB by", "MB/s", "min-max"):
        table.add_column(title, justify="left" if " by" in title else "right")
    for row in report.copies:
        rates = [report.size / seconds / 1e6 for seconds in row.seconds]
        if row.failure:
            table.add_row(row.name, row.failure)
        else:
            table.add_row(
                row.name,
                f"{statistics.median(rates):,.0f}",
                f"{min(rates):,.0f}-{max(rates):,.0f}",
            )
    console.print(table)
    for latency in report.latencies:
        middle, longest = statistics.median(latency.seconds), max(latency.seconds)
        console.print(
            f"{latency.name}: {middle * 1e3:.1f} ms, at most {longest * 1e3:.1f} ms"
        )


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure shared storage.")
    parser.add_argument("directory", type=_parse_directory, help="on the storage")
    parser.add_argument(
        "--second", type=_parse_directory, help="the same, by way of another mount"
    )
    parser.add_argument(
        "--source",
        type=_parse_directory,
        default=tempfile.gettempdir(),
        help="a local directory (default: %(default)s)",
    )
    parser.add_argument(
        "--size", type=parse_size, default="64MiB", help="such as 256MiB or 4GiB"
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default: 3)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the report here"
    )
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("at least one round is needed")
    return arguments


def _parse_directory(text: str) -> Path:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not a directory")
    return Path(text)


if __name__ == "__main__":
    sys.exit(main())
