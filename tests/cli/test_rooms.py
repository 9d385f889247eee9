"""``invite``, ``join`` and ``workers``, in this process."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from bench.ports import reserved_port
from sleap_rtc.cli import main, rooms
from sleap_rtc.proto.rendezvous.invite import Invite, encode_invite
from sleap_rtc.proto.rendezvous.workers import Candidate, WorkerCard
from tests.cli.test_output import logs_as_before as logs_as_before

ELSEWHERE = Invite("wss://signaling.example.org/ws", b"s" * 32)
HERE = Invite("ws://127.0.0.1:8787", b"s" * 32)


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The state directory of a machine that has not joined a room."""
    monkeypatch.delenv("SLEAP_RTC_INVITE", raising=False)
    monkeypatch.setenv("SLEAP_RTC_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    code = ended.value.code
    assert isinstance(code, int)
    return code


# ---------------------------------------------------------------------- join and invite


def test_a_room_is_joined_and_its_invite_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = encode_invite(ELSEWHERE)
    assert run("join", f" {text} ") == 0
    shown = capsys.readouterr()
    assert shown.out == "Joined the room at wss://signaling.example.org/ws.\n"
    assert shown.err == ""
    assert run("invite") == 0
    shown = capsys.readouterr()
    assert shown.out == f"{text}\n"
    assert shown.err == ""


def test_an_invite_is_read_from_standard_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"{encode_invite(ELSEWHERE)}\nmore\n".encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text)))
    assert run("join", "-") == 0
    assert "Joined the room" in capsys.readouterr().out


def test_a_room_of_this_machine_alone_has_a_warning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("join", encode_invite(HERE)) == 0
    assert "Only the worker's machine" in capsys.readouterr().err
    assert run("invite") == 0
    assert "only works on this machine" in capsys.readouterr().err


def test_a_new_secret_makes_another_invite(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run("join", encode_invite(ELSEWHERE))
    run("invite")
    before = capsys.readouterr().out.splitlines()[-1]
    assert run("invite", "--new") == 0
    shown = capsys.readouterr()
    assert shown.out.strip() != before
    assert "Restart the workers" in shown.err
    run("invite")
    assert capsys.readouterr().out == shown.out


@pytest.mark.parametrize("command", [["invite"], ["invite", "--new"], ["workers"]])
def test_a_machine_without_a_room_gets_the_command_to_join_one(
    capsys: pytest.CaptureFixture[str], command: list[str], state: Path
) -> None:
    assert run(*command) == 2
    assert "sleap-rtc join" in capsys.readouterr().err
    assert not state.exists()


def test_a_damaged_invite_is_a_usage_error(
    capsys: pytest.CaptureFixture[str], state: Path
) -> None:
    assert run("join", "hello") == 2
    assert "invite" in capsys.readouterr().err
    assert not state.exists()


# ----------------------------------------------------------------------------- workers


def test_a_server_that_cannot_be_reached_is_exit_code_three(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with reserved_port() as port:
        run("join", encode_invite(Invite(f"ws://127.0.0.1:{port}", b"s" * 32)))
        assert run("workers", "--timeout", "0.1") == 3
    assert "Cannot reach the signaling server" in capsys.readouterr().err


WORKERS = [
    Candidate(
        "worker-gpu-1",
        WorkerCard(
            hostname="gpu",
            gpu_model="Tesla T4",
            gpu_memory_mb=16 * 1024,
            sleap_nn_version="0.1.2",
            slots=3,
            slots_free=2,
            disk_free=5 * 2**30,
            shared_storage=True,
            nonce="secret",
        ),
    ),
    Candidate("worker-\x1b[31mred[bold]", WorkerCard(status="busy")),
]


def test_workers_are_a_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rooms, "out", Console(width=200, highlight=False))
    rooms.show_workers(WORKERS, as_json=False)
    title, first, second = capsys.readouterr().out.splitlines()
    assert title.split() == (
        ["worker", "status", "slots", "GPU", "sleap-nn", "shared", "disk", "free"]
    )
    for words in ("worker-gpu-1", "2 of 3 free", "Tesla T4, 16.0 GiB", "yes"):
        assert words in first
    for words in ("busy", "none", "not found", "no", "red[bold]"):
        assert words in second
    assert "\x1b" not in second


def test_workers_are_json_without_their_nonces(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rooms.show_workers(WORKERS, as_json=True)
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["event"] == "worker"
    assert first["peer_id"] == "worker-gpu-1"
    assert first["slots_free"] == 2
    assert "nonce" not in first
    assert second["status"] == "busy"


def test_for_a_room_without_workers_the_way_to_start_one_is_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rooms.show_workers([], as_json=False)
    assert "daemon --role worker" in capsys.readouterr().out
    rooms.show_workers([], as_json=True)
    assert capsys.readouterr().out == ""
