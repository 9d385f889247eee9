"""The receiving side of a transfer: it requests chunks until the file is whole."""

from collections.abc import Iterable
from enum import Enum, auto
from typing import assert_never

import msgspec
from typing_extensions import override

from sleap_rtc.proto.errors import LocalProtocolError
from sleap_rtc.proto.machine import Ignored, Machine, Table, Trigger
from sleap_rtc.proto.messages import (
    ChunkGrant,
    FileError,
    FileReceived,
    FileVerified,
)
from sleap_rtc.proto.transfer.chunk_map import ChunkMap
from sleap_rtc.proto.transfer.frames import ChunkHeader
from sleap_rtc.proto.transfer.machine import (
    MAX_WINDOW,
    Publish,
    ReceiverOutput,
    SenderMessage,
    Store,
    TransferDone,
    TransferMachine,
    TransferMessage,
)


class ReceiverLimits(msgspec.Struct, frozen=True):
    """Limits of a receiver.

    Args:
        window: Chunks that may be granted and not yet stored, at most `MAX_WINDOW`.
        window_bytes: Bytes that are granted at most, whatever the size of the chunks:
            a receiver may have to hold them in memory.
        damages: Times that one chunk may arrive damaged. The link has integrity checks
            of its own, so more damage means a broken sender.
    """

    window: int = 16
    window_bytes: int = 64 * 1024 * 1024
    damages: int = 5


LIMITS = ReceiverLimits()


class ReceiverState(Enum):
    """Phases of a receiver."""

    RECEIVING = auto()
    VERIFYING = auto()  #   all is stored, and the sender compares the hashes
    PUBLISHING = auto()
    DONE = auto()
    FAILED = auto()


class ReceiverTrigger(Enum):
    """Causes of a transition, besides messages."""

    CHUNK_ARRIVED = auto()
    CHUNK_STORED = auto()
    CHUNK_DAMAGED = auto()
    ALL_STORED = auto()
    PUBLISHED = auto()
    CANCELLED = auto()
    PEER_FAULT = auto()


_S, _T = ReceiverState, ReceiverTrigger

TRANSITIONS: Table[ReceiverState] = {
    _S.RECEIVING: {
        _T.CHUNK_ARRIVED: _S.RECEIVING,
        _T.CHUNK_STORED: _S.RECEIVING,
        _T.CHUNK_DAMAGED: _S.RECEIVING,
        _T.ALL_STORED: _S.VERIFYING,
        FileError: _S.FAILED,
        _T.CANCELLED: _S.FAILED,
        _T.PEER_FAULT: _S.FAILED,
    },
    _S.VERIFYING: {
        FileVerified: _S.PUBLISHING,
        FileError: _S.FAILED,
        _T.CANCELLED: _S.FAILED,
        _T.PEER_FAULT: _S.FAILED,
    },
    _S.PUBLISHING: {
        _T.PUBLISHED: _S.DONE,
        _T.CANCELLED: _S.FAILED,
        _T.PEER_FAULT: _S.FAILED,
    },
    _S.DONE: {},
    _S.FAILED: {},
}

_AFTER_THE_END: frozenset[Trigger] = frozenset(
    {
        _T.CHUNK_ARRIVED,
        _T.CANCELLED,
        ChunkGrant,
        FileReceived,
        FileVerified,
        FileError,
    }
)

IGNORED: Ignored[ReceiverState] = {
    _S.RECEIVING: frozenset(),
    _S.VERIFYING: frozenset({_T.CHUNK_ARRIVED}),
    _S.PUBLISHING: frozenset({_T.CHUNK_ARRIVED, FileVerified, FileError}),
    _S.DONE: _AFTER_THE_END,
    _S.FAILED: _AFTER_THE_END | {_T.CHUNK_STORED, _T.CHUNK_DAMAGED, _T.PUBLISHED},
}
"""The sender may answer or send a chunk twice, and the storage may report on a transfer
that has failed meanwhile."""


