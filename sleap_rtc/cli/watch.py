"""The output of ``send`` while it works: for people, or one JSON object per line."""

import sys
from abc import ABC, abstractmethod
from typing import assert_never

import msgspec
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from typing_extensions import override

from sleap_rtc import client
from sleap_rtc.cli.console import err, out, plain, print_json
from sleap_rtc.proto.sizes import human_size
from sleap_rtc.proto.terminal import printable

_STEP = 10
"""Percent between two lines of progress where lines cannot be redrawn."""


class Watch(ABC):
    """Shows the events of a job; `close` leaves the terminal in order."""

    @abstractmethod
    def __call__(self, event: client.Event) -> None:
        """Show an event."""

    @abstractmethod
    def summarize(self, result: client.JobResult) -> None:
        """Show the result of a job that completed."""

    @abstractmethod
    def close(self) -> None:
        """End the output in progress; safe to call again."""


class TerminalWatch(Watch):
    """Shows a progress bar for the transfer, then the output of the job.

    The last line is redrawn where the terminal allows it; elsewhere a line is printed
    once it is final.
    """

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=err,
            transient=False,
        )
        self._tasks: dict[str, TaskID] = {}
        self._printed: dict[str, int] = {}
        self._lines = _Lines()

    @override
    def close(self) -> None:
        self._end_bar()
        self._lines.finish()

    @override
    def __call__(self, event: client.Event) -> None:
        if not isinstance(event, client.TransferProgress):
            self._end_bar()
        if not isinstance(event, client.LinePrinted):
            self._lines.finish()
        match event:
            case client.WorkerChosen(worker=worker, reason=reason):
                self._print("Worker", f"{worker.peer_id} ({reason})")
            case client.LinkOpened(kind=kind, address=address, reason=reason):
                self._print("Link", f"{kind} to {address} ({reason})")
            case client.LinkLost(reason=reason):
                self._print("Link", f"lost: {reason}; opening another one")
            case client.JobResumed(job_id=job_id):
                self._print("Job", f"continuing {job_id}")
            case client.NoteTrouble(reason=reason):
                self._print("Note", f"{reason}; after a crash the job would start over")
            case client.PackageChanged(job_id=job_id):
                self._print(
                    "Package",
                    f"changed since it was submitted as {job_id}: this is a new job",
                )
            case client.RouteChosen(route=route, reason=reason):
                self._print("Route", f"{route} ({reason})")
            case client.TransferProgress(what=what, done=done, total=total):
                self._show_progress(what, done, total)
            case client.PackageCopied(method=method, size=size, seconds=seconds):
                self._print(
                    "Copied", f"{human_size(size)} in {seconds:.1f} s ({method})"
                )
            case client.StateChanged(progress=progress):
                if progress.state == "QUEUED":
                    ahead = progress.position
                    self._print("Job", f"queued, {ahead} ahead" if ahead else "queued")
                elif progress.state == "RUNNING":
                    self._print("Job", "running")
            case client.LinePrinted(line=line, text=text):
                self._lines.show(line, printable(text))
            case client.StageComplete(stage=stage):
                self._print("Job", f"{stage} complete")
            case client.ResultsChosen():
                pass  # `ResultsStored` prints the directory
            case client.ResultsStored(directory=directory, files=files, size=size):
                self._print(
                    "Results", f"{files} files, {human_size(size)}, in {directory}"
                )
            case _:
                assert_never(event)

    @override
    def summarize(self, result: client.JobResult) -> None:
        spent = ", ".join(f"{name} {s:.1f} s" for name, s in result.seconds.items())
        self._print("Done", f"{result.job_id} ({spent})")
        if result.output is not None:
            out.print(str(result.output), markup=False)

    def _show_progress(self, what: str, done: int, total: int) -> None:
        if not err.is_terminal:
            self._print_progress(what, done, total)
            return
        if what not in self._tasks:
            self._bar.start()
            self._tasks[what] = self._bar.add_task(plain(what), total=total)
        self._bar.update(self._tasks[what], completed=done)

    def _print_progress(self, what: str, done: int, total: int) -> None:
        """Print a line at every step, where a bar cannot be drawn."""
        percent = 100 if done >= total else done * 100 // max(total, 1)
        step = percent // _STEP * _STEP
        if step > self._printed.get(what, -1):
            self._printed[what] = step
            self._print(
                what, f"{percent} % ({human_size(done)} of {human_size(total)})"
            )

    def _end_bar(self) -> None:
        if self._tasks:
            self._bar.stop()
            for task in self._tasks.values():
                self._bar.remove_task(task)
            self._tasks.clear()

    def _print(self, title: str, text: str) -> None:
        err.print(f"[bold cyan]{plain(title)}:[/] {plain(text)}")


