"""The session of one client with the worker: it finds the job and routes messages."""

from collections.abc import Callable
from typing import NoReturn, assert_never

import structlog
import trio

from sleap_rtc.io.link.link import Link, LinkClosedError
from sleap_rtc.proto import messages
from sleap_rtc.proto.errors import RemoteProtocolError
from sleap_rtc.proto.job.worker_table import WorkerState
from sleap_rtc.proto.transfer.machine import TransferMessage
from sleap_rtc.worker.client_link import ClientLink, open_client_link
from sleap_rtc.worker.jobs import Jobs

FLUSH_TIMEOUT = 1.0
"""Seconds that a link which ends may take to send its client the reason."""

CLOSE_TIMEOUT = 5.0
"""Seconds that closing a link may take."""


async def serve_link(
    jobs: Jobs,
    greet: Callable[[], messages.Greeting],
    link: Link[messages.ClientMessage],
) -> None:
    """Serve one client until its link ends.

    Args:
        jobs: All jobs of the worker.
        greet: Returns the worker's greeting.
        link: An authenticated link; it is closed at the end.
    """
    log = jobs.log.bind(address=link.statistics().address)
    log.info("client connected")
    reason = "the worker was stopped"
    try:
        async with open_client_link(link) as client:
            reason = await _Session(jobs, client, log).serve(greet())
    finally:
        with trio.move_on_after(CLOSE_TIMEOUT, shield=True):
            await link.aclose(reason)
        log.info("client gone", reason=reason)


class _Session:
    """Receives the messages of one client as long as its link lasts."""

    def __init__(
        self,
        jobs: Jobs,
        client: ClientLink,
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self._jobs = jobs
        self._client = client
        self._log = log
        self._job = jobs.begin(client)

    async def serve(self, greeting: messages.Greeting) -> str:
        """Serve the link; return why it ended."""
        reason = "the worker was stopped"
        try:
            self._client.outbox.put(messages.Hello(greeting))
            reason = await self._serve()
        finally:
            self._job.detach(self._client, reason)
        return reason

    async def _serve(self) -> str:
        try:
            with self._client.serving:
                await self._receive_messages()
            await self._flush()
        except LinkClosedError as error:
            return self._client.reason or error.reason
        except RemoteProtocolError as error:
            self._log.warning("client broke the protocol", reason=error.reason)
            self._client.outbox.put(messages.Error(error.reason))
            await self._flush()
            return error.reason
        return self._client.reason

    async def _flush(self) -> None:
        """Send the reason of the end, unless the client does not receive."""
        with trio.move_on_after(FLUSH_TIMEOUT):
            await self._client.outbox.flush()

    async def _receive_messages(self) -> NoReturn:
        """Receive messages until the link ends."""
        has_greeted = False
        while True:
            message = await self._client.link.receive_message()
            if isinstance(message, messages.Error):
                raise RemoteProtocolError(f"the client gave up: {message.reason}")
            if isinstance(message, messages.Hello) is has_greeted:
                raise RemoteProtocolError("HELLO must come first, and only once")
            has_greeted = True
            if isinstance(message, messages.Hello):
                pass  # it arrives at its place
            elif isinstance(message, TransferMessage):
                self._client.transfers.receive_message(message)
            elif isinstance(message, messages.JobResume):
                await self._resume(message)
            elif isinstance(message, messages.ClientJobMessage):
                self._job.receive_message(self._client, message)
            elif isinstance(message, messages.Auth | messages.Unknown):
                raise RemoteProtocolError(f"{type(message).__name__} is not expected")
            else:
                assert_never(message)

    async def _resume(self, message: messages.JobResume) -> None:
        """Attach to the job of an earlier link, or report that it is unknown."""
        if self._job.state is not WorkerState.NEW:
            raise RemoteProtocolError(
                "JOB_RESUME must be the first message about a job"
            )
        job = await self._jobs.attach(self._client, message)
        if job is None:
            self._client.outbox.put(messages.JobUnknown(message.job_id))
        else:
            # No await separates this from `attach`, so a lost link is not missed.
            self._job = job
            self._log.info("client came back", job=message.job_id)