class Receiver(
    TransferMachine[ReceiverState, ReceiverOutput],
    Machine[TransferMessage, ReceiverOutput],
):
    """The receiving side of one transfer; the first grants wait in `next_output`.

    Report what happens: `chunk_arrived` for the header of each frame of this transfer,
    `chunk_stored` or `chunk_damaged` for each `Store`, `receive_message`, `published`
    after `Publish`, and `cancel` if the owner or its storage gives up. After each,
    drain `next_output`.

    Args:
        transfer_id: The number that the two sides use.
        chunk_map: The chunks that an earlier transfer stored. The machine adds those
            that it stores.
        limits: The credits of the sender.

    Raises:
        LocalProtocolError: If the window is not between 1 and `MAX_WINDOW`.
    """

    def __init__(
        self, transfer_id: int, chunk_map: ChunkMap, limits: ReceiverLimits = LIMITS
    ) -> None:
        super().__init__(
            transfer_id,
            ReceiverState.RECEIVING,
            transitions=TRANSITIONS,
            ignored=IGNORED,
        )
        if not 0 < limits.window <= MAX_WINDOW:
            raise LocalProtocolError(f"not a window: {limits.window} chunks")
        self._map = chunk_map
        in_memory = max(1, limits.window_bytes // chunk_map.chunk_size)
        self._window = min(limits.window, in_memory)
        self._max_damages = limits.damages
        self._granted: set[int] = set()
        self._storing: dict[int, bytes] = {}  # the hash of each chunk
        self._again: set[int] = set()
        self._never_granted = chunk_map.next_missing(0)
        self._damages_of: dict[int, int] = {}
        self._ask_for_more()

    @property
    def chunk_map(self) -> ChunkMap:
        """The stored chunks: the authoritative state of this transfer."""
        return self._map

    @property
    def outstanding(self) -> int:
        """Chunks that are granted and not yet stored."""
        return len(self._granted) + len(self._storing)

    def chunk_arrived(self, header: ChunkHeader) -> bool:
        """Handle the header of a frame.

        Returns:
            True if a `Store` follows; otherwise the payload is not needed.

        Raises:
            LocalProtocolError: If the frame is of another transfer.
        """
        self._check_id(header.transfer_id)
        if not self._move_untrusted(ReceiverTrigger.CHUNK_ARRIVED):
            return False
        fault = self._fault_of_chunk(header)
        if fault is not None:
            self._blame_peer(fault)
            return False
        if header.index not in self._granted:
            return False  # a granted chunk that has arrived twice
        self._granted.remove(header.index)
        self._storing[header.index] = header.hash
        self._outputs.append(Store(header.index, header.hash))
        return True

    def chunk_stored(self, index: int) -> None:
        """Record that a chunk is written and its hash was right.

        Raises:
            LocalProtocolError: If there was no `Store` for it.
        """
        if self._move(ReceiverTrigger.CHUNK_STORED):
            self._map.set(index, self._end_storing(index))
            self._ask_for_more()

    def chunk_damaged(self, index: int) -> None:
        """Record that the hash of a chunk was wrong, and ask for the chunk again.

        The transfer fails if the same chunk was damaged too often.

        Raises:
            LocalProtocolError: If there was no `Store` for it.
        """
        if self._move(ReceiverTrigger.CHUNK_DAMAGED):
            self._end_storing(index)
            self._again.add(index)
            self._damages_of[index] = self._damages_of.get(index, 0) + 1
            damages = self._damages_of[index]
            if damages == self._max_damages:
                self._blame_peer(f"chunk {index} arrived damaged {damages} times")
            else:
                self._ask_for_more()

    @override
    def receive_message(self, message: TransferMessage, now: float) -> None:
        """Handle a control message of this transfer.

        Raises:
            LocalProtocolError: If the message is of another transfer.
        """
        self._check_id(message.transfer_id)
        is_expected = self._move_untrusted(type(message))
        if not is_expected or not isinstance(message, SenderMessage):
            return  # the messages of a receiver are never expected
        match message:
            case FileVerified():
                self._outputs.append(Publish())
            case FileError(reason=reason):
                self._report_failure(reason, tell_peer=False)
            case _:
                assert_never(message)

    def published(self) -> None:
        """Record that the file is durable under its name.

        Raises:
            LocalProtocolError: If there was no `Publish`.
        """
        if self._move(ReceiverTrigger.PUBLISHED):
            self._outputs.append(TransferDone())

    def cancel(self, reason: str) -> None:
        """End the transfer because the owner or its storage gave up.

        Args:
            reason: Why, for the sender.
        """
        if self._move(ReceiverTrigger.CANCELLED):
            self._report_failure(reason)

    @override
    def next_output(self) -> ReceiverOutput | None:
        return self._outputs.popleft() if self._outputs else None

    def _fault_of_chunk(self, header: ChunkHeader) -> str | None:
        """Return why the sender must not send this chunk; None if it may.

        One that was granted before may come twice.
        """
        index = header.index
        if index >= self._map.count:
            return f"chunk {index} came of a file of {self._map.count}"
        if header.length != self._map.length(index):
            return (
                f"chunk {index} came with {header.length} bytes instead of "
                f"{self._map.length(index)}"
            )
        if index >= self._never_granted:
            return f"chunk {index} came and was not granted"
        return None

    def _end_storing(self, index: int) -> bytes:
        stored = self._storing.pop(index, None)
        if stored is None:
            raise LocalProtocolError(f"chunk {index} is not being stored")
        return stored

    def _ask_for_more(self) -> None:
        """Grant more chunks, or ask to verify the file if all are stored."""
        if self._map.is_complete:
            self._move(ReceiverTrigger.ALL_STORED)
            self._send(FileReceived(self.transfer_id, self._map.root().hex()))
        # Grant once half of the window is free: few messages, and early enough.
        elif self.outstanding <= self._window // 2:
            for run in _runs(self._choose(self._window - self.outstanding)):
                self._granted.update(run)
                self._send(ChunkGrant(self.transfer_id, run.start, len(run)))

    def _choose(self, room: int) -> list[int]:
        """Choose the chunks to grant next: damaged ones, then ones never granted."""
        chosen = sorted(self._again)[:room]
        self._again.difference_update(chosen)
        while len(chosen) < room and self._never_granted < self._map.count:
            chosen.append(self._never_granted)
            self._never_granted = self._map.next_missing(self._never_granted + 1)
        return chosen

    @override
    def _blame_peer(self, reason: str) -> None:
        self._move(ReceiverTrigger.PEER_FAULT)
        self._report_failure(reason)


def _runs(indexes: Iterable[int]) -> list[range]:
    """Join ascending chunk indexes into as few ranges as possible."""
    runs: list[range] = []
    for index in indexes:
        if runs and runs[-1].stop == index:
            runs[-1] = range(runs[-1].start, index + 1)
        else:
            runs.append(range(index, index + 1))
    return runs
