"""Run the commands of a job, and read their output.

No shell is involved. Every command gets a session, and so a process group, of its own:
all processes that it started end with it. Windows has no such groups; there only the
command itself is ended.
"""

import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import msgspec
import trio

from sleap_rtc.io.storage.call import call_storage
from sleap_rtc.io.storage.probe import probe_storage
from sleap_rtc.proto.job.script import Command, equivalents
from sleap_rtc.worker.job_log import JobLog

START_TIMEOUT = 60.0
"""Seconds for the folder of a command to answer; a mount may fail over in 30."""

_READ_SIZE = 16 * 1024
"""Bytes of one read; as 16 Ki empty lines they keep the event loop busy for 0.1 s."""

OnOutput = Callable[[bytes], Awaitable[None]]


class CommandLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Limits for the end of a command; the product uses `LIMITS`."""

    grace_timeout: float = 10.0
    """Seconds from SIGTERM to SIGKILL; sleap-nn takes up to 4 s to end its training."""

    kill_timeout: float = 5.0
    """Seconds to wait after SIGKILL; only a process inside the kernel takes longer."""

    drain_timeout: float = 2.0
    """Seconds to wait for output after a command has ended; a child may hold the
    pipe."""

    drain_bytes: int = 1024 * 1024
    """Bytes of output that are read after the end of a command; a pipe holds no
    more."""


LIMITS = CommandLimits()
"""The limits of the product."""


class ProgramStartError(Exception):
    """A program could not be started.

    Args:
        reason: The reason and the remedy, for people.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class ProgramMissingError(ProgramStartError):
    """A program is not installed here.

    Args:
        program: Its name.
    """

    def __init__(self, program: str) -> None:
        super().__init__(
            f"'{program}' is not installed on this worker, or not on its PATH. Install "
            "it there, or start the worker from the environment that has it.",
        )


class ScriptOutcome(msgspec.Struct, frozen=True):
    """Outcome of the commands of a script.

    Args:
        failed: The command that failed, or None if all of them succeeded.
        status: Its exit status; minus the number of the signal that killed it; None
            if it could not be started.
        reason: The failure, for people.
    """

    failed: Command | None = None
    status: int | None = None
    reason: str = ""

    @property
    def ok(self) -> bool:
        """True if every command ended with exit status 0."""
        return self.failed is None


# ------------------------------------------------------------------------- scripts


async def run_script(
    commands: Sequence[Command],
    *,
    cwd: Path,
    environment: Mapping[str, str],
    log: JobLog,
    gpus: tuple[int, ...] | None = None,
) -> ScriptOutcome:
    """Run commands one after the other, up to the first that fails.

    The log begins each command with a line that shows it. If its program is not
    installed, an installed spelling of the command runs instead, and the log reports
    that.

    Args:
        commands: The commands; their programs have been checked already.
        cwd: The folder to run them in.
        environment: The worker's environment; programs are looked up on its PATH.
        log: The log for their output.
        gpus: The GPUs that the commands see, by number; None for all.

    Returns:
        The outcome of the last command that ran.
    """
    for command in commands:
        log.note("$ " + shlex.join(command.argv))
        try:
            await _require_answer(cwd)
            status = await run_command(
                await _resolve(command, cwd, environment, log),
                cwd=cwd,
                environment=environment,
                on_output=log.add,
                gpus=gpus,
            )
        except ProgramStartError as error:
            return ScriptOutcome(command, None, f"{command}: {error.reason}")
        log.end_command()
        if status != 0:
            return ScriptOutcome(
                command, status, f"{command} {_describe_status(status)}"
            )
    return ScriptOutcome()


async def _require_answer(cwd: Path) -> None:
    """Check that the storage of a program's folder answers.

    Python holds its global lock until a new program runs. A program that hangs while
    it changes to its folder would freeze the whole worker.

    Raises:
        ProgramStartError: If the storage does not answer.
    """
    health = await probe_storage(cwd, START_TIMEOUT)
    if not health.answered:
        raise ProgramStartError(health.reason)


async def _resolve(
    command: Command, cwd: Path, environment: Mapping[str, str], log: JobLog
) -> tuple[str, ...]:
    """Find the program of a command, or of another spelling of it."""
    path = environment.get("PATH", os.defpath)
    for argv in (command.argv, *equivalents(command.argv)):
        found = await call_storage(find_program, argv[0], cwd, path)
        if found is None:
            continue
        if argv is not command.argv:
            other = Command(argv, command.line, command.script).title
            log.note(
                f"{command.argv[0]} is not installed here; running '{other}' instead"
            )
        return (found, *argv[1:])
    raise ProgramMissingError(command.argv[0])


def find_program(program: str, cwd: Path, path: str) -> str | None:
    """Find an executable (blocking).

    Args:
        program: A name, or a path relative to `cwd`.
        cwd: The folder that the program will run in.
        path: The folders to look for names in, as in PATH. Relative ones are left out:
            a package must not contain a program of an allowed name.

    Returns:
        Its absolute path, or None.
    """
    if os.path.basename(program) != program:
        return shutil.which(str(cwd / program))
    folders = [folder for folder in path.split(os.pathsep) if os.path.isabs(folder)]
    return shutil.which(program, path=os.pathsep.join(folders))


def _describe_status(status: int) -> str:
    if status >= 0:
        return f"ended with exit status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = "unnamed"
    text = f"was killed by signal {-status} ({name})"
    if name == "SIGKILL":
        text += "; the machine may have run out of memory"
    return text


