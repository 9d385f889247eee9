"""The code of ``send``: it submits a package, shows its job, and handles Ctrl-C."""

import signal
from contextlib import closing

import trio

from sleap_rtc import client
from sleap_rtc.cli.console import err
from sleap_rtc.cli.running import run
from sleap_rtc.cli.watch import JsonWatch, TerminalWatch, Watch


def send_package(request: client.JobRequest, *, as_json: bool) -> None:
    """Run a package on a worker, and print what happens.

    Args:
        request: The package, and how to run it.
        as_json: Print JSON lines instead of text for people.
    """
    run(_send, request, JsonWatch() if as_json else TerminalWatch())


async def _send(request: client.JobRequest, watch: Watch) -> None:
    cancel_asked = trio.Event()
    async with trio.open_nursery() as nursery:
        await nursery.start(listen_for_interrupts, cancel_asked)
        with closing(watch):
            result = await client.submit(request, watch, cancel_asked=cancel_asked)
        watch.summarize(result)
        nursery.cancel_scope.cancel(reason="the job has ended")


async def listen_for_interrupts(
    cancel_asked: trio.Event,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Ask for the end of the job at the first Ctrl-C, and raise at the second."""
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as arrived:
        task_status.started()
        async for _ in arrived:
            if cancel_asked.is_set():
                raise KeyboardInterrupt
            err.print(
                "Asking the worker to cancel; Ctrl-C again exits without waiting."
            )
            cancel_asked.set()
