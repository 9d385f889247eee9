"""The end that a signal asks for."""

import signal

import structlog
import trio


async def end_on_signal(
    scope: trio.CancelScope,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """End in order on Ctrl-C and on SIGTERM.

    Args:
        scope: Cancelled when one of them comes.
        task_status: Told as soon as none of them kills the process any more.
    """
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as arrived:
        task_status.started()
        async for number in arrived:
            structlog.get_logger().info("ending", signal=signal.Signals(number).name)
            scope.cancel(reason="a signal asked for the end")
