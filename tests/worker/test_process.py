"""Real commands: their output, their end, and their remains."""

import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from sleap_rtc.proto.job.lines import LineEvent
from sleap_rtc.proto.job.script import Command
from sleap_rtc.worker.job_log import open_job_log
from sleap_rtc.worker.process import (
    LIMITS,
    CommandLimits,
    ProgramMissingError,
    ProgramStartError,
    ScriptOutcome,
    find_program,
    job_environment,
    run_command,
    run_script,
)

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="the programs here are scripts with a first line"
)

LIMIT = 30.0
"""Seconds that a test may take."""

MakeProgram = Callable[[str, str], Path]


@pytest.fixture
def make_program(tmp_path: Path) -> MakeProgram:
    """Write a Python program into the folder that is the PATH of the tests."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def make(name: str, source: str) -> Path:
        program = folder / name
        program.write_text(f"#!{sys.executable} -S\n{source}")
        program.chmod(0o755)
        return program

    return make


class Output:
    """Keeps the output of a command; a test can wait for a part of it."""

    def __init__(self) -> None:
        self.data = b""
        self._more = trio.Event()

    async def add(self, data: bytes) -> None:
        self.data += data
        self._more.set()
        self._more = trio.Event()

    async def wait_for(self, text: bytes) -> None:
        while text not in self.data:
            await self._more.wait()


async def run(
    program: Path,
    *arguments: str,
    output: Output | None = None,
    limits: CommandLimits = LIMITS,
) -> int:
    output = output or Output()
    with trio.fail_after(LIMIT):
        return await run_command(
            [str(program), *arguments],
            cwd=program.parent,
            environment=os.environ,
            on_output=output.add,
            limits=limits,
        )


class Lifeline:
    """A named pipe that a program holds open; its end is the end of the program."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self._stream = trio.lowlevel.FdStream(
            os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        )

    async def ends(self) -> None:
        """Fail unless the program, which has begun, has ended or is about to."""
        async with self._stream:
            with trio.fail_after(60):
                assert await self._stream.receive_some() == b"begun"
                assert await self._stream.receive_some() == b""


HOLD = "import os; os.write(os.open('alive', os.O_WRONLY), b'begun')\n"
"""Code of a program that holds the lifeline."""


# ----------------------------------------------------------------------- one command


async def test_output_and_errors_come_in_the_order_of_printing(
    make_program: MakeProgram,
) -> None:
    program = make_program(
        "p",
        "import sys\n"
        "for i in range(200):\n"
        "    print('out', i)\n"
        "    print('err', i, file=sys.stderr)\n",
    )
    output = Output()
    assert await run(program, output=output) == 0
    expected = "".join(f"out {i}\nerr {i}\n" for i in range(200))
    assert output.data.decode() == expected


async def test_a_program_gets_its_arguments_and_folder_and_an_empty_input(
    make_program: MakeProgram, tmp_path: Path
) -> None:
    program = make_program(
        "p",
        "import os, sys\nprint(sys.argv[1:], os.getcwd(), repr(sys.stdin.read()))\n",
    )
    output = Output()
    assert await run(program, "a b", "$HOME", "'", output=output) == 0
    folder = await trio.Path(tmp_path / "bin").resolve()
    assert output.data.decode() == f"""['a b', '$HOME', "'"] {folder} ''\n"""


@pytest.mark.parametrize(
    ("source", "status"),
    [
        ("", 0),
        ("raise SystemExit(3)", 3),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL),
        ("import os; os.close(1); os.close(2); raise SystemExit(5)", 5),
    ],
)
async def test_the_exit_status_comes_back(
    make_program: MakeProgram, source: str, status: int
) -> None:
    assert await run(make_program("p", source)) == status


async def test_a_missing_program_is_named_with_advice(tmp_path: Path) -> None:
    with pytest.raises(ProgramMissingError, match=r"'.*nothing' is not installed"):
        await run(tmp_path / "nothing")


