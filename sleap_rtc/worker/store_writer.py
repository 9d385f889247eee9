"""Background writes to the store of jobs, for the event loop."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import structlog
import trio

from sleap_rtc.io.nursery import open_background_nursery
from sleap_rtc.io.storage.call import call_storage
from sleap_rtc.io.storage.folder import StorageError
from sleap_rtc.worker.job_store import (
    LIMITS,
    JobRecord,
    JobStore,
    StoreError,
    StoreLimits,
    open_store,
)


class StoreWriter:
    """Writes the records of jobs to a store in the background.

    A full or slow disk does not stop a job. If a job changes faster than the disk
    writes, only its latest record is kept, so memory stays bounded.

    Args:
        store: The store. It must stay open as long as `run` runs.
        log: The log for failures.
        limits: The limits of the writer.
    """

    def __init__(
        self,
        store: JobStore,
        log: structlog.typing.FilteringBoundLogger,
        limits: StoreLimits = LIMITS,
    ) -> None:
        self._store = store
        self._log = log
        self._limits = limits
        self._waiting: dict[str, JobRecord | None] = {}
        self._changed = trio.Event()
        self._logged: set[str] = set()
        self._limiter = trio.CapacityLimiter(1)

    def put(self, record: JobRecord) -> None:
        """Queue the record of a job for writing; failed writes are retried as well."""
        self._waiting[record.job_id] = record
        self._changed.set()

    def remove(self, job_id: str) -> None:
        """Queue a job for removal; failed writes are retried as well."""
        self._waiting[job_id] = None
        self._changed.set()

    async def run(self) -> None:
        """Write until cancelled. Then the rest is written within some seconds."""
        try:
            while True:
                await self._changed.wait()
                self._changed = trio.Event()
                await self._write_waiting()
        finally:
            with trio.move_on_after(self._limits.flush_timeout, shield=True):
                await self._write_waiting()
            if self._waiting:
                self._log.warning("jobs not stored", jobs=list(self._waiting))

    async def _write_waiting(self) -> None:
        """Write each record once; a failed or interrupted one stays in the queue."""
        for job_id, record in list(self._waiting.items()):
            try:
                # An abandoned thread ends by itself. The next one waits for it, and
                # writing a record twice does no harm.
                await trio.to_thread.run_sync(
                    self._write,
                    job_id,
                    record,
                    abandon_on_cancel=True,
                    limiter=self._limiter,
                )
            except StoreError as error:
                self._log_once(error)
            else:
                if self._waiting[job_id] is record:  # it is still the latest
                    del self._waiting[job_id]
        if not self._waiting:
            self._logged.clear()

    def _write(self, job_id: str, record: JobRecord | None) -> None:
        if record is None:
            self._store.remove(job_id)
        else:
            self._store.save(record)

    def _log_once(self, error: StoreError) -> None:
        """Log each kind of failure once until the store works again."""
        if error.kind not in self._logged:
            self._logged.add(error.kind)
            self._log.error("job not stored", reason=str(error))


@asynccontextmanager
async def open_store_writer(
    path: Path, log: structlog.typing.FilteringBoundLogger
) -> AsyncIterator[tuple[JobStore, StoreWriter]]:
    """Open the store, and write to it in the background while the body runs.

    Closing takes limited time, even on a disk that hangs.

    Args:
        path: The file of the store.
        log: The log for failures.

    Raises:
        StoreError: If the store cannot be opened.
    """
    store = await call_storage(open_store, path, discard=JobStore.close)
    try:
        async with open_background_nursery() as nursery:
            writer = StoreWriter(store, log)
            nursery.start_soon(writer.run)
            yield store, writer
    finally:
        try:
            await call_storage(store.close, timeout=LIMITS.close_timeout, shield=True)
        except (StoreError, StorageError) as error:
            log.warning("job store not closed", reason=str(error))
