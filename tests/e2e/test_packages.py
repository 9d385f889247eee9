"""Packages of every kind that exporters, people and attackers make."""

import re
import signal
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import END_TO_END, EXAMPLES, Lab, Machine, Running, tree
from tests.e2e.packages import make_package

pytestmark = END_TO_END

CONFIG = """\
data_config:
  train_labels_path:
  - labels.pkg.slp
trainer_config:
  max_epochs: 1
  ckpt_dir: models
"""


class House:
    """A worker for all tests of this module."""

    def __init__(self, machine: Machine, worker: Running) -> None:
        self.machine = machine
        self.worker = worker


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    lab = Lab(tmp_path_factory.mktemp("house"))
    try:
        machine = lab.machine("gpu")
        yield House(machine, machine.start_worker())
    finally:
        lab.close()


TRAIN = "sleap-nn train --config-name model.yaml --config-dir ."
TRAINING: dict[str, str | bytes] = {"model.yaml": CONFIG, "labels.pkg.slp": b"labels"}
JOBS_YAML = """\
training:
  config: model.yaml
inference: []
"""

GOOD: dict[str, tuple[str, str, list[str], dict[str, str]]] = {
    "flat": ("", "train-script.sh", [TRAIN], {}),
    "inside one folder": ("my job/", "train-script.sh", [TRAIN], {}),
    "sleap 1.5.2": (
        "",
        "train-script.sh",
        [
            "sleap-nn-train --config-name model.yaml --config-dir . "
            'trainer_config.ckpt_dir="models" trainer_config.run_name="run"'
        ],
        {"inference-script.sh": "#!/bin/bash\n"},
    ),
    "sleap 1.6.6": (
        "",
        "train-script.sh",
        [
            'sleap train --config-name "model.yaml" --config-dir "." '
            "trainer_config.ckpt_dir='models' \"trainer_config.run_name=run\""
        ],
        {"inference-script.sh": "#!/bin/bash\n", "jobs.yaml": JOBS_YAML},
    ),
    "broken over lines": (
        "",
        "train-script.sh",
        [
            "set -euo pipefail",
            "# train",
            "sleap-nn train --config-name \\\n  model.yaml",
        ],
        {},
    ),
}


@pytest.mark.parametrize("kind", GOOD)
def test_every_layout_runs(house: House, tmp_path: Path, kind: str) -> None:
    folder, script, commands, files = GOOD[kind]
    package = make_package(
        tmp_path / "job.zip",
        *commands,
        files={**TRAINING, **files},
        script=script,
        folder=folder,
    )
    out = tmp_path / "out"
    house.machine.run("send", package, "--output", out).expect(0)
    results = tree(out)
    assert any(path.endswith("/best.ckpt") for path in results), results.keys()
    assert all(path.startswith(("models/", "job.log")) for path in results)


def test_both_scripts_run_training_first(house: House, tmp_path: Path) -> None:
    track = "sleap-nn track --data_path v.mp4 --model_paths models/tiny_run"
    package = make_package(
        tmp_path / "job.zip",
        TRAIN,
        files={
            **TRAINING,
            "v.mp4": b"video",
            "track-script.sh": f"{track} -o a.slp\n{track} -o b.slp\n",
        },
    )
    out = tmp_path / "out"
    done = house.machine.run("send", package, "--output", out).expect(0)
    assert done.err.index("training complete") < done.err.index("inference complete")
    assert {"models/tiny_run/best.ckpt", "a.slp", "b.slp"} <= tree(out).keys()


def test_a_directory_is_a_package(house: House, tmp_path: Path) -> None:
    with zipfile.ZipFile(EXAMPLES / "synth_job.zip") as archive:
        archive.extractall(tmp_path / "exported")
    out = tmp_path / "out"
    house.machine.run("send", tmp_path / "exported", "--output", out).expect(0)
    assert "models/synth_run/best.ckpt" in tree(out)


def zip_of(path: Path, *entries: tuple[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return path


def link_of(path: Path) -> Path:
    """Make a package with a symbolic link that leads out of it."""
    entry = zipfile.ZipInfo("models")
    entry.create_system, entry.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("train-script.sh", "act say hello\n")
        archive.writestr(entry, "/tmp")
    return path


def cut_of(path: Path) -> Path:
    """Make a zip whose content is damaged, though its directory is whole."""
    zip_of(path, ("train-script.sh", b"act say hello\n" * 100))
    content = bytearray(path.read_bytes())
    content[50:60] = b"0123456789"
    path.write_bytes(content)
    return path


SCRIPT = ("train-script.sh", b"act say hello\n")

HOSTILE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "climbs out": (
        lambda path: zip_of(path, SCRIPT, ("../../escaped.txt", b"x")),
        r"escaped\.txt",
    ),
    "is absolute": (
        lambda path: zip_of(path, SCRIPT, ("/tmp/escaped.txt", b"x")),
        r"escaped\.txt",
    ),
    "holds a link": (link_of, "models"),
    "is a bomb": (
        lambda path: zip_of(path, SCRIPT, ("zeros.bin", bytes(200 * 1024 * 1024))),
        r"zeros\.bin",
    ),
    "is damaged": (cut_of, r"train-script\.sh"),
    "has no script": (lambda path: zip_of(path, ("readme", b"x")), "train-script.sh"),
    "has an empty script": (
        lambda path: zip_of(path, ("train-script.sh", b"# nothing\n")),
        "nothing to run",
    ),
    "runs a shell": (
        lambda path: make_package(path, "act mark escaped hello", "bash -c 'echo hi'"),
        r"line 3.*bash",
    ),
    "pipes": (
        lambda path: make_package(path, "act say hello | act fail 1"),
        r"line 2",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_bad_package_fails_and_leaves_nothing(
    house: House, tmp_path: Path, kind: str
) -> None:
    make, named = HOSTILE[kind]
    out = tmp_path / "out"
    package = make(tmp_path / "job.zip")
    done = house.machine.run("send", package, "--output", out).expect(5)
    assert re.search(named, done.err.replace("\n", " ")), done.err
    assert "hello" not in done.out
    assert "Traceback" not in done.err
    assert not any(house.machine.home.parent.rglob("*escaped*"))
    assert not Path("/tmp/escaped.txt").exists()
    assert house.machine.jobs_left() == []
    assert not out.exists()


def test_a_missing_program_is_named(house: House, tmp_path: Path) -> None:
    package = make_package(tmp_path / "job.zip", "sleap-nn-track --data_path v.mp4")
    machine = house.machine
    # The tiny trainer has no such program; sleap-nn track would do the same.
    done = machine.run("send", package, "--output", tmp_path / "out").expect(5)
    assert "sleap-nn" in done.err


def test_the_owner_can_allow_a_program(lab: Lab, tmp_path: Path) -> None:
    machine = lab.machine("gpu")
    worker = machine.start("daemon")
    worker.wait_for("worker ready")
    package = make_package(machine.home / "job.zip", "act say hello")
    refused = machine.run("send", package).expect(5)
    assert re.search(r"line 2.*'act'", refused.err)
    assert "--allow" in refused.err
    worker.signal(signal.SIGTERM)
    worker.finish().expect(0)
    machine.start_worker()
    machine.run("send", package).expect(0)


def test_the_worker_has_survived_all_packages(house: House, tmp_path: Path) -> None:
    package = make_package(tmp_path / "job.zip", "act say hello")
    done = house.machine.run("send", package, "--output", tmp_path / "out").expect(0)
    assert "hello" in done.out
    assert "Traceback" not in house.worker.err
