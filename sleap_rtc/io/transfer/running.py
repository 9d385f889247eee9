"""One file on its way over a link: a task that runs the effects of its machine."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, assert_never

import trio
from typing_extensions import override

from sleap_rtc.io.link.link import Link, LinkClosedError
from sleap_rtc.io.storage.call import call_storage
from sleap_rtc.io.storage.files import Buffer
from sleap_rtc.io.storage.folder import StorageError
from sleap_rtc.proto.messages import FileOffer, Message, OfferedFile
from sleap_rtc.proto.transfer.chunk_map import ChunkMap
from sleap_rtc.proto.transfer.frames import ChunkHeader, Frame
from sleap_rtc.proto.transfer.machine import (
    HashMissing,
    Publish,
    ReadAndSend,
    SendMessage,
    Store,
    TransferDone,
    TransferFailed,
    TransferMessage,
)
from sleap_rtc.proto.transfer.receiver import Receiver, ReceiverState
from sleap_rtc.proto.transfer.sender import Sender

Progress = Callable[[int], None]

WRITERS = 2
"""Threads that hash and write chunks of one file: one may wait for the disk."""

CLOSE_TIMEOUT = 2.0
"""Seconds in which a cancelled transfer tries to inform the peer."""

PUBLISH_GRACE_TIMEOUT = 10.0
"""Seconds that a cancelled transfer waits for a whole file to get its name: disks may
have much to write first."""


class TransferError(Exception):
    """A file did not arrive, although the link is open.

    Args:
        reason: The cause, for people. It may be a text of the peer.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


Outcome = TransferDone | TransferError | LinkClosedError
"""The end of a transfer."""


class ChunkSource(Protocol):
    """Source of a file that is sent; worker threads call it, several at once.

    Its methods raise `StorageError` if the storage failed.
    """

    def read(self, index: int) -> tuple[Buffer, bytes]:
        """Return a chunk and its BLAKE3 hash."""

    def check_unchanged(self) -> bool:
        """Return True if the file is as it was when it was opened."""


class ChunkSink(Protocol):
    """Target of a file that arrives; worker threads call it, several at once.

    Its methods raise `StorageError` if the storage failed.
    """

    chunk_map: ChunkMap
    """The stored chunks. The transfer owns the map and adds those that it stores."""

    def write(self, index: int, payload: Buffer, digest: bytes) -> bool:
        """Write a chunk; return False if its hash does not match."""

    def publish(self) -> Path:
        """Publish the whole file under its name, and return its path."""

    def keep(self) -> None:
        """Keep the chunks for a later transfer, unless the file was published."""

    def abandon(self) -> None:
        """Remove the written chunks, unless the file was published."""


class RunningTransfer(ABC):
    """One transfer: its inputs never wait, and one task runs its effects."""

    def __init__(
        self,
        link: Link[Message],
        machine: Receiver | Sender,
        on_progress: Progress,
    ) -> None:
        self._link = link
        self._machine = machine
        self._on_progress = on_progress
        self._reported = 0
        self._outcome: Outcome | None = None  # None while it runs
        self._woken = trio.Event()

    def receive_message(self, message: TransferMessage) -> None:
        """Handle a control message of this transfer."""
        self._machine.receive_message(message, trio.current_time())
        self._woken.set()

    @abstractmethod
    def receive_frame(self, frame: Frame) -> None:
        """Handle a bulk frame of this transfer."""

    def link_lost(self, error: LinkClosedError) -> None:
        """End the transfer because the link ended."""
        self._finish(error)

    def _finish(self, outcome: Outcome) -> None:
        """Record how the transfer ended; only the first outcome counts."""
        if self._outcome is None:
            self._outcome = outcome
        self._woken.set()

    def _report(self, size: int) -> None:
        if size > self._reported:  # a chunk may be sent twice, or stored too late
            self._reported = size
            self._on_progress(size)

    async def _run(self) -> None:
        """Run the effects of the machine until the transfer has ended."""
        try:
            async with trio.open_nursery() as nursery:
                while self._outcome is None:
                    await self._step(nursery)
                nursery.cancel_scope.cancel()
        finally:
            if self._outcome is None:
                await self._cancel()
        if isinstance(self._outcome, Exception):
            raise self._outcome

    async def _step(self, nursery: trio.Nursery) -> None:
        """Run one effect, or wait for the input that brings the next."""
        try:
            if not await self._run_next(nursery):
                self._woken = trio.Event()
                await self._woken.wait()
        except LinkClosedError as error:
            self.link_lost(error)

    @abstractmethod
    async def _run_next(self, nursery: trio.Nursery) -> bool:
        """Run the next output of the machine; return False if none is left."""

    async def _cancel(self) -> None:
        """Send FILE_ERROR to the peer, for at most `CLOSE_TIMEOUT`."""
        self._machine.cancel("the other side cancelled the transfer")
        with trio.move_on_after(CLOSE_TIMEOUT, shield=True):
            while (output := self._machine.next_output()) is not None:
                if isinstance(output, SendMessage):
                    try:
                        await self._link.send_message(output.message)
                    except LinkClosedError:
                        return


