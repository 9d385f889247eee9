"""Checks for problems that keep this machine from sending or running jobs."""

import os
import platform
import socket
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Literal

import msgspec
import trio

from sleap_rtc import client
from sleap_rtc.config import (
    SHARED_STORAGE_VARIABLE,
    chosen_environment,
    find_shared_root,
    load_settings,
)
from sleap_rtc.errors import UserError
from sleap_rtc.io.hardware import describe_machine
from sleap_rtc.io.quic.socket import BUFFER_SIZE
from sleap_rtc.io.storage.call import call_storage
from sleap_rtc.io.storage.probe import probe_storage
from sleap_rtc.proto.sizes import human_size

STORAGE_TIMEOUT = 10.0
"""Seconds after which storage counts as hanging."""

SIGNALING_TIMEOUT = 5.0
"""Seconds to join the room, and for an answer over HTTP."""

Verdict = Literal["ok", "note", "failed"]


class Check(msgspec.Struct, frozen=True):
    """The result of one check.

    Args:
        name: The subject of the check.
        verdict: ``failed`` needs a remedy; ``note`` is fine on most machines.
        found: The finding.
        advice: The remedy.
    """

    name: str
    verdict: Verdict
    found: str
    advice: str = ""


async def examine(
    shared_storage_root: Path | None = None,
    environ: Mapping[str, str] = os.environ,
) -> AsyncIterator[Check]:
    """Run all checks, one after the other.

    Args:
        shared_storage_root: The value of the command line.
        environ: Environment variables.

    Yields:
        Each result as soon as it is known.
    """
    yield _check_python()
    yield await _check_room(environ)
    settings = await call_storage(load_settings, environ)
    if url := chosen_environment(settings, environ).signaling_http:
        yield await _check_http(url)
    yield await _check_storage(shared_storage_root, environ)
    yield _check_udp()
    machine = await call_storage(describe_machine, Path.home())
    if machine.sleap_nn:
        yield Check("sleap-nn", "ok", f"version {machine.sleap_nn} on the PATH")
    else:
        yield Check(
            "sleap-nn",
            "note",
            "not on the PATH",
            "A worker needs it: start the worker from the environment that has it. "
            "A machine that only sends jobs does not.",
        )
    if machine.gpus:
        models = ", ".join(
            f"{gpu.model} ({human_size(gpu.memory_mb * 1024**2)})"
            for gpu in machine.gpus
        )
        yield Check("GPU", "ok", models)
    else:
        yield Check(
            "GPU",
            "note",
            "no NVIDIA GPU was found",
            "Jobs run here on the CPU. If the machine has a GPU, install its driver "
            "(`nvidia-smi` must list it; in a container it needs --gpus all).",
        )


def _check_python() -> Check:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Check("Python", "ok", found)


async def _check_room(environ: Mapping[str, str]) -> Check:
    try:
        workers = await client.list_workers(timeout=SIGNALING_TIMEOUT, environ=environ)
    except UserError as error:
        return Check("Signaling", "failed", error.message, error.hint)
    if not workers:
        return Check(
            "Signaling",
            "note",
            "reached, but no worker is in the room",
            "Start one: sleap-rtc daemon --role worker",
        )
    names = ", ".join(worker.peer_id for worker in workers)
    return Check("Signaling", "ok", f"reached; workers: {names}")


async def _check_http(url: str) -> Check:
    """Check that the configured signaling server answers HTTP with any status."""
    name = "Signaling over HTTP"
    with trio.move_on_after(SIGNALING_TIMEOUT):
        try:
            status = await trio.to_thread.run_sync(
                _http_status, url, abandon_on_cancel=True
            )
        except OSError as error:
            return Check(
                name,
                "failed",
                f"{url}: {getattr(error, 'reason', error)}",
                "Check signaling_http in the configuration file, and the server.",
            )
        return Check(name, "ok", f"{url} answers with status {status}")
    return Check(name, "failed", f"{url} does not answer", "Check the server.")


def _http_status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=SIGNALING_TIMEOUT) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code  # an error is an answer as well


async def _check_storage(
    shared_storage_root: Path | None, environ: Mapping[str, str]
) -> Check:
    name = "Shared storage"
    try:
        root = await call_storage(find_shared_root, shared_storage_root, environ)
    except UserError as error:
        return Check(name, "failed", error.message, error.hint)
    if root is None:
        return Check(
            name,
            "note",
            "Shared storage not configured, will use RTC transfer",
            f"If this machine and the worker mount the same storage, set "
            f"{SHARED_STORAGE_VARIABLE} on both: packages are then only copied there.",
        )
    health = await probe_storage(root, STORAGE_TIMEOUT)
    if not health.ok:
        return Check(
            name,
            "failed",
            health.reason,
            "Check the mount (`mount`, `df`) and that this user may write there.",
        )
    return Check(
        name,
        "ok",
        f"{root}: {human_size(health.free_bytes)} of "
        f"{human_size(health.total_bytes)} free, a small write takes "
        f"{health.write_seconds * 1000:.1f} ms",
    )


def _check_udp() -> Check:
    """Check the size of the socket buffers that the system grants."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_SIZE)
        given = udp.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    found = f"socket buffer of {human_size(given)}"
    if given < BUFFER_SIZE:
        return Check(
            "UDP",
            "note",
            f"{found}; {human_size(BUFFER_SIZE)} is faster over long distances",
            f"As root: sysctl -w net.core.rmem_max={BUFFER_SIZE} "
            f"net.core.wmem_max={BUFFER_SIZE}",
        )
    return Check("UDP", "ok", found)