async def test_a_program_that_cannot_be_started_is_named_with_the_reason(
    make_program: MakeProgram, tmp_path: Path
) -> None:
    program = make_program("p", "")
    program.write_bytes(b"\x00\x01 no program")
    with pytest.raises(ProgramStartError, match=r"Cannot start .*: Exec format"):
        await run(program)
    with pytest.raises(ProgramStartError, match="gone is gone"):
        await run_command(
            [str(program)],
            cwd=tmp_path / "gone",
            environment={},
            on_output=Output().add,
        )


def test_the_environment_has_no_variable_of_sleap_rtc() -> None:
    worker = {"PATH": "/bin", "SLEAP_RTC_INVITE": "secret", "CUDA_VISIBLE_DEVICES": "7"}
    assert job_environment(worker, None) == {
        "PATH": "/bin",
        "CUDA_VISIBLE_DEVICES": "7",
        "PYTHONUNBUFFERED": "1",
    }
    assert job_environment(worker, (0, 2))["CUDA_VISIBLE_DEVICES"] == "0,2"
    assert job_environment(worker, ())["CUDA_VISIBLE_DEVICES"] == ""


async def test_a_child_that_keeps_the_pipe_open_is_ended_with_the_program(
    make_program: MakeProgram, tmp_path: Path
) -> None:
    lifeline = Lifeline(tmp_path / "bin" / "alive")
    child = HOLD + "import time\nprint('begun', flush=True)\ntime.sleep(99)\n"
    program = make_program(
        "p",
        "import os, subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-Sc', {child!r}])\n"
        "print('parent', flush=True)\n"
        "while not os.path.exists('go'): time.sleep(0.01)\n",
    )
    output = Output()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(run, program, output=output))
        with trio.fail_after(LIMIT):
            await output.wait_for(b"begun")
        (program.parent / "go").touch()
    await lifeline.ends()


async def test_a_slow_reader_slows_the_program_and_loses_nothing(
    make_program: MakeProgram,
) -> None:
    total = 32 * 1024 * 1024
    program = make_program(
        "p",
        "import os\n"
        f"for i in range({total} // 65536):\n"
        "    os.write(1, bytes([i % 256]) * 65536)\n",
    )
    received = 0
    largest = 0
    gate = trio.Event()
    reached = trio.Event()

    async def take(data: bytes) -> None:
        nonlocal received, largest
        received += len(data)
        largest = max(largest, len(data))
        reached.set()
        await gate.wait()

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:

            async def follow() -> None:
                status = await run_command(
                    [str(program)],
                    cwd=program.parent,
                    environment=os.environ,
                    on_output=take,
                )
                assert status == 0

            nursery.start_soon(follow)
            await reached.wait()
            await trio.testing.wait_all_tasks_blocked(0.1)
            assert received <= 16384
            gate.set()
    assert received == total
    assert largest <= 16384


async def test_the_last_output_survives_a_reader_slower_than_the_drain(
    make_program: MakeProgram, tmp_path: Path
) -> None:
    lifeline = Lifeline(tmp_path / "bin" / "alive")
    program = make_program(
        "p",
        HOLD + "import time\nos.write(1, b'first')\n"
        "while not os.path.exists('go'): time.sleep(0.01)\n"
        "os.write(1, b'x' * 60000)\n",
    )
    received = b""

    async def take(data: bytes) -> None:
        nonlocal received
        received += data
        if data == b"first":
            (program.parent / "go").touch()
            await lifeline.ends()
            await trio.sleep(0.1)  # longer than the drain

    with trio.fail_after(LIMIT):
        await run_command(
            [str(program)],
            cwd=program.parent,
            environment={},
            on_output=take,
            limits=CommandLimits(drain_timeout=0.05),
        )
    assert received == b"first" + b"x" * 60000


