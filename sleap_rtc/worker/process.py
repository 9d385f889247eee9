"""Run the commands of a job, and follow their output.

No shell is involved. Every command gets a session, and so a process group, of its own:
whatever it started ends with it. On Windows there are no such groups, and only the
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
from sleap_rtc.proto.job.lines import LineAssembler, LineEvent
from sleap_rtc.proto.job.script import Command, equivalents

GRACE_SECONDS = 10.0
"""What a command has after SIGTERM; sleap-nn takes up to 4 s to end its training."""

KILL_SECONDS = 5.0
"""Longest wait after SIGKILL; only a process inside the kernel can take longer."""

START_TIMEOUT = 60.0
"""Seconds for the folder of a command to answer; network mounts fail over in 30."""

DRAIN_SECONDS = 2.0
"""Longest wait for output after the end of a command, if a child of it holds on."""

DRAIN_BYTES = 1024 * 1024
"""Most output that is taken after the end of a command; a pipe never holds more."""

_READ_SIZE = 16 * 1024
"""Bytes at once; as 16 Ki empty lines they keep the event loop busy for 0.1 s."""

OnOutput = Callable[[bytes], Awaitable[None]]
OnLine = Callable[[LineEvent], Awaitable[None]]


class ProgramStartError(Exception):
    """A program could not be started.

    Args:
        program: Its name.
        reason: Why, and what to do, for people.
    """

    def __init__(self, program: str, reason: str) -> None:
        super().__init__(reason)
        self.program = program
        self.reason = reason


class ProgramMissingError(ProgramStartError):
    """A program is not installed here."""

    def __init__(self, program: str) -> None:
        super().__init__(
            program,
            f"'{program}' is not installed on this worker, or not on its PATH. Install "
            "it there, or start the worker from the environment that has it.",
        )


class ScriptOutcome(msgspec.Struct, frozen=True):
    """How the commands of a script ended.

    Args:
        next_line: The number that the next line of the log gets.
        failed: The command that failed, or None if all of them succeeded.
        status: Its exit status; minus the number of the signal that killed it; None
            if it could not be started.
        reason: What happened to it, for people.
    """

    next_line: int
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
    on_line: OnLine,
    gpus: tuple[int, ...] | None = None,
    grace: float = GRACE_SECONDS,
    first_line: int = 1,
) -> ScriptOutcome:
    """Run commands one after the other, up to the first that fails.

    The log begins each command with a line that shows it. A command whose program is
    not installed runs as another spelling of it that is, and the log says so.

    Args:
        commands: What to run; their programs have been checked already.
        cwd: The folder to run them in.
        environment: The worker's environment; programs are looked up on its PATH.
        on_line: Gets every line, and every redraw of a line, one at a time. While it
            waits, the command waits too.
        gpus: The GPUs that the commands see, by number; None for all.
        grace: Seconds that a command has to end by itself when this is cancelled.
        first_line: The number of the first line of the log.

    Returns:
        How it ended. What `on_line` raises comes out in an exception group.
    """
    log = _Log(on_line, first_line)
    for command in commands:
        await log.note("$ " + shlex.join(command.argv))
        try:
            await _require_answer(command.argv[0], cwd)
            argv = await _resolve(command, cwd, environment, log)
            status = await _run_logged(
                argv, log, cwd=cwd, environment=environment, gpus=gpus, grace=grace
            )
        except ProgramStartError as error:
            reason = f"{command}: {error.reason}"
            return ScriptOutcome(log.next_line, command, None, reason)
        if status != 0:
            reason = f"{command} {_describe_status(status)}"
            return ScriptOutcome(log.next_line, command, status, reason)
    return ScriptOutcome(log.next_line)


async def _run_logged(
    argv: Sequence[str],
    log: "_Log",
    *,
    cwd: Path,
    environment: Mapping[str, str],
    gpus: tuple[int, ...] | None,
    grace: float,
) -> int:
    """Run one command with its output going to the log."""
    send, receive = trio.open_memory_channel[bytes](0)
    status = 0
    failure: ProgramStartError | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(log.follow, receive)
        async with send:
            try:
                status = await run_command(
                    argv,
                    cwd=cwd,
                    environment=environment,
                    on_output=send.send,
                    gpus=gpus,
                    grace=grace,
                )
            except ProgramStartError as error:
                failure = error
    if failure is not None:
        raise failure
    return status


class _Log:
    """The lines of a script; one task at a time delivers them, so they stay in order.

    Args:
        on_line: Gets them.
        first_line: The number of the first.
    """

    def __init__(self, on_line: OnLine, first_line: int) -> None:
        self._on_line = on_line
        self._assembler = LineAssembler(first_line)

    @property
    def next_line(self) -> int:
        return self._assembler.next_line

    async def note(self, text: str) -> None:
        """Add a line of the runner's own."""
        data = text.replace("\n", " ").encode() + b"\n"
        await self._deliver(self._assembler.receive_data(data, trio.current_time()))

    async def follow(self, output: trio.MemoryReceiveChannel[bytes]) -> None:
        """Deliver the lines of a command until its output ends."""
        async with output:
            while True:
                deadline = self._assembler.deadline()
                data: bytes | None = None
                with trio.CancelScope(
                    deadline=math.inf if deadline is None else deadline
                ):
                    try:
                        data = await output.receive()
                    except trio.EndOfChannel:
                        break
                now = trio.current_time()
                if data is None:
                    await self._deliver(self._assembler.handle_timeout(now))
                else:
                    await self._deliver(self._assembler.receive_data(data, now))
        await self._deliver(self._assembler.finish(trio.current_time()))

    async def _deliver(self, events: list[LineEvent]) -> None:
        for event in events:
            await self._on_line(event)


