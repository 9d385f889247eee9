"""One file on its way in chunks: the receiver, the sender, and their credits.

The receiver's `ChunkMap` is authoritative. The receiver grants the chunks that it can
take, and the sender sends exactly those, in any order. When all are stored, the
receiver names the hash over the chunk hashes. The sender compares it with its own and
answers, and only then the file appears under its name. The messages are drawn in
docs/protocol.md, section 6.

FILE_ERROR ends a transfer from either side at any time. A machine serves one transfer
over one link; over the next link, new machines continue from the chunk map. No
transition depends on time: the link notices a peer that is gone.
"""

from abc import ABC, abstractmethod
from collections import deque
from enum import Enum
from typing import Generic, TypeVar

import msgspec

from sleap_rtc.proto.errors import LocalProtocolError, RemoteProtocolError
from sleap_rtc.proto.machine import Ignored, Table, Trigger, move, move_untrusted
from sleap_rtc.proto.messages import (
    ChunkGrant,
    FileError,
    FileReceived,
    FileVerified,
)

MAX_WINDOW = 64
"""Chunks that may be granted and not yet begun by the sender."""

SenderMessage = FileVerified | FileError
"""Messages that a sender sends."""

ReceiverMessage = ChunkGrant | FileReceived | FileError
"""Messages that a receiver sends."""

TransferMessage = SenderMessage | ReceiverMessage
"""The messages of a running transfer."""


class SendMessage(msgspec.Struct, frozen=True):
    """Effect: send this to the peer, in the order of the outputs."""

    message: TransferMessage


class Store(msgspec.Struct, frozen=True):
    """Effect: write the chunk that just arrived if its BLAKE3 hash is `digest`.

    Answer with `Receiver.chunk_stored` or `Receiver.chunk_damaged`.
    """

    index: int
    digest: bytes


class Publish(msgspec.Struct, frozen=True):
    """Effect: make the file durable under its name; answer `Receiver.published`."""


class ReadAndSend(msgspec.Struct, frozen=True):
    """Effect: read this chunk, send it, answer `Sender.chunk_sent`."""

    index: int


class HashMissing(msgspec.Struct, frozen=True):
    """Effect: read and hash these chunks; answer `Sender.hashes_read`.

    They went to the receiver before this sender was made.
    """

    first: int
    count: int


class TransferDone(msgspec.Struct, frozen=True):
    """Event: the receiver has the file, and the sender verified it."""


class TransferFailed(msgspec.Struct, frozen=True):
    """Event: the transfer ended without a file, and why."""

    reason: str


ReceiverOutput = SendMessage | Store | Publish | TransferDone | TransferFailed
SenderOutput = SendMessage | ReadAndSend | HashMissing | TransferDone | TransferFailed


StateT = TypeVar("StateT", bound=Enum)
OutputT = TypeVar("OutputT", bound=msgspec.Struct)


class TransferMachine(ABC, Generic[StateT, OutputT]):
    """State, tables and outputs of a receiver or a sender.

    A fault of the peer ends the transfer and not the link: the peer gets a FILE_ERROR,
    and the owner a `TransferFailed`. No method raises for it.

    Args:
        transfer_id: The number that the two sides use.
        state: The first state.
        transitions: The state that each trigger leads to.
        ignored: The triggers that come too late to matter.
    """

    def __init__(
        self,
        transfer_id: int,
        state: StateT,
        *,
        transitions: Table[StateT],
        ignored: Ignored[StateT],
    ) -> None:
        self.transfer_id = transfer_id
        self.state = state
        self._transitions = transitions
        self._ignored = ignored
        self._outputs: deque[SendMessage | TransferFailed | OutputT] = deque()

    def _move(self, trigger: Trigger) -> bool:
        """Follow the table; return False if the trigger is ignored.

        Raises:
            LocalProtocolError: If the trigger is not in the row of the state.
        """
        if trigger in self._ignored[self.state]:
            return False
        self.state = move(self._transitions, self.state, trigger)
        return True

    def _move_untrusted(self, trigger: Trigger) -> bool:
        """Follow the table; return False if the trigger is ignored or not expected.

        The transfer fails if it is not expected.
        """
        if trigger in self._ignored[self.state]:
            return False
        try:
            self.state = move_untrusted(self._transitions, self.state, trigger)
        except RemoteProtocolError as error:
            self._blame_peer(error.reason)
            return False
        return True

    def _check_id(self, transfer_id: int) -> None:
        if transfer_id != self.transfer_id:
            raise LocalProtocolError(
                f"transfer {self.transfer_id} got input of transfer {transfer_id}"
            )

    def _send(self, message: TransferMessage) -> None:
        self._outputs.append(SendMessage(message))

    def _report_failure(self, reason: str, *, tell_peer: bool = True) -> None:
        """Replace the outputs by those of a failure."""
        self._outputs.clear()
        if tell_peer:
            self._send(FileError(self.transfer_id, reason))
        self._outputs.append(TransferFailed(reason))

    @abstractmethod
    def _blame_peer(self, reason: str) -> None:
        """End the transfer for a fault of the peer."""
