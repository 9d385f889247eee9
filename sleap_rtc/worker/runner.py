"""Run one job in its directory: unpack it, run its scripts, list what they made."""

import os
import threading
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import TextIO

import msgspec
import trio

from sleap_rtc.io.storage.archive import extract_package
from sleap_rtc.io.storage.archive_plan import ArchiveError
from sleap_rtc.io.storage.call import call_storage
from sleap_rtc.io.storage.folder import (
    Folder,
    StorageError,
    create_beneath,
    explain_errors,
    list_tree,
    open_beneath,
)
from sleap_rtc.proto.errors import InvalidInput
from sleap_rtc.proto.job.lines import LineEvent
from sleap_rtc.proto.job.script import (
    MAX_SCRIPT_LENGTH,
    SCRIPT_KINDS,
    Script,
    ScriptError,
    ScriptKind,
    plan_scripts_untrusted,
)
from sleap_rtc.worker.process import run_script

LOG_NAME = "job.log"
"""The whole output of a job, the last version of each line; it is a result, too."""

LISTING_TIMEOUT = 5.0
"""Seconds for listing the results of a job that was stopped."""

LOG_CLOSE_TIMEOUT = 3.0
"""Seconds for writing the rest of the log after the commands have ended."""

_FLUSH_INTERVAL = 1.0
"""Seconds between two writes of the log: storage may be slow, and jobs chatty."""

_REDRAWN_LINES = 16
"""How far up a progress bar reaches: nested ones redraw a few lines."""


class RunReport(msgspec.Struct, frozen=True):
    """How a run ended.

    Args:
        failure: Why it failed, for people; None if it succeeded.
        results: Size in bytes of each file that the job made or changed, by its path
            relative to the job directory.
    """

    failure: str | None
    results: dict[str, int]


class Run(msgspec.Struct, frozen=True):
    """What to run, and whom to tell.

    Args:
        directory: The job directory; nothing outside of it is written.
        package: Name of the package in it.
        programs: The programs that this worker runs.
        gpus: The GPUs that the commands see, or None for all.
        on_line: Is told every line of output.
        on_stage: Is told when all commands of one kind have succeeded.
    """

    directory: Path
    package: str
    programs: frozenset[str]
    gpus: tuple[int, ...] | None
    on_line: Callable[[LineEvent], None]
    on_stage: Callable[[ScriptKind], None]


async def run_job(run: Run, stop: trio.CancelScope) -> RunReport:
    """Run a package that lies in its job directory.

    Args:
        run: What to run.
        stop: Is entered here; whoever cancels it stops the commands, and still gets
            the report with what the job made until then.

    Returns:
        How it ended. A package that is no good is a failed run, not an exception.
    """
    failure: str | None = "stopped"
    before: dict[str, tuple[int, int]] = {}
    results: dict[str, int] | None = None
    with stop:
        try:
            scripts = await call_storage(_unpack, run)
            before = await call_storage(_snapshot, run.directory)
            failure = await _run_scripts(run, scripts)
        except ArchiveError as error:
            failure = f"The package {run.package} can't be unpacked: {error}"
        except ScriptError as error:
            failure = f"The package {run.package} can't be run: {error.reason}"
        except (StorageError, InvalidInput) as error:
            failure = str(error)
        results = await call_storage(_made_since, run, before)
    if results is None:
        results = await _list_after_stop(run, before)
    return RunReport(failure, results)


async def _list_after_stop(
    run: Run, before: Mapping[str, tuple[int, int]]
) -> dict[str, int]:
    """List the results of a stopped job, unless the storage takes too long."""
    try:
        return await call_storage(
            _made_since, run, before, timeout=LISTING_TIMEOUT, shield=True
        )
    except StorageError:
        return {}


def _unpack(run: Run) -> tuple[Script, ...]:
    """Unpack the package and read its scripts; nothing has run yet.

    Raises:
        ArchiveError: If the package is broken or hostile.
        ScriptError: If a script holds what this worker does not run.
        StorageError: If the storage failed.
    """
    with (
        explain_errors("Failed to unpack the package"),
        closing(Folder.open(run.directory)) as folder,
    ):
        package = open_beneath(run.directory, run.package)
        extract_package(package, folder, check=trio.from_thread.check_cancelled)
    present = {path for path, _, _ in list_tree(run.directory)}
    texts = {
        name: _read_script(run.directory, name)
        for name in SCRIPT_KINDS
        if name in present
    }
    return plan_scripts_untrusted(texts, run.programs)


