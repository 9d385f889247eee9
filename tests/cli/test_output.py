"""The output of commands, and their exit codes."""

import json
import logging
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import get_args

import pytest
import structlog

from sleap_rtc import client
from sleap_rtc.cli import main
from sleap_rtc.cli.console import plain
from sleap_rtc.cli.failures import reported_errors
from sleap_rtc.cli.watch import JsonWatch, TerminalWatch
from sleap_rtc.client import LinePrinted, PackageCopied, RouteChosen, TransferProgress
from sleap_rtc.errors import ExitCode, JobFailedError, NoWorkerError, UserError
from sleap_rtc.proto import messages
from sleap_rtc.proto.rendezvous.workers import Candidate, WorkerCard

COMMANDS = ("send", "daemon", "invite", "join", "workers", "doctor", "config")


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """Undo the changes of a command to the logs of its process."""
    handlers = logging.root.handlers[:]
    level = logging.root.level
    yield
    structlog.reset_defaults()
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    code = ended.value.code
    assert isinstance(code, int)
    return code


def ended_by(error: BaseException, *, as_json: bool = False) -> int | str | None:
    """Raise an error where commands do; return the exit code."""

    def command() -> None:
        with reported_errors(as_json=as_json):
            raise error

    with pytest.raises(SystemExit) as ended:
        command()
    return ended.value.code


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(
    capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert run(command, "--help") == 0
    shown = capsys.readouterr().out
    assert f"sleap-rtc {command}" in shown


def test_the_help_lists_commands_and_exit_codes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert all(command in shown for command in COMMANDS)
    for code in ExitCode:
        assert re.search(rf"\b{int(code)} [a-z]", shown), code


@pytest.mark.parametrize("kind", UserError.__subclasses__())
def test_every_failure_has_its_exit_code(
    capsys: pytest.CaptureFixture[str], kind: type[UserError]
) -> None:
    assert ended_by(kind("It broke.", "Mend it.")) == kind.exit_code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Error: It broke." in shown.err
    assert "What to do: Mend it." in shown.err


def test_a_failure_of_several_tasks_is_one_failure(
    capsys: pytest.CaptureFixture[str],
) -> None:
    group = ExceptionGroup("", [ExceptionGroup("", [NoWorkerError("Nobody.")])])
    assert ended_by(group) == ExitCode.NO_WORKER
    assert "Nobody." in capsys.readouterr().err
    assert ended_by(BaseExceptionGroup("", [KeyboardInterrupt()])) == 130


def test_a_bug_is_never_hidden_behind_a_failure() -> None:
    def command() -> None:
        with reported_errors():
            raise ExceptionGroup("", [NoWorkerError("Nobody."), ValueError("bug")])

    with pytest.raises(ExceptionGroup):
        command()


def test_ctrl_c_is_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended_by(KeyboardInterrupt()) == 130
    assert "Interrupted." in capsys.readouterr().err


def test_a_failure_can_be_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended_by(JobFailedError("a\x1b[2Jb", "hint"), as_json=True) == 5
    shown = json.loads(capsys.readouterr().out)
    assert shown["event"] == "error"
    assert shown["kind"] == "JobFailedError"
    assert shown["exit_code"] == 5
    assert "\x1b" not in shown["message"]


def test_text_of_a_peer_is_neither_markup_nor_control() -> None:
    assert plain("[red]x") == r"\[red]x"
    assert "\x1b" not in plain("\x1b[31mred")


def test_output_is_printed_once_a_line_is_final(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with closing(TerminalWatch()) as watch:
        for number, text in ((1, "one"), (2, "50 %"), (2, "100 %"), (3, "three")):
            watch(LinePrinted(number, text))
        watch(LinePrinted(2, "too late"))
    assert capsys.readouterr().out == "one\n100 %\nthree\n"


def test_a_gap_in_the_output_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with closing(TerminalWatch()) as watch:
        for number in (1, 2, 4, 100):
            watch(LinePrinted(number, f"line {number}"))
    assert capsys.readouterr().out.splitlines() == [
        "line 1",
        "line 2",
        "... 1 line left out; job.log has them",
        "line 4",
        "... 95 lines left out; job.log has them",
        "line 100",
    ]


def test_output_of_a_job_cannot_control_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for watch in (TerminalWatch(), JsonWatch()):
        with closing(watch):
            watch(LinePrinted(1, "a\x1b]0;title\x07b\x9b5Ac[red]d"))
            watch(RouteChosen("channel", "\x1b[31mbecause"))
        shown = capsys.readouterr()
        text = shown.out + shown.err
        assert not set(text) & {"\x1b", "\x07", "\x9b"}
        assert "[red]d" in text


def test_progress_is_a_line_at_every_step_where_lines_cannot_be_redrawn(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with closing(TerminalWatch()) as watch:
        for done in range(1001):
            watch(TransferProgress("Sending x", done, 1000))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    assert lines[-1].startswith("Sending x: 100 %")


def test_the_method_of_a_copy_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with closing(TerminalWatch()) as watch:
        watch(PackageCopied("read/write", 3 * 2**30, 1.5))
    shown = capsys.readouterr().err
    assert shown == "Copied: 3.0 GiB in 1.5 s (read/write)\n"


def test_json_has_each_event_on_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with closing(JsonWatch()) as watch:
        watch(LinePrinted(7, "two\nlines"))
        watch(TransferProgress("Sending x", 1, 2))
        watch(PackageCopied("reflink", 2, 0.5))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        {"event": "line", "line": 7, "text": "two\nlines"},
        {"event": "progress", "what": "Sending x", "done": 1, "total": 2},
        {"event": "copied", "method": "reflink", "size": 2, "seconds": 0.5},
    ]


CARD = WorkerCard(hostname="gpu")
STATE = messages.JobProgress("QUEUED", position=2)

EVENTS: list[tuple[client.Event, str, dict[str, object]]] = [
    (
        client.WorkerChosen(Candidate("worker-1", CARD), "it is free"),
        "Worker: worker-1 (it is free)",
        {"event": "worker", "worker": "worker-1", "reason": "it is free"},
    ),
    (
        client.LinkOpened("tcp", "10.0.0.1:7", "it was first"),
        "Link: tcp to 10.0.0.1:7 (it was first)",
        {"event": "link", "kind": "tcp", "address": "10.0.0.1:7"},
    ),
    (
        client.LinkLost("silence"),
        "Link: lost: silence; opening another one",
        {"event": "link_lost", "reason": "silence"},
    ),
    (
        client.JobResumed("job_1"),
        "Job: continuing job_1",
        {"event": "resumed", "job_id": "job_1"},
    ),
    (
        client.NoteTrouble("the disk is full"),
        "Note: the disk is full; after a crash the job would start over",
        {"event": "note_trouble", "reason": "the disk is full"},
    ),
    (
        client.PackageChanged("job_1"),
        "Package: changed since it was submitted as job_1: this is a new job",
        {"event": "package_changed", "earlier_job_id": "job_1"},
    ),
    (
        client.RouteChosen("channel", "you asked for it"),
        "Route: channel (you asked for it)",
        {"event": "route", "route": "channel", "reason": "you asked for it"},
    ),
    (
        client.StateChanged(STATE),
        "Job: queued, 2 ahead",
        {"event": "state", "state": "QUEUED", "position": 2},
    ),
    (
        client.StateChanged(messages.JobProgress("RUNNING")),
        "Job: running",
        {"event": "state", "state": "RUNNING"},
    ),
    (
        client.StateChanged(messages.JobProgress("COMPLETE")),
        "",
        {"event": "state", "state": "COMPLETE"},
    ),
    (
        client.StageComplete("training"),
        "Job: training complete",
        {"event": "stage_complete", "stage": "training"},
    ),
    (
        client.ResultsChosen(Path("/x")),
        "",
        {"event": "results_directory", "directory": "/x"},
    ),
    (
        client.ResultsStored(Path("/x"), 2, 2048),
        "Results: 2 files, 2.0 KiB, in /x",
        {"event": "results", "directory": "/x", "files": 2, "size": 2048},
    ),
]


@pytest.mark.parametrize(("event", "text", "fields"), EVENTS)
def test_each_event_is_shown_to_people_and_programs(
    capsys: pytest.CaptureFixture[str],
    event: client.Event,
    text: str,
    fields: dict[str, object],
) -> None:
    with closing(TerminalWatch()) as watch:
        watch(event)
    assert capsys.readouterr().err.strip() == text
    with closing(JsonWatch()) as json_watch:
        json_watch(event)
    assert json.loads(capsys.readouterr().out).items() >= fields.items()


def test_every_kind_of_event_is_tried() -> None:
    tried = {type(event) for event, _, _ in EVENTS}
    elsewhere = {client.LinePrinted, client.TransferProgress, client.PackageCopied}
    assert tried | elsewhere == set(get_args(client.Event))
