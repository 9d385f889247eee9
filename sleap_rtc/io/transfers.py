"""Files over a link: the chunks go from the storage to the network and back."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, assert_never

import trio

from sleap_rtc.io.folder import SharedStorageError
from sleap_rtc.io.link import Link, LinkClosedError
from sleap_rtc.proto.chunk_map import ChunkMap
from sleap_rtc.proto.errors import RemoteProtocolError
from sleap_rtc.proto.frames import ChunkHeader, Frame
from sleap_rtc.proto.messages import (
    ChunkGrant,
    FileError,
    FileOffer,
    FileReceived,
    Message,
    OfferedFile,
)
from sleap_rtc.proto.transfer import (
    Discard,
    HashMissing,
    Publish,
    ReadAndSend,
    SenderDone,
    SenderFailed,
    SendMessage,
    Store,
    TransferDone,
    TransferFailed,
    TransferMessage,
)
from sleap_rtc.proto.transfer_receiver import Receiver
from sleap_rtc.proto.transfer_sender import Sender

Buffer = bytes | bytearray | memoryview
Progress = Callable[[int], None]

WRITERS = 2
"""Threads that hash and write chunks of one file: one may wait for the disk."""

MAX_REFUSALS = 64
"""Refusals of unknown transfers that wait to be sent; what is over is not refused."""

FAREWELL_SECONDS = 2.0
"""How long a transfer that ends early tries to tell the peer."""


_UNKNOWN = "there is no such transfer here; it ended, or was never begun"


class TransferError(Exception):
    """A file did not arrive, though the link still stands.

    Args:
        reason: What happened, for people. It may be the peer's own words.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class ChunkSource(Protocol):
    """What a file is sent from; worker threads call it, several at once.

    Its methods raise `SharedStorageError` if the storage failed.
    """

    def read(self, index: int) -> tuple[Buffer, bytes]:
        """Return a chunk and its BLAKE3 hash."""

    def check_unchanged(self) -> bool:
        """Tell whether the file is still what it was when it was opened."""


class ChunkSink(Protocol):
    """Where a file arrives; worker threads call it, several at once.

    Its methods raise `SharedStorageError` if the storage failed.
    """

    chunk_map: ChunkMap
    """What is there already; the transfer takes it over and notes what it stores."""

    def write(self, index: int, payload: Buffer, digest: bytes) -> bool:
        """Write a chunk, or return False if that is not its hash."""

    def publish(self) -> Path:
        """Let the whole file appear under its name, and return that."""

    def keep(self) -> None:
        """Leave what was written for later, unless it was published."""

    def abandon(self) -> None:
        """Remove what was written, unless it was published."""


def _ignore_progress(_size: int) -> None:
    """What happens with the progress of a transfer that nobody watches."""


