"""Jobs in their directory: real packages, real commands, real files."""

import os
import sys
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from sleap_rtc.proto.job.script import ScriptKind
from sleap_rtc.proto.job.worker import RunEvent, StageSucceeded
from sleap_rtc.worker.job_log import LOG_NAME
from sleap_rtc.worker.runner import Run, RunReport, run_job
from tests.e2e import actor
from tests.e2e.packages import make_package
from tests.io.storage.places import HangingStorage, small_mount

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="workers run on Linux and macOS"
)


@pytest.fixture(autouse=True)
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    actor.install(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")


class Job:
    """A job directory with a package, and the reports of its run."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir()
        self.package = directory / "job.zip"
        self.lines: dict[int, str] = {}
        self.stages: list[ScriptKind] = []
        self.stop = trio.CancelScope()
        self.waiting = trio.Event()

    async def run(self, deadline: float = 30) -> RunReport:
        def on_event(event: RunEvent) -> None:
            if isinstance(event, StageSucceeded):
                self.stages.append(event.stage)
                return
            self.lines[event.line] = event.text
            if event.text == "waiting":
                self.waiting.set()

        with trio.fail_after(deadline):
            return await run_job(
                Run(
                    directory=self.directory,
                    package=self.package.name,
                    programs=frozenset({"act"}),
                    gpus=None,
                    on_event=on_event,
                ),
                self.stop,
            )

    @property
    def log(self) -> list[str]:
        return (self.directory / LOG_NAME).read_text().splitlines()


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path / "job")


async def test_the_report_names_the_files_that_the_job_made_or_changed(
    job: Job,
) -> None:
    make_package(
        job.package,
        "act copy a.txt models/new.txt",
        "act mark changed.txt more",
        files={"a.txt": "12345", "changed.txt": "old\n", "same.txt": "same"},
    )
    report = await job.run()
    assert report.failure is None
    sizes = {path: size for path, size in report.results.items() if path != LOG_NAME}
    assert sizes == {"models/new.txt": 5, "changed.txt": 9}
    assert report.results[LOG_NAME] == (job.directory / LOG_NAME).stat().st_size
    assert job.stages == ["training"]


async def test_the_log_holds_every_line_in_its_last_version(job: Job) -> None:
    make_package(job.package, "act lines 1000", "act say end")
    await job.run()
    expected = [f"line {number}" for number in range(1000)]
    assert job.log == ["$ act lines 1000", *expected, "$ act say end", "end"]
    assert [job.lines[number] for number in sorted(job.lines)] == job.log


async def test_stages_are_reported_in_order(job: Job) -> None:
    make_package(
        job.package, "act say train", files={"track-script.sh": "act say track\n"}
    )
    assert (await job.run()).failure is None
    assert job.stages == ["training", "inference"]
    assert job.log.index("train") < job.log.index("track")


async def test_a_command_that_fails_ends_the_job_and_keeps_its_results(
    job: Job,
) -> None:
    make_package(
        job.package,
        "act big half.bin 1",
        "act fail 3",
        "act big never.bin 1",
        files={"track-script.sh": "act say never\n"},
    )
    report = await job.run()
    assert report.failure is not None
    assert "line 3) ended with exit status 3" in report.failure
    assert report.results.keys() == {"half.bin", LOG_NAME}
    assert job.stages == []


async def test_nothing_runs_if_a_later_line_is_not_allowed(job: Job) -> None:
    make_package(job.package, "act big made.bin 1", "rm -rf models")
    report = await job.run()
    assert report.failure is not None
    assert "line 3" in report.failure
    assert "rm" in report.failure
    assert report.results == {}
    assert not (job.directory / "made.bin").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip", b"x" * 1000])
async def test_a_file_that_is_not_a_package_is_a_failed_run(
    job: Job, content: bytes
) -> None:
    job.package.write_bytes(content)
    report = await job.run()
    assert report.failure is not None
    assert "Cannot unpack the package job.zip" in report.failure
    assert report.results == {}
    assert [path.name for path in job.directory.iterdir()] == ["job.zip"]


async def test_a_job_without_its_package_is_a_failed_run(job: Job) -> None:
    report = await job.run()
    assert report.failure is not None
    assert "job.zip" in report.failure


async def test_a_stopped_job_ends_and_reports_its_files(
    job: Job, tmp_path: Path
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    make_package(job.package, "act big made.bin 1", f"act wait {fifo}")
    reports: list[RunReport] = []

    async def run() -> None:
        reports.append(await job.run())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        await job.waiting.wait()
        job.stop.cancel()
    (report,) = reports
    assert report.failure == "stopped"
    assert report.results.keys() == {"made.bin", LOG_NAME}
    assert "waiting" in job.log


async def test_a_job_stopped_before_it_began_runs_nothing(job: Job) -> None:
    make_package(job.package, "act big made.bin 1")
    job.stop.cancel()
    report = await job.run()
    assert report == RunReport("stopped", {})
    assert [path.name for path in job.directory.iterdir()] == ["job.zip"]


async def test_a_full_disk_costs_the_log_and_not_the_worker(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    with small_mount(mount, 1):
        job = Job(mount / "job")
        # The file that fills the disk stays, so the lines have no room.
        make_package(job.package, f"act fill {mount}", "act say done")
        report = await job.run()
    assert report.failure is None
    assert list(job.lines.values())[-1] == "done"


@pytest.mark.parametrize(
    "step",
    [
        "runner.extract_package",
        "runner.list_tree",
        "job_log.create_beneath",
    ],
)
async def test_a_job_on_storage_that_hangs_can_be_stopped(
    job: Job,
    step: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mock_clock: MockClock,
) -> None:
    fifo = tmp_path / "commands"
    os.mkfifo(fifo)
    make_package(job.package, f"act wait {fifo}")
    with HangingStorage(tmp_path / "fifo") as storage:

        def hang(*arguments: object, **_: object) -> None:
            if isinstance(arguments[0], int):
                os.close(arguments[0])  # like the function that it replaces
            storage.touch()

        monkeypatch.setattr(f"sleap_rtc.worker.{step}", hang)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(job.run, 3000)
            mock_clock.rate = 20
            await storage.wait_touched()
            job.stop.cancel()