@pytest.mark.parametrize(
    "prints",
    ["time.sleep(0.01); os.write(1, b'.')", "os.write(1, b'.' * 65536)"],
    ids=["slowly", "quickly"],
)
async def test_a_daemon_that_a_program_left_cannot_print_forever(
    make_program: MakeProgram,
    tmp_path: Path,
    prints: str,
) -> None:
    limits = CommandLimits(drain_timeout=0.2, kill_timeout=0.2)
    lifeline = Lifeline(tmp_path / "bin" / "alive")
    program = make_program(
        "p",
        HOLD + "import time\nparent = os.getpid()\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    while os.getppid() == parent: time.sleep(0.01)\n"
        f"    while True: {prints}\n",
    )
    output = Output()
    assert await run(program, output=output, limits=limits) == 0
    assert len(output.data) < 4 * limits.drain_bytes
    await lifeline.ends()


# ---------------------------------------------------------------------- cancellation

STUBBORN = """
import os, signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-Sc", '''
import os, signal, time
os.write(os.open("alive", os.O_WRONLY), b"begun")
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(99)
'''])
child.wait()
"""

POLITE = """
import os, pathlib, signal, time
def end(*_):
    os.write(1, b"x" * 1_000_000)  # more than a pipe holds
    pathlib.Path("ended").touch()
    os._exit(0)
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
while True: time.sleep(9)
"""


async def cancel_after(program: Path, text: bytes, *, grace_timeout: float) -> None:
    """Run a program, and cancel it once it has printed a text."""
    output = Output()
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:

            async def follow() -> None:
                await run_command(
                    [str(program)],
                    cwd=program.parent,
                    environment=os.environ,
                    on_output=output.add,
                    limits=CommandLimits(grace_timeout=grace_timeout),
                )

            nursery.start_soon(follow)
            await output.wait_for(text)
            nursery.cancel_scope.cancel()


async def test_cancelling_ends_a_grandchild_that_ignores_it(
    make_program: MakeProgram, tmp_path: Path
) -> None:
    lifeline = Lifeline(tmp_path / "bin" / "alive")
    await cancel_after(make_program("p", STUBBORN), b"ready", grace_timeout=0.2)
    await lifeline.ends()


async def test_cancelling_lets_a_program_end_in_order(
    make_program: MakeProgram,
) -> None:
    program = make_program("p", POLITE)
    await cancel_after(program, b"ready", grace_timeout=LIMIT)
    assert (program.parent / "ended").exists()


