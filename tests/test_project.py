"""Rules for the tree as a whole: its files, its pins, its documents."""

import ast
import importlib.metadata
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sleap_rtc.config import load_settings
from sleap_rtc.proto import messages
from sleap_rtc.proto.rendezvous import messages as rendezvous
from tests.test_language import read_python

ROOT = Path(__file__).parent.parent

MADE_BY_TOOLS = {".git", ".venv", "build", "dist", "results", "__pycache__"}

# Written apart, so that this file passes its own test.
REGISTRY_HOSTS = [
    ".".join(parts)
    for parts in (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("npmjs", "org"),
        ("npmjs", "com"),
        ("deb", "debian", "org"),
        ("archive", "ubuntu", "com"),
        ("ghcr", "io"),
        ("docker", "io"),
        ("conda", "anaconda", "org"),
        ("crates", "io"),
    )
]


def our_files() -> Iterator[Path]:
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        made = any(part in MADE_BY_TOOLS or part.endswith("_cache") for part in parts)
        if path.is_file() and not made and ".hypothesis" not in parts:
            yield path


def modules() -> list[Path]:
    return sorted((ROOT / "sleap_rtc").rglob("*.py"))


def read_yaml(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


# ------------------------------------------------------------------------ the tree


def test_no_file_names_the_host_of_a_registry() -> None:
    pattern = re.compile("|".join(re.escape(host) for host in REGISTRY_HOSTS))
    found = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in our_files()
        if (match := pattern.search(path.read_bytes().decode("utf-8", "ignore")))
    ]
    assert not found


def test_every_module_of_the_package_has_a_docstring() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in modules()
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not silent


TIMED_SCOPES = {"move_on_after", "move_on_at", "fail_after", "fail_at"}