class _Lines:
    """The output of a job on standard output, with redraws of the last line.

    It keeps only the line that may still be redrawn; the worker keeps the others, in
    `LogHistory` for a client that resumes, and in the file of `JobLog`.
    """

    def __init__(self) -> None:
        self._number = 0
        self._pending: str | None = None
        self._redraws = sys.stdout.isatty()

    def show(self, number: int, text: str) -> None:
        """Show a line; the number of the last line replaces that line.

        Earlier lines cannot be replaced: they have scrolled away.
        """
        if number < self._number:
            return
        if number > self._number:
            self.finish()
            self._print_gap(number - self._number - 1)
        self._number, self._pending = number, text
        if self._redraws:
            width = max(out.width - 1, 20)
            sys.stdout.write("\r\x1b[2K" + text[:width])
            sys.stdout.flush()

    def _print_gap(self, count: int) -> None:
        """Print how many lines were left out because the link was slower."""
        if count:
            lines = "line" if count == 1 else "lines"
            sys.stdout.write(f"... {count} {lines} left out; job.log has them\n")

    def finish(self) -> None:
        """Make the last line final."""
        if self._pending is None:
            return
        text, self._pending = self._pending, None
        sys.stdout.write(f"\r\x1b[2K{text}\n" if self._redraws else f"{text}\n")
        sys.stdout.flush()


class JsonWatch(Watch):
    """Prints each event as one JSON object on a line."""

    @override
    def close(self) -> None:
        sys.stdout.flush()

    @override
    def __call__(self, event: client.Event) -> None:
        match event:
            case client.WorkerChosen(worker=worker, reason=reason):
                print_json("worker", worker=worker.peer_id, reason=reason)
            case client.LinkOpened(kind=kind, address=address, reason=reason):
                print_json("link", kind=kind, address=address, reason=reason)
            case client.LinkLost(reason=reason):
                print_json("link_lost", reason=reason)
            case client.JobResumed(job_id=job_id):
                print_json("resumed", job_id=job_id)
            case client.NoteTrouble(reason=reason):
                print_json("note_trouble", reason=reason)
            case client.PackageChanged(job_id=job_id):
                print_json("package_changed", earlier_job_id=job_id)
            case client.ResultsChosen(directory=directory):
                print_json("results_directory", directory=directory)
            case client.RouteChosen(route=route, reason=reason):
                print_json("route", route=route, reason=reason)
            case client.TransferProgress(what=what, done=done, total=total):
                print_json("progress", what=what, done=done, total=total)
            case client.PackageCopied(method=method, size=size, seconds=seconds):
                print_json("copied", method=method, size=size, seconds=seconds)
            case client.StateChanged(progress=progress):
                print_json("state", **msgspec.to_builtins(progress))
            case client.LinePrinted(line=line, text=text):
                print_json("line", line=line, text=text)
            case client.StageComplete(stage=stage):
                print_json("stage_complete", stage=stage)
            case client.ResultsStored(directory=directory, files=files, size=size):
                print_json("results", directory=directory, files=files, size=size)
            case _:
                assert_never(event)

    @override
    def summarize(self, result: client.JobResult) -> None:
        print_json(
            "done",
            job_id=result.job_id,
            output=None if result.output is None else str(result.output),
            seconds={name: round(s, 3) for name, s in result.seconds.items()},
        )