async def test_an_error_of_the_reader_ends_the_program(
    make_program: MakeProgram, tmp_path: Path
) -> None:
    lifeline = Lifeline(tmp_path / "bin" / "alive")
    program = make_program(
        "p", HOLD + "import time\nprint('ready', flush=True)\ntime.sleep(99)\n"
    )

    async def take(data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        raise OSError("the disk is full")

    with trio.fail_after(LIMIT), pytest.raises(ExceptionGroup) as caught:
        await run_command(
            [str(program)], cwd=program.parent, environment=os.environ, on_output=take
        )
    assert caught.group_contains(OSError, match="disk is full")
    await lifeline.ends()


# --------------------------------------------------------------------------- scripts


class Job:
    """Runs scripts whose programs are in one folder, and keeps the log."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.events: list[LineEvent] = []

    @property
    def log(self) -> list[str]:
        lines = {event.line: event.text for event in self.events}
        assert list(lines) == list(range(1, len(lines) + 1))
        return list(lines.values())

    async def run(self, *commands: str) -> ScriptOutcome:
        parsed = [
            Command(tuple(command.split()), 2 + number, "train-script.sh")
            for number, command in enumerate(commands)
        ]
        with trio.fail_after(LIMIT):
            async with open_job_log(self.folder, self.events.append) as log:
                return await run_script(
                    parsed,
                    cwd=self.folder,
                    environment={"PATH": str(self.folder / "bin")},
                    log=log,
                )


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


async def test_commands_run_one_after_the_other(
    make_program: MakeProgram, job: Job
) -> None:
    make_program("sleap-nn", "import sys\nprint('this is', sys.argv[1], end='')\n")
    outcome = await job.run("sleap-nn train a", "sleap-nn track b")
    assert outcome == ScriptOutcome()
    assert outcome.ok
    assert job.log == [
        "$ sleap-nn train a",
        "this is train",
        "$ sleap-nn track b",
        "this is track",
    ]


async def test_the_first_failure_is_the_last_command(
    make_program: MakeProgram, job: Job
) -> None:
    make_program("sleap-nn", "print('no data')\nraise SystemExit(1)\n")
    outcome = await job.run("sleap-nn train a", "sleap-nn track b")
    assert not outcome.ok
    assert outcome.status == 1
    assert outcome.failed is not None
    assert outcome.failed.argv[1] == "train"
    assert outcome.reason == (
        "'sleap-nn train' (train-script.sh, line 2) ended with exit status 1"
    )
    assert job.log == ["$ sleap-nn train a", "no data"]


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (signal.SIGSEGV, "was killed by signal 11 (SIGSEGV)"),
        (signal.SIGKILL, "(SIGKILL); the machine may have run out of memory"),
    ],
)
async def test_a_killed_command_names_the_signal(
    make_program: MakeProgram, job: Job, number: int, text: str
) -> None:
    make_program("sleap", f"import os\nos.kill(os.getpid(), {number})\n")
    outcome = await job.run("sleap train")
    assert outcome.status == -number
    assert outcome.reason.endswith(text)


async def test_another_spelling_stands_in_for_a_missing_program(
    make_program: MakeProgram, job: Job
) -> None:
    make_program("sleap-nn", "import sys\nprint(sys.argv[1:])\n")
    assert (await job.run("sleap-nn-train --config-name x")).ok
    assert job.log == [
        "$ sleap-nn-train --config-name x",
        "sleap-nn-train is not installed here; running 'sleap-nn train' instead",
        "['train', '--config-name', 'x']",
    ]


async def test_a_missing_program_fails_the_script_with_advice(
    tmp_path: Path, job: Job
) -> None:
    # A program of that name in the package does not count.
    (tmp_path / "sleap").write_text("#!/bin/sh\n")
    (tmp_path / "sleap").chmod(0o755)
    outcome = await job.run("sleap train x")
    assert outcome.status is None
    assert outcome.reason == (
        "'sleap train' (train-script.sh, line 2): 'sleap' is not installed on this "
        "worker, or not on its PATH. Install it there, or start the worker from the "
        "environment that has it."
    )


def test_programs_are_found_on_absolute_folders_only(
    make_program: MakeProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = make_program("sleap", "")
    monkeypatch.chdir(program.parent)
    assert find_program("sleap", tmp_path, "") is None
    assert find_program("sleap", tmp_path, ".:bin") is None
    assert find_program("sleap", tmp_path, f".:{program.parent}") == str(program)
    assert find_program("bin/sleap", tmp_path, "") == str(program)
    assert find_program(str(program), tmp_path, "") == str(program)


async def test_redraws_keep_their_line_from_the_pipe_to_the_log(
    make_program: MakeProgram, job: Job
) -> None:
    make_program(
        "sleap",
        "import sys\n"
        "print('start')\n"
        "for i in range(5001):\n"
        "    print(f'\\r{i / 50:.0f}%', end='')\n"
        "print('\\nend')\n",
    )
    outcome = await job.run("sleap train")
    assert job.log == ["$ sleap train", "start", "100%", "end"]
    assert outcome.ok
    assert len(job.events) < 500


async def test_a_line_without_an_end_is_shown_while_the_command_waits(
    make_program: MakeProgram, tmp_path: Path
) -> None:
    make_program(
        "sleap",
        "import pathlib, time\n"
        "print('waiting...', end='', flush=True)\n"
        "while not pathlib.Path('go').exists(): time.sleep(0.01)\n",
    )

    def on_line(event: LineEvent) -> None:
        if event.text == "waiting...":
            (tmp_path / "go").touch()

    with trio.fail_after(LIMIT):
        async with open_job_log(tmp_path, on_line) as log:
            outcome = await run_script(
                [Command(("sleap",), 1, "train-script.sh")],
                cwd=tmp_path,
                environment={"PATH": str(tmp_path / "bin")},
                log=log,
            )
    assert outcome.ok
