"""The jobs of a worker, and clients with links to them, in one process."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import structlog
import trio
import trio.testing

from sleap_rtc.io.nursery import open_background_nursery
from sleap_rtc.proto import messages
from sleap_rtc.proto.job.worker_table import WorkerState
from sleap_rtc.worker.job import Job, JobSettings
from sleap_rtc.worker.job_store import JobRecord, JobStore
from sleap_rtc.worker.jobs import Jobs, open_jobs
from sleap_rtc.worker.session import serve_link
from sleap_rtc.worker.slots import SlotQueue
from sleap_rtc.worker.store_writer import open_store_writer
from tests.io.link.memory import MemoryLink

T = TypeVar("T", bound=messages.Message)

DEADLINE = 60.0
JOB = "job_0123abcd"
SIZE = 3 * 1024 * 1024
SUBMIT = messages.JobSubmit(JOB, messages.Submission("job.zip", SIZE))
RESUME = messages.JobResume(JOB, messages.ResumePoint())
OFFER = messages.FileOffer(0, messages.OfferedFile("job.zip", SIZE, 1024 * 1024))


class Client:
    """The other end of a worker's link."""

    def __init__(self, link: MemoryLink[messages.WorkerMessage]) -> None:
        self.link = link

    async def send(self, *batch: messages.Message) -> None:
        for message in batch:
            await self.link.send_message(message)

    async def expect(self, kind: type[T]) -> T:
        """Return the next message of a kind, and skip all others."""
        while True:
            message = await self.link.receive_message()
            if isinstance(message, kind):
                return message


class World:
    """The jobs of a worker, and a way to open links to them."""

    def __init__(
        self, jobs: Jobs, directory: Path, store: JobStore, nursery: trio.Nursery
    ) -> None:
        self.jobs = jobs
        self.directory = directory
        self.store = store
        self._nursery = nursery

    def serve(self, link: MemoryLink[messages.ClientMessage]) -> None:
        self._nursery.start_soon(serve_link, self.jobs, greeting, link)

    def open_silent_link(self) -> Client:
        """Open a link without a greeting."""
        mine, its = MemoryLink.pair()
        self.serve(its)
        return Client(mine)

    async def connect(self) -> Client:
        """Open a link, and greet."""
        client = self.open_silent_link()
        await client.send(messages.Hello(greeting()))
        return client

    async def begin(self) -> Client:
        """Open a link, and submit the job over it."""
        client = await self.connect()
        await client.send(SUBMIT)
        await client.expect(messages.JobAccepted)
        return client

    async def resume(self) -> Client:
        """Open a link, and resume the job over it."""
        client = await self.connect()
        await client.send(RESUME)
        await client.expect(messages.ResumeAccepted)
        return client

    def job(self, job_id: str = JOB) -> Job:
        job = self.jobs.get(job_id)
        assert job is not None
        return job

    def state(self) -> WorkerState:
        return self.job().state


async def until(condition: Callable[[], bool]) -> None:
    """Wait until worker threads have made a condition true."""
    while not condition():
        await trio.lowlevel.checkpoint()


def greeting() -> messages.Greeting:
    return messages.Greeting(messages.PROTOCOL_VERSION, "1.0", "client")


@asynccontextmanager
async def open_world(
    tmp_path: Path, shared_root: Path | None = None
) -> AsyncIterator[World]:
    log = structlog.get_logger()
    directory = tmp_path / "jobs"
    settings = JobSettings("worker-test", directory, shared_root, frozenset())
    with trio.fail_after(DEADLINE):
        async with (
            open_store_writer(tmp_path / "store", log) as (store, writer),
            open_jobs(settings, SlotQueue(1), writer, log) as jobs,
            open_background_nursery() as nursery,
        ):
            yield World(jobs, directory, store, nursery)


def record(
    state: messages.JobStateName,
    updated: float,
    directory: Path,
    *,
    results: dict[str, int] | None = None,
) -> JobRecord:
    return JobRecord(
        job_id=JOB,
        worker_id="worker-test",
        route="channel",
        directory=str(directory),
        package="job.zip",
        size=SIZE,
        state=state,
        detail="",
        output_path="models",
        results=results or {},
        updated=updated,
    )
