"""``send``: run a package on a worker, watch it, and get the results."""

import signal
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import trio
import typer

from sleap_rtc import client
from sleap_rtc.cli.console import err, reported_errors, run
from sleap_rtc.cli.watch import JsonWatch, TerminalWatch, Watch
from sleap_rtc.proto.messages import MAX_LANES


class RouteOption(StrEnum):
    """The routes that can be asked for."""

    auto = "auto"
    shared = "shared"
    channel = "channel"
    tcp = "tcp"
    quic = "quic"


def send(
    package: Annotated[
        Path,
        typer.Argument(help="A job package as SLEAP exports it: zip or directory."),
    ],
    worker: Annotated[
        str | None,
        typer.Option(help="Id, name or host name of the worker; default: choose one."),
    ] = None,
    route: Annotated[
        RouteOption,
        typer.Option(
            help="Over shared storage, or in chunks through the channel: over TCP if "
            "possible, or over the one that is named."
        ),
    ] = RouteOption.auto,
    output: Annotated[
        Path | None,
        typer.Option(help="Where the results go; default: PACKAGE-results."),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(min=0.1, help="Cancel the job after so many seconds."),
    ] = None,
    shared_storage_root: Annotated[
        Path | None,
        typer.Option(help="Where this machine mounts the shared storage."),
    ] = None,
    patience: Annotated[
        float,
        typer.Option(min=0, help="Seconds to try to open a lost connection again."),
    ] = client.PATIENCE,
    lanes: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MAX_LANES,
            help="Connections for a large transfer; default: as many as pay here.",
        ),
    ] = None,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh", help="Begin a new job, also if one was begun with this package."
        ),
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a line instead.")
    ] = False,
) -> None:
    """Run a package on a worker; Ctrl-C cancels it, a second one leaves at once."""
    with reported_errors(as_json=json):
        request = client.JobRequest(
            package=package,
            worker=worker,
            route=route.value,
            output=output,
            timeout=timeout,
            shared_storage_root=shared_storage_root,
            patience=patience,
            lanes=lanes,
            fresh=fresh,
        )
        watch = JsonWatch() if json else TerminalWatch()
        run(_send, request, watch)


async def _send(request: client.JobRequest, watch: Watch) -> None:
    cancel_asked = trio.Event()
    async with trio.open_nursery() as nursery:
        await nursery.start(_listen_for_interrupts, cancel_asked)
        with watch:
            result = await client.submit(request, watch, cancel_asked=cancel_asked)
        watch.summarize(result)
        nursery.cancel_scope.cancel(reason="the job has ended")


async def _listen_for_interrupts(
    cancel_asked: trio.Event,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Turn the first Ctrl-C into a wish, and the second into the end."""
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as arrived:
        task_status.started()
        async for _ in arrived:
            if cancel_asked.is_set():
                raise KeyboardInterrupt
            err.print(
                "Asking the worker to cancel; Ctrl-C again leaves without waiting."
            )
            cancel_asked.set()