async def _require_answer(program: str, cwd: Path) -> None:
    """Check that the folder answers in which a program is to start.

    Python holds its global lock until a new program runs, so one that hangs at the
    change to its folder would freeze the whole worker.

    Raises:
        ProgramStartError: If the folder does not answer.
    """
    health = await probe_storage(cwd, START_TIMEOUT)
    if not health.answered:
        raise ProgramStartError(program, health.reason)


async def _resolve(
    command: Command, cwd: Path, environment: Mapping[str, str], log: _Log
) -> tuple[str, ...]:
    """Find the program of a command, or of another spelling of it."""
    path = environment.get("PATH", os.defpath)
    for argv in (command.argv, *equivalents(command.argv)):
        found = await call_storage(find_program, argv[0], cwd, path)
        if found is None:
            continue
        if argv is not command.argv:
            other = Command(argv, command.line, command.script).title
            await log.note(
                f"{command.argv[0]} is not installed here; running '{other}' instead"
            )
        return (found, *argv[1:])
    raise ProgramMissingError(command.argv[0])


def find_program(program: str, cwd: Path, path: str) -> str | None:
    """Find an executable; it blocks.

    Args:
        program: A name, or a path, which counts from `cwd`.
        cwd: The folder that the program will run in.
        path: The folders to look for names in, as in PATH. Relative ones are left out:
            a package must not bring a program of its own under an allowed name.

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
    grace: float = GRACE_SECONDS,
) -> int:
    """Run a program to its end.

    When this is cancelled, the program and everything that it started get SIGTERM, and
    SIGKILL once `grace` has passed; what they still print is dropped.

    Args:
        argv: The program, as a path or by a name on PATH, and its arguments.
        cwd: The folder to run it in.
        environment: The worker's environment, see `job_environment`.
        on_output: Gets the output, standard error included, as it comes, at most
            16 KiB at once. While it waits, nothing more is read.
        gpus: The GPUs that the program sees, by number; None for all.
        grace: Seconds between SIGTERM and SIGKILL.

    Returns:
        The exit status, or minus the number of the signal that ended the program.

    Raises:
        ProgramMissingError: If there is no such program.
        ProgramStartError: If it can't be started for another reason.
    """
    process = await _start(argv, cwd, job_environment(environment, gpus))
    try:
        assert process.stdout is not None  # asked for in _start
        output = _Output(process.stdout)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_end_output_with, process, output)
            while data := await output.read():
                await on_output(data)
        return await process.wait()
    finally:
        await _stop(process, grace)


def job_environment(
    environment: Mapping[str, str], gpus: tuple[int, ...] | None
) -> dict[str, str]:
    """Make the environment of a job out of the worker's.

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
        # CUDA counts the fastest GPU first unless told to count as the driver does.
        result["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
        result["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
    return result


class _Output:
    """The pipe that a program and its children write to.

    It ends when the last of them closes it, or soon after `end_soon`.
    """

    def __init__(self, stream: trio.abc.ReceiveStream) -> None:
        self._stream = stream
        self._scope = trio.CancelScope()
        self._ending = False
        self._since = 0.0
        self._seconds = DRAIN_SECONDS
        self._bytes = DRAIN_BYTES

    def end_soon(self) -> None:
        """Read no more than the pipe holds, and hardly wait for more."""
        self._ending = True
        self._since = trio.current_time()
        self._scope.deadline = self._since + self._seconds

    async def read(self) -> bytes:
        """Wait for output; b"" is its end."""
        if self._bytes <= 0:
            return b""
        self._since = trio.current_time()
        deadline = self._since + self._seconds if self._ending else math.inf
        data = b""
        with trio.CancelScope(deadline=deadline) as self._scope:
            data = bytes(await self._stream.receive_some(_READ_SIZE))
        if self._ending:
            # Only the waiting counts: a slow reader shall lose nothing.
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
        raise ProgramStartError(argv[0], f"the folder {cwd} is gone") from None
    except OSError as error:
        raise ProgramStartError(
            argv[0], f"'{argv[0]}' could not be started: {error.strerror}"
        ) from None


async def _stop(process: trio.Process, grace: float) -> None:
    """End what is left of a program and of everything that it started."""
    assert process.stdout is not None  # asked for in _start
    if process.returncode is None:
        _signal_all(process, kill=False)
        with trio.move_on_after(grace, shield=True):
            await _wait_for_all(process, process.stdout)
    _signal_all(process, kill=True)
    with trio.move_on_after(KILL_SECONDS, shield=True):
        await _wait_for_all(process, process.stdout)
    await process.stdout.aclose()


async def _wait_for_all(process: trio.Process, stdout: trio.abc.ReceiveStream) -> None:
    """Wait for the end of a program and of all that can still write its output."""
    # A program that can't print its last words might never get to its end.
    while await stdout.receive_some(_READ_SIZE):
        pass
    await process.wait()


def _signal_all(process: trio.Process, *, kill: bool) -> None:
    """Send SIGTERM or SIGKILL to a program and to everything that it started."""
    if sys.platform == "win32":
        process.kill()
        return
    try:
        # With the program reaped and its children gone, the number could in theory
        # belong to a new group; but the kernel hands numbers out in turn, and the
        # program was reaped only now.
        os.killpg(process.pid, signal.SIGKILL if kill else signal.SIGTERM)
    except (ProcessLookupError, PermissionError):
        pass  # Nobody is left; macOS says it in the second way.
