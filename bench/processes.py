"""Other programs: run them, measure their resources, and never leave one behind."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import psutil

from bench.measures import BenchError, Usage

END_TIMEOUT = 20.0
"""Seconds in which a process has to end when it is asked to."""

SLOWEST_RATE = 1_000_000
"""Bytes per second below which a transfer is given up."""

_LOOK = 0.01
"""Seconds between two samples of a program's memory."""


def patience(size: int) -> float:
    """Return the seconds after which a transfer of `size` bytes is given up."""
    return 60.0 + size / SLOWEST_RATE


def python_module(name: str, python: str = sys.executable) -> tuple[str, ...]:
    """Return the command that runs a module as a program."""
    return (python, "-m", name)


def run_tool(
    command: Sequence[str], *, timeout: float, env: Mapping[str, str] | None = None
) -> tuple[float, Usage]:
    """Run a program to its end.

    Args:
        command: The program and its arguments.
        timeout: Seconds after which it is killed.
        env: Its environment; None for ours.

    Returns:
        Its duration in seconds, and its resources.

    Raises:
        BenchError: If it fails.
    """
    began = time.monotonic()
    with (
        started(command, env=env, stderr=subprocess.PIPE) as process,
        killed_after(timeout, process),
        _watched_memory(process.pid) as peaks,
    ):
        # wait4() wakes up at once and reports the resources; wait() does neither.
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        said = process.stderr.read() if process.stderr else ""
    if process.returncode != 0:
        raise BenchError(
            f"{command[0]} ended with {process.returncode}: {last_line_of(said)}"
        )
    peak = max(peaks, default=None)
    return seconds, Usage(round(used.ru_utime + used.ru_stime, 3), peak)


@contextmanager
def started(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    stdin: int = subprocess.DEVNULL,
    stdout: int | IO[str] = subprocess.DEVNULL,
    stderr: int | IO[str] = subprocess.DEVNULL,
) -> Iterator[subprocess.Popen[str]]:
    """Run a program for as long as the body runs, and end it then.

    It has a session of its own, so Ctrl-C reaches this process only.
    """
    with subprocess.Popen(
        command,
        env=env,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(END_TIMEOUT)
                except subprocess.TimeoutExpired:
                    process.kill()


@contextmanager
def killed_after(seconds: float, *processes: subprocess.Popen[str]) -> Iterator[None]:
    """Kill processes that still run after some time, which ends their output."""

    def kill() -> None:
        for process in processes:
            process.kill()

    timer = threading.Timer(seconds, kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def wait_for_text(
    log: Path, text: str, process: subprocess.Popen[str], timeout: float
) -> None:
    """Wait until a process has written something to its log.

    Raises:
        BenchError: If it ends first, or is late.
    """
    deadline = time.monotonic() + timeout
    while text not in (written := log.read_text()):
        if process.poll() is not None or time.monotonic() > deadline:
            raise BenchError(f"it did not start: {last_line_of(written)}")
        time.sleep(_LOOK)


def last_line_of(said: str) -> str:
    """Return the line of a program's output that explains its end best."""
    # The frame around an exception group carries no information.
    lines = [text for line in said.splitlines() if (text := line.strip(" |+-"))]
    return lines[-1] if lines else "it printed nothing"


class Meter:
    """The resources that a process uses between two moments.

    The first moment may be set again, the last one only once. The peak of the memory
    is that of its whole life.
    """

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._began = self._cpu_seconds()
        self._spent: float | None = None
        self._peak: int | None = None

    def begin(self) -> None:
        """Set the first moment."""
        self._began = self._cpu_seconds()

    def end(self) -> None:
        """Set the last moment; a later call only samples the memory."""
        if self._spent is None:
            self._spent = self._cpu_seconds() - self._began
        self.look_at_memory()

    def look_at_memory(self) -> None:
        """Record the peak; a process that has ended keeps the last one."""
        self._peak = peak_of(self._process.pid) or self._peak

    def usage(self) -> Usage:
        """Return the resources."""
        if self._spent is None:
            raise BenchError("the process did not report when the transfer had ended")
        return Usage(round(self._spent, 3), self._peak)

    def _cpu_seconds(self) -> float:
        times = self._process.cpu_times()
        children: float = times.children_user + times.children_system
        return float(times.user + times.system) + children


def peak_of(pid: int) -> int | None:
    """Return the most bytes that a process ever had resident; None except on Linux."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return None if found is None else int(found[1]) * 1024


@contextmanager
def _watched_memory(pid: int) -> Iterator[list[int]]:
    """Sample the peak memory of a process into the list that is yielded.

    wait4() is of no use for that: a child begins with the peak of its parent.
    """
    peaks: list[int] = []
    is_over = threading.Event()

    def look() -> None:
        while not is_over.wait(_LOOK) and (peak := peak_of(pid)) is not None:
            peaks.append(peak)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peaks
    finally:
        is_over.set()
        thread.join()
