"""Every command as a user types it: its output, and its exit code."""

import json
import os
import re
import stat
import sys
from pathlib import Path

import psutil
import pytest

from sleap_rtc.proto.rendezvous.invite import (
    Invite,
    decode_invite_untrusted,
    encode_invite,
)
from tests.e2e.harness import END_TO_END, EXAMPLES, Lab, release, tree
from tests.e2e.packages import make_package

pytestmark = END_TO_END

SOME_INVITE = encode_invite(Invite("ws://127.0.0.1:9", bytes(32)))
PACKAGE = EXAMPLES / "synth_job.zip"


def json_lines(text: str) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in text.splitlines()]
    assert all(isinstance(line, dict) and "event" in line for line in lines)
    return lines


# ----------------------------------------------------------------------- usage


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["send"], "package"),
        (["send", "none.zip"], "none.zip"),
        (["send", "job.zip", "--route", "pigeon"], "pigeon"),
        (["send", "job.zip", "--timeout", "soon"], "--timeout"),
        (["send", "text.zip"], "not a zip file"),
        (["send", "job.zip", "--shared-storage-root", "none"], "does not exist"),
        (["daemon", "--role", "king"], "king"),
        (["daemon", "--slots", "0"], "slots"),
        (["daemon", "--listen", "here"], "HOST:PORT"),
        (["daemon", "--role", "signaling"], "--listen"),
        (["join", "hello"], "not an invite"),
        (["workers", "--timeout", "x"], "timeout"),
        (["dance"], "dance"),
        (["--option"], "--option"),
    ],
    ids=" ".join,
)
def test_an_impossible_command_is_a_usage_error(
    lab: Lab, arguments: list[str], named: str
) -> None:
    machine = lab.machine("laptop")
    machine.variables["SLEAP_RTC_INVITE"] = SOME_INVITE
    make_package(machine.home / "job.zip", "act say hello")
    (machine.home / "text.zip").write_text("text")
    done = machine.run(*arguments).expect(2)
    assert named in done.err.replace("\n", " ")
    assert "Traceback" not in done.err


def test_without_a_room_the_way_to_enter_one_is_printed(lab: Lab) -> None:
    machine = lab.machine("laptop")
    for arguments in (("send", PACKAGE), ("workers",), ("invite",)):
        done = machine.run(*arguments).expect(2)
        assert "sleap-rtc join" in done.err
    assert not machine.state.exists()


def test_a_bad_configuration_names_its_file(lab: Lab) -> None:
    machine = lab.machine("laptop")
    config = machine.home / "config.toml"
    config.write_text("[worker]\nslotz = 1\n")
    machine.variables["SLEAP_RTC_CONFIG"] = str(config)
    machine.variables["SLEAP_RTC_INVITE"] = SOME_INVITE
    for arguments in (("send", PACKAGE), ("daemon",), ("config", "show")):
        done = machine.run(*arguments).expect(2)
        assert "config.toml" in done.err
        assert "slotz" in done.err
    machine.variables["SLEAP_RTC_CONFIG"] = str(machine.home / "none.toml")
    assert "none.toml" in machine.run("config", "show").expect(2).err


def test_a_damaged_invite_is_named(lab: Lab) -> None:
    machine = lab.machine("laptop")
    machine.state.mkdir()
    (machine.state / "invite").write_text("damaged\n")
    done = machine.run("send", PACKAGE).expect(2)
    assert str(machine.state / "invite") in done.err.replace("\n", "")
    machine.variables["SLEAP_RTC_INVITE"] = "damaged"
    done = machine.run("send", PACKAGE).expect(2)
    assert "invite" in done.err


def test_no_worker_is_exit_code_three(lab: Lab) -> None:
    machine = lab.machine("gpu")
    worker = machine.start_worker("--name", "Maja's GPU")
    done = machine.run("send", PACKAGE, "--worker", "other").expect(3)
    assert "no worker 'other' is in the room" in done.err
    assert "worker-maja-s-gpu-" in done.err
    done = machine.run("send", PACKAGE, "--worker", "Maja's GPU").expect(0)
    assert "you asked for it" in done.err
    # Another secret is another room, and it is empty.
    stranger = lab.machine("stranger")
    invite = machine.run("invite").expect(0).out.strip()
    stranger.run("join", invite).expect(0)
    stranger.run("invite", "--new").expect(0)
    done = stranger.run("send", PACKAGE).expect(3)
    assert "no worker is in the room" in done.err
    worker.kill()
    done = machine.run("workers", "--timeout", 1).expect(3)
    assert "Cannot reach the signaling server" in done.err


def test_a_port_in_use_is_named(lab: Lab) -> None:
    machine, other = lab.machine("gpu"), lab.machine("other")
    worker = machine.start_worker()
    port = worker.wait_for(r"signaling server listens.* port=(\d+)")[1]
    address = f"127.0.0.1:{port}"
    for role in ("worker", "signaling"):
        done = other.run("daemon", "--role", role, "--listen", address).expect(2)
        assert "in use" in done.err
        assert "Traceback" not in done.err


def test_a_second_worker_of_a_user_joins_the_first(lab: Lab) -> None:
    machine = lab.machine("gpu")
    machine.start_worker("--name", "one")
    machine.start_worker("--name", "two")
    found = json_lines(machine.run("workers", "--json").expect(0).out)
    assert {worker["name"] for worker in found} == {"one", "two"}
    done = machine.run("send", PACKAGE, "--worker", "two").expect(0)
    assert "worker-two-" in done.err


# ---------------------------------------------------------------------- output


