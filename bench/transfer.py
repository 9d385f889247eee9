"""Measure how fast a file reaches a worker, by each route and beside plain copies.

    python bench/transfer.py --size 512MiB --rounds 3

What is measured is the product itself: a worker daemon, and `sleap-rtc send` with a
package whose job does next to nothing. The time is the client's own for its transfer
phase, which ends when the worker has the whole package on its disk (with fsync) and has
queued the job. A route has fixed costs (the mount probe, messages to and fro), which
hide the transfer of a small file; they are measured as well, by sending a package that
is next to empty, and stand in a column of their own.

The package is a file of random bytes with a small zip at its end, as in archives that
unpack themselves: the worker stores all of it and unpacks only a script. `cp`, `dd`
and `shutil.copy2` copy the same file within the same file system; their time includes
an fsync, too. The ways take turns, and each begins in another place in each round,
because the speed of a disk and of a shared machine changes from minute to minute.
"""

import argparse
import mmap
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import psutil
from blake3 import blake3
from peers import PROGRAM, BenchError, deliver
from rich import box
from rich.console import Console
from rich.table import Table

MEBIBYTE = 1024**2
SMALL = 1024
"""Bytes of a package that shows what a route costs without its load."""

ROUTES = ("shared", "channel", "tcp", "quic")
"""What `sleap-rtc send --route` takes; the last two are the channel over one link."""

DEFAULT_ROUTES = ("shared", "channel")

console = Console(highlight=False)


class Sample(msgspec.Struct, frozen=True):
    """One way, once.

    Args:
        seconds: How long it took.
        is_intact: True if the bytes that arrived have the BLAKE3 hash of the source.
        client_cpu: CPU seconds of the side that has the file.
        worker_cpu: CPU seconds of the worker; None if there is none.
        client_peak: The most bytes resident; None if not known.
        worker_peak: The same of the worker.
        link: The transport between the two, if they have one.
    """

    seconds: float
    is_intact: bool
    client_cpu: float
    worker_cpu: float | None = None
    client_peak: int | None = None
    worker_peak: int | None = None
    link: str = ""


class Machine(msgspec.Struct, frozen=True):
    """What the numbers were measured on."""

    system: str
    python: str
    cores: int
    memory_bytes: int
    file_system: str


class Way(msgspec.Struct):
    """One way for the file, and what was measured of it."""

    name: str
    samples: list[Sample] = []
    small_samples: list[Sample] = []


class Report(msgspec.Struct):
    """Everything that was measured, as it is written with `--json`."""

    machine: Machine
    size: int
    ways: list[Way]


Copy = Callable[[Path, Path], object]

COPIES: dict[str, Copy] = {
    "cp": lambda source, target: _run("cp", str(source), str(target)),
    "dd": lambda source, target: _run(
        "dd", f"if={source}", f"of={target}", f"bs={MEBIBYTE}"
    ),
    "shutil.copy2": shutil.copy2,
}


def main() -> int:
    """Do what the command line says; returns the exit code."""
    arguments = _parse_arguments()
    # A polite end is an end with cleaning up.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory(
            prefix="sleap-rtc-bench-", dir=arguments.directory
        ) as name:
            report = measure(
                Path(name), arguments.size, arguments.rounds, arguments.routes
            )
    except (BenchError, OSError, subprocess.CalledProcessError) as error:
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
    intact = all(sample.is_intact for way in report.ways for sample in way.samples)
    return 0 if intact else 1


def measure(directory: Path, size: int, rounds: int, routes: tuple[str, ...]) -> Report:
    """Measure all ways in turn.

    Args:
        directory: An empty directory; the files go there.
        size: Bytes of the file.
        rounds: How often each way is measured.
        routes: The routes to measure.

    Raises:
        BenchError: If there is no room, or a worker or a client failed.
    """
    free = shutil.disk_usage(directory).free
    if free < size * 5 // 2:
        raise BenchError(f"{directory} has {free} bytes free; 2.5 times {size} needed")
    arrived = directory / "arrived.zip"
    package = make_package(directory / "package.zip", size, arrived)
    small = make_package(directory / "small.zip", SMALL, arrived)
    ways = [*(Way(name) for name in COPIES), *(Way(route) for route in routes)]
    for number in range(rounds):
        shift = number % len(ways)
        for way in ways[shift:] + ways[:shift]:
            console.print(f"[dim]round {number + 1} of {rounds}: {way.name}[/]")
            if way.name in COPIES:
                way.samples.append(copy_once(COPIES[way.name], package, arrived))
            else:
                way.small_samples.append(send_once(way.name, small, arrived))
                way.samples.append(send_once(way.name, package, arrived))
    return Report(describe_machine(directory), package.stat().st_size, ways)


def make_package(path: Path, size: int, arrived: Path) -> Path:
    """Write a package of random bytes.

    Args:
        path: The file to write.
        size: How many random bytes.
        arrived: Where the job of the package keeps what the worker has stored.

    Returns:
        The path.
    """
    command = shlex.join((PROGRAM, path.name, str(arrived)))
    with path.open("wb") as file:
        for start in range(0, size, MEBIBYTE):
            file.write(os.urandom(min(MEBIBYTE, size - start)))
    with zipfile.ZipFile(path, "a") as package:
        package.writestr("train-script.sh", f"#!/bin/bash\n{command}\n")
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path


def copy_once(copy: Copy, source: Path, target: Path) -> Sample:
    """Copy a file on the same file system, and wait until it is on the disk."""
    warm_memory(source.stat().st_size)
    cpu, began = sum(os.times()[:4]), time.monotonic()
    copy(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())
    seconds, cpu = time.monotonic() - began, sum(os.times()[:4]) - cpu
    return Sample(round(seconds, 3), take_away(target, source), round(cpu, 3))


