"""Show all of sleap-rtc on one machine: a worker, two jobs, one by each route.

    python examples/demo.py

With `sleap-nn` on the PATH it trains for real; without, `tiny_trainer.py` stands in
for it. Everything happens in a temporary directory, which is removed at the end.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

HERE = Path(__file__).resolve().parent
PACKAGE = HERE / "synth_job.zip"
SLEAP_RTC = [sys.executable, "-m", "sleap_rtc"]
START_TIMEOUT = 60.0
JOB_TIMEOUT = 900
SHOWN_LINES = 12
"""Lines of a job's output that are shown: sleap-nn prints about 600."""

console = Console(highlight=False)


class DemoError(Exception):
    """The demonstration cannot continue."""


def main() -> int:
    """Run the demonstration; returns the exit code."""
    with tempfile.TemporaryDirectory(prefix="sleap-rtc-demo-") as name:
        try:
            _run(Path(name))
        except DemoError as error:
            console.print(f"[bold red]The demo failed:[/] {escape(str(error))}")
            return 1
        except KeyboardInterrupt:
            console.print("Interrupted; the worker is stopped.")
            return 130
    return 0


def _run(directory: Path) -> None:
    environment = _environment(directory)
    storage = directory / "storage"
    storage.mkdir()
    # The two machines would mount the same storage at different places.
    seen_by_client = directory / "mounted-here"
    seen_by_client.symlink_to(storage, target_is_directory=True)
    console.rule("A worker with a signaling server of its own")
    with _worker(directory, environment, storage):
        results = []
        for route, root in (("shared", seen_by_client), ("channel", None)):
            console.rule(f"{PACKAGE.name} by the {route} route")
            results.append(_send(directory, environment, route, root))
    console.rule("Seconds of each phase")
    console.print(_table(results))


def _environment(directory: Path) -> dict[str, str]:
    """Return an environment apart from the user's own rooms, with a trainer."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("SLEAP_RTC_") and name != "SHARED_STORAGE_ROOT"
    }
    environment["SLEAP_RTC_STATE_DIR"] = str(directory / "state")
    environment["SLEAP_RTC_CONFIG"] = str(directory / "config.toml")
    (directory / "config.toml").touch()
    if found := shutil.which("sleap-nn"):
        console.print(f"Training for real, with {found}.")
        return environment
    console.print(
        "sleap-nn is not on the PATH, so a small trainer of our own stands in for it "
        "(examples/tiny_trainer.py)."
    )
    programs = directory / "programs"
    trainer = [sys.executable, str(HERE / "tiny_trainer.py")]
    install = [*trainer, "--install", str(programs)]
    subprocess.run(install, check=True, stdout=subprocess.DEVNULL)
    environment["PATH"] = f"{programs}{os.pathsep}{environment.get('PATH', '')}"
    return environment


@contextmanager
def _worker(
    directory: Path, environment: dict[str, str], storage: Path
) -> Iterator[None]:
    """Run a worker for as long as the body runs."""
    log = directory / "worker.log"
    command = [*SLEAP_RTC, "daemon", "--role", "worker", "--name", "demo"]
    command += ["--shared-storage-root", str(storage)]
    with log.open("w") as file:
        worker = subprocess.Popen(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        _wait_until_ready(worker, log)
        for line in log.read_text().splitlines():
            console.print(f"[dim]{escape(line)}[/]")
        yield
    finally:
        worker.send_signal(signal.SIGTERM)
        try:
            worker.wait(timeout=20)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


def _wait_until_ready(worker: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while "Send a job" not in log.read_text():
        if worker.poll() is not None or time.monotonic() > deadline:
            raise DemoError(f"the worker did not start:\n{log.read_text()}")
        time.sleep(0.1)


def _send(
    directory: Path, environment: dict[str, str], route: str, root: Path | None
) -> dict[str, Any]:
    """Send the package, show its events, and return the last one."""
    output = directory / f"results-{route}"
    command = [*SLEAP_RTC, "send", str(PACKAGE), "--json", "--route", route]
    command += ["--output", str(output), "--timeout", str(JOB_TIMEOUT)]
    if root is not None:
        command += ["--shared-storage-root", str(root)]
    console.print(f"$ sleap-rtc send {PACKAGE.name} --route {route}")
    lines: dict[int, str] = {}
    last: dict[str, Any] = {}
    with (
        console.status("Looking for the worker") as status,
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, text=True
        ) as client,
    ):
        assert client.stdout is not None
        for text in client.stdout:
            last = json.loads(text)
            if last["event"] == "line":
                lines[last["line"]] = last["text"]
                status.update(escape(last["text"][: console.width - 4]))
            elif last["event"] == "progress":
                percent = 100 * last["done"] // max(last["total"], 1)
                status.update(f"{escape(last['what'])}: {percent} %")
                _show(last, lines)
            else:
                _show(last, lines)
    if client.returncode != 0:
        raise DemoError(last.get("message", "the client printed nothing"))
    for path in sorted(output.rglob("*")):
        if path.is_file():
            size = path.stat().st_size
            console.print(f"  {escape(str(path.relative_to(output)))}  {size:,} bytes")
    return {"route": route, **last}


def _show(event: dict[str, Any], lines: dict[int, str]) -> None:
    match event:
        case {"event": "worker" | "route" as kind, "reason": reason}:
            console.print(f"{kind.capitalize()}: {event[kind]} ({escape(reason)})")
        case {"event": "link", "kind": kind, "address": address}:
            console.print(f"Link: {kind} to {address}")
        case {"event": "progress", "done": done, "total": total} if done == total:
            console.print(f"{escape(event['what'])}: {total:,} bytes")
        case {"event": "stage_complete", "stage": stage}:
            shown = [lines[number] for number in sorted(lines)]
            if len(shown) > SHOWN_LINES:
                console.print(f"[dim]... {len(shown) - SHOWN_LINES} lines before[/]")
            for line in shown[-SHOWN_LINES:]:
                console.print(f"[dim]{escape(line)}[/]")
            console.print(f"{stage.capitalize()} complete")
        case _:
            pass


def _table(results: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    phases = ("connect", "transfer", "queue", "run", "results")
    for title in ("route", *phases):
        table.add_column(title, justify="right" if title != "route" else "left")
    for result in results:
        seconds = result["seconds"]
        table.add_row(
            result["route"], *(f"{seconds.get(phase, 0.0):.2f} s" for phase in phases)
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
