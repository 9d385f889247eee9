"""Disposable machines: each with a home, a state directory, daemons and commands.

Everything is a real process of this machine. A `Lab` that closes ends the processes of
its machines, and those of their jobs.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from bench.ports import reserved_port
from tests.e2e import actor

DEADLINE = 90.0
"""Seconds that a wait may take on a busy machine, unless the test sets a limit."""

EXAMPLES = Path(__file__).parents[2] / "examples"

END_TO_END = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        sys.platform == "win32",
        reason="workers run on Linux and macOS: process groups, signals, FIFOs",
    ),
]
"""The marks of every module of end-to-end tests."""

_MARK = "LAB_OF_THIS_TEST"
"""Environment variable by which a lab recognizes its processes."""

UPLOADING = r"Sending big\.zip: [1-9]\d? %"
"""Output of a client in the middle of an upload of ``big.zip``."""

_POLL = 0.02
"""Seconds between two checks of another process."""


class Finished(NamedTuple):
    """A command that has ended."""

    code: int
    out: str
    err: str

    def expect(self, code: int) -> "Finished":
        """Fail with the whole output of the command unless it ended with this code."""
        assert self.code == code, f"exit {self.code}\n{self.out}\n{self.err}"
        return self


class Running:
    """A command that runs in a process group of its own.

    Args:
        arguments: The program and its arguments.
        environ: Its whole environment.
        cwd: Where it runs.
        output: Path of the file for its standard output; its errors go beside it.
    """

    def __init__(
        self, arguments: list[str], environ: dict[str, str], cwd: Path, output: Path
    ) -> None:
        self._out, self._err = output.with_suffix(".out"), output.with_suffix(".err")
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                arguments,
                cwd=cwd,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    @property
    def out(self) -> str:
        """Its standard output so far."""
        return self._out.read_text(errors="replace")

    @property
    def err(self) -> str:
        """Its standard error so far."""
        return self._err.read_text(errors="replace")

    def wait_for(
        self, pattern: str, *, after: int = 0, timeout: float = DEADLINE
    ) -> re.Match[str]:
        """Wait for a pattern in its standard error or output.

        Args:
            pattern: A regular expression.
            after: Characters of standard error to skip, as `len(running.err)` before.
            timeout: Seconds.
        """
        end = time.monotonic() + timeout
        while True:
            ended = self.process.poll() is not None
            found = re.search(pattern, self.err[after:]) or re.search(pattern, self.out)
            if found is not None:
                return found
            if ended or time.monotonic() > end:
                pytest.fail(f"no {pattern!r} came:\n{self.out}\n{self.err}")
            time.sleep(_POLL)

    def finish(self, timeout: float = DEADLINE) -> Finished:
        """Wait until it ends by itself."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            pytest.fail(f"it did not end in {timeout} s:\n{self.out}\n{self.err}")
        return Finished(code, self.out, self.err)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process, as a terminal or an administrator would."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """End it as a power cut would."""
        self.process.kill()
        self.process.wait(DEADLINE)

    def peak_memory(self) -> int:
        """Return its peak resident memory in bytes; 0 once it has ended; Linux only."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        return int(found[1]) * 1024 if found else 0


class Machine:
    """A user's account on a machine: a home, and a state directory.

    Args:
        lab: The lab that it belongs to.
        name: Its name, which is also that of its home.
    """

    def __init__(self, lab: "Lab", name: str) -> None:
        self._lab = lab
        self.home = lab.folder / name
        self.home.mkdir()
        self.state = self.home / "state"
        self.jobs = self.state / "jobs"
        self.variables: dict[str, str] = {}
        """Environment variables that its user has set."""
        self._has_room = False

    def start(self, *arguments: object, module: str = "sleap_rtc") -> Running:
        """Start a `sleap-rtc` command, or one of its modules."""
        command = [sys.executable, "-m", module, *map(str, arguments)]
        return self._lab.start(command, self._environ(), self.home)

    def run(
        self, *arguments: object, timeout: float = DEADLINE, module: str = "sleap_rtc"
    ) -> Finished:
        """Run a `sleap-rtc` command to its end."""
        return self.start(*arguments, module=module).finish(timeout)

    def start_worker(self, *options: object, module: str = "sleap_rtc") -> Running:
        """Start a worker that may also run `act`, and wait until it is ready.

        The first one of a room of its own listens on a reserved port, and records it:
        the next one finds that port free.
        """
        if not self._has_room and "SLEAP_RTC_SIGNALING_WS" not in self.variables:
            options = ("--listen", f"127.0.0.1:{self._lab.reserve_port()}", *options)
        self._has_room = True
        command = ("daemon", "--role", "worker", "--allow", "act", *options)
        worker = self.start(*command, module=module)
        worker.wait_for("worker ready")
        return worker

    def jobs_left(self) -> list[str]:
        """List the job directories of the channel route."""
        return sorted(os.listdir(self.jobs)) if self.jobs.exists() else []

    def _environ(self) -> dict[str, str]:
        own = ("SLEAP_RTC_", "SHARED_STORAGE_", "XDG_", "PYTEST_", "COV_")
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(own)}
        return {
            **inherited,
            "PATH": f"{self._lab.programs}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(self.home),
            "SLEAP_RTC_STATE_DIR": str(self.state),
            _MARK: str(self._lab.folder),
            **self.variables,
        }