class ReceivingFile(RunningTransfer):
    """One file that is received."""

    def __init__(
        self,
        link: Link[Message],
        receiver: Receiver,
        sink: ChunkSink,
        on_progress: Progress,
    ) -> None:
        super().__init__(link, receiver, on_progress)
        self._receiver = receiver
        self._sink = sink
        self._payloads: dict[int, Buffer] = {}
        self._writers = trio.CapacityLimiter(WRITERS)
        self._path = Path()

    async def receive(self) -> Path:
        """Receive the whole file, and return its path."""
        self._report(self._receiver.chunk_map.bytes_there)
        await self._run()
        return self._path

    @override
    def receive_frame(self, frame: Frame) -> None:
        """Store a chunk if the machine expects it."""
        if self._receiver.chunk_arrived(frame.header):
            self._payloads[frame.header.index] = frame.payload
        self._woken.set()

    @override
    def link_lost(self, error: LinkClosedError) -> None:
        # The file is whole once it is published: then the link no longer matters.
        if self._receiver.state is not ReceiverState.PUBLISHING:
            super().link_lost(error)

    @override
    async def _run_next(self, nursery: trio.Nursery) -> bool:
        match self._receiver.next_output():
            case None:
                return False
            case SendMessage(message=message):
                await self._link.send_message(message)
            case Store(index=index, digest=digest):
                payload = self._payloads.pop(index)
                nursery.start_soon(self._store, index, payload, digest)
            case Publish():
                await self._publish()
            case TransferDone() as done:
                self._finish(done)
            case TransferFailed(reason=reason):
                self._finish(TransferError(reason))
            case output:
                assert_never(output)
        return True

    async def _store(self, index: int, payload: Buffer, digest: bytes) -> None:
        try:
            is_good = await call_storage(
                self._sink.write, index, payload, digest, limiter=self._writers
            )
        except StorageError as error:
            self._receiver.cancel(str(error))
        else:
            if is_good:
                self._receiver.chunk_stored(index)
                self._report(self._receiver.chunk_map.bytes_there)
            else:
                self._receiver.chunk_damaged(index)
        self._woken.set()

    async def _publish(self) -> None:
        try:
            self._path = await call_storage(
                self._sink.publish, grace=PUBLISH_GRACE_TIMEOUT
            )
        except StorageError as error:
            self._receiver.cancel(str(error))
        else:
            self._receiver.published()


class SendingFile(RunningTransfer):
    """One file that is sent."""

    def __init__(
        self,
        link: Link[Message],
        sender: Sender,
        source: ChunkSource,
        on_progress: Progress,
    ) -> None:
        super().__init__(link, sender, on_progress)
        self._sender = sender
        self._source = source

    async def send(self, offer: OfferedFile) -> None:
        """Offer the file, and serve the receiver until it has verified the file."""
        await self._link.send_message(FileOffer(self._sender.transfer_id, offer))
        await self._run()

    @override
    def receive_frame(self, frame: Frame) -> None:
        """Ignore a frame: the peer is the receiver."""

    @override
    async def _run_next(self, nursery: trio.Nursery) -> bool:
        match self._sender.next_output():
            case None:
                return False
            case SendMessage(message=message):
                await self._link.send_message(message)
            case ReadAndSend(index=index):
                nursery.start_soon(self._send_chunk, index)
            case HashMissing(first=first, count=count):
                nursery.start_soon(self._hash, range(first, first + count))
            case TransferDone() as done:
                self._finish(done)
            case TransferFailed(reason=reason):
                self._finish(TransferError(reason))
            case output:
                assert_never(output)
        return True

    async def _send_chunk(self, index: int) -> None:
        try:
            chunk = await call_storage(self._read, index)
            if chunk is None:
                self._sender.source_changed()
            else:
                payload, digest = chunk
                header = ChunkHeader(
                    self._sender.transfer_id, index, len(payload), digest
                )
                await self._link.send_frame(Frame(header, payload))
                if self._outcome is None:
                    self._sender.chunk_sent(index, digest)
                    self._report(self._sender.bytes_known)
        except StorageError as error:
            self._sender.cancel(str(error))
        except LinkClosedError as error:
            self.link_lost(error)
        self._woken.set()

    async def _hash(self, indexes: range) -> None:
        try:
            digests = await call_storage(self._read_hashes, indexes)
        except StorageError as error:
            self._sender.cancel(str(error))
        else:
            if len(digests) < len(indexes):
                self._sender.source_changed()
            elif self._outcome is None:
                self._sender.hashes_read(digests)
                self._report(self._sender.bytes_known)
        self._woken.set()

    def _read(self, index: int) -> tuple[Buffer, bytes] | None:
        """Read a chunk; None if the file is no longer the one that was offered."""
        chunk = self._source.read(index)
        return chunk if self._source.check_unchanged() else None

    def _read_hashes(self, indexes: range) -> list[bytes]:
        """Hash chunks; fewer if the file is no longer the offered one."""
        digests = []
        for index in indexes:
            chunk = self._read(index)
            if chunk is None:
                break
            digests.append(chunk[1])
        return digests
