"""`scp` and `rsync -e ssh`, through an SSH server of the bench's own.

The server runs as the user of the benchmark, on a free port of loopback, with a host
key and one client key that are made for it. No other keys or settings are read. The
time of a small file is subtracted from each time: it goes into connecting.
"""

import getpass
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil

from bench.files import take_away
from bench.measures import (
    BenchError,
    Contestant,
    Load,
    Sample,
    Usage,
    without_connecting,
)
from bench.ports import reserved_port
from bench.processes import (
    END_TIMEOUT,
    Meter,
    patience,
    run_tool,
    started,
    wait_for_text,
)

PRIVILEGE_SEPARATION = Path("/run/sshd")
"""A directory without which the server does not start as root."""

_ADMINISTRATION = "/usr/sbin:/sbin"
"""Directories of the server, which are not on every PATH."""


def copies_over_ssh(load: Load, directory: Path, server: int) -> list[Contestant]:
    """Make contestants of the two programs.

    Args:
        load: The file that they copy.
        directory: The directory that `open_server` has filled.
        server: The process id of the server.
    """
    configuration = str(directory / "client.conf")
    commands = {
        "scp": ("scp", "-q", "-F", configuration),
        "rsync -e ssh": ("rsync", "--whole-file", f"--rsh=ssh -F {configuration}"),
    }
    return [
        Contestant(name, partial(_measure, load, command, server))
        for name, command in commands.items()
    ]


def why_not() -> str:
    """Return which programs are missing; empty if none are."""
    programs = ("ssh", "scp", "rsync", "ssh-keygen", "sshd")
    missing = [name for name in programs if _find(name) is None]
    return f"{', '.join(missing)} not installed" if missing else ""


@contextmanager
def open_server(directory: Path) -> Iterator[int]:
    """Run an SSH server; yield its process id.

    Args:
        directory: An empty one, for the keys and the settings.

    Raises:
        BenchError: If it does not start.
    """
    with _separated(), reserved_port() as port:
        _write_settings(directory, port)
        log = directory / "log"
        # It only starts by its full path.
        command = (_find("sshd") or "sshd", "-D", "-e", "-f")
        with (
            log.open("w") as file,
            started(
                (*command, str(directory / "server.conf")), stdout=file, stderr=file
            ) as server,
        ):
            wait_for_text(log, "Server listening", server, END_TIMEOUT)
            yield server.pid


def _measure(load: Load, command: tuple[str, ...], server: int) -> Sample:
    # This script is a small file.
    connecting, _ = run_tool((*command, __file__, _target(load)), timeout=END_TIMEOUT)
    _wait_for_sessions(server)
    meter = Meter(server)
    seconds, sender = run_tool(
        (*command, str(load.path), _target(load)), timeout=patience(load.size)
    )
    _wait_for_sessions(server)
    meter.end()
    return Sample(
        seconds=without_connecting(seconds, connecting),
        is_intact=take_away(load),
        sender=sender,
        # The memory of its sessions is unknown, and its own is not that of a transfer.
        receiver=Usage(meter.usage().cpu_seconds),
        note=f"and {connecting:.1f} s to connect",
    )


def _target(load: Load) -> str:
    return f"bench:{load.arrived}"


def _wait_for_sessions(server: int) -> None:
    """Wait until the server has ended its sessions; only then it has their CPU time."""
    deadline = time.monotonic() + END_TIMEOUT
    while psutil.Process(server).children():
        if time.monotonic() > deadline:
            raise BenchError("the session of the SSH server does not end")
        time.sleep(0.01)


def _write_settings(directory: Path, port: int) -> None:
    host_key, client_key = directory / "host_key", directory / "client_key"
    for key in (host_key, client_key):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)]
        subprocess.run(command, check=True)
    public = host_key.with_suffix(".pub").read_text()
    (directory / "known_hosts").write_text(f"[127.0.0.1]:{port} {public}")
    (directory / "server.conf").write_text(f"""
        ListenAddress 127.0.0.1
        Port {port}
        HostKey {host_key}
        AuthorizedKeysFile {client_key}.pub
        AuthenticationMethods publickey
        PermitRootLogin prohibit-password
        PidFile none
        StrictModes no
        UsePAM no
        Subsystem sftp internal-sftp
        """)
    (directory / "client.conf").write_text(f"""
        Host bench
        HostName 127.0.0.1
        Port {port}
        User {getpass.getuser()}
        IdentityFile {client_key}
        IdentitiesOnly yes
        IdentityAgent none
        BatchMode yes
        GlobalKnownHostsFile none
        UserKnownHostsFile {directory / "known_hosts"}
        StrictHostKeyChecking yes
        """)


@contextmanager
def _separated() -> Iterator[None]:
    """Make the directory that the server needs as root, if it is missing."""
    is_ours = os.geteuid() == 0 and not PRIVILEGE_SEPARATION.exists()
    if is_ours:
        PRIVILEGE_SEPARATION.mkdir(mode=0o755)
    try:
        yield
    finally:
        if is_ours:
            PRIVILEGE_SEPARATION.rmdir()


def _find(program: str) -> str | None:
    path = f"{os.environ.get('PATH', '')}:{_ADMINISTRATION}"
    return shutil.which(program, path=path)
