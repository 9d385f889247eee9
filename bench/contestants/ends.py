"""Pairs of small programs that move bytes in another way: bare TLS, aiortc, aioquic."""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from bench.files import take_away
from bench.measures import Absent, BenchError, Contestant, Load, Sample, Usage
from bench.processes import killed_after, last_line_of, patience, python_module, started

ROOT = Path(__file__).parents[2]
"""Folder that the package `bench` lies in."""

Process = subprocess.Popen[str]


def tls_stream(load: Load) -> Contestant:
    """Make a contestant of a bare TLS stream between two processes."""
    certificate = load.path.parent / "certificate.der"
    script = python_module("bench.ends.tls")
    common = (str(certificate), str(load.size))

    def measure() -> Sample:
        with _end(load, *script, "receive", *common) as receiver:
            port = _line_of(receiver)
            with _end(load, *script, "send", *common, port) as sender:
                sample = _hear(sender, receiver)
        certificate.unlink()
        return sample

    return Contestant("a bare TLS stream (Trio)", measure)


def data_channel(load: Load, python: str | None) -> Contestant | Absent:
    """Make a contestant of a WebRTC data channel.

    Args:
        load: The file that is sent.
        python: A Python that has aiortc, if there is one.
    """
    name = "aiortc data channel"
    if python is None:
        return Absent(name, "no Python that has aiortc was named (--peers-python)")
    if subprocess.run([python, "-c", "import aiortc"], capture_output=True).returncode:
        return Absent(name, f"{python} has no aiortc")
    script = python_module("bench.ends.webrtc", python)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def measure() -> Sample:
        with (
            _end(load, *script, "send", str(load.path), env=environment) as sender,
            _end(
                load, *script, "receive", str(load.arrived), env=environment
            ) as receiver,
        ):
            _tell(receiver, _line_of(sender))
            _tell(sender, _line_of(receiver))
            sample = _hear(sender, receiver)
        return msgspec.structs.replace(sample, is_intact=take_away(load))

    return Contestant(name, measure)


def engine_in_memory(load: Load, datagram_size: int) -> Contestant:
    """Make a contestant of aioquic's engine, both ends in one process."""
    script = python_module("bench.ends.engine")

    def measure() -> Sample:
        with _end(load, *script, str(load.size), str(datagram_size)) as both:
            return _hear(both)

    return Contestant(f"aioquic in memory, {datagram_size} B", measure)


@contextmanager
def _end(
    load: Load, *command: str, env: dict[str, str] | None = None
) -> Iterator[Process]:
    """Run a program, and kill it if the load takes it too long."""
    pipe = subprocess.PIPE
    with (
        started(command, env=env, stdin=pipe, stdout=pipe, stderr=pipe) as process,
        killed_after(patience(load.size), process),
    ):
        yield process


def _line_of(process: Process) -> str:
    """Read the next line that a program prints."""
    line = process.stdout.readline().strip() if process.stdout else ""
    if not line:
        process.kill()
        said = process.stderr.read() if process.stderr else ""
        raise BenchError(f"one end of the pair went away: {last_line_of(said)}")
    return line


def _tell(process: Process, line: str) -> None:
    if process.stdin:
        process.stdin.write(f"{line}\n")
        process.stdin.flush()


def _hear(*processes: Process) -> Sample:
    """Read the resources of the sender, and of the receiver if it has a process."""
    told = [json.loads(_line_of(process)) for process in processes]
    sides = [Usage(one["cpu_seconds"], one["peak_bytes"]) for one in told]
    seconds = round(told[0]["seconds"], 4)
    return Sample(seconds, sender=sides[0], receiver=sides[1] if sides[1:] else None)