def test_every_line_of_json_output_is_an_object(lab: Lab) -> None:
    machine = lab.machine("gpu")
    machine.start_worker()
    done = machine.run("send", PACKAGE, "--json").expect(0)
    events = json_lines(done.out)
    assert [event["event"] for event in events][:3] == ["worker", "link", "route"]
    last = events[-1]
    assert last["event"] == "done"
    assert last["output"] == str(machine.home / "synth_job-results")
    package = make_package(machine.home / "job.zip", "act fail 3")
    failed = json_lines(machine.run("send", package, "--json").expect(5).out)[-1]
    assert (failed["event"], failed["exit_code"]) == ("error", 5)
    assert "act" in str(failed["message"])
    missing = json_lines(machine.run("send", "none.zip", "--json").expect(2).out)
    assert [event["event"] for event in missing] == ["error"]


def test_workers_lists_the_workers_of_the_room(lab: Lab) -> None:
    machine = lab.machine("gpu")
    worker = machine.start_worker("--slots", 3, "--name", "big one")
    done = machine.run("workers").expect(0)
    assert "worker-big-one-" in done.out
    assert "3 of 3 free" in done.out
    fifo = lab.fifo()
    package = make_package(machine.home / "job.zip", f"act wait {fifo}")
    client = machine.start("send", package)
    client.wait_for("waiting")
    (found,) = json_lines(machine.run("workers", "--json").expect(0).out)
    assert (found["slots"], found["slots_free"]) == (3, 2)
    assert "nonce" not in found
    release(fifo)
    client.finish().expect(0)
    worker.kill()


def test_doctor_reports_each_check(lab: Lab) -> None:
    machine = lab.machine("gpu")
    alone = machine.run("doctor").expect(1)
    assert "failed Signaling" in alone.out
    machine.start_worker()
    storage = lab.folder / "storage"
    storage.mkdir()
    well = machine.run("doctor", "--shared-storage-root", storage).expect(0)
    assert "failed" not in well.out
    assert re.search(r"ok +Shared storage: .* free", well.out)
    assert tree(storage) == {}
    bad = machine.run("doctor", "--json", "--shared-storage-root", "none").expect(1)
    verdicts = {check["name"]: check["verdict"] for check in json_lines(bad.out)}
    assert verdicts["Shared storage"] == "failed"
    assert verdicts["Signaling"] == "ok"


def test_config_and_version_print_the_settings_in_force(lab: Lab) -> None:
    machine = lab.machine("laptop")
    config = machine.home / "my config.toml"
    config.write_text('shared_storage_root = "/mnt/lab"\n[worker]\nslots = 2\n')
    machine.variables["SLEAP_RTC_CONFIG"] = str(config)
    assert machine.run("config", "path").expect(0).out == f"{config}\n"
    shown = machine.run("config", "show").expect(0).out
    assert "shared_storage_root = /mnt/lab\n" in shown
    values = json.loads(machine.run("config", "show", "--json").expect(0).out)
    assert values["worker"]["slots"] == 2
    assert values["state_directory"] == str(machine.state)
    version = machine.run("version").expect(0).out
    assert re.fullmatch(r"sleap-rtc \d+\.\d+\.\d+\S* \(protocol \d+, .*\)\n", version)


def test_client_and_worker_are_modules_that_run(lab: Lab) -> None:
    storage = lab.folder / "storage"
    storage.mkdir()
    machine = lab.machine("gpu")
    option = ("--shared-storage-root", storage)
    worker = machine.start(*option, module="sleap_rtc.worker")
    worker.wait_for("worker ready")
    done = machine.run(PACKAGE, *option, module="sleap_rtc.client").expect(0)
    assert "Route: shared" in done.err
    (job,) = (storage / "jobs").iterdir()
    assert "models/synth_run/best.ckpt" in tree(job)


# -------------------------------------------------------------------------- the secret


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def command_lines(lab: Lab) -> str:
    found = []
    for process in lab.processes(""):
        try:
            found.append(" ".join(process.cmdline()))
        except psutil.NoSuchProcess:
            continue
    return "\n".join(found)


def test_the_secret_stays_a_secret(lab: Lab) -> None:
    gpu, laptop = lab.machine("gpu"), lab.machine("laptop")
    options = ("--log-format", "json", "--verbose", "--listen", "127.0.0.1:0")
    worker = gpu.start_worker(*options)
    invite = gpu.run("invite").expect(0).out.strip()
    secret = decode_invite_untrusted(invite).secret.hex()
    laptop.variables["SLEAP_RTC_INVITE"] = invite
    fifo = lab.fifo()
    package = make_package(laptop.home / "job.zip", f"act wait {fifo}")
    client = laptop.start("send", package)
    client.wait_for("waiting")
    shown = command_lines(lab)
    assert "sleap_rtc" in shown
    if sys.platform == "linux":
        (job,) = lab.processes("actor.py")
        shown += "".join(job.environ().values())
    release(fifo)
    done = client.finish().expect(0)
    damaged = laptop.variables["SLEAP_RTC_INVITE"] = invite[:-4]
    refused = laptop.run("send", package).expect(2)
    outputs = [shown, worker.out, worker.err, done.out, done.err]
    outputs += [refused.out, refused.err, laptop.run("doctor").out]
    for text in outputs:
        assert not any(word in text for word in (invite, damaged, secret))
    assert mode(gpu.state) == 0o700
    assert mode(gpu.state / "invite") == 0o600
    for path, content in tree(gpu.home).items():
        if path != "state/invite":
            assert invite.encode() not in content, path


def test_only_the_owner_sees_a_job(lab: Lab) -> None:
    os.umask(0o022)
    machine = lab.machine("gpu")
    machine.start_worker()
    fifo = lab.fifo()
    package = make_package(machine.home / "job.zip", f"act wait {fifo}")
    client = machine.start("send", package)
    client.wait_for("waiting")
    assert mode(machine.jobs) == 0o700
    release(fifo)
    client.finish().expect(0)
