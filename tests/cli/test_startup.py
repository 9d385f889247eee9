"""Help and version start without the code of any command."""

import subprocess
import sys

import pytest

HEAVY = {
    "aioquic",
    "cryptography",
    "pynvml",
    "sleap_rtc.client",
    "sleap_rtc.config",
    "sleap_rtc.io",
    "sleap_rtc.rendezvous",
    "sleap_rtc.worker",
    "structlog",
    "trio",
    "trio_websocket",
    "wsproto",
}

SCRIPT = """
import sys
from sleap_rtc.cli import main
try:
    main(sys.argv[1:])
finally:
    sys.stdout.flush()
    print(*sys.modules, file=sys.stderr)
"""


def imported_by(*arguments: str) -> tuple[set[str], str]:
    """Run a command in a fresh interpreter; return its modules and its output."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stderr.split()), done.stdout


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ("--help", "daemon"),
        ("send --help", "--route"),
        ("daemon --help", "--listen"),
        ("version", "protocol"),
    ],
)
def test_a_command_that_needs_no_network_imports_no_network(
    arguments: str, shown: str
) -> None:
    modules, output = imported_by(*arguments.split())
    assert shown in output
    assert not modules & HEAVY


def test_version_imports_no_console() -> None:
    modules, _ = imported_by("version")
    assert "rich" not in modules
    assert "rich.console" not in modules


def test_the_heavy_modules_exist() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sleap_rtc.cli.send, sleap_rtc.cli.daemon, sys; print(*sys.modules)",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(done.stdout.split()) >= HEAVY
