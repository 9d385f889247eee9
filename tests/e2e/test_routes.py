"""The routes: shared storage seen from two mount points, the channel, and why."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.harness import END_TO_END, EXAMPLES, Finished, Lab, Machine, tree
from tests.e2e.packages import make_package

pytestmark = END_TO_END

PACKAGE = EXAMPLES / "synth_job.zip"

needs_mounts = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0,
    reason="NOT CHECKED ON REAL MOUNTS: needs Linux and root",
)


@contextmanager
def mounted(target: Path, *arguments: object) -> Iterator[Path]:
    """Mount something for the time of the body, or skip without the right to."""
    target.mkdir()
    command = ["mount", *map(str, arguments), str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"NOT CHECKED ON REAL MOUNTS: {done.stderr.strip()}")
    try:
        yield target
    finally:
        subprocess.run(["umount", "--lazy", str(target)], check=True)


def make_storage(lab: Lab) -> Path:
    storage = lab.folder / "storage"
    storage.mkdir()
    return storage


def only_job(root: Path) -> Path:
    (job,) = (root / "jobs").iterdir()
    return job


def route_of(done: Finished) -> str:
    found = re.findall(r"^Route: (.*)$", done.err, re.MULTILINE)
    return str(found[-1])


def check_shared_job(machine: Machine, theirs: Path, mine: Path) -> None:
    """Run a job with a worker that mounts `theirs` and a client that mounts `mine`."""
    machine.start_worker("--shared-storage-root", theirs)
    arguments = ("send", PACKAGE, "--shared-storage-root", mine)
    done = machine.run(*arguments, "--route", "shared").expect(0)
    assert route_of(done).startswith("shared (")
    job = only_job(mine.resolve())
    assert done.out.splitlines()[-1] == str(job)
    assert (job / "synth_job.zip").read_bytes() == PACKAGE.read_bytes()
    assert (job / "models" / "synth_run" / "best.ckpt").stat().st_size > 100
    assert not (job / "mount-probe").exists()
    assert machine.jobs_left() == []
    done = machine.run(*arguments, "--output", "out").expect(0)
    copied = tree(machine.home / "out")
    assert "models/synth_run/best.ckpt" in copied
    (again,) = (path for path in (mine / "jobs").iterdir() if path.name != job.name)
    assert copied.items() <= tree(again).items()
    assert "synth_job.zip" not in copied


def test_two_paths_to_one_storage_are_a_shared_route(lab: Lab) -> None:
    storage = make_storage(lab)
    link = lab.folder / "link"
    link.symlink_to(storage)
    check_shared_job(lab.machine("gpu"), storage, link)


@needs_mounts
def test_two_mounts_of_one_storage_are_a_shared_route(lab: Lab) -> None:
    storage = make_storage(lab)
    with mounted(lab.folder / "other", "--bind", storage) as other:
        check_shared_job(lab.machine("gpu"), other, storage)


def test_storage_of_one_side_only_is_not_used(lab: Lab) -> None:
    storage = make_storage(lab)
    machine = lab.machine("gpu")
    machine.start_worker()
    arguments = ("send", PACKAGE, "--shared-storage-root", storage)
    done = machine.run(*arguments).expect(0)
    assert "channel (Shared storage not configured on the worker" in route_of(done)
    done = machine.run(*arguments, "--route", "shared").expect(4)
    assert "not configured on the worker" in done.err
    done = machine.run("send", PACKAGE).expect(0)
    expected = "channel (Shared storage not configured, will use RTC transfer)"
    assert route_of(done) == expected
    done = machine.run("send", PACKAGE, "--route", "shared").expect(4)
    assert "Shared storage not configured here" in done.err
    assert tree(storage) == {}


def test_different_storage_is_noticed_before_the_package_is_copied(lab: Lab) -> None:
    storage, other = make_storage(lab), lab.folder / "other"
    other.mkdir()
    machine = lab.machine("gpu")
    machine.start_worker("--shared-storage-root", other)
    machine.variables["SHARED_STORAGE_ROOT"] = str(storage)
    done = machine.run("send", PACKAGE).expect(0)
    assert "channel (The worker does not see this storage" in route_of(done)
    done = machine.run("send", PACKAGE, "--route", "shared").expect(4)
    assert "The worker does not see this storage" in done.err
    assert tree(storage) == tree(other) == {}
    assert not list(storage.glob("jobs/*"))


def test_the_channel_can_be_asked_for(lab: Lab) -> None:
    storage = make_storage(lab)
    machine = lab.machine("gpu")
    machine.variables["SHARED_STORAGE_ROOT"] = str(storage)
    machine.start_worker()
    done = machine.run("send", PACKAGE, "--route", "channel").expect(0)
    assert route_of(done) == "channel (the channel route was asked for)"
    assert tree(storage) == {}


@needs_mounts
def test_full_storage_is_noticed_before_a_byte_is_copied(lab: Lab) -> None:
    machine = lab.machine("gpu")
    package = make_package(
        machine.home / "job.zip",
        "act say hello",
        files={"big.bin": os.urandom(3 * 1024 * 1024)},
    )
    small = lab.folder / "small"
    with mounted(small, "-t", "tmpfs", "-o", "size=2m", "none"):
        machine.variables["SHARED_STORAGE_ROOT"] = str(small)
        machine.start_worker()
        done = machine.run("send", package).expect(0)
        pattern = r"channel \(Insufficient disk space on shared storage: need .*, have"
        assert re.match(pattern, route_of(done))
        done = machine.run("send", package, "--route", "shared").expect(4)
        assert "Insufficient disk space on shared storage: need" in done.err
        assert not list(small.glob("jobs/*"))


@needs_mounts
def test_storage_that_became_read_only_is_not_used(lab: Lab) -> None:
    machine = lab.machine("gpu")
    with mounted(lab.folder / "storage", "-t", "tmpfs", "none") as storage:
        machine.variables["SHARED_STORAGE_ROOT"] = str(storage)
        machine.start_worker()
        with mounted(lab.folder / "mine", "--bind", storage) as mine:
            command = ["mount", "-o", "remount,bind,ro", str(mine)]
            subprocess.run(command, check=True)
            del machine.variables["SHARED_STORAGE_ROOT"]
            done = machine.run("send", PACKAGE, "--shared-storage-root", mine).expect(2)
            assert "cannot be read and written" in done.err
        subprocess.run(["mount", "-o", "remount,ro", str(storage)], check=True)
        # The worker's own view fails, so the client cannot prepare anything either.
        done = machine.run("send", PACKAGE).expect(0)
        assert route_of(done).startswith("channel (")


@needs_mounts
def test_a_full_worker_refuses_with_the_space_that_it_needs(lab: Lab) -> None:
    machine = lab.machine("gpu")
    package = make_package(
        machine.home / "job.zip",
        "act say hello",
        files={"big.bin": os.urandom(3 * 1024 * 1024)},
    )
    with mounted(machine.state, "-t", "tmpfs", "-o", "size=2m", "none"):
        worker = machine.start_worker()
        done = machine.run("send", package).expect(6)
        assert "Insufficient disk space on the worker: need" in done.err
        assert machine.jobs_left() == []
        small = make_package(machine.home / "small.zip", "act say hello")
        machine.run("send", small).expect(0)
        worker.kill()


def test_a_failed_job_on_shared_storage_keeps_its_files(lab: Lab) -> None:
    storage = make_storage(lab)
    machine = lab.machine("gpu")
    machine.variables["SHARED_STORAGE_ROOT"] = str(storage)
    machine.start_worker()
    package = make_package(machine.home / "job.zip", "act big half.bin 1", "act fail 3")
    done = machine.run("send", package).expect(5)
    job = only_job(storage)
    assert str(job) in done.err.replace("\n", "")
    assert {"half.bin", "job.log"} <= tree(job).keys()
