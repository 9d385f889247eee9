"""Watch the event loops of a worker and a client: does anything block them?

    python -m bench.loop --size 256MiB --json report.json

A worker and a client are two processes that run the product's own functions,
`run_worker` and `submit`, with an instrument of Trio's. The table shows for how long
the steps of each blocked its loop. docs/performance.md explains it. Linux only.
"""

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO

import msgspec
import trio
from rich.console import Console
from rich.table import Table

from bench.loop_watch import LIMIT, Findings, LoopWatch
from bench.measures import MEBIBYTE, BenchError, parse_size
from bench.processes import (
    last_line_of,
    patience,
    python_module,
    started,
    wait_for_text,
)
from sleap_rtc import client, worker
from sleap_rtc.proto.route.routes import RoutePreference

WAYS: dict[str, RoutePreference] = {
    "tcp": "tcp",
    "quic": "quic",
    "shared": "shared",
    "many": "tcp",
}
"""Routes of the transfers, by the name of the way. "many" is a small package whose job
prints many lines and makes many files; the others move one big file."""

START_TIMEOUT = 60.0
"""Seconds in which a worker has to be ready."""

SHOWN = 3
"""Steps of each process that are named below the table."""

_MAKE_MANY = """\
import pathlib, sys
count = int(sys.argv[1])
folder = pathlib.Path("models")
folder.mkdir()
for number in range(count):
    print("line", number, "of what a job says while it runs")
    folder.joinpath(f"{number}.txt").write_text("result")
"""


class Side(msgspec.Struct, frozen=True):
    """Findings in one process."""

    way: str
    name: str
    found: Findings


def main() -> int:
    """Run the command line; return the exit code."""
    arguments = _parse_arguments()
    if arguments.end is not None:
        _ENDS[arguments.end](arguments.directory, arguments.route)
        return 0
    console = Console(width=None if sys.stdout.isatty() else 132, highlight=False)
    try:
        with tempfile.TemporaryDirectory(
            prefix="sleap-rtc-bench-", dir=arguments.directory
        ) as directory:
            sides = [
                side
                for way in arguments.ways
                for side in _watch(
                    Path(directory, way), way, arguments.size, arguments.count
                )
            ]
    except (BenchError, OSError) as error:
        console.print(f"The measurement failed: {error}", style="red", markup=False)
        return 1
    _show(sides, console)
    if arguments.json is not None:
        arguments.json.write_bytes(msgspec.json.encode(sides))
    return 1 if any(side.found.blocking() for side in sides) else 0


# -------------------------------------------------------------- the two processes


def _be_worker(directory: Path, _route: RoutePreference) -> None:
    programs = ("ln", Path(sys.executable).name)
    options = worker.read_options(
        os.environ,
        allow=programs,
        name="bench",
        shared_storage_root=directory / "storage",
    )
    watch = LoopWatch()
    trio.run(worker.run_worker, options, instruments=[watch])
    _report(directory / "worker.json", watch)


def _be_client(directory: Path, route: RoutePreference) -> None:
    request = client.JobRequest(
        package=directory / "package.zip",
        route=route,
        output=directory / "results",
        shared_storage_root=directory / "storage",
    )
    watch = LoopWatch()
    trio.run(client.submit, request, lambda event: None, instruments=[watch])
    _report(directory / "client.json", watch)


_ENDS: dict[str, Callable[[Path, RoutePreference], None]] = {
    "worker": _be_worker,
    "client": _be_client,
}


def _report(path: Path, watch: LoopWatch) -> None:
    path.write_bytes(msgspec.json.encode(watch.findings()))


# ------------------------------------------------------------------ what they do