def send_once(route: str, source: Path, arrived: Path) -> Sample:
    """Send a package to a worker by one route."""
    warm_memory(source.stat().st_size)
    with tempfile.TemporaryDirectory(dir=source.parent) as name:
        delivery = deliver(source, route, Path(name))
    return Sample(
        seconds=delivery.seconds,
        is_intact=take_away(arrived, source),
        client_cpu=delivery.client.cpu_seconds,
        worker_cpu=delivery.worker.cpu_seconds,
        client_peak=delivery.client.peak_bytes,
        worker_peak=delivery.worker.peak_bytes,
        link="" if route == "shared" else delivery.link,
    )


def take_away(arrived: Path, source: Path) -> bool:
    """Remove a copy; returns whether it had the BLAKE3 hash of its source."""
    is_intact = _hash_of(arrived) == _hash_of(source)
    arrived.unlink()
    return is_intact


def warm_memory(size: int) -> None:
    """Touch more memory than a copy will fill.

    A virtual machine may have given its free memory back to its host; whoever uses it
    next would pay for that, a second or more for each gigabyte.
    """
    size = min(size * 3 // 2, psutil.virtual_memory().available // 2)
    with mmap.mmap(-1, size + MEBIBYTE) as memory:
        for _ in range(size // MEBIBYTE):
            memory.write(b"\1" * MEBIBYTE)


def _hash_of(path: Path) -> str:
    return blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()


def describe_machine(directory: Path) -> Machine:
    """Describe what this runs on, and the file system of a directory."""
    mounts = [
        mount
        for mount in psutil.disk_partitions(all=True)
        if directory.resolve().is_relative_to(mount.mountpoint)
    ]
    nearest = max(mounts, key=lambda mount: len(mount.mountpoint), default=None)
    return Machine(
        system=f"{platform.system()} {platform.release()} on {platform.machine()}",
        python=platform.python_version(),
        cores=os.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
        file_system=nearest.fstype if nearest else "unknown",
    )


def show(report: Report) -> None:
    """Print a table: medians, and of the throughput the slowest and the fastest."""
    machine = report.machine
    rounds = len(report.ways[0].samples)
    table = Table(
        box=box.SIMPLE,
        show_edge=False,
        pad_edge=False,
        title=f"{report.size / 1e6:,.0f} MB, {rounds} rounds, medians",
        caption=f"{machine.system}, {machine.cores} cores, "
        f"{machine.memory_bytes / 1024**3:.0f} GiB memory, {machine.file_system}, "
        f"Python {machine.python}. CPU in seconds, peak memory in MiB, client / worker",
    )
    table.add_column("way", no_wrap=True)
    for title in ("MB/s", "min-max", "CPU", "peak", "fixed", "bytes"):
        table.add_column(title, justify="right", no_wrap=True)
    for way in report.ways:
        table.add_row(*_row(report.size, way))
    console.print(table)


def _row(size: int, way: Way) -> tuple[str, ...]:
    samples = way.samples
    rates = [size / sample.seconds / 1e6 for sample in samples]
    small = [sample.seconds for sample in way.small_samples]
    peaks = [(s.client_peak, s.worker_peak) for s in samples]
    link = samples[0].link
    return (
        f"{way.name} ({link})" if link not in ("", way.name) else way.name,
        f"{statistics.median(rates):,.0f}",
        f"{min(rates):,.0f}-{max(rates):,.0f}",
        _pair(
            [s.client_cpu for s in samples], [s.worker_cpu for s in samples], "{:.3g}"
        ),
        _pair(
            [None if one is None else one / MEBIBYTE for one, _ in peaks],
            [None if two is None else two / MEBIBYTE for _, two in peaks],
            "{:.0f}",
        ),
        f"{statistics.median(small):.2f} s" if small else "",
        "intact" if all(s.is_intact for s in samples) else "DAMAGED",
    )


def _pair(
    client: list[float] | list[float | None], worker: list[float | None], form: str
) -> str:
    """Write the medians of both sides, or of those that there are."""
    medians = []
    for side in (client, worker):
        known = [value for value in side if value is not None]
        if known:
            medians.append(form.format(statistics.median(known)))
    return " / ".join(medians)


def _run(*command: str) -> None:
    """Run a command, and let nobody hear it."""
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure how fast a file reaches a worker."
    )
    parser.add_argument(
        "--size", type=_parse_size, default="64MiB", help="such as 256MiB or 5GiB"
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default: 3)")
    parser.add_argument(
        "--routes",
        type=_parse_routes,
        default=",".join(DEFAULT_ROUTES),
        help=f"some of {','.join(ROUTES)} (default: {','.join(DEFAULT_ROUTES)})",
    )
    parser.add_argument(
        "--directory", type=Path, help="where the files go (default: a temporary one)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write it all here")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("at least one round is needed")
    return arguments


def _parse_size(text: str) -> int:
    found = re.fullmatch(r"(\d+)([KMG])iB", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text} is no size such as 256MiB or 5GiB")
    unit: int = 1024 ** ("KMG".index(found[2]) + 1)
    return int(found[1]) * unit


def _parse_routes(text: str) -> tuple[str, ...]:
    routes = tuple(text.split(","))
    if not set(routes) <= set(ROUTES):
        raise argparse.ArgumentTypeError(f"the routes are {' and '.join(ROUTES)}")
    return routes


if __name__ == "__main__":
    sys.exit(main())
