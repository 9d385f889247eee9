"""One package through a real worker daemon and a real `sleap-rtc send`."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import msgspec
import psutil

SLEAP_RTC = (sys.executable, "-m", "sleap_rtc")

PROGRAM = "ln"
"""What the job runs: the worker forgets a package once its job is done, so the job
keeps a hard link to what has arrived."""

START_TIMEOUT = 60.0
"""Seconds in which a worker has to be ready."""

END_TIMEOUT = 20.0
"""Seconds in which a process has to end when it is asked to."""

SLOWEST_RATE = 1_000_000
"""Bytes per second below which a transfer is given up."""


class BenchError(Exception):
    """A measurement can't be made; the text is for people."""


class Usage(msgspec.Struct, frozen=True):
    """What one side has used.

    Args:
        cpu_seconds: Time on any core during the transfer, its children included.
        peak_bytes: The most that was resident, ever; None where the system (other
            than Linux) does not tell.
    """

    cpu_seconds: float
    peak_bytes: int | None


class Delivery(msgspec.Struct, frozen=True):
    """A package that went from a client to a worker.

    Args:
        seconds: From the choice of the route to the job's place in the queue.
        link: The transport of the link.
        client: What the client used.
        worker: What the worker used.
    """

    seconds: float
    link: str
    client: Usage
    worker: Usage


def deliver(package: Path, route: str, directory: Path) -> Delivery:
    """Send a package to a fresh worker.

    Args:
        package: What to send.
        route: As in `sleap-rtc send --route`.
        directory: An empty directory for everything that the two write.

    Raises:
        BenchError: If the worker did not start or the job did not succeed.
    """
    storage, state = directory / "storage", directory / "state"
    storage.mkdir()
    environment = _environment(directory, state)
    shared = ["--shared-storage-root", str(storage)]
    with _worker(directory, environment, shared) as worker:
        timeout = START_TIMEOUT + package.stat().st_size / SLOWEST_RATE
        arguments = ["send", str(package), "--json", "--route", route]
        arguments += ["--output", str(directory / "results"), *shared]
        arguments += ["--timeout", f"{timeout:.0f}"]
        with _started(arguments, environment) as client:
            watch = _Watch(client, worker)
            for line in client.stdout or ():
                watch.receive(json.loads(line))
        if client.returncode != 0:
            said = watch.last.get("message", "it said nothing")
            raise BenchError(f"the client failed on the {route} route: {said}")
        return watch.delivery()


class _Watch:
    """Looks at both processes when the client says where it stands."""

    def __init__(
        self, client: subprocess.Popen[str], worker: subprocess.Popen[str]
    ) -> None:
        self.last: dict[str, Any] = {}
        self._client = _Meter(client.pid)
        self._worker = _Meter(worker.pid)
        self._link = ""

    def receive(self, event: dict[str, Any]) -> None:
        """Take an event of the client."""
        self.last = event
        meters = (self._client, self._worker)
        match event:
            case {"event": "link", "kind": kind}:
                self._link = kind
            case {"event": "route"}:
                for meter in meters:
                    meter.begin()
            case {"event": "state", "state": state} if state != "RECEIVING":
                for meter in meters:
                    meter.end()

    def delivery(self) -> Delivery:
        """Sum up; the worker still runs, and its peak includes the unpacking."""
        self._worker.look_at_memory()
        return Delivery(
            seconds=self.last["seconds"]["transfer"],
            link=self._link,
            client=self._client.usage(),
            worker=self._worker.usage(),
        )


class _Meter:
    """What a process uses between two moments; the second one counts once."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._began = self._cpu_seconds()
        self._spent: float | None = None
        self._peak: int | None = None

    def begin(self) -> None:
        """The transfer begins."""
        self._began = self._cpu_seconds()

    def end(self) -> None:
        """The transfer has ended; a later call only looks at the memory."""
        if self._spent is None:
            self._spent = self._cpu_seconds() - self._began
        self.look_at_memory()

    def look_at_memory(self) -> None:
        """Note the peak; a process that has ended keeps the one before."""
        status = Path(f"/proc/{self._process.pid}/status")
        if not status.exists():
            return
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found is not None:
            self._peak = int(found[1]) * 1024

    def usage(self) -> Usage:
        """Return what was found."""
        if self._spent is None:
            raise BenchError("the client did not say when the transfer had ended")
        return Usage(round(self._spent, 3), self._peak)

    def _cpu_seconds(self) -> float:
        times = self._process.cpu_times()
        children: float = times.children_user + times.children_system
        return float(times.user + times.system) + children


def _environment(directory: Path, state: Path) -> dict[str, str]:
    """Keep out of the user's own rooms and settings."""
    own = ("SLEAP_RTC_", "SHARED_STORAGE_")
    config = directory / "config.toml"
    config.touch()
    return {
        **{k: v for k, v in os.environ.items() if not k.startswith(own)},
        "SLEAP_RTC_STATE_DIR": str(state),
        "SLEAP_RTC_CONFIG": str(config),
    }


@contextmanager
def _worker(
    directory: Path, environment: dict[str, str], options: list[str]
) -> Iterator[subprocess.Popen[str]]:
    """Run a worker for as long as the body runs."""
    log = directory / "worker.log"
    arguments = ["daemon", "--role", "worker", "--name", "bench", "--allow", PROGRAM]
    with (
        log.open("w") as file,
        _started([*arguments, *options], environment, log=file) as worker,
    ):
        deadline = time.monotonic() + START_TIMEOUT
        while "worker ready" not in log.read_text():
            if worker.poll() is not None or time.monotonic() > deadline:
                raise BenchError(f"the worker did not start:\n{log.read_text()}")
            time.sleep(0.05)
        yield worker


@contextmanager
def _started(
    arguments: list[str], environment: dict[str, str], log: IO[str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Run a `sleap-rtc` command; it has ended when the body has.

    It has a session of its own: what Ctrl-C means is decided here, not there.

    Args:
        arguments: What follows `sleap-rtc`.
        environment: Its environment variables.
        log: Where all of its output goes; otherwise the body has to read it.
    """
    with subprocess.Popen(
        [*SLEAP_RTC, *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log or subprocess.PIPE,
        stderr=subprocess.STDOUT if log else subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
            if log is None:
                process.wait(END_TIMEOUT)  # its output has ended, so it will, too
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(END_TIMEOUT)
                except subprocess.TimeoutExpired:
                    process.kill()
