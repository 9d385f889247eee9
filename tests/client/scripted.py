"""A worker that its test scripts, over any kind of link."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import TypeVar

import trio

from sleap_rtc.io.link.link import Link, LinkClosedError
from sleap_rtc.io.nursery import open_background_nursery
from sleap_rtc.io.storage.folder import open_owned
from sleap_rtc.io.transfer.chunk_files import ChunkReader, ChunkWriter
from sleap_rtc.io.transfer.transfers import Transfers
from sleap_rtc.proto import messages
from sleap_rtc.proto.transfer.machine import TransferMessage

T = TypeVar("T", bound=messages.Message)

CHUNK_SIZE = 4096


class ScriptedWorker:
    """The worker's end of a link: real transfers, and messages that the test sends."""

    def __init__(self, link: Link[messages.ClientMessage]) -> None:
        self.link = link
        self.transfers = Transfers(link)
        self._put, self._got = trio.open_memory_channel[messages.Message](1000)

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.transfers.run)
            try:
                while True:
                    message = await self.link.receive_message()
                    if isinstance(message, TransferMessage):
                        self.transfers.receive_message(message)
                    else:
                        self._put.send_nowait(message)
            except LinkClosedError:
                self._put.close()

    async def send(self, *batch: messages.Message) -> None:
        for message in batch:
            await self.link.send_message(message)

    async def expect(self, kind: type[T]) -> T:
        """Wait for the next message, which has to be of this kind."""
        message = await self._got.receive()
        assert isinstance(message, kind), message
        return message

    async def wait_closed(self) -> list[messages.Message]:
        """Wait until the client has closed the link; return the last messages."""
        return [message async for message in self._got]

    def waiting(self) -> int:
        """Return the number of messages that the test has not read."""
        return self._got.statistics().current_buffer_used

    async def greet(self, *, shared: bool = False) -> messages.Greeting:
        hello = await self.expect(messages.Hello)
        greeting = messages.Greeting(
            messages.PROTOCOL_VERSION, "1.0", "worker", shared_storage=shared
        )
        await self.send(messages.Hello(greeting))
        return hello.greeting

    async def accept(self) -> str:
        """Accept a submission; return the job id."""
        job_id = (await self.expect(messages.JobSubmit)).job_id
        await self.send(messages.JobAccepted(job_id))
        return job_id

    async def receive_package(self, folder: Path) -> Path:
        offer = await self.expect(messages.FileOffer)
        sink = await trio.to_thread.run_sync(
            lambda: ChunkWriter.open(
                folder,
                offer.file.name,
                size=offer.file.size,
                chunk_size=offer.file.chunk_size,
            )
        )
        return await self.transfers.receive_file(offer.transfer_id, sink)

    async def send_result(self, source: Path) -> None:
        """Answer one request for a result with this file."""
        await self.answer(await self.expect(messages.FileRequest), source)

    async def answer(self, request: messages.FileRequest, source: Path) -> None:
        offer = messages.OfferedFile(source.name, result_file(source).size, CHUNK_SIZE)
        with closing(ChunkReader(open_owned(source), chunk_size=CHUNK_SIZE)) as reader:
            await self.transfers.send_file(request.transfer_id, offer, reader)

    async def complete(self, job_id: str, *results: Path) -> None:
        """Report the results of a job and its end."""
        files = tuple(map(result_file, results))
        await self.send(
            messages.JobResults(job_id, messages.ResultPage(files)),
            messages.JobComplete(job_id, "models"),
        )


def result_file(path: Path) -> messages.ResultFile:
    return messages.ResultFile(path.name, path.stat().st_size)


@asynccontextmanager
async def scripted_worker(
    link: Link[messages.ClientMessage],
) -> AsyncIterator[ScriptedWorker]:
    """Run a worker for as long as the body runs."""
    async with open_background_nursery() as nursery:
        worker = ScriptedWorker(link)
        nursery.start_soon(worker.run)
        yield worker
