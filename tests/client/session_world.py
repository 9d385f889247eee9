"""A client's session, run by a test over links in memory."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from random import Random

import trio

from sleap_rtc.client.events import SessionEvent
from sleap_rtc.client.reach import WorkerGoneError
from sleap_rtc.client.session import OpenLink, Plan, run_session
from sleap_rtc.io.link.link import Link
from sleap_rtc.proto import messages
from sleap_rtc.proto.job.client_outputs import JobEnded
from tests.client.scripted import ScriptedWorker, scripted_worker
from tests.io.link.memory import MemoryLink

JOB = "job_0123abcd"
PATIENCE = 60.0
CONTENT = Random(1).randbytes(3 * 1024 * 1024 + 1)

Script = Callable[[ScriptedWorker], Awaitable[None]]


class Client:
    """Runs a job; records its events and the number of attempts to reconnect."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.events: list[SessionEvent] = []
        self.cancel_asked = trio.Event()
        self.attempts = 0

    async def run(self, *scripts: Script) -> JobEnded:
        """Run the job; each script is the worker's end of one link."""
        remaining = iter(scripts)

        @asynccontextmanager
        async def open_link() -> AsyncIterator[Link[messages.WorkerMessage]]:
            script = next(remaining, None)
            if script is None:
                raise WorkerGoneError("There is no worker.")
            mine, its = MemoryLink.pair()
            async with scripted_worker(its) as worker, trio.open_nursery() as nursery:
                nursery.start_soon(script, worker)
                yield mine
                mine.cut("the client closed the link")

        def open_again() -> AbstractAsyncContextManager[Link[messages.WorkerMessage]]:
            self.attempts += 1
            return open_link()

        async with open_link() as first:
            return await self.run_on(first, open_again)

    async def run_on(
        self, link: Link[messages.WorkerMessage], open_again: OpenLink
    ) -> JobEnded:
        return await run_session(
            self.plan,
            link,
            open_again,
            greeting=messages.Greeting(messages.PROTOCOL_VERSION, "1.0", "client"),
            on_event=self.events.append,
            cancel_asked=self.cancel_asked,
        )

    def of(self, kind: type[SessionEvent]) -> list[SessionEvent]:
        return [event for event in self.events if isinstance(event, kind)]


def same_content(one: Path, other: Path) -> bool:
    return one.read_bytes() == other.read_bytes()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())
