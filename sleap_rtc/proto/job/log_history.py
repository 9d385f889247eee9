"""The last lines of the output of a job, for a client that resumes it."""

from collections.abc import Iterator

from sleap_rtc.proto.messages import JobLog

MAX_HISTORY = 2 * 1024 * 1024
"""Bytes of output that are kept for each job; a long training prints less."""

_LINE_OVERHEAD = 200
"""Bytes that a line costs beside its text, so that empty lines are limited."""


class LogHistory:
    """Keeps the last version of each line; the oldest are dropped beyond `MAX_HISTORY`.

    It serves a client that resumes its job: unlike the file of the worker's `JobLog` it
    has a limit and includes lines that may still be redrawn, and it keeps messages to
    send, not text to show as the terminal of the client does.
    """

    def __init__(self) -> None:
        self._size = 0
        self._by_line: dict[int, JobLog] = {}

    def add(self, message: JobLog) -> None:
        """Record a line in place of its earlier version."""
        earlier = self._by_line.pop(message.line, None)
        if earlier is not None:
            self._size -= _cost(earlier)
        self._by_line[message.line] = message
        self._size += _cost(message)
        while self._size > MAX_HISTORY:
            oldest = next(iter(self._by_line))
            self._size -= _cost(self._by_line.pop(oldest))

    def since(self, sequence: int) -> Iterator[JobLog]:
        """Return the messages from a sequence number on, in order."""
        return (each for each in self._by_line.values() if each.sequence >= sequence)


def _cost(message: JobLog) -> int:
    return len(message.text.encode()) + _LINE_OVERHEAD
