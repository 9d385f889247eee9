"""A description of the machine and of the programs."""

import importlib.metadata
import os
import platform
import re
import shutil
import ssl
import subprocess
from pathlib import Path

import psutil

from bench.measures import Machine

_LIBRARIES = ("sleap-rtc", "aioquic", "blake3", "cryptography", "trio")

_TOOLS = {
    "cp": ("cp", "--version"),
    "rsync": ("rsync", "--version"),
    "ssh": ("ssh", "-V"),
}

_PEERS = ("aiortc", "magic-wormhole")


def describe_machine(peers_python: str | None) -> Machine:
    """Describe this machine.

    Args:
        peers_python: The Python that has the other programs, if there is one.
    """
    versions = {"Python": platform.python_version(), "OpenSSL": ssl.OPENSSL_VERSION}
    versions |= {name: importlib.metadata.version(name) for name in _LIBRARIES}
    for name, command in _TOOLS.items():
        if shutil.which(name) is not None:
            versions[name] = _first_line(command)
    if peers_python is not None:
        versions |= {name: _version_there(peers_python, name) for name in _PEERS}
    return Machine(
        system=f"{platform.system()} {platform.release()} on {platform.machine()}",
        processor=_processor(),
        cores=os.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
        versions={name: version for name, version in versions.items() if version},
    )


def _first_line(command: tuple[str, ...]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    said = (done.stdout or done.stderr).strip()
    return said.splitlines()[0] if said else ""


def _version_there(python: str, name: str) -> str:
    script = f"import importlib.metadata as m; print(m.version({name!r}))"
    done = subprocess.run([python, "-c", script], capture_output=True, text=True)
    return done.stdout.strip()


def _processor() -> str:
    try:
        information = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    found = re.search(r"model name\s*:\s*(.+)", information)
    return found[1] if found else platform.processor()
