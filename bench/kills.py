"""Kill either side of a transfer again and again, and see whether it arrives.

    python -m bench.kills --size 1GiB --kills 100 --json report.json

A worker daemon and `sleap-rtc send` move a package of random bytes. At random moments
one of the two gets SIGKILL. Then the worker is started again, or the same `send`. That
repeats until `--kills` kills have happened and the last transfer has ended. The report
counts transfers that did not finish, packages that arrived with other bytes, and the
bytes by which the client's progress fell back at each kill, which are sent again.
"""

import argparse
import json
import os
import queue
import random
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from blake3 import blake3
from rich.console import Console

from bench.measures import MEBIBYTE, BenchError, parse_size

SLEAP_RTC = (sys.executable, "-m", "sleap_rtc")
PROGRAM = "ln"
"""Program of the job: it keeps a hard link to the package that has arrived."""

START_TIMEOUT = 60.0
"""Seconds in which a worker has to be ready."""

SILENCE = 180.0
"""Seconds without output of the client after which a transfer counts as stuck."""

MAX_RETRIES = 5
"""Attempts to type the command again after a client gave up by itself."""

console = Console(highlight=False)


class Kill(msgspec.Struct):
    """One kill.

    Args:
        victim: The side that was killed, client or worker.
        done: Bytes that the client had counted as sent; 0 before the first.
        again: Bytes by which that count fell back afterwards; they were sent twice.
    """

    victim: str
    done: int
    again: int = 0


class Transfer(msgspec.Struct):
    """One package, from the first event to the last.

    Args:
        seconds: Duration of all attempts together.
        kills: The kills during it.
        retries: Number of times that the client gave up by itself and its command was
            typed again.
        is_intact: True if the package arrived as it was sent.
        failure: The reason why it did not finish.
    """

    seconds: float = 0.0
    kills: list[Kill] = []
    retries: int = 0
    is_intact: bool = False
    failure: str = ""


class Report(msgspec.Struct):
    """Everything that was measured, as it is written with `--json`."""

    size: int
    seed: int
    undisturbed: Transfer
    transfers: list[Transfer] = []


