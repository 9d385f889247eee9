"""One client's link to the worker: finds its job, and brings it the messages."""

from collections.abc import Awaitable, Callable
from typing import NoReturn

import structlog
import trio

from sleap_rtc.io.link.link import Link, LinkClosedError
from sleap_rtc.io.link.outbox import Outbox
from sleap_rtc.io.nursery import open_background_nursery
from sleap_rtc.io.transfer.transfers import Transfers
from sleap_rtc.proto import messages as m
from sleap_rtc.proto.errors import RemoteProtocolError
from sleap_rtc.proto.job.worker_table import WorkerState
from sleap_rtc.worker.jobs import Job, JobsHome

FLUSH_TIMEOUT = 1.0
"""Seconds that a link which ends may take to send its client the reason."""

CLOSE_TIMEOUT = 5.0
"""Seconds that closing a link may take."""


async def serve_link(home: JobsHome, link: Link) -> None:
    """Serve one client until its link ends.

    Args:
        home: What all links share.
        link: An authenticated link; it is closed at the end.
    """
    log = home.log.bind(address=link.statistics().address)
    log.info("client connected")
    session = _Session(home, link, log)
    reason = "the worker was stopped"
    try:
        reason = await session.serve()
    finally:
        session.job.detach(session, reason)
        with trio.move_on_after(CLOSE_TIMEOUT, shield=True):
            await link.aclose(reason)
        log.info("client gone", reason=reason)


class _Session:
    """The link of one client, for as long as it lasts; see `JobLink`."""

    def __init__(
        self, home: JobsHome, link: Link, log: structlog.typing.FilteringBoundLogger
    ) -> None:
        self.outbox = Outbox(link)
        self.transfers = Transfers(link)
        self.job = Job(home)
        self.job.begin(self)
        self._home = home
        self._link = link
        self._log = log
        self._nursery: trio.Nursery | None = None
        self._serving = trio.CancelScope()
        self._reason = ""

    def start(self, effect: Callable[..., Awaitable[None]], *args: object) -> None:
        """Start an effect that ends with the link."""
        if self._nursery is not None:
            self._nursery.start_soon(effect, *args)

    def leave(self, reason: str) -> None:
        """End the link, and tell the client why, if it is still there."""
        self._reason = reason
        self.outbox.put(m.Error(reason))
        self._serving.cancel(reason=reason)

    async def serve(self) -> str:
        """Serve the link; returns why it ended."""
        async with open_background_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self.outbox.run)
            nursery.start_soon(self.transfers.run)
            self.outbox.put(m.Hello(self._home.greet()))
            try:
                with self._serving:
                    await self._receive_messages()
                await self._say_farewell()
            except LinkClosedError as error:
                self._reason = self._reason or error.reason
            except RemoteProtocolError as error:
                self._reason = error.reason
                self._log.warning("client broke the protocol", reason=error.reason)
                self.outbox.put(m.Error(error.reason))
                await self._say_farewell()
            finally:
                self._nursery = None
        return self._reason

    async def _say_farewell(self) -> None:
        """Let the client hear why the link ends."""
        with trio.move_on_after(FLUSH_TIMEOUT):
            await self.outbox.flush()

    async def _receive_messages(self) -> NoReturn:
        """Take messages until the link ends."""
        greeted = False
        while True:
            message = await self._link.receive_message()
            if isinstance(message, m.Error):
                raise RemoteProtocolError(f"the client gave up: {message.reason}")
            if isinstance(message, m.Hello) is greeted:
                raise RemoteProtocolError("one HELLO comes first, and only one")
            greeted = True
            if isinstance(message, m.Hello) or self.transfers.deliver_message(message):
                continue
            if isinstance(message, m.JobResume):
                await self._resume(message)
            elif not isinstance(message, m.ClientJobMessage):
                raise RemoteProtocolError(f"{type(message).__name__} is not expected")
            else:
                self._check_is_free(message)
                self.job.receive_message(self, message)

    async def _resume(self, message: m.JobResume) -> None:
        """Take up the job of an earlier link, or say that there is none."""
        if self.job.core.state is not WorkerState.NEW:
            raise RemoteProtocolError("JOB_RESUME comes before all else about a job")
        known = self._home.jobs.get(message.job_id)
        if known is not None:
            # Whatever happens to the link meanwhile, it is this job that it had.
            self.job = known
            if await known.attach(self, message):
                self._log.info("client came back", job=message.job_id)
                return
            self.job = Job(self._home)
            self.job.begin(self)
        self.outbox.put(m.JobUnknown(message.job_id))

    def _check_is_free(self, message: m.Message) -> None:
        """See that nobody begins a job anew that the worker has.

        JOB_SUBMIT is answered by the job itself.
        """
        if not isinstance(message, m.MountProbe | m.JobIdentity):
            return
        known = self._home.jobs.get(message.job_id)
        if known is not None and known is not self.job and known.core.can_resume:
            raise RemoteProtocolError(f"{message.job_id} is known; it can be resumed")
