"""An orderly end on signals."""

import signal

import structlog
import trio


async def end_on_signal(
    scope: trio.CancelScope,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Cancel a scope on Ctrl-C and on SIGTERM.

    Args:
        scope: The scope.
        task_status: Started as soon as the signals no longer kill the process.
    """
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as arrived:
        task_status.started()
        async for number in arrived:
            structlog.get_logger().info("ending", signal=signal.Signals(number).name)
            scope.cancel(reason="a signal asked for the end")
