"""The send queue of a link: ordered, bounded in memory, never blocking."""

import trio

from sleap_rtc.io.link.link import Link, LinkClosedError
from sleap_rtc.proto.messages import JobLog, Message

MAX_WAITING_LINES = 5000
"""Messages in the queue for a slow peer, about a megabyte of output. Beyond that the
older half of the lines is left out of the live view; the job's log file has it."""


class Outbox:
    """Messages for one peer, sent by one task.

    `put` never waits: a job must not stop because the laptop that watches it sleeps.

    Args:
        link: The link to send them on.
    """

    def __init__(self, link: Link[Message]) -> None:
        self._link = link
        self._waiting: list[Message] = []
        self._changed = trio.Event()
        self._idle = trio.Event()
        self._idle.set()

    def put(self, message: Message) -> None:
        """Queue a message after all earlier ones."""
        if isinstance(message, JobLog) and len(self._waiting) >= MAX_WAITING_LINES:
            self._leave_lines_out()
        self._waiting.append(message)
        self._idle = trio.Event() if self._idle.is_set() else self._idle
        self._changed.set()

    def _leave_lines_out(self) -> None:
        """Remove the older half of the lines, so that a slow peer sees the newest."""
        half = len(self._waiting) // 2
        older = [m for m in self._waiting[:half] if not isinstance(m, JobLog)]
        self._waiting[:half] = older

    async def flush(self) -> None:
        """Wait until every queued message has been handed to the link."""
        await self._idle.wait()

    async def run(self) -> None:
        """Send queued messages until cancelled, or until the link is gone."""
        try:
            while True:
                await self._changed.wait()
                self._changed = trio.Event()
                messages, self._waiting = self._waiting, []
                for message in messages:
                    await self._link.send_message(message)
                if not self._waiting:
                    self._idle.set()
        except LinkClosedError:
            return  # the task that receives from the link handles its end
        finally:
            self._idle.set()