class Transfers:
    """The file transfers of one link.

    The owner starts `run` in a nursery, and gives every control message that it
    receives to `deliver_message`. Then any number of its tasks may send and receive
    files; the two sides agree on the transfer ids.

    Args:
        link: Where the files go. The owner keeps it, and closes it.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._active: dict[int, _Active] = {}
        self._refuse, self._refused = trio.open_memory_channel[int](MAX_REFUSALS)
        self._frames_dropped = 0

    @property
    def active(self) -> int:
        """Transfers that run now."""
        return len(self._active)

    @property
    def frames_dropped(self) -> int:
        """Frames that nobody wanted: duplicates, and those of unknown transfers."""
        return self._frames_dropped

    async def run(self) -> None:
        """Route what arrives until the link ends; then every transfer ends too."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send_refusals)
            try:
                while True:
                    self._route_frame(await self._link.receive_frame())
            except LinkClosedError as error:
                for active in self._active.values():
                    active.link_lost(error)
            nursery.cancel_scope.cancel()

    def deliver_message(self, message: Message) -> bool:
        """Take a control message, if it belongs to a transfer that was begun.

        A peer that waits for a transfer which this side does not have is told so.

        Args:
            message: Any control message of the link.

        Returns:
            False if it is of another kind, `FileOffer` and `FileRequest` included.
        """
        if not isinstance(message, TransferMessage):
            return False
        active = self._active.get(message.transfer_id)
        if active is not None:
            active.receive_message(message)
        elif isinstance(message, ChunkGrant | FileReceived):
            try:
                self._refuse.send_nowait(message.transfer_id)
            except trio.WouldBlock:
                pass  # the peer asks again and again; it was told often enough
        return True

    async def send_file(
        self,
        transfer_id: int,
        offer: OfferedFile,
        source: ChunkSource,
        *,
        on_progress: Progress = _ignore_progress,
    ) -> None:
        """Offer a file, and send it until the receiver has verified it.

        Args:
            transfer_id: A number that no running transfer of this link has.
            offer: The file as the receiver sees it.
            source: The file; the caller closes it.
            on_progress: Called with the number of bytes sent so far.

        Raises:
            TransferError: If the receiver does not take it, or it can't be read.
            LinkClosedError: If the link ended first.
        """
        sender = Sender(transfer_id, offer.size, offer.chunk_size)
        sending = _Sending(self._link, sender, source, on_progress)
        with self._registered(transfer_id, sending):
            await sending.send(offer)

    async def receive_file(
        self,
        transfer_id: int,
        offer: OfferedFile,
        sink: ChunkSink,
        *,
        keep_part: bool = False,
        on_progress: Progress = _ignore_progress,
    ) -> Path:
        """Receive a file that the peer offered, or the rest of it.

        It asks only for the chunks that the sink does not have. What becomes of those
        that are stored depends on what ends the transfer:

        - The sink is published when it is whole and the sender has verified it.
        - It is abandoned on a `TransferError`: the peer gave the file up, it is not
          the file that the stored chunks are of, or the storage failed.
        - In every other case `keep_part` decides: the link was lost, or the owner
          cancelled, as it does when its process stops. The peer is told of that.

        Args:
            transfer_id: The number in the offer.
            offer: The file.
            sink: Where it goes, for a file of that size in chunks of that size.
            keep_part: Keep what arrived for a later transfer of the same file; without
                it nothing is left.
            on_progress: Called with the number of bytes stored so far, those of
                earlier transfers included.

        Returns:
            The path of the whole file.

        Raises:
            TransferError: If the peer stopped it or broke the protocol, or the file
                can't be written.
            LinkClosedError: If the link ended first.
        """
        leave = sink.keep if keep_part else sink.abandon
        try:
            receiver = Receiver(transfer_id, offer, chunk_map=sink.chunk_map)
            receiving = _Receiving(self._link, receiver, sink, on_progress)
            with self._registered(transfer_id, receiving):
                return await receiving.receive()
        except TransferError:
            leave = sink.abandon
            raise
        finally:
            with trio.CancelScope(shield=True):
                try:
                    await trio.to_thread.run_sync(leave)
                except SharedStorageError:
                    pass  # a hidden part file stays; what led here matters more

    @contextmanager
    def _registered(self, transfer_id: int, active: "_Active") -> Iterator[None]:
        """Let what arrives for a transfer reach it, as long as it runs."""
        if transfer_id in self._active:
            raise TransferError(f"transfer {transfer_id} runs already")
        self._active[transfer_id] = active
        try:
            yield
        finally:
            del self._active[transfer_id]

    def _route_frame(self, frame: Frame) -> None:
        active = self._active.get(frame.header.transfer_id)
        if active is None or not active.receive_frame(frame):
            self._frames_dropped += 1

    async def _send_refusals(self) -> None:
        async for transfer_id in self._refused:
            try:
                await self._link.send_message(FileError(transfer_id, _UNKNOWN))
            except LinkClosedError:
                return  # `run` notices it too


class _Active(ABC):
    """One transfer: its inputs never wait, and one task carries out its outputs."""

    def __init__(
        self, link: Link, machine: Receiver | Sender, on_progress: Progress
    ) -> None:
        self._link = link
        self._machine = machine
        self._on_progress = on_progress
        self._reported = 0
        self._has_ended = False
        self._error: TransferError | LinkClosedError | None = None
        self._woken = trio.Event()

    def receive_message(self, message: TransferMessage) -> None:
        """Take a control message of this transfer."""
        try:
            self._machine.receive_message(message)
        except RemoteProtocolError:
            pass  # the machine has failed, and its outputs say why
        self._woken.set()

    @abstractmethod
    def receive_frame(self, frame: Frame) -> bool:
        """Take a bulk frame of this transfer, or return False if nobody wants it."""

    def link_lost(self, error: LinkClosedError) -> None:
        """End, because nothing comes or goes any more."""
        self._machine.link_lost()
        self._end(error)

    def _end(self, error: TransferError | LinkClosedError | None) -> None:
        if not self._has_ended:
            self._has_ended = True
            self._error = error
        self._woken.set()

    def _report(self, size: int) -> None:
        if size > self._reported:  # a chunk may be sent twice, or stored too late
            self._reported = size
            self._on_progress(size)

    async def _run(self) -> None:
        """Carry out what the machine wants until the transfer has ended."""
        try:
            async with trio.open_nursery() as nursery:
                while not self._has_ended:
                    await self._step(nursery)
                nursery.cancel_scope.cancel()
        finally:
            if not self._has_ended:
                await self._say_farewell()
        if self._error is not None:
            raise self._error

    async def _step(self, nursery: trio.Nursery) -> None:
        """Carry out one output, or wait for what brings the next."""
        try:
            if not await self._carry_out_next(nursery):
                self._woken = trio.Event()
                await self._woken.wait()
        except LinkClosedError as error:
            self.link_lost(error)

    @abstractmethod
    async def _carry_out_next(self, nursery: trio.Nursery) -> bool:
        """Carry out the next output of the machine; return False if there is none."""

    async def _say_farewell(self) -> None:
        """Tell the peer that the owner gave up, if there is time."""
        self._machine.cancel("the other side cancelled the transfer")
        with trio.move_on_after(FAREWELL_SECONDS, shield=True):
            while (output := self._machine.next_output()) is not None:
                if isinstance(output, SendMessage):
                    try:
                        await self._link.send_message(output.message)
                    except LinkClosedError:
                        return