class Scene:
    """A worker, a client, and the package between them.

    Args:
        directory: An empty directory for all files.
        size: Bytes of the package.
        route: As in `sleap-rtc send --route`.
    """

    def __init__(self, directory: Path, size: int, route: str) -> None:
        self.package = directory / "package.zip"
        self.arrived = directory / "arrived.zip"
        self._log = directory / "worker.log"
        self._route = route
        self._output = directory / "results"
        config = directory / "config.toml"
        config.touch()
        own = ("SLEAP_RTC_", "SHARED_STORAGE_")
        self._environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(own)},
            "SLEAP_RTC_STATE_DIR": str(directory / "state"),
            "SLEAP_RTC_CONFIG": str(config),
        }
        command = shlex.join((PROGRAM, self.package.name, str(self.arrived)))
        with self.package.open("wb") as file:
            for _ in range(0, size, MEBIBYTE):
                file.write(os.urandom(MEBIBYTE))
        with zipfile.ZipFile(self.package, "a") as package:
            package.writestr("train-script.sh", f"#!/bin/bash\n{command}\n")
        self.size = self.package.stat().st_size

    def renew_package(self) -> None:
        """Write another package, so that no client resumes the last one."""
        self.arrived.unlink(missing_ok=True)
        with self.package.open("rb+") as file:
            file.write(os.urandom(MEBIBYTE))

    def is_intact(self) -> bool:
        """Return whether the package that arrived is the one that was sent."""
        return self.arrived.exists() and _hash(self.arrived) == _hash(self.package)

    def start_worker(self) -> "subprocess.Popen[str]":
        """Start a worker, and wait until it is ready.

        Raises:
            BenchError: If it is not ready in time.
        """
        options = ["daemon", "--role", "worker", "--name", "bench", "--allow", PROGRAM]
        with self._log.open("w") as log:
            worker = self._start(options, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + START_TIMEOUT
        while "worker ready" not in self._log.read_text():
            if worker.poll() is not None or time.monotonic() > deadline:
                _kill(worker)
                raise BenchError(f"no worker started:\n{self._log.read_text()}")
            time.sleep(0.05)
        return worker

    def start_client(self) -> "Client":
        """Start the command."""
        options = ["send", str(self.package), "--json", "--route", self._route]
        options += ["--output", str(self._output)]
        return Client(
            self._start(options, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        )

    def _start(self, options: list[str], **streams: Any) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [*SLEAP_RTC, *options],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
            **streams,
        )


class Client:
    """A running `sleap-rtc send` and its events.

    Args:
        process: The process; its output comes here.
    """

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self._said: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def next_event(self, timeout: float) -> dict[str, Any] | None:
        """Wait for the next event; None after the last one.

        Raises:
            queue.Empty: If nothing came in time.
        """
        return self._said.get(timeout=max(0.0, timeout))

    def _read(self) -> None:
        for line in self.process.stdout or ():
            try:
                self._said.put(json.loads(line))
            except ValueError:
                pass  # a line that a kill has cut
        self._said.put(None)


class Run:
    """One transfer, with the kills that happen to it.

    Args:
        scene: The worker, the client and the package.
        chance: Source of the victims and the moments.
        longest: Seconds until the next kill, at most.
        budget: Kills that may happen.
    """

    def __init__(
        self, scene: Scene, chance: random.Random, longest: float, budget: int
    ) -> None:
        self.transfer = Transfer()
        self._scene = scene
        self._chance = chance
        self._longest = longest
        self._budget = budget
        self._done = 0
        self._last = "it printed nothing"

    def carry_out(self) -> Transfer:
        """Send the package, with as many attempts as it takes."""
        began = time.monotonic()
        with _ended_after() as processes:
            processes["worker"] = self._scene.start_worker()
            client: Client | None = self._type_command(processes)
            while client is not None:
                if self._watch(client, self._next_kill()):
                    client = self._after_the_end(client, processes)
                else:
                    client = self._kill_one(client, processes)
        self.transfer.seconds = time.monotonic() - began
        self.transfer.is_intact = self._scene.is_intact()
        return self.transfer

    def _next_kill(self) -> float | None:
        if len(self.transfer.kills) >= self._budget:
            return None
        return time.monotonic() + self._chance.uniform(0, self._longest)

    def _watch(self, client: Client, until: float | None) -> bool:
        """Follow the client; return True if it ended before the moment of a kill."""
        quiet = time.monotonic() + SILENCE
        while True:
            now = time.monotonic()
            try:
                event = client.next_event(min(quiet, until or quiet) - now)
            except queue.Empty:
                if until is None or time.monotonic() < until:
                    self.transfer.failure = f"stuck; its last lines: {self._last}"
                    _kill(client.process)
                    return True
                return False
            if event is None:
                client.process.wait()
                return True
            quiet = time.monotonic() + SILENCE
            self._note(event)
            if until is not None and time.monotonic() >= until:
                return False

    def _note(self, event: dict[str, Any]) -> None:
        self._last = event.get("message") or event.get("reason") or self._last
        if event.get("event") == "progress" and event["total"] == self._scene.size:
            fell_by = self._done - event["done"]
            if fell_by > 0 and self.transfer.kills:
                self.transfer.kills[-1].again += fell_by
            self._done = event["done"]

    def _kill_one(
        self, client: Client, processes: dict[str, "subprocess.Popen[str]"]
    ) -> Client | None:
        victim = self._chance.choice(("worker", "client"))
        _kill(processes[victim])
        self.transfer.kills.append(Kill(victim, self._done))
        if victim == "client":
            if self._scene.arrived.exists():
                return None  # the job has run, so nothing is left to resume
            return self._type_command(processes)
        processes["worker"] = self._scene.start_worker()
        return client

    def _after_the_end(
        self, client: Client, processes: dict[str, "subprocess.Popen[str]"]
    ) -> Client | None:
        """Start the command again after a failure, unless it has failed too often."""
        if client.process.returncode == 0 or self.transfer.failure:
            return None
        if self.transfer.retries == MAX_RETRIES:
            self.transfer.failure = self._last
            return None
        self.transfer.retries += 1
        return self._type_command(processes)

    def _type_command(self, processes: dict[str, "subprocess.Popen[str]"]) -> Client:
        client = self._scene.start_client()
        processes["client"] = client.process
        return client


def main() -> int:
    """Run the command line; return the exit code."""
    arguments = _parse_arguments()
    # SIGTERM cleans up as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory(
            prefix="sleap-rtc-bench-", dir=arguments.directory
        ) as name:
            scene = Scene(Path(name), arguments.size, arguments.route)
            report = measure(scene, arguments.kills, arguments.seed)
    except (BenchError, OSError) as error:
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
    everything = [report.undisturbed, *report.transfers]
    return 0 if all(one.is_intact and not one.failure for one in everything) else 1


