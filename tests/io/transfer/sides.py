"""Two peers that share a link, and a file that one of them sends to the other."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import trio

from sleap_rtc.io.link.link import Link, LinkClosedError
from sleap_rtc.io.nursery import open_background_nursery
from sleap_rtc.io.storage.folder import open_owned
from sleap_rtc.io.transfer.chunk_files import ChunkReader, ChunkWriter
from sleap_rtc.io.transfer.transfers import TransferError, Transfers
from sleap_rtc.proto.messages import FileOffer, Message, OfferedFile
from sleap_rtc.proto.transfer.machine import TransferMessage
from tests.io.link.memory import MemoryLink

CHUNK_SIZE = 64 * 1024
DEADLINE = 60.0


class Side:
    """One peer: its end of a link, its transfers, and the other messages it got."""

    def __init__(self, link: Link[Message]) -> None:
        self.link = link
        self.transfers = Transfers(link)
        self.is_hostile = False  # if True, the test answers the messages
        self._other_messages, self.other_messages = trio.open_memory_channel[Message](
            100
        )

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.transfers.run)
            try:
                while True:
                    message = await self.link.receive_message()
                    if isinstance(message, TransferMessage) and not self.is_hostile:
                        self.transfers.receive_message(message)
                    else:
                        self._other_messages.send_nowait(message)
            except LinkClosedError:
                pass

    @property
    def link_is_cut(self) -> bool:
        assert isinstance(self.link, MemoryLink)
        return self.link.is_cut

    async def next_message(self) -> Message:
        return await self.other_messages.receive()

    async def next_offer(self) -> FileOffer:
        message = await self.next_message()
        assert isinstance(message, FileOffer)
        return message


@asynccontextmanager
async def two_sides() -> AsyncIterator[tuple[Side, Side]]:
    with trio.fail_after(DEADLINE):
        async with open_background_nursery() as nursery:
            sides = [Side(link) for link in MemoryLink.pair()]
            for side in sides:
                nursery.start_soon(side.run)
            yield sides[0], sides[1]


class Job:
    """A source file, and the directory in which it arrives."""

    def __init__(self, folder: Path, size: int, name: str = "job.zip") -> None:
        self.content = Random(size).randbytes(size)
        self.source_path = folder / "source" / name
        self.source_path.parent.mkdir(exist_ok=True)
        self.source_path.write_bytes(self.content)
        self.root = folder / "root"
        self.root.mkdir(exist_ok=True)
        self.offer = OfferedFile(name=name, size=size, chunk_size=CHUNK_SIZE)
        self.sent = 0
        self.stored = 0
        self.path: Path | None = None
        self.errors: dict[str, Exception] = {}

    def sink(self) -> ChunkWriter:
        size = self.offer.size
        return ChunkWriter.open(
            self.root, self.offer.name, size=size, chunk_size=CHUNK_SIZE
        )

    async def send(self, side: Side, transfer_id: int = 1) -> None:
        source = ChunkReader(open_owned(self.source_path), chunk_size=CHUNK_SIZE)
        try:
            await side.transfers.send_file(
                transfer_id, self.offer, source, on_progress=self._note_sent
            )
        except (TransferError, LinkClosedError) as error:
            self.errors["sender"] = error
        finally:
            source.close()

    async def receive(
        self,
        side: Side,
        transfer_id: int = 1,
        sink: ChunkWriter | None = None,
    ) -> None:
        try:
            self.path = await side.transfers.receive_file(
                transfer_id,
                sink or self.sink(),
                on_progress=self._note_stored,
            )
        except (TransferError, LinkClosedError) as error:
            self.errors["receiver"] = error

    def _note_sent(self, size: int) -> None:
        assert self.sent < size
        self.sent = size

    def _note_stored(self, size: int) -> None:
        assert self.stored < size
        self.stored = size

    def check_arrived(self) -> None:
        assert not self.errors
        assert self.path == self.root / self.offer.name
        assert self.path.read_bytes() == self.content
        assert self.stored == self.sent == self.offer.size

    def check_nothing_left(self) -> None:
        assert list(self.root.iterdir()) == []

    def check_kept(self) -> None:
        assert sorted(path.name for path in self.root.iterdir()) == [
            f".{self.offer.name}.map",
            f".{self.offer.name}.part",
        ]

    def reason(self, side: str) -> str:
        error = self.errors[side]
        assert isinstance(error, TransferError)
        return error.reason


async def send_and_receive(job: Job, sender: Side, receiver: Side) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(job.send, sender)
        offer = await receiver.next_offer()
        assert offer == FileOffer(1, job.offer)
        nursery.start_soon(job.receive, receiver)
