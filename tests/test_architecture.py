"""The import contracts hold, and each of them notices when it is broken."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

FLOORS = "Floors: cli > doctor > client, worker > rendezvous > io > proto"
IO = "io/: connect > quic, tcp > link; transfer > link, storage; signaling"
TRANSFER = "io/transfer knows what a link is, and no kind of it"
FILES = "Links know nothing of files"
SIGNALING = "io/signaling knows nothing of links and files"
PROTO = "proto/: job, rendezvous, transfer > route > messages > errors"
PURE = "proto/ imports nothing that reaches the world"

BREACHES = [
    (FLOORS, "doctor", "cli"),
    (FLOORS, "client", "doctor"),
    (FLOORS, "client", "cli"),
    (FLOORS, "worker", "cli"),
    (FLOORS, "client", "worker"),
    (FLOORS, "worker", "client"),
    (FLOORS, "rendezvous", "client"),
    (FLOORS, "rendezvous", "worker"),
    (FLOORS, "config", "rendezvous"),
    (FLOORS, "filesystem", "config"),
    (FLOORS, "io.link", "errors"),
    (FLOORS, "io.storage", "config"),
    (FLOORS, "proto.job", "io.link"),
    (IO, "io.link", "io.tcp"),
    (IO, "io.tcp", "io.quic"),
    (IO, "io.quic", "io.tcp"),
    (IO, "io.quic", "io.connect"),
    (IO, "io.storage", "io.transfer"),
    (IO, "io.link", "io.transfer"),
    (IO, "io.link", "io.storage"),
    (IO, "io.storage", "io.link"),
    (IO, "io.connect", "io.transfer"),
    (IO, "io.transfer", "io.connect"),
    (IO, "io.transfer", "io.signaling"),
    (IO, "io.connect", "io.signaling"),
    (IO, "io.signaling", "io.connect"),
    (IO, "io.signaling", "io.transfer"),
    (IO, "io.nursery", "io.link"),
    (TRANSFER, "io.transfer", "io.tcp"),
    (TRANSFER, "io.transfer", "io.quic"),
    (FILES, "io.tcp", "io.storage"),
    (FILES, "io.quic", "io.storage"),
    (FILES, "io.connect", "io.storage"),
    (SIGNALING, "io.signaling", "io.link"),
    (SIGNALING, "io.signaling", "io.storage"),
    (SIGNALING, "io.signaling", "io.tcp"),
    (SIGNALING, "io.signaling", "io.quic"),
    (PROTO, "proto.route", "proto.job"),
    (PROTO, "proto.job", "proto.transfer"),
    (PROTO, "proto.transfer", "proto.rendezvous"),
    (PROTO, "proto.quic", "proto.transfer"),
    (PROTO, "proto.messages", "proto.route"),
    (PROTO, "proto.errors", "proto.messages"),
    (PURE, "proto.job", "socket"),
]
"""The contract, the importer below `sleap_rtc`, and a module it may not import."""


def lint_imports(folder: Path) -> str:
    result = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return result.stdout + result.stderr


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package where a project with the same contracts has it."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(
        ROOT / "sleap_rtc",
        tmp_path / "sleap_rtc",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    return tmp_path


def source(folder: Path, module: str) -> Path:
    path = folder / "sleap_rtc" / Path(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def test_all_contracts_are_kept() -> None:
    report = lint_imports(ROOT)
    assert "0 broken" in report, report


def test_every_contract_has_a_breach_below() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    names = [rule["name"] for rule in settings["tool"]["importlinter"]["contracts"]]
    assert set(names) == {contract for contract, _, _ in BREACHES}


def sections(report: str) -> dict[str, str]:
    """Return the part of a report about each broken contract."""
    _, *parts = re.split(r"^(.+)\n-{10,}$", report, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


@pytest.mark.parametrize("contract", sorted({breach[0] for breach in BREACHES}))
def test_an_import_upwards_is_noticed(copy: Path, contract: str) -> None:
    expected = []
    for number, (broken, importer, imported) in enumerate(BREACHES):
        if broken != contract:
            continue
        path = source(copy, importer)
        module = f"sleap_rtc.{importer}"
        if path.name == "__init__.py":  # a separate module makes no cycle
            path = path.with_name(f"breach_{number}.py")
            module += f".breach_{number}"
        whole = imported if imported == "socket" else f"sleap_rtc.{imported}"
        with path.open("a", encoding="utf-8") as file:
            file.write(f"\nimport {whole}\n")
        expected.append(f"- {module} -> {whole} ")
    found = " ".join(sections(lint_imports(copy)).get(contract, "").split())
    assert not [breach for breach in expected if breach not in found]


@pytest.mark.parametrize("room", ["", "io", "proto"])
def test_a_module_without_a_floor_is_noticed(copy: Path, room: str) -> None:
    path = copy / "sleap_rtc" / room / "attic.py"
    path.write_text('"""A module."""\n', encoding="utf-8")
    assert "attic" in lint_imports(copy)
