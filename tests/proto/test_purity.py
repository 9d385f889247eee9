"""No module of proto/ can reach the world; the checks themselves are tested."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROTO = ROOT / "sleap_rtc" / "proto"
MODULES = sorted(PROTO.rglob("*.py"))

WORLDLY_IMPORTS = [
    "import trio",
    "import trio_websocket",
    "import time",
    "import os",
    "import random",
    "import secrets",
    "import socket",
    "import threading",
    "import logging",
    "import asyncio",
    "import uuid",
    "from os import urandom",
    "from os.path import join",
    "from pathlib import Path",
    "from datetime import datetime",
    "from time import monotonic",
    "from sleap_rtc.io import link",
    "from sleap_rtc.io.link.link import Link",
]

# Ruff bans modules; these names need no import.
WORLDLY_BUILTINS = {
    "__import__",
    "breakpoint",
    "compile",
    "eval",
    "exec",
    "input",
    "open",
    "print",
}


def worldly_names(source: str) -> set[str]:
    """Return the worldly builtins that a module mentions."""
    names = {
        node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)
    }
    return names & WORLDLY_BUILTINS


def ruff(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run ruff on a folder with the rules of this project."""
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "ruff",
            "check",
            "--no-cache",
            "--output-format=concise",
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Return a copy of proto/ in a project with the same rules."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(PROTO, tmp_path / "sleap_rtc" / "proto")
    return tmp_path


def test_proto_is_clean(copy: Path) -> None:
    result = ruff(copy)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_worldly_import_in_proto_is_noticed(copy: Path) -> None:
    for number, statement in enumerate(WORLDLY_IMPORTS):
        module = copy / "sleap_rtc" / "proto" / f"worldly_{number}.py"
        module.write_text(f"{statement}\n")
    result = ruff(copy)
    assert result.returncode == 1
    for number, statement in enumerate(WORLDLY_IMPORTS):
        lines = [
            line
            for line in result.stdout.splitlines()
            if f"worldly_{number}.py" in line and "TID251" in line
        ]
        assert lines, statement


def test_the_ban_holds_in_proto_alone(copy: Path) -> None:
    (copy / "sleap_rtc" / "io").mkdir()
    (copy / "sleap_rtc" / "io" / "clock.py").write_text(
        '"""A clock."""\n\nimport time\n\nnow = time.monotonic\n'
    )
    result = ruff(copy)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    "module", MODULES, ids=lambda path: str(path.relative_to(PROTO))
)
def test_no_module_uses_a_worldly_builtin(module: Path) -> None:
    assert worldly_names(module.read_text(encoding="utf-8")) == set()


@pytest.mark.parametrize("name", sorted(WORLDLY_BUILTINS))
def test_a_worldly_builtin_is_noticed(name: str) -> None:
    assert worldly_names(f"def f(value):\n    return {name}(value)\n") == {name}


def test_nothing_that_proto_imports_reaches_the_world() -> None:
    """Run import-linter, which follows the imports that ruff does not see."""
    program = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run(
        [program, "--no-cache", "--no-logo"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    # The same program checks the layers above proto/ in the lint job.
    assert "proto/ imports nothing that reaches the world KEPT" in result.stdout, (
        result.stdout + result.stderr
    )
    assert "sleap_rtc.proto is not allowed" not in result.stdout