def shields_without_a_deadline(source: str) -> list[int]:
    """Return the lines of a module that shield from cancellation without an end."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Attribute(attr=name) | ast.Name(id=name)):
                given = {each.arg for each in node.keywords}
                has_end = name in TIMED_SCOPES or given & {"deadline", "timeout"}
                if "shield" in given and not has_end:
                    found.append(node.lineno)
            case ast.Assign(targets=[ast.Attribute(attr="shield")]):
                found.append(node.lineno)
    return found


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("with trio.CancelScope(shield=True): pass", [1]),
        ("scope.shield = True", [1]),
        ("x = f(shield=shield)", [1]),
        ("with trio.CancelScope(shield=True, deadline=1): pass", []),
        ("with trio.move_on_after(1, shield=True): pass", []),
        ("await call_storage(f, shield=True, timeout=1)", []),
    ],
)
def test_a_shield_without_a_deadline_is_found(source: str, lines: list[int]) -> None:
    assert shields_without_a_deadline(source) == lines


def test_every_shield_has_a_deadline() -> None:
    found = {
        str(path.relative_to(ROOT)): lines
        for path in modules()
        if (lines := shields_without_a_deadline(path.read_text(encoding="utf-8")))
    }
    assert not found


# Everything else that blocks may touch storage that hangs, so it uses `call_storage`.
THREADS = {
    "doctor.py": ["_http_status"],
    "io/signaling/websocket.py": ["ssl.create_default_context"],
    "io/storage/call.py": ["call.run"],
    "io/tcp/driver.py": ["server_context"],
    "worker/daemon.py": ["make_certificate"],
    "worker/store_writer.py": ["self._write"],  # abandoned, with a limiter of its own
}
"""The functions that are called in threads without `call_storage`, by module."""


def test_only_known_functions_run_in_threads_without_call_storage() -> None:
    package = ROOT / "sleap_rtc"
    found = {
        path.relative_to(package).as_posix(): functions
        for path in modules()
        if (functions := threaded_functions(path.read_text(encoding="utf-8")))
    }
    assert found == THREADS


def threaded_functions(source: str) -> list[str]:
    return [
        ast.unparse(node.args[0])
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "trio.to_thread.run_sync"
    ]


def test_the_installed_package_carries_its_licence() -> None:
    distribution = importlib.metadata.distribution("sleap-rtc")
    assert distribution.metadata["License-Expression"] == "BSD-3-Clause"
    licences = [
        file.read_text()
        for file in distribution.files or ()
        if file.parts[-2:] == ("licenses", "LICENSE")
    ]
    assert licences == [(ROOT / "LICENSE").read_text(encoding="utf-8")]


# ------------------------------------------------------------------------ the pins


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and line[0] != "#"]
    return {canonicalize_name(pin.name): str(pin.specifier) for pin in found}


PLATFORMS = [
    {"sys_platform": "linux", "os_name": "posix", "platform_system": "Linux"},
    {"sys_platform": "darwin", "os_name": "posix", "platform_system": "Darwin"},
    {"sys_platform": "win32", "os_name": "nt", "platform_system": "Windows"},
]


def needed(environment: dict[str, str]) -> set[str]:
    """Return the packages that `.[dev]` needs, as far as they are installed here."""
    todo = [("sleap-rtc", "dev")]
    seen = set()
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # only other platforms need it
        for requirement in map(Requirement, requires):
            marker = requirement.marker
            if marker and not marker.evaluate({**environment, "extra": extra}):
                continue
            for further in ("", *requirement.extras):
                todo.append((canonicalize_name(requirement.name), further))
    return {name for name, _ in seen} - {"sleap-rtc"}


@pytest.mark.parametrize("platform", PLATFORMS, ids=lambda p: p["sys_platform"])
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_everything_that_is_installed_is_pinned(
    python: str, platform: dict[str, str]
) -> None:
    environment = {str(k): str(v) for k, v in default_environment().items()}
    environment |= platform
    environment |= {"python_version": python, "python_full_version": f"{python}.0"}
    missing = needed(environment) - pins().keys()
    assert missing == set()


def test_every_pin_is_one_version() -> None:
    loose = {name for name, version in pins().items() if not version.startswith("==")}
    assert not loose


# -------------------------------------------------------------------- the documents


def rows(document: str, columns: int) -> list[list[str]]:
    """Return the rows of all tables with a number of columns."""
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    return [row for row in cells if len(row) == columns]


def test_the_protocol_document_has_a_row_for_every_message() -> None:
    documented = {row[0].strip("`"): row for row in rows("protocol.md", 5)}
    for name, cls in messages.TABLE.items():
        assert name in documented, f"docs/protocol.md has no row for {name}"
        fields = documented[name][3]
        count = 0 if fields == "none" else len(fields.split(";"))
        assert count == len(cls.__struct_fields__), f"the fields of {name}"
        assert documented[name][4], f"what {name} is answered with"


def test_the_protocol_document_has_every_structured_key() -> None:
    text = (ROOT / "docs/protocol.md").read_text(encoding="utf-8")
    keys = {
        key for cls in messages.Json.__subclasses__() for key in cls.__struct_fields__
    }
    assert not {key for key in keys if f"`{key}`" not in text}


def test_the_protocol_document_has_a_row_for_every_signal() -> None:
    documented = {row[0].strip("`"): row[2] for row in rows("protocol.md", 4)}
    for name, cls in rendezvous.TABLE.items():
        assert name in documented, f"docs/protocol.md has no row for {name}"
        for field in msgspec.structs.fields(cls):
            assert f"`{field.encode_name}`" in documented[name], name


def test_the_development_guide_shows_every_room() -> None:
    text = (ROOT / "docs/development.md").read_text(encoding="utf-8")
    tree = text.partition("```\nsleap_rtc/")[2].partition("```")[0]
    shown = set(re.findall(r"[a-z]+(?:/|\.py)", tree))
    assert shown == {
        f"{path.name}/" if path.is_dir() else path.name
        for folder in ("", "io", "proto")
        for path in (ROOT / "sleap_rtc" / folder).iterdir()
        if path.suffix in ("", ".py") and not path.name.startswith("__")
    }


BETWEEN = re.compile(r"'?\.\.\.'?|\b[NXY]\b|\d+|: |'")
"""Parts of a quoted message that vary, or that several strings make together."""


def messages_of_the_package() -> str:
    """Return all strings of the package, with the parts of each that vary cut out."""
    strings = [
        text.prose
        for path in modules()
        for text in read_python(str(path), path.read_text(encoding="utf-8"))
        if text.kind == "message"
    ]
    return "\n".join(" ".join(string.split()) for string in strings)


def test_every_message_of_the_troubleshooting_tables_exists() -> None:
    text = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    tables = text.partition("## Troubleshooting")[2].partition("\n## ")[0]
    shown = re.findall(r"(?m)^\| (`.*?) \|", tables)
    assert shown
    quoted = [quote for cell in shown for quote in re.findall(r"`([^`]+)`", cell)]
    source = messages_of_the_package()
    missing = {
        quote
        for quote in quoted
        for part in BETWEEN.split(quote)
        if " " in part.strip() and part.strip(" ,;") not in source
    }
    assert not missing


PATHS = re.compile(r"(?<![\w./-])(?:sleap_rtc|tests|bench|docs|examples)/[\w./-]*\w")
MODULES = re.compile(
    r"(?<![\w./-])(?:sleap_rtc|tests|bench)(?:\.[a-zA-Z_]\w*)+(?!\w*/)"
)


def texts() -> Iterator[tuple[Path, str]]:
    """Yield the files that must name existing files, with their text."""
    for path in our_files():
        relative = path.relative_to(ROOT)
        is_text = relative.suffix in {".py", ".md", ".toml", ".yml", ""}
        is_kept = "archive" in relative.parts or relative.name == "test_language.py"
        if is_text and relative.name[0] != "." and not is_kept:
            yield relative, path.read_text(encoding="utf-8")


def test_every_path_that_is_named_exists() -> None:
    missing = {
        f"{path}: {named}"
        for path, text in texts()
        for named in PATHS.findall(text)
        if not (ROOT / named).exists()
    }
    assert not missing


def exists(name: str) -> bool:
    """Return whether a dotted name is a package, a module, or something in one."""
    path, parts = ROOT, name.split(".")
    while parts and (path / parts[0]).is_dir():
        path /= parts.pop(0)
    module = (path / parts[0]).with_suffix(".py") if parts else path
    if module.is_file():
        del parts[0]
    else:
        module = path / "__init__.py"
    source = module.read_text(encoding="utf-8")
    return all(re.search(rf"\b{part}\b", source) for part in parts)


def test_every_module_that_is_named_exists() -> None:
    named = {(path, name) for path, text in texts() for name in MODULES.findall(text)}
    known = {name: exists(name) for name in {name for _, name in named}}
    assert not {f"{path}: {name}" for path, name in named if not known[name]}


def test_the_example_configuration_is_valid_and_complete(tmp_path: Path) -> None:
    text = (ROOT / "config.example.toml").read_text(encoding="utf-8")
    assert tomllib.loads(text) == {}, "it must change nothing as it is"
    path = tmp_path / "config.toml"
    path.write_text(re.sub(r"(?m)^#(?=[a-z\[])", "", text), encoding="utf-8")
    settings = load_settings({"SLEAP_RTC_CONFIG": str(path)})
    assert settings.environments.keys() == {"development", "staging", "production"}
    for table in (settings, settings.worker, *settings.environments.values()):
        for key in table.__struct_fields__:
            assert f"\n#{key} = " in text or f"\n#[{key}" in text, key


# ------------------------------------------------------------ workflows and compose

WORKFLOWS = sorted(path.name for path in (ROOT / ".github/workflows").glob("*"))


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_has_few_rights_and_ends(name: str) -> None:
    workflow = read_yaml(f".github/workflows/{name}")
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["group"]
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 120
        for action in (step["uses"] for step in job["steps"] if "uses" in step):
            assert re.fullmatch(r"(actions|docker)/[a-z-]+@v[0-9]+", action)


def test_ci_runs_every_python_version_that_the_package_claims() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    claimed = {
        classifier.rpartition(" ")[2]
        for classifier in project["project"]["classifiers"]
        if re.search(r":: 3\.\d+$", classifier)
    }
    workflow = read_yaml(".github/workflows/ci.yml")
    assert set(workflow["jobs"]["test"]["strategy"]["matrix"]["python"]) == claimed


def mount_point(service: dict[str, Any], volume: str) -> str:
    for mount in service["volumes"]:
        source, _, target = mount.partition(":")
        if source == volume:
            return str(target)
    raise AssertionError(f"{volume} is not mounted")


def test_worker_and_client_mount_one_storage_at_two_places() -> None:
    compose = read_yaml("docker-compose.yml")
    assert compose["services"].keys() == {"signaling", "worker", "client"}
    points = []
    for name in ("worker", "client"):
        service = compose["services"][name]
        point = mount_point(service, "shared")
        assert service["environment"]["SHARED_STORAGE_ROOT"] == point
        points.append(point)
    assert points[0] != points[1]


def test_the_invite_reaches_a_container_as_a_file_only() -> None:
    compose = read_yaml("docker-compose.yml")
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    state = re.findall(r"SLEAP_RTC_STATE_DIR=(\S+)", dockerfile)
    targets = [secret["target"] for secret in compose["services"]["client"]["secrets"]]
    assert targets == [f"{state[0]}/invite"]
    for service in compose["services"].values():
        assert "SLEAP_RTC_INVITE" not in service.get("environment", {})