class _Receiving(_Active):
    """One file that comes in."""

    def __init__(
        self, link: Link, receiver: Receiver, sink: ChunkSink, on_progress: Progress
    ) -> None:
        super().__init__(link, receiver, on_progress)
        self._receiver = receiver
        self._sink = sink
        self._payloads: dict[int, Buffer] = {}
        self._writers = trio.CapacityLimiter(WRITERS)
        self._path = Path()

    async def receive(self) -> Path:
        """Take the whole file, and return where it is."""
        self._receiver.start()
        self._report(self._receiver.chunk_map.bytes_there)
        await self._run()
        return self._path

    def receive_frame(self, frame: Frame) -> bool:
        try:
            is_wanted = self._receiver.chunk_arrived(frame.header)
        except RemoteProtocolError:
            is_wanted = False  # the machine has failed, and its outputs say why
        if is_wanted:
            self._payloads[frame.header.index] = frame.payload
        self._woken.set()
        return is_wanted

    async def _carry_out_next(self, nursery: trio.Nursery) -> bool:
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
            case Discard():
                pass  # `receive_file` does it, when no thread writes any more
            case TransferDone():
                self._end(None)
            case TransferFailed(reason=reason):
                self._end(TransferError(reason))
            case output:
                assert_never(output)
        return True

    async def _store(self, index: int, payload: Buffer, digest: bytes) -> None:
        try:
            is_good = await trio.to_thread.run_sync(
                self._sink.write, index, payload, digest, limiter=self._writers
            )
        except SharedStorageError as error:
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
            self._path = await trio.to_thread.run_sync(self._sink.publish)
        except SharedStorageError as error:
            self._receiver.cancel(str(error))
        else:
            self._receiver.published()


class _Sending(_Active):
    """One file that goes out."""

    def __init__(
        self, link: Link, sender: Sender, source: ChunkSource, on_progress: Progress
    ) -> None:
        super().__init__(link, sender, on_progress)
        self._sender = sender
        self._source = source

    async def send(self, offer: OfferedFile) -> None:
        """Offer the file, and serve the receiver until it has all of it."""
        await self._link.send_message(FileOffer(self._sender.transfer_id, offer))
        await self._run()

    def receive_frame(self, frame: Frame) -> bool:
        return False

    async def _carry_out_next(self, nursery: trio.Nursery) -> bool:
        match self._sender.next_output():
            case None:
                return False
            case SendMessage(message=message):
                await self._link.send_message(message)
            case ReadAndSend(index=index):
                nursery.start_soon(self._send_chunk, index)
            case HashMissing(first=first, count=count):
                nursery.start_soon(self._hash, range(first, first + count))
            case SenderDone():
                self._end(None)
            case SenderFailed(reason=reason):
                self._end(TransferError(reason))
            case output:
                assert_never(output)
        return True

    async def _send_chunk(self, index: int) -> None:
        try:
            chunk = await trio.to_thread.run_sync(self._read, index)
            if chunk is None:
                self._sender.source_changed()
            else:
                payload, digest = chunk
                header = ChunkHeader(
                    self._sender.transfer_id, index, len(payload), digest
                )
                await self._link.send_frame(Frame(header, payload))
                if not self._has_ended:
                    self._sender.chunk_sent(index, digest)
                    self._report(self._sender.bytes_known)
        except SharedStorageError as error:
            self._sender.source_failed(str(error))
        except LinkClosedError as error:
            self.link_lost(error)
        self._woken.set()

    async def _hash(self, indexes: range) -> None:
        try:
            digests = await trio.to_thread.run_sync(self._read_hashes, indexes)
        except SharedStorageError as error:
            self._sender.source_failed(str(error))
        else:
            if len(digests) < len(indexes):
                self._sender.source_changed()
            elif not self._has_ended:
                self._sender.hashes_read(digests)
                self._report(self._sender.bytes_known)
        self._woken.set()

    def _read(self, index: int) -> tuple[Buffer, bytes] | None:
        """Read a chunk; None if the file is no longer what was offered."""
        chunk = self._source.read(index)
        return chunk if self._source.check_unchanged() else None

    def _read_hashes(self, indexes: range) -> list[bytes]:
        """Hash chunks; fewer of them if the file is no longer what was offered."""
        digests = []
        for index in indexes:
            chunk = self._read(index)
            if chunk is None:
                break
            digests.append(chunk[1])
        return digests
