"""Run one job in its directory: unpack it, run its scripts, list the results."""

import os
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

import msgspec
import trio

from sleap_rtc.io.storage.archive import extract_package
from sleap_rtc.io.storage.archive_plan import ArchiveError
from sleap_rtc.io.storage.call import call_storage
from sleap_rtc.io.storage.folder import (
    Folder,
    StorageError,
    explain_errors,
    list_tree,
    open_beneath,
)
from sleap_rtc.proto.errors import InvalidInput
from sleap_rtc.proto.job.script import (
    MAX_SCRIPT_LENGTH,
    SCRIPT_KINDS,
    Script,
    ScriptError,
    plan_scripts_untrusted,
)
from sleap_rtc.proto.job.worker import RunEvent, StageSucceeded
from sleap_rtc.worker.job_log import open_job_log
from sleap_rtc.worker.process import run_script

LISTING_TIMEOUT = 5.0
"""Seconds for listing the results of a job that was stopped."""


class RunReport(msgspec.Struct, frozen=True):
    """The end of a run.

    Args:
        failure: The reason of a failure, for people; None if the run succeeded.
        results: Size in bytes of each file that the job made or changed, by its path
            relative to the job directory.
    """

    failure: str | None
    results: dict[str, int]


class Run(msgspec.Struct, frozen=True):
    """A job to run, and the callbacks for its progress.

    Args:
        directory: The job directory; nothing outside of it is written.
        package: Name of the package in it.
        programs: The programs that this worker runs.
        gpus: The GPUs that the commands see, or None for all.
        on_event: Called with each line of output, and with each stage that succeeded.
    """

    directory: Path
    package: str
    programs: frozenset[str]
    gpus: tuple[int, ...] | None
    on_event: Callable[[RunEvent], None]


async def run_job(run: Run, stop: trio.CancelScope) -> RunReport:
    """Run the package in a job directory.

    Args:
        run: The job.
        stop: Scope entered here. Cancelling it stops the commands; the report is still
            returned, with the results up to then.

    Returns:
        The report. An unusable package is a failed run, not an exception.
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
            failure = f"Cannot unpack the package {run.package}: {error}"
        except ScriptError as error:
            failure = f"Cannot run the package {run.package}: {error.reason}"
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
    """Unpack the package and read its scripts (blocking).

    Raises:
        ArchiveError: If the package is broken or hostile.
        ScriptError: If a script has a command that this worker does not run.
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
        # One character more than allowed, so that a longer script is refused.
        return file.read(MAX_SCRIPT_LENGTH + 1)


async def _run_scripts(run: Run, scripts: tuple[Script, ...]) -> str | None:
    """Run all scripts up to the first command that fails; return the failure."""
    async with open_job_log(run.directory, run.on_event) as log:
        for number, script in enumerate(scripts):
            outcome = await run_script(
                script.commands,
                cwd=run.directory,
                environment=os.environ,
                log=log,
                gpus=run.gpus,
            )
            if not outcome.ok:
                return outcome.reason
            if all(later.kind != script.kind for later in scripts[number + 1 :]):
                run.on_event(StageSucceeded(script.kind))
    return None


def _snapshot(directory: Path) -> dict[str, tuple[int, int]]:
    return {path: (size, changed) for path, size, changed in list_tree(directory)}


def _made_since(run: Run, before: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """List files that were made or changed; none if the package was not unpacked."""
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
