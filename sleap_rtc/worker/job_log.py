"""The output of a job as numbered lines: for its client, and in a file."""

import os
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TextIO

import trio

from sleap_rtc.io.alarm import Alarm
from sleap_rtc.io.nursery import open_background_nursery
from sleap_rtc.io.storage.call import call_storage
from sleap_rtc.io.storage.folder import StorageError, create_beneath
from sleap_rtc.proto.errors import InvalidInput
from sleap_rtc.proto.job.lines import LineAssembler, LineEvent

LOG_NAME = "job.log"
"""Name of the file with the last version of each line; it is one of the results."""

CLOSE_TIMEOUT = 3.0
"""Seconds for writing the rest of the file after the commands have ended."""

_WRITE_INTERVAL = 1.0
"""Seconds between two writes of the file: storage may be slow, and jobs print a lot."""


@asynccontextmanager
async def open_job_log(
    directory: Path, on_line: Callable[[LineEvent], None]
) -> AsyncIterator["JobLog"]:
    """Log the output of a job for as long as the body runs.

    At the end the rest is delivered and written, even if the task is cancelled; a disk
    that hangs delays the end for a limited time only.

    Args:
        directory: The job directory, where the file is created.
        on_line: Called with each line, and with each redraw of a line.
    """
    log = JobLog(directory, on_line)
    try:
        async with open_background_nursery() as nursery:
            nursery.start_soon(log.deliver_redraws)
            nursery.start_soon(log.write_regularly)
            yield log
    finally:
        await log.close()


class JobLog:
    """Cuts output into lines, delivers them, and writes those that are final.

    It is the source of all lines and keeps none that is written: `LogHistory` keeps the
    recent ones for a client that resumes its job.

    A full or slow disk does not stop the job: the client gets all lines in any case.
    Made by `open_job_log`.
    """

    def __init__(self, directory: Path, on_line: Callable[[LineEvent], None]) -> None:
        self._directory = directory
        self._on_line = on_line
        self._assembler = LineAssembler()
        self._alarm = Alarm()
        # A thread takes lines from the left while the event loop adds them.
        self._unwritten: deque[str] = deque()
        self._file: TextIO | None = None
        self._writing = threading.Lock()

    def note(self, text: str) -> None:
        """Add a line of the worker itself."""
        data = text.replace("\n", " ").encode() + b"\n"
        self._deliver(self._assembler.receive_data(data, trio.current_time()))

    async def add(self, data: bytes) -> None:
        """Add output of a command."""
        self._deliver(self._assembler.receive_data(data, trio.current_time()))
        await trio.lowlevel.checkpoint()

    def end_command(self) -> None:
        """Deliver the rest of a command's output; the next one starts a new line."""
        self._deliver(self._assembler.finish(trio.current_time()))

    async def deliver_redraws(self) -> None:
        """Deliver lines that are drawn again when they are due, until cancelled."""
        while True:
            await self._alarm.wait()
            self._deliver(self._assembler.handle_timeout(trio.current_time()))

    async def write_regularly(self) -> None:
        """Write final lines to the file, until cancelled."""
        while True:
            await trio.sleep(_WRITE_INTERVAL)
            await call_storage(self._write)

    async def close(self) -> None:
        """Write the rest, even in a cancelled task, unless it takes too long."""
        self.end_command()
        try:
            await call_storage(
                self._write_and_close, timeout=CLOSE_TIMEOUT, shield=True
            )
        except StorageError:
            pass  # the client has all lines

    def _deliver(self, events: list[LineEvent]) -> None:
        for event in events:
            self._on_line(event)
        self._unwritten.extend([f"{text}\n" for text in self._assembler.take_final()])
        self._alarm.set(self._assembler.deadline())

    # ---------------------------------------------------------------------- in threads

    def _write(self) -> None:
        with self._writing:  # wait for an abandoned thread
            unwritten = self._unwritten
            lines = [unwritten.popleft() for _ in range(len(unwritten))]
            try:
                if self._file is None:
                    fd = create_beneath(self._directory, LOG_NAME)
                    self._file = os.fdopen(fd, "w", encoding="utf-8")
                self._file.writelines(lines)
                self._file.flush()
            except (OSError, StorageError, InvalidInput):
                return  # the client has these lines

    def _write_and_close(self) -> None:
        self._write()
        with self._writing:
            try:
                if self._file is not None:
                    self._file.close()
            except OSError:
                return  # closing retries a failed write
