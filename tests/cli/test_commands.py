"""``config``, ``daemon``, ``doctor`` and ``send``, in this process."""

import json
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import trio

from sleap_rtc import client
from sleap_rtc.cli import daemon, doctor, main, send
from sleap_rtc.cli.watch import JsonWatch
from sleap_rtc.doctor import Check
from sleap_rtc.errors import NoWorkerError
from sleap_rtc.proto.rendezvous.invite import Invite, encode_invite
from tests.cli.test_output import logs_as_before as logs_as_before

LOCAL = Invite("ws://127.0.0.1:8787", b"s" * 32)
REMOTE = Invite("wss://signaling.example.org/ws", b"s" * 32)


@pytest.fixture(autouse=True)
def config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The configuration file, in a directory without any other setting."""
    for name in ("SHARED_STORAGE_ROOT", "SLEAP_RTC_ENV", "SLEAP_RTC_INVITE"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "my config.toml"
    path.write_text('shared_storage_root = "/mnt/lab"\n[worker]\nslots = 2\n')
    monkeypatch.setenv("SLEAP_RTC_CONFIG", str(path))
    monkeypatch.setenv("SLEAP_RTC_STATE_DIR", str(tmp_path / "state"))
    return path


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    code = ended.value.code
    assert isinstance(code, int)
    return code


# ------------------------------------------------------------------------------ config


def test_the_settings_are_shown_with_their_sources(
    capsys: pytest.CaptureFixture[str],
    config_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert run("config", "path") == 0
    assert capsys.readouterr().out == f"{config_file}\n"
    assert run("config", "show") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "shared_storage_root = /mnt/lab" in lines
    assert "shared_storage_root_from = config file" in lines
    assert "signaling_websocket = not set" in lines
    monkeypatch.setenv("SHARED_STORAGE_ROOT", "/mnt/other")
    assert run("config", "show", "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert values["shared_storage_root"] == "/mnt/other"
    assert values["shared_storage_root_from"] == "SHARED_STORAGE_ROOT"
    assert values["worker"] == {"slots": 2}


# ------------------------------------------------------------------------------ daemon


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("daemon --role signaling", "--listen"),
        ("daemon --role signaling --listen here", "HOST:PORT"),
        ("daemon --role worker --listen here", "HOST:PORT"),
    ],
)
def test_a_daemon_with_a_bad_address_is_a_usage_error(
    capsys: pytest.CaptureFixture[str],
    config_file: Path,
    arguments: str,
    words: str,
) -> None:
    config_file.write_text("")
    assert run(*arguments.split()) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("invite", "is_hosted", "out", "err"),
    [
        (LOCAL, True, "Only this machine can reach this worker", ""),
        (REMOTE, True, f"sleap-rtc join {encode_invite(REMOTE)}", ""),
        (REMOTE, False, f"sleap-rtc join {encode_invite(REMOTE)}", REMOTE.url),
    ],
)
def test_a_worker_prints_how_to_reach_it(
    capsys: pytest.CaptureFixture[str],
    invite: Invite,
    is_hosted: bool,
    out: str,
    err: str,
) -> None:
    daemon.print_directions(invite, is_hosted)
    shown = capsys.readouterr()
    assert out in shown.out
    assert err in shown.err
    assert (encode_invite(invite) in shown.out) is (invite is REMOTE)


# ------------------------------------------------------------------------------ doctor


def examine_as(*checks: Check) -> Callable[[Path | None], AsyncIterator[Check]]:
    async def examine(root: Path | None) -> AsyncIterator[Check]:
        for check in checks:
            yield check

    return examine


OK = Check("Python", "ok", "3.13")
NOTE = Check("GPU", "note", "no [GPU] was found", "Install its driver.")
FAILED = Check("Signaling", "failed", "\x1b[31mred", "Check the server.")


def test_checks_are_printed_as_they_come(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "examine", examine_as(OK, NOTE))
    doctor.print_checks(None, as_json=False)
    assert capsys.readouterr().out.splitlines() == [
        "ok     Python: 3.13",
        "note   GPU: no [GPU] was found",
        "        Install its driver.",
    ]


def test_a_failed_check_is_exit_code_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "examine", examine_as(OK, FAILED))
    assert run("doctor") == 1
    shown = capsys.readouterr().out
    assert "failed Signaling" in shown
    assert "\x1b" not in shown
    assert run("doctor", "--json") == 1
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["verdict"] for event in events] == ["ok", "failed"]
    assert {event["event"] for event in events} == {"check"}


# -------------------------------------------------------------------------------- send


def test_the_options_of_send_make_the_request(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[client.JobRequest] = []

    async def submit(request: client.JobRequest, *args: object, **kw: object) -> object:
        requests.append(request)
        return client.JobResult("job_0123abcd", Path("/x/results"), {"run": 1.0})

    monkeypatch.setattr(client, "submit", submit)
    assert run("send", "job.zip") == 0
    assert capsys.readouterr().out == "/x/results\n"
    options = "--worker gpu --route quic --output o --timeout 5 --patience 7 --fresh"
    assert run("send", "job.zip", *options.split(), "--json") == 0
    done = json.loads(capsys.readouterr().out)
    assert done == {
        "event": "done",
        "job_id": "job_0123abcd",
        "output": "/x/results",
        "seconds": {"run": 1.0},
    }
    assert requests == [
        client.JobRequest(Path("job.zip")),
        client.JobRequest(
            Path("job.zip"),
            worker="gpu",
            route="quic",
            output=Path("o"),
            timeout=5,
            patience=7,
            fresh=True,
        ),
    ]


def test_an_error_of_send_is_reported_as_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def submit(*args: object, **kw: object) -> object:
        raise NoWorkerError("No worker.", "Start one.")

    monkeypatch.setattr(client, "submit", submit)
    assert run("send", "job.zip") == 3
    assert "No worker." in capsys.readouterr().err
    assert run("send", "job.zip", "--json") == 3
    assert json.loads(capsys.readouterr().out)["hint"] == "Start one."


async def test_the_first_interrupt_cancels_and_the_second_exits(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = trio.Event()
    with pytest.RaisesGroup(KeyboardInterrupt):
        async with trio.open_nursery() as nursery:
            await nursery.start(send.listen_for_interrupts, asked)
            signal.raise_signal(signal.SIGINT)
            await asked.wait()
            assert "Asking the worker to cancel" in capsys.readouterr().err
            signal.raise_signal(signal.SIGTERM)


def test_json_output_is_flushed_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    watch = JsonWatch()
    watch.close()
    watch.close()
    assert capsys.readouterr().out == ""