def measure(scene: Scene, kills: int, seed: int) -> Report:
    """Send packages until `kills` kills have happened.

    Args:
        scene: The worker, the client and the package.
        kills: Number of kills.
        seed: Seed of the victims and the moments.

    Raises:
        BenchError: If not even an undisturbed transfer finishes.
    """
    undisturbed = Run(scene, random.Random(seed), 0.0, budget=0).carry_out()
    if undisturbed.failure or not undisturbed.is_intact:
        raise BenchError(
            f"without a kill it failed: {undisturbed.failure or 'damaged'}"
        )
    report = Report(scene.size, seed, undisturbed)
    chance = random.Random(seed)
    left = kills
    while left > 0:
        scene.renew_package()
        run = Run(scene, chance, undisturbed.seconds, left)
        report.transfers.append(run.carry_out())
        left -= len(run.transfer.kills)
        console.print(f"[dim]{kills - left} of {kills} kills[/]")
    return report


def show(report: Report) -> None:
    """Print a summary."""
    kills = [kill for transfer in report.transfers for kill in transfer.kills]
    failed = [transfer for transfer in report.transfers if transfer.failure]
    wrong = [t for t in report.transfers if not t.failure and not t.is_intact]
    console.print(
        f"{len(report.transfers)} transfers of {report.size / 1e6:,.0f} MB,"
        f" {len(kills)} kills: {len(failed)} did not finish,"
        f" {len(wrong)} arrived with other bytes,"
        f" {sum(t.retries for t in report.transfers)} commands gave up and were"
        f" typed again. Undisturbed it takes {report.undisturbed.seconds:.1f} s."
    )
    for victim in ("worker", "client"):
        again = [kill.again / MEBIBYTE for kill in kills if kill.victim == victim]
        if again:
            console.print(
                f"sent again after a kill of the {victim}: median"
                f" {statistics.median(again):.1f} MiB, at most {max(again):.1f} MiB"
            )
    for transfer in failed:
        console.print(f"not finished: {transfer.failure}", style="red", markup=False)


@contextmanager
def _ended_after() -> Iterator[dict[str, "subprocess.Popen[str]"]]:
    """Keep a table of processes; none of them outlives the body."""
    processes: dict[str, subprocess.Popen[str]] = {}
    try:
        yield processes
    finally:
        for process in processes.values():
            _kill(process)


def _kill(process: "subprocess.Popen[str]") -> None:
    """End a process and its children as a power cut would, and wait for that."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it has ended by itself
    process.wait()


def _hash(path: Path) -> bytes:
    return blake3(max_threads=blake3.AUTO).update_mmap(path).digest()


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Kill either side of transfers.")
    parser.add_argument(
        "--size", type=parse_size, default="1GiB", help="such as 64MiB (1GiB)"
    )
    parser.add_argument("--kills", type=int, default=100, help="number of kills (100)")
    parser.add_argument(
        "--seed", type=int, default=1, help="of the moments and victims (1)"
    )
    parser.add_argument("--route", choices=("tcp", "quic"), default="tcp")
    parser.add_argument("--directory", type=Path, help="directory for the files")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the report here"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
