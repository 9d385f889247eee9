"""Files over a link: the chunks go from the storage to the network and back."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

from sleap_rtc.io.link.link import Link, LinkClosedError
from sleap_rtc.io.storage.call import call_storage
from sleap_rtc.io.storage.folder import StorageError
from sleap_rtc.io.transfer.running import (
    ChunkSink,
    ChunkSource,
    Progress,
    ReceivingFile,
    RunningTransfer,
    SendingFile,
    TransferError,
)
from sleap_rtc.proto.messages import (
    ChunkGrant,
    FileError,
    FileReceived,
    Message,
    OfferedFile,
)
from sleap_rtc.proto.transfer.frames import Frame
from sleap_rtc.proto.transfer.machine import TransferMessage
from sleap_rtc.proto.transfer.receiver import Receiver
from sleap_rtc.proto.transfer.sender import Sender

__all__ = ["TransferError", "Transfers"]

MAX_REFUSALS = 64
"""Refusals of unknown transfers that may wait to be sent; more are dropped."""

LEAVE_TIMEOUT = 5.0
"""Seconds for leaving or removing the part of a file whose transfer has ended."""

_UNKNOWN = "there is no such transfer here; it ended, or was never begun"


def _ignore_progress(_size: int) -> None:
    """Ignore the progress of a transfer."""


class Transfers:
    """The file transfers of one link.

    The owner starts `run` in a nursery, and passes each message about a transfer that
    it receives to `receive_message`. Then any number of its tasks may send and receive
    files. The two sides agree on the transfer ids.

    Args:
        link: The link, which the owner closes.
    """

    def __init__(self, link: Link[Message]) -> None:
        self._link = link
        self._active: dict[int, RunningTransfer] = {}
        self._refuse, self._refused = trio.open_memory_channel[int](MAX_REFUSALS)

    @property
    def active(self) -> int:
        """Transfers that are running."""
        return len(self._active)

    async def run(self) -> None:
        """Route frames until the link ends; then every transfer ends as well."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send_refusals)
            try:
                while True:
                    self._route_frame(await self._link.receive_frame())
            except LinkClosedError as error:
                for active in self._active.values():
                    active.link_lost(error)
            nursery.cancel_scope.cancel()

    def receive_message(self, message: TransferMessage) -> None:
        """Handle a control message of a transfer.

        If this side does not have the transfer that the peer waits for, the peer gets
        a FILE_ERROR.
        """
        active = self._active.get(message.transfer_id)
        if active is not None:
            active.receive_message(message)
        elif isinstance(message, ChunkGrant | FileReceived):
            try:
                self._refuse.send_nowait(message.transfer_id)
            except trio.WouldBlock:
                pass  # the peer has many answers already

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
            InvalidInput: If it has too many chunks.
            TransferError: If the receiver refuses it, or it cannot be read.
            LinkClosedError: If the link ended first.
        """
        sender = Sender(transfer_id, offer.size, offer.chunk_size)
        sending = SendingFile(self._link, sender, source, on_progress)
        with self._registered(transfer_id, sending):
            await sending.send(offer)

    async def receive_file(
        self,
        transfer_id: int,
        sink: ChunkSink,
        *,
        on_progress: Progress = _ignore_progress,
    ) -> Path:
        """Receive a file that the peer offered, or the rest of it.

        It asks only for the chunks that the sink does not have. On a `TransferError`
        the sink is abandoned. If the link is lost or the task is cancelled, the stored
        chunks are kept for a later transfer of the same file. The peer gets a
        FILE_ERROR if the task is cancelled.

        Args:
            transfer_id: The number in the offer.
            sink: The target, opened for the offered size and chunk size.
            on_progress: Called with the number of bytes stored so far, those of
                earlier transfers included.

        Returns:
            The path of the whole file.

        Raises:
            TransferError: If the peer stopped it or broke the protocol, or the file
                cannot be written.
            LinkClosedError: If the link ended first.
        """
        leave = sink.keep
        try:
            receiver = Receiver(transfer_id, sink.chunk_map)
            receiving = ReceivingFile(self._link, receiver, sink, on_progress)
            with self._registered(transfer_id, receiving):
                return await receiving.receive()
        except TransferError:
            leave = sink.abandon
            raise
        finally:
            try:
                await call_storage(leave, timeout=LEAVE_TIMEOUT, shield=True)
            except StorageError:
                pass  # a hidden part file stays; the first error matters more

    @contextmanager
    def _registered(self, transfer_id: int, active: RunningTransfer) -> Iterator[None]:
        """Route input to a transfer while the block runs."""
        if transfer_id in self._active:
            raise TransferError(f"transfer {transfer_id} is already running")
        self._active[transfer_id] = active
        try:
            yield
        finally:
            del self._active[transfer_id]

    def _route_frame(self, frame: Frame) -> None:
        active = self._active.get(frame.header.transfer_id)
        if active is not None:
            active.receive_frame(frame)

    async def _send_refusals(self) -> None:
        async for transfer_id in self._refused:
            try:
                await self._link.send_message(FileError(transfer_id, _UNKNOWN))
            except LinkClosedError:
                return  # `run` also notices it
