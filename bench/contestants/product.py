"""The product itself: a real worker daemon, and a real `sleap-rtc send`.

The timed part is the client's own transfer phase. It begins when the route is chosen
and ends when the worker has the whole package safe on its disk, checked, and has queued
the job.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from bench.files import PROGRAM, fresh_directory, take_away, warm_memory
from bench.measures import BenchError, Contestant, Load, Sample
from bench.processes import (
    Meter,
    killed_after,
    last_line_of,
    patience,
    python_module,
    started,
    wait_for_text,
)

START_TIMEOUT = 60.0
"""Seconds in which a worker has to be ready."""


class Way(msgspec.Struct, frozen=True):
    """One way of the product.

    Args:
        name: Its name in the table.
        route: As in `sleap-rtc send --route`.
        options: Further options of `send`.
        datagram_size: Bytes of a QUIC datagram; None if the product chooses.
    """

    name: str
    route: str
    options: tuple[str, ...] = ()
    datagram_size: int | None = None

    def command(self, *arguments: str) -> list[str]:
        """Return the command line of `sleap-rtc` with arguments."""
        if self.datagram_size is None:
            return [sys.executable, "-m", "sleap_rtc", *arguments]
        capped = python_module("bench.ends.capped")
        return [*capped, str(self.datagram_size), *arguments]


def deliveries(load: Load, ways: list[Way]) -> list[Contestant]:
    """Make contestants that send a package to a fresh worker."""
    return [
        Contestant(way.name, partial(_deliver, load, way), warms_memory=True)
        for way in ways
    ]


def starts(load: Load, ways: list[Way]) -> list[Contestant]:
    """Make contestants that wait for a job to run.

    The time runs from the start of the process of `send`, whose worker is ready, until
    the worker reports that the job is running.
    """
    return [
        Contestant(way.name, partial(_start, load, way), warms_memory=True)
        for way in ways
    ]


def _deliver(load: Load, way: Way) -> Sample:
    seen = _send(load, way)
    seconds = seen.last["seconds"]["transfer"]
    parts = {} if seen.copy_seconds is None else {"the copy": seen.copy_seconds}
    return Sample(
        seconds=seconds,
        is_intact=take_away(load),
        sender=seen.client.usage(),
        receiver=seen.worker.usage(),
        note=seen.method,
        parts=parts,
    )


def _start(load: Load, way: Way) -> Sample:
    began = time.monotonic()
    seen = _send(load, way)
    took = seen.running_at - seen.sent_at
    return Sample(
        seconds=round(took, 3),
        is_intact=take_away(load),
        note=f"the worker was ready after {seen.sent_at - began:.1f} s",
    )


class _Watch:
    """Measures both processes when the client reports an event."""

    def __init__(self, client: int, worker: int, sent_at: float) -> None:
        self.last: dict[str, Any] = {}
        self.client = Meter(client)
        self.worker = Meter(worker)
        self.sent_at = sent_at
        self.running_at = 0.0
        self.copy_seconds: float | None = None
        self.method = ""

    def receive(self, event: dict[str, Any]) -> None:
        """Handle an event of the client."""
        self.last = event
        match event:
            case {"event": "route"}:
                self.client.begin()
                self.worker.begin()
            case {"event": "copied", "method": method, "seconds": seconds}:
                self.method, self.copy_seconds = method, seconds
            case {"event": "state", "state": state} if state != "RECEIVING":
                self.client.end()
                self.worker.end()
                if state == "RUNNING":
                    self.running_at = time.monotonic()


def _send(load: Load, way: Way) -> _Watch:
    with (
        fresh_directory(load.path.parent) as directory,
        _open_worker(directory, way) as (worker, environment),
    ):
        timeout = patience(load.size)
        arguments = ["send", str(load.path), "--json", "--route", way.route]
        arguments += ["--output", str(directory / "results")]
        arguments += ["--shared-storage-root", str(directory / "storage")]
        arguments += ["--timeout", f"{timeout:.0f}", *way.options]
        # Free memory stays warm for seconds only, and starting the worker took some.
        warm_memory(load.size)
        command, sent_at = way.command(*arguments), time.monotonic()
        errors = directory / "send.log"
        with (
            errors.open("w") as file,
            started(
                command, env=environment, stdout=subprocess.PIPE, stderr=file
            ) as client,
        ):
            seen = _Watch(client.pid, worker.pid, sent_at)
            with killed_after(2 * timeout, client):
                for line in client.stdout or ():
                    seen.receive(json.loads(line))
                code = client.wait()
        if code != 0:
            said = seen.last.get("message") or last_line_of(errors.read_text())
            raise BenchError(f"send ended with {code}: {said}")
        # The worker's peak includes the unpacking.
        seen.worker.look_at_memory()
        return seen


@contextmanager
def _open_worker(
    directory: Path, way: Way
) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    """Run a worker in a room of its own; yield it and the room's environment."""
    storage, log = directory / "storage", directory / "worker.log"
    storage.mkdir()
    environment = _environment(directory)
    arguments = ["daemon", "--role", "worker", "--name", "bench", "--allow", PROGRAM]
    arguments += ["--shared-storage-root", str(storage)]
    with (
        log.open("w") as file,
        started(
            way.command(*arguments), env=environment, stdout=file, stderr=file
        ) as worker,
    ):
        wait_for_text(log, "worker ready", worker, START_TIMEOUT)
        yield worker, environment


def _environment(directory: Path) -> dict[str, str]:
    """Return an environment apart from the user's own rooms and settings."""
    own = ("SLEAP_RTC_", "SHARED_STORAGE_")
    config = directory / "config.toml"
    config.touch()
    return {
        **{k: v for k, v in os.environ.items() if not k.startswith(own)},
        "SLEAP_RTC_STATE_DIR": str(directory / "state"),
        "SLEAP_RTC_CONFIG": str(config),
    }
