"""Description of this machine for jobs and clients."""

import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pynvml

from sleap_rtc.proto.messages import Gpu
from sleap_rtc.proto.terminal import printable

_PROGRAMS = ("sleap-nn", "sleap-nn-train", "sleap")
"""Programs whose place leads to the installation of sleap-nn, the most reliable
first."""

_SHEBANG_LENGTH = 512
"""Bytes of the first line of a script; Linux itself reads 256."""


class MachineInfo(msgspec.Struct, frozen=True):
    """Description of a worker's machine.

    Args:
        hostname: The name of the machine.
        gpus: Its NVIDIA GPUs, numbered as the driver does.
        sleap_nn: The version of sleap-nn on the PATH, or "".
        disk_free: Bytes of free disk space for jobs.
    """

    hostname: str
    gpus: tuple[Gpu, ...]
    sleap_nn: str
    disk_free: int


def describe_machine(directory: Path) -> MachineInfo:
    """Return the description of this machine. Blocking: call it in a thread.

    Args:
        directory: The directory for jobs.
    """
    return MachineInfo(
        hostname=socket.gethostname(),
        gpus=find_gpus(),
        sleap_nn=find_sleap_nn(os.environ.get("PATH", "")),
        disk_free=shutil.disk_usage(directory).free,
    )


def find_gpus() -> tuple[Gpu, ...]:
    """Return the NVIDIA GPUs; none without a working driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        return tuple(_gpu(number) for number in range(pynvml.nvmlDeviceGetCount()))
    except pynvml.NVMLError:
        return ()
    finally:
        pynvml.nvmlShutdown()


def _gpu(number: int) -> Gpu:
    """Return a GPU, even one that fell off its bus: the others keep their numbers."""
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(number)
        name = pynvml.nvmlDeviceGetName(handle)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle).total
    except pynvml.NVMLError as error:
        return Gpu(model=f"does not answer: {error}"[:128], memory_mb=0)
    return Gpu(model=str(name)[:128], memory_mb=int(memory) // 2**20)


def find_sleap_nn(path: str) -> str:
    """Return the version of sleap-nn without starting it, which would take 10 s.

    Args:
        path: The folders to look for the program in, as in PATH.

    Returns:
        The version, or "" if it is not installed or has no version.
    """
    for program in _PROGRAMS:
        found = shutil.which(program, path=path)
        if found is None:
            continue
        for prefix in _prefixes(Path(found)):
            for version in _versions(prefix):
                return printable(version)[:64]
    return ""


def _prefixes(program: Path) -> Iterator[Path]:
    """Yield the environments that a program may belong to, the likeliest first."""
    interpreter = _interpreter(program)
    if interpreter is not None:
        yield interpreter.parent.parent
    yield program.parent.parent
    # Tools that give each program its own environment link to it from elsewhere.
    yield program.resolve().parent.parent


def _interpreter(program: Path) -> Path | None:
    """Return the Python in the first line of a script, if it has one."""
    try:
        with program.open("rb") as file:
            first = file.readline(_SHEBANG_LENGTH)
    except OSError:
        return None
    if not first.startswith(b"#!/"):
        return None
    return Path(os.fsdecode(first[2:].strip()))


def _versions(prefix: Path) -> Iterator[str]:
    """Yield the versions of sleap-nn in an environment."""
    for packages in ("lib/python3*/site-packages", "Lib/site-packages"):
        for found in prefix.glob(f"{packages}/sleap_nn-*.dist-info"):
            yield found.name.removeprefix("sleap_nn-").removesuffix(".dist-info")
