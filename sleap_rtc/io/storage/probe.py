"""Checks that storage answers, and that two machines see the same storage."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, TypeVarTuple

import msgspec
import trio

from sleap_rtc.io.storage import probe_child
from sleap_rtc.io.storage.call import call_storage
from sleap_rtc.io.storage.files import write_at
from sleap_rtc.io.storage.folder import (
    StorageError,
    create_beneath,
    explain_errors,
    open_beneath,
)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

MAX_PROBE_BYTES = 64
"""Bytes of a mount probe, which holds a nonce; more than that is not read."""

_KILL_TIMEOUT = 0.5
"""Seconds for a killed child to end before it is left behind."""


class StorageHealth(msgspec.Struct, frozen=True):
    """Result of a probe of storage.

    Args:
        ok: True if it answered in time, and could be written to.
        reason: The reason if it is not ok, for people.
        answered: False if it did not answer in time.
        free_bytes: Bytes that may still be written.
        total_bytes: Bytes of the whole file system.
        write_seconds: Seconds for writing a small file to the disk.
    """

    ok: bool
    reason: str = ""
    answered: bool = True
    free_bytes: int = 0
    total_bytes: int = 0
    write_seconds: float = 0.0


async def probe_storage(path: Path, timeout: float) -> StorageHealth:
    """Check storage that may hang, and write a small file there.

    A process that waits for dead storage cannot continue, nor always be killed, so the
    check runs in a child process. One that does not end in time is left behind.

    Args:
        path: A directory on the storage.
        timeout: Seconds to wait for the answer.
    """
    # The child imports nothing of this package, so that it starts in about 20 ms.
    child = await trio.lowlevel.open_process(
        [sys.executable, "-I", "-S", str(probe_child.__file__), str(path)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    answer = b""
    try:
        with trio.move_on_after(timeout):
            answer = await _read_answer(child)
    finally:
        await _end_child(child)
    if not answer:
        reason = f"Storage at {path} did not answer within {timeout:g} seconds"
        return StorageHealth(ok=False, reason=reason, answered=False)
    return msgspec.json.decode(answer, type=StorageHealth)


async def ask_storage(
    root: Path, function: Callable[[*Ts], T], *args: *Ts, timeout: float
) -> T:
    """Probe storage, then call a function that touches it; see `call_storage`.

    Args:
        root: A directory on the storage.
        function: The function, which may block.
        args: Its arguments.
        timeout: Seconds for the probe and the call together.

    Raises:
        StorageError: If the storage does not answer, or failed.
    """
    health = await probe_storage(root, timeout / 2)
    if not health.ok:
        raise StorageError(health.reason)
    return await call_storage(function, *args, root=root, timeout=timeout / 2)


def write_probe(root: Path, relative: str, nonce: bytes) -> None:
    """Write a mount probe, a new small file for another host to find.

    Args:
        root: The shared root as this machine mounts it.
        relative: The path beneath it, in an existing directory.
        nonce: The content of the file, at most 64 bytes.

    Raises:
        InvalidInput: If the path leads elsewhere.
        StorageError: If the name is taken, or the storage failed.
    """
    if len(nonce) > MAX_PROBE_BYTES:
        raise ValueError(f"a mount probe holds at most {MAX_PROBE_BYTES} bytes")
    fd = create_beneath(root, relative)
    with explain_errors(f"Failed to write {relative}"):
        try:
            write_at(fd, nonce, 0)
            # The other host looks for it at once, and close() alone does not promise
            # that the data has left this machine.
            os.fsync(fd)
        finally:
            os.close(fd)


def read_probe(root: Path, relative: str) -> bytes:
    """Read a mount probe that another host wrote.

    Returns:
        Its content, at most 64 bytes.

    Raises:
        InvalidInput: If it does not exist, or the path leads elsewhere.
        StorageError: If the storage failed.
    """
    fd = open_beneath(root, relative)
    with explain_errors(f"Failed to read {relative}"):
        try:
            return os.read(fd, MAX_PROBE_BYTES)
        finally:
            os.close(fd)


async def _read_answer(child: trio.Process) -> bytes:
    answer = b""
    assert child.stdout is not None  # it is a pipe, see above
    async for piece in child.stdout:
        answer += piece
    return answer


async def _end_child(child: trio.Process) -> None:
    """Kill the child; one that hangs inside the kernel is left behind."""
    with trio.move_on_after(_KILL_TIMEOUT, shield=True):
        child.kill()
        await child.wait()
    if child.stdout is not None:
        await child.stdout.aclose()