def _watch(directory: Path, way: str, size: int, count: int) -> list[Side]:
    """Send one package, and return the findings of both sides.

    Raises:
        BenchError: If it did not arrive.
    """
    (directory / "storage").mkdir(parents=True)
    _make_package(directory / "package.zip", way, size, count)
    log = directory / "worker.log"
    with log.open("w") as file, _started("worker", directory, way, file) as serving:
        wait_for_text(log, "worker ready", serving, START_TIMEOUT)
        said = directory / "client.log"
        with (
            said.open("w") as file,
            _started("client", directory, way, file) as sending,
        ):
            timer = threading.Timer(patience(size), sending.kill)
            timer.start()
            code = sending.wait()
            timer.cancel()
        if code != 0:
            raise BenchError(f"the client: {last_line_of(said.read_text())}")
        serving.send_signal(signal.SIGTERM)
        if serving.wait(START_TIMEOUT) != 0:
            raise BenchError(f"the worker: {last_line_of(log.read_text())}")
    sides = [
        Side(
            way,
            name,
            msgspec.json.decode(
                (directory / f"{name}.json").read_bytes(), type=Findings
            ),
        )
        for name in _ENDS
    ]
    shutil.rmtree(directory)
    return sides


def _make_package(path: Path, way: str, size: int, count: int) -> None:
    """Write a package for a way: one big file, or a program that makes many."""
    if way == "many":
        python = Path(sys.executable).name
        command = shlex.join((python, "make_many.py", str(count)))
    else:
        command = "ln package.zip models"
        with path.open("wb") as file:
            for start in range(0, size, MEBIBYTE):
                file.write(os.urandom(min(MEBIBYTE, size - start)))
    with zipfile.ZipFile(path, "a") as package:
        package.writestr("train-script.sh", f"#!/bin/bash\n{command}\n")
        package.writestr("make_many.py", _MAKE_MANY)


def _started(
    end: str, directory: Path, way: str, output: IO[str]
) -> AbstractContextManager["subprocess.Popen[str]"]:
    """Run one of the two processes for as long as the body runs."""
    own = ("SLEAP_RTC_", "SHARED_STORAGE_")
    config = directory / "config.toml"
    config.touch()
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(own)},
        "SLEAP_RTC_STATE_DIR": str(directory / "state"),
        "SLEAP_RTC_CONFIG": str(config),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    command = [*python_module("bench.loop"), "--end", end, "--route", WAYS[way]]
    return started(
        [*command, "--directory", str(directory)],
        env=environment,
        stdout=output,
        stderr=subprocess.STDOUT,
    )


# ----------------------------------------------------------------- what was found


def _show(sides: list[Side], console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("way", "loop of"):
        table.add_column(column)
    for column in ("steps", "99.9 %", "worst", "over 10 ms", "garbage", "lock"):
        table.add_column(column, justify="right")
    for side in sides:
        found = side.found
        worst = found.worst[0].busy if found.worst else 0.0
        table.add_row(
            side.way,
            side.name,
            f"{found.steps:,}",
            *(_ms(value) for value in (found.p999, worst)),
            str(len(found.blocking())),
            *(_ms(value) for value in (found.collection, found.lock_wait)),
        )
    console.print("Milliseconds for which one step blocked an event loop")
    console.print(table)
    for side in sides:
        for step in side.found.worst[:SHOWN]:
            mark = "BLOCKS" if step.busy > LIMIT else "      "
            spent = f"computed {_ms(step.computed)}, slept {_ms(step.slept)}"
            console.print(
                f"{mark} {side.way} {side.name} {_ms(step.busy)} ({spent}) "
                f"{step.task}: {step.place}",
                markup=False,
                soft_wrap=True,
            )


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f}"


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Watch what blocks the event loops of a worker and a client."
    )
    parser.add_argument(
        "--size", type=parse_size, default="256MiB", help="such as 8MiB"
    )
    parser.add_argument(
        "--count", type=int, default=2000, help="lines and files of the job of 'many'"
    )
    parser.add_argument(
        "--ways",
        type=_parse_ways,
        default=",".join(WAYS),
        help=f"some of {','.join(WAYS)} (default: all)",
    )
    parser.add_argument(
        "--directory", type=Path, help="directory for the files (default: temporary)"
    )
    parser.add_argument("--json", type=Path, help="write all findings here")
    parser.add_argument("--end", choices=_ENDS, help=argparse.SUPPRESS)
    parser.add_argument("--route", help=argparse.SUPPRESS)
    return parser.parse_args()


def _parse_ways(text: str) -> list[str]:
    ways = text.split(",")
    if unknown := set(ways) - set(WAYS):
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is not a way")
    return ways


if __name__ == "__main__":
    sys.exit(main())
