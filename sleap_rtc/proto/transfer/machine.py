"""One file on its way in chunks: the receiver, the sender, and their credits.

The receiver owns the truth, its `ChunkMap`. It grants the chunks that it can take, and
the sender sends exactly those, in any order. When all are stored the
receiver names the hash over the chunk hashes; the sender compares it with its own and
answers, and only then the file appears under its name::

    sender                                receiver
                     FILE_OFFER    ->
                  <- CHUNK_GRANT          `Receiver.start`
    `ReadAndSend`    frames        ->     `Store`
                  <- CHUNK_GRANT          half of the window is free again
                  <- FILE_RECEIVED        every chunk is stored
    `HashMissing`
                     FILE_VERIFIED ->     `Publish`

FILE_ERROR ends a transfer from either side at any time. Nothing here depends on time: a
peer that is gone is noticed by the link, and a slow one is the owner's to judge.
"""

from abc import ABC, abstractmethod
from collections import deque
from enum import Enum
from typing import Generic, NoReturn, TypeVar

import msgspec

from sleap_rtc.proto.errors import LocalProtocolError, RemoteProtocolError
from sleap_rtc.proto.messages import (
    ChunkGrant,
    FileError,
    FileReceived,
    FileVerified,
)

MAX_WINDOW = 64
"""Chunks that a receiver may have granted and a sender not yet begun to send."""

TransferMessage = ChunkGrant | FileReceived | FileVerified | FileError
"""The messages that a running transfer understands."""


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


class Discard(msgspec.Struct, frozen=True):
    """Effect: remove what was stored of the file."""


class TransferDone(msgspec.Struct, frozen=True):
    """Event: the file is there."""


class TransferFailed(msgspec.Struct, frozen=True):
    """Event: the transfer ended without a file, and why."""

    reason: str


class ReadAndSend(msgspec.Struct, frozen=True):
    """Effect: read this chunk, send it, answer `Sender.chunk_sent`."""

    index: int


class HashMissing(msgspec.Struct, frozen=True):
    """Effect: read and hash these chunks; answer `Sender.hashes_read`.

    They went to the receiver before this sender was made.
    """

    first: int
    count: int


class SenderDone(msgspec.Struct, frozen=True):
    """Event: the receiver has the file, and it is the right one."""


class SenderFailed(msgspec.Struct, frozen=True):
    """Event: the transfer ended, and why."""

    reason: str


ReceiverOutput = SendMessage | Store | Publish | Discard | TransferDone | TransferFailed
SenderOutput = SendMessage | ReadAndSend | HashMissing | SenderDone | SenderFailed


# ----------------------------------------------------------------- what both share


class Verdict(Enum):
    """What an input gets that leads to no state."""

    IGNORED = "-"
    """Nothing happens: it comes too late to matter."""

    OUR_FAULT = "ours"
    """`LocalProtocolError`, and nothing changes."""

    PEER_FAULT = "peer's"
    """The transfer fails, the peer is told, and `RemoteProtocolError`."""


StateT = TypeVar("StateT", bound=Enum)
OutputT = TypeVar("OutputT", bound=msgspec.Struct)


def read_table(states: type[StateT], text: str) -> dict[tuple[str, StateT], Enum]:
    """Read a table: states across, inputs down; ``.`` stays in the state."""
    header, *rows = [line.split() for line in text.strip().splitlines()]
    table: dict[tuple[str, StateT], Enum] = {}
    for name, *cells in rows:
        for column, cell in zip(header[1:], cells, strict=True):
            state = states[column]
            if cell == ".":
                table[name, state] = state
            else:
                table[name, state] = states[cell] if cell.isupper() else Verdict(cell)
    return table


class Machine(ABC, Generic[StateT, OutputT]):
    """What a receiver and a sender have in common: a state, a table, and outputs.

    Args:
        transfer_id: The number that the two sides use.
        state: The first state.
        table: What each input does in each state.
    """

    def __init__(
        self,
        transfer_id: int,
        state: StateT,
        table: dict[tuple[str, StateT], Enum],
    ) -> None:
        self.transfer_id = transfer_id
        self.state = state
        self._table = table
        self._outputs: deque[SendMessage | OutputT] = deque()

    def _enter(self, name: str, fault: str = "") -> bool:
        """Follow the table, and tell whether the input counts.

        Args:
            name: The input.
            fault: What the peer did wrong, if the table says that it is its fault.
        """
        verdict = self._table[name, self.state]
        if verdict is Verdict.PEER_FAULT:
            self._blame_peer(fault)
        if verdict is Verdict.OUR_FAULT:
            raise LocalProtocolError(f"{name} while {self.state.name}")
        if verdict is Verdict.IGNORED:
            return False
        self.state = type(self.state)(verdict)
        return True

    def _check_id(self, transfer_id: int) -> None:
        if transfer_id != self.transfer_id:
            raise LocalProtocolError(
                f"transfer {self.transfer_id} was given what is of {transfer_id}"
            )

    def _send(self, message: TransferMessage) -> None:
        self._outputs.append(SendMessage(message))

    @abstractmethod
    def _fail(self, reason: str, *, tell_peer: bool = True) -> None:
        """End the transfer; what is still to be drained no longer matters."""

    def _blame_peer(self, reason: str) -> NoReturn:
        """End the transfer for what the peer did, and tell it."""
        self._fail(reason)
        raise RemoteProtocolError(reason)
