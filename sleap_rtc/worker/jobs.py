"""The jobs of a worker: each outlives the links of its client, and a restart."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import structlog
import trio

from sleap_rtc.io.nursery import open_background_nursery
from sleap_rtc.proto import messages
from sleap_rtc.proto.job.worker import WorkerJob
from sleap_rtc.worker.client_link import ClientLink
from sleap_rtc.worker.job import Job, JobContext, JobSettings
from sleap_rtc.worker.job_storage import is_package_there, results_left
from sleap_rtc.worker.job_store import JobRecord
from sleap_rtc.worker.slots import SlotQueue
from sleap_rtc.worker.store_writer import StoreWriter

KEEP_PARTS = 3 * 24 * 3600.0
"""Seconds that part of a package waits for its client: a long weekend."""

SWEEP_INTERVAL = 3600.0
"""Seconds between two searches for parts whose client has not come back."""


@asynccontextmanager
async def open_jobs(
    settings: JobSettings,
    queue: SlotQueue,
    store: StoreWriter,
    log: structlog.typing.FilteringBoundLogger,
) -> AsyncIterator["Jobs"]:
    """Own jobs for as long as the body runs; then their runs are cancelled.

    Args:
        settings: The decisions of the worker's owner.
        queue: The slots.
        store: Stores each change of a job.
        log: The worker's log.
    """
    async with open_background_nursery() as nursery:
        jobs = Jobs(JobContext(settings, queue, store, nursery, log, {}))
        nursery.start_soon(jobs.sweep)
        yield jobs


class Jobs:
    """All jobs of a worker; made by `open_jobs`.

    Each link begins with a new job that has no id yet.

    Args:
        context: The part of the worker that the jobs share.
    """

    def __init__(self, context: JobContext) -> None:
        self.log = context.log
        self._context = context
        self._by_id = context.by_id

    def __len__(self) -> int:
        return len(self._by_id)

    def get(self, job_id: str) -> Job | None:
        """Return the job of an id."""
        return self._by_id.get(job_id)

    def begin(self, link: ClientLink) -> Job:
        """Return a new job for a client that has not named one."""
        return Job(self._context, WorkerJob(), link=link)

    async def attach(self, link: ClientLink, request: messages.JobResume) -> Job | None:
        """Return the job that a client resumes, which then uses only this link.

        Returns:
            None if the worker has no such job.
        """
        job = self._by_id.get(request.job_id)
        if job is None or not await job.attach(link, request):
            return None
        return job

    async def restore(self, records: list[JobRecord]) -> None:
        """Continue the jobs that an earlier process of this worker has stored."""
        for record in records:
            job = await self._restored(record)
            self._by_id[record.job_id] = job
            self.log.info("job restored", job=record.job_id, state=job.progress.state)
            job.drain()

    async def _restored(self, record: JobRecord) -> Job:
        progress = messages.JobProgress(record.state, 0, record.detail)
        results: dict[str, int] = {}
        directory = Path(record.directory)
        if record.route == "channel":  # the state directory may have moved
            directory = self._context.settings.directory / record.job_id
        if record.state == "RECEIVING" and await is_package_there(
            directory, record.package, record.size
        ):
            progress = messages.JobProgress("QUEUED")
        if record.state == "RUNNING":
            results = await results_left(directory, record.output_path)
        machine = WorkerJob.restored(
            record.job_id,
            record.route,
            messages.Submission(record.package, record.size),
            progress,
            results=results or record.results,
            output_path=record.output_path,
        )
        return Job(self._context, machine, directory=directory, updated=record.updated)

    async def sweep(self) -> None:
        """Discard parts of packages whose client stays away too long, until cancelled.

        The first search comes after a pause, in which clients can return after a
        restart of the worker.
        """
        while True:
            await trio.sleep(SWEEP_INTERVAL)
            for job in tuple(self._by_id.values()):
                job.discard_if_older(time.time() - KEEP_PARTS)