def _read_script(directory: Path, name: str) -> str:
    fd = open_beneath(directory, name)
    with (
        explain_errors(f"Failed to read {name}"),
        os.fdopen(fd, encoding="utf-8", errors="replace") as file,
    ):
        # One more than is allowed, so that a longer one is refused and not cut.
        return file.read(MAX_SCRIPT_LENGTH + 1)


async def _run_scripts(run: Run, scripts: tuple[Script, ...]) -> str | None:
    """Run the commands of all scripts, up to the first that fails."""
    failure: str | None = None
    async with trio.open_nursery() as nursery:
        log = _JobLog(run.directory)
        nursery.start_soon(log.write_regularly)

        async def on_line(event: LineEvent) -> None:
            log.add(event)
            run.on_line(event)

        next_line = 1
        try:
            for script in scripts:
                outcome = await run_script(
                    script.commands,
                    cwd=run.directory,
                    environment=os.environ,
                    on_line=on_line,
                    gpus=run.gpus,
                    first_line=next_line,
                )
                next_line = outcome.next_line
                if not outcome.ok:
                    failure = outcome.reason
                    break
                if not any(s.kind == script.kind for s in _after(scripts, script)):
                    run.on_stage(script.kind)
        finally:
            nursery.cancel_scope.cancel(reason="the commands have ended")
            await log.close()
    return failure


def _after(scripts: tuple[Script, ...], script: Script) -> tuple[Script, ...]:
    return scripts[scripts.index(script) + 1 :]


def _snapshot(directory: Path) -> dict[str, tuple[int, int]]:
    return {path: (size, changed) for path, size, changed in list_tree(directory)}


def _made_since(run: Run, before: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """List what was made or changed since; nothing if nothing had been unpacked."""
    if not before:
        return {}
    try:
        after = _snapshot(run.directory)
    except (StorageError, InvalidInput):
        return {}
    return {
        path: status[0]
        for path, status in after.items()
        if before.get(path) != status and path != run.package
    }


class _JobLog:
    """Writes the output of a job to a file, without ever making the job wait.

    A line is written once `_REDRAWN_LINES` later ones have come; until then a new
    version replaces it.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._recent: dict[int, str] = {}
        self._lines: list[str] = []
        self._file: TextIO | None = None
        self._writing = threading.Lock()

    def add(self, event: LineEvent) -> None:
        """Take a line, or a new version of a recent one."""
        if event.line in self._recent or not self._recent:
            self._recent[event.line] = event.text
        elif event.line > max(self._recent):
            self._recent[event.line] = event.text
            if len(self._recent) > _REDRAWN_LINES:
                self._lines.append(self._recent.pop(min(self._recent)) + "\n")

    async def write_regularly(self) -> None:
        """Write what has come, until cancelled."""
        while True:
            await trio.sleep(_FLUSH_INTERVAL)
            await call_storage(self._write)

    async def close(self) -> None:
        """Write the rest, even in a cancelled task, unless it takes too long."""
        self._lines += [text + "\n" for text in self._recent.values()]
        self._recent.clear()
        try:
            await call_storage(self._close, timeout=LOG_CLOSE_TIMEOUT, shield=True)
        except StorageError:
            pass  # the lines have gone to the client too

    def _write(self) -> None:
        with self._writing:  # a thread that was left behind here comes first
            self._write_lines()

    def _write_lines(self) -> None:
        lines, self._lines = self._lines, []
        try:
            if self._file is None:
                fd = create_beneath(self._directory, LOG_NAME)
                self._file = os.fdopen(fd, "w", encoding="utf-8")
            self._file.writelines(lines)
            self._file.flush()
        except (OSError, StorageError, InvalidInput):
            # The lines have gone to the client, too: a full disk must not end the job.
            return

    def _close(self) -> None:
        self._write()
        try:
            if self._file is not None:
                self._file.close()
        except OSError:
            return  # as above: it writes once more what had no room
