"""What a worker thread asks of the task that it works for."""

import trio


def stop_if_cancelled() -> bool:
    """Let a thread notice that its task is cancelled; for arguments ``cancelled``.

    Returns:
        False: there is no reason to stop.

    Raises:
        trio.Cancelled: If the task is; it ends the thread's work, too.
    """
    trio.from_thread.check_cancelled()
    return False
