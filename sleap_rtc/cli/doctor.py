"""The code of ``doctor``: it prints each check as it is made."""

import sys
from pathlib import Path

import msgspec

from sleap_rtc.cli.console import out, plain, print_json
from sleap_rtc.cli.running import run
from sleap_rtc.doctor import examine
from sleap_rtc.errors import ExitCode

_MARKS = {
    "ok": "[green]ok[/]    ",
    "note": "[yellow]note[/]  ",
    "failed": "[red]failed[/]",
}


def print_checks(shared_storage_root: Path | None, *, as_json: bool) -> None:
    """Print all checks; end the process with an exit code if one has failed."""
    failed: list[str] = []
    run(_print_checks, shared_storage_root, as_json, failed)
    if failed:
        sys.exit(ExitCode.UNEXPECTED)


async def _print_checks(
    shared_storage_root: Path | None, as_json: bool, failed: list[str]
) -> None:
    async for check in examine(shared_storage_root):
        if check.verdict == "failed":
            failed.append(check.name)
        if as_json:
            print_json("check", **msgspec.to_builtins(check))
            continue
        out.print(f"{_MARKS[check.verdict]} {check.name}: {plain(check.found)}")
        if check.advice:
            out.print(f"        [dim]{plain(check.advice)}[/]")
