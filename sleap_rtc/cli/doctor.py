"""``doctor``: say what works here, and what to do about what does not."""

import sys
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from sleap_rtc.cli.console import out, plain, print_json, run
from sleap_rtc.doctor import examine
from sleap_rtc.errors import ExitCode

_MARKS = {
    "ok": "[green]ok[/]    ",
    "note": "[yellow]note[/]  ",
    "failed": "[red]failed[/]",
}


def doctor(
    shared_storage_root: Annotated[
        Path | None,
        typer.Option(help="Where this machine mounts the shared storage."),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line.")
    ] = False,
) -> None:
    """Check Python, signaling, shared storage, UDP, sleap-nn and GPUs."""
    failed: list[str] = []
    run(_doctor, shared_storage_root, json, failed)
    if failed:
        sys.exit(ExitCode.UNEXPECTED)


async def _doctor(
    shared_storage_root: Path | None, json: bool, failed: list[str]
) -> None:
    async for check in examine(shared_storage_root):
        if check.verdict == "failed":
            failed.append(check.name)
        if json:
            print_json("check", **msgspec.to_builtins(check))
            continue
        out.print(f"{_MARKS[check.verdict]} {check.name}: {plain(check.found)}")
        if check.advice:
            out.print(f"        [dim]{plain(check.advice)}[/]")