class Lab:
    """Some machines, and all processes that they have started.

    Args:
        folder: An empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.programs = folder / "programs"
        actor.install(self.programs)
        trainer = [sys.executable, str(EXAMPLES / "tiny_trainer.py")]
        subprocess.run(
            [*trainer, "--install", str(self.programs)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        self._started: list[Running] = []
        self._ports = ExitStack()
        (folder / "outputs").mkdir()

    def machine(self, name: str) -> Machine:
        """Create a machine."""
        return Machine(self, name)

    def start(self, command: list[str], environ: dict[str, str], cwd: Path) -> Running:
        """Start a process that ends with the lab."""
        output = self.folder / "outputs" / str(len(self._started))
        running = Running(command, environ, cwd, output)
        self._started.append(running)
        return running

    def reserve_port(self) -> int:
        """Return a port for a server of this lab; no other program gets it."""
        return self._ports.enter_context(reserved_port())

    def fifo(self, name: str = "fifo") -> Path:
        """Make a FIFO for `act wait`."""
        path = self.folder / name
        os.mkfifo(path)
        return path

    def processes(self, word: str) -> list[psutil.Process]:
        """List the processes of this lab that have a word in their command line."""
        found = []
        for process in psutil.process_iter():
            try:
                ours = process.environ().get(_MARK) == str(self.folder)
                if ours and any(word in part for part in process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue  # it has ended, or is not one of ours
        return found

    def wait_gone(self, word: str, timeout: float = DEADLINE) -> None:
        """Wait until no process of this lab has a word in its command line."""
        wait_until(lambda: not self.processes(word), f"{word} to end", timeout)

    def close(self) -> None:
        """End everything that was started here."""
        for running in self._started:
            if running.process.poll() is None:
                running.signal(signal.SIGKILL)
                running.process.wait(DEADLINE)
        for process in self.processes(""):
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass  # it has ended by itself
        self._ports.close()


class Town:
    """Three machines: a signaling server, a worker and a client that know it.

    Args:
        lab: The lab that they belong to.
    """

    def __init__(self, lab: Lab) -> None:
        self.port = lab.reserve_port()
        self._server_machine = lab.machine("server")
        self.gpu, self.laptop = lab.machine("gpu"), lab.machine("laptop")
        self.server = self.start_server()
        address = f"ws://127.0.0.1:{self.port}"
        self.gpu.variables["SLEAP_RTC_SIGNALING_WS"] = address
        self.worker = self.gpu.start_worker()
        self.laptop.run("join", self.gpu.run("invite").expect(0).out.strip()).expect(0)

    def start_server(self) -> Running:
        """Start the signaling server; a restarted one keeps its port."""
        listen = f"127.0.0.1:{self.port}"
        server = self._server_machine.start(
            "daemon", "--role", "signaling", "--listen", listen
        )
        server.wait_for("signaling server listens")
        return server


def release(fifo: Path) -> None:
    """Release `act wait`; it must be waiting, or about to."""
    fifo.write_bytes(b"")


def wait_until(
    condition: Callable[[], bool], what: str, timeout: float = DEADLINE
) -> None:
    """Poll for a condition that another process fulfils without a signal."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"waited {timeout} s for {what}")
        time.sleep(_POLL)


def tree(folder: Path) -> dict[str, bytes]:
    """Read all files beneath a folder, by relative path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