# ------------------------------------------------------------------------ commands


async def run_command(
    argv: Sequence[str],
    *,
    cwd: Path,
    environment: Mapping[str, str],
    on_output: OnOutput,
    gpus: tuple[int, ...] | None = None,
    limits: CommandLimits = LIMITS,
) -> int:
    """Run a program to its end.

    On cancellation the program and everything that it started get SIGTERM, and SIGKILL
    after the grace period; their output in that time is dropped.

    Args:
        argv: The program, as a path or by a name on PATH, and its arguments.
        cwd: The folder to run it in.
        environment: The worker's environment, see `job_environment`.
        on_output: Called with the output, standard error included, as it comes, at
            most 16 KiB at once. The next output is read after it returns.
        gpus: The GPUs that the program sees, by number; None for all.
        limits: The limits for its end.

    Returns:
        The exit status, or minus the number of the signal that ended the program.

    Raises:
        ProgramMissingError: If the program does not exist.
        ProgramStartError: If it cannot be started for another reason.
    """
    process = await _start(argv, cwd, job_environment(environment, gpus))
    try:
        assert process.stdout is not None  # `_start` opens a pipe
        output = _Output(process.stdout, limits)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_end_output_with, process, output)
            while data := await output.read():
                await on_output(data)
        return await process.wait()
    finally:
        await _stop(process, limits)


def job_environment(
    environment: Mapping[str, str], gpus: tuple[int, ...] | None
) -> dict[str, str]:
    """Return the environment of a job, which is derived from the worker's.

    Args:
        environment: The worker's; the settings of sleap-rtc, which may be secret, are
            left out.
        gpus: The GPUs that the job sees, by number; None leaves this as it is.
    """
    result = {
        name: value
        for name, value in environment.items()
        if not name.upper().startswith("SLEAP_RTC_")
    }
    result["PYTHONUNBUFFERED"] = "1"
    if gpus is not None:
        # By default CUDA numbers the fastest GPU first; the driver does not.
        result["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
        result["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
    return result


class _Output:
    """The pipe that a program and its children write to.

    It ends when the last of them closes it, or after the drain that `end_soon` starts.
    """

    def __init__(self, stream: trio.abc.ReceiveStream, limits: CommandLimits) -> None:
        self._stream = stream
        self._scope = trio.CancelScope()
        self._ending = False
        self._since = 0.0
        self._seconds = limits.drain_timeout
        self._bytes = limits.drain_bytes

    def end_soon(self) -> None:
        """Read only the content of the pipe, and wait for more for a short time."""
        self._ending = True
        self._since = trio.current_time()
        self._scope.deadline = self._since + self._seconds

    async def read(self) -> bytes:
        """Return the next output; b"" at its end."""
        if self._bytes <= 0:
            return b""
        self._since = trio.current_time()
        deadline = self._since + self._seconds if self._ending else math.inf
        data = b""
        with trio.CancelScope(deadline=deadline) as self._scope:
            data = bytes(await self._stream.receive_some(_READ_SIZE))
        if self._ending:
            # Only waiting counts against the limit, so a slow reader loses nothing.
            self._seconds -= trio.current_time() - self._since
            self._bytes -= len(data)
        return data


async def _end_output_with(process: trio.Process, output: _Output) -> None:
    await process.wait()
    output.end_soon()


async def _start(
    argv: Sequence[str], cwd: Path, environment: dict[str, str]
) -> trio.Process:
    start = partial(
        trio.lowlevel.open_process,
        list(argv),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=cwd,
        env=environment,
        start_new_session=True,
    )
    try:
        return await start()
    except FileNotFoundError as error:
        if error.filename == argv[0]:
            raise ProgramMissingError(argv[0]) from None
        raise ProgramStartError(f"the folder {cwd} is gone") from None
    except OSError as error:
        raise ProgramStartError(f"Cannot start '{argv[0]}': {error.strerror}") from None


async def _stop(process: trio.Process, limits: CommandLimits) -> None:
    """End a program and everything that it started; takes limited time."""
    assert process.stdout is not None  # `_start` opens a pipe
    if process.returncode is None:
        _signal_all(process, kill=False)
        with trio.move_on_after(limits.grace_timeout, shield=True):
            await _wait_for_all(process, process.stdout)
    _signal_all(process, kill=True)
    with trio.move_on_after(limits.kill_timeout, shield=True):
        await _wait_for_all(process, process.stdout)
    await process.stdout.aclose()


async def _wait_for_all(process: trio.Process, stdout: trio.abc.ReceiveStream) -> None:
    """Wait for the end of a program and of all processes that hold its output open."""
    # A program whose last output is not read may wait forever to print it.
    while await stdout.receive_some(_READ_SIZE):
        pass
    await process.wait()


def _signal_all(process: trio.Process, *, kill: bool) -> None:
    """Send SIGTERM or SIGKILL to a program and to everything that it started."""
    if sys.platform == "win32":
        process.kill()
        return
    try:
        # Once the program is reaped and its children are gone, a new group could in
        # theory get the number. But the kernel assigns numbers in turn, and the program
        # was reaped only now.
        os.killpg(process.pid, signal.SIGKILL if kill else signal.SIGTERM)
    except (ProcessLookupError, PermissionError):
        pass  # no process is left; macOS raises the second error
