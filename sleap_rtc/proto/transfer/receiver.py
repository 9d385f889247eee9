"""The receiving side of a transfer: what to ask for, and when the file is whole."""

from collections import deque
from collections.abc import Iterable
from enum import Enum, auto
from typing import assert_never

from sleap_rtc.proto.errors import LocalProtocolError
from sleap_rtc.proto.messages import (
    ChunkGrant,
    FileError,
    FileReceived,
    FileVerified,
    OfferedFile,
)
from sleap_rtc.proto.transfer.chunk_map import ChunkMap
from sleap_rtc.proto.transfer.frames import ChunkHeader
from sleap_rtc.proto.transfer.machine import (
    MAX_WINDOW,
    Discard,
    Machine,
    Publish,
    ReceiverOutput,
    SendMessage,
    Store,
    TransferDone,
    TransferFailed,
    TransferMessage,
    read_table,
)

MAX_WINDOW_BYTES = 64 * 1024 * 1024
"""What a receiver grants at most, whatever the size of the chunks: it may have to hold
it."""

MAX_DAMAGES = 5
"""Times that one chunk may arrive damaged. The link has integrity checks of its own,
so more than that is a broken sender."""


class ReceiverState(Enum):
    """Where a receiver stands."""

    NEW = auto()
    RECEIVING = auto()
    VERIFYING = auto()
    PUBLISHING = auto()
    DONE = auto()
    FAILED = auto()


RECEIVER_TABLE = read_table(
    ReceiverState,
    """
    in_state        NEW        RECEIVING  VERIFYING   PUBLISHING  DONE  FAILED
    start           RECEIVING  ours       ours        ours        ours  ours
    chunk_arrived   peer's     .          -           -           -     -
    chunk_stored    ours       .          ours        ours        ours  -
    chunk_damaged   ours       .          ours        ours        ours  -
    all_stored      ours       VERIFYING  ours        ours        ours  ours
    FILE_VERIFIED   peer's     peer's     PUBLISHING  -           -     -
    published       ours       ours       ours        DONE        ours  -
    FILE_ERROR      FAILED     FAILED     FAILED      -           -     -
    wrong_message   peer's     peer's     peer's      peer's      -     -
    cancel          FAILED     FAILED     FAILED      FAILED      -     -
    link_lost       .          .          .           .           -     -
    link_restored   .          .          .           .           -     -
    """,
)


class Receiver(Machine[ReceiverState, ReceiverOutput]):
    """The receiving side of one transfer.

    Call `start` once, then give it what happens: `chunk_arrived` for the header of each
    frame of this transfer, `chunk_stored` or `chunk_damaged` for each `Store`,
    `receive_message`, `published` after `Publish`, `link_lost` and `link_restored`, and
    `cancel` if the owner or its storage gives up. After each, drain `next_output`. A
    failed transfer takes late answers without complaint.

    Args:
        transfer_id: The number that the two sides use.
        file: What the sender offered.
        chunk_map: What is there already, to go on with an earlier transfer.
        window: Chunks that may be granted and not yet stored; fewer if they are large.

    Raises:
        InvalidInput: If the offered file has too many chunks.
        LocalProtocolError: If the map is that of another file, or the window is not
            within 1 and `MAX_WINDOW`.
    """

    def __init__(
        self,
        transfer_id: int,
        file: OfferedFile,
        *,
        chunk_map: ChunkMap | None = None,
        window: int = 16,
    ) -> None:
        super().__init__(transfer_id, ReceiverState.NEW, RECEIVER_TABLE)
        if not 0 < window <= MAX_WINDOW:
            raise LocalProtocolError(f"a window of {window} chunks")
        if chunk_map is None:
            chunk_map = ChunkMap(file.size, file.chunk_size)
        elif (chunk_map.size, chunk_map.chunk_size) != (file.size, file.chunk_size):
            raise LocalProtocolError("the chunk map is that of another file")
        self._map = chunk_map
        self._has_link = True
        self._window = min(window, max(1, MAX_WINDOW_BYTES // file.chunk_size))
        self._granted: set[int] = set()
        self._storing: dict[int, bytes] = {}  # the hash of each chunk
        self._again: set[int] = set()
        self._never_granted = chunk_map.next_missing(0)
        self._damages_of: dict[int, int] = {}  # of chunks that are not stored yet
        self._damages = 0
        self._duplicates = 0

    @property
    def chunk_map(self) -> ChunkMap:
        """What is stored; the truth about this transfer."""
        return self._map

    @property
    def outstanding(self) -> int:
        """Chunks that are granted and not yet stored."""
        return len(self._granted) + len(self._storing)

    @property
    def damages(self) -> int:
        """Chunks that arrived with a wrong hash."""
        return self._damages

    @property
    def duplicates(self) -> int:
        """Chunks that arrived and were not wanted any more."""
        return self._duplicates

    def start(self) -> None:
        """Ask for the first chunks.

        Raises:
            LocalProtocolError: If it was called before.
        """
        self._enter("start")
        self._go_on()

    def chunk_arrived(self, header: ChunkHeader) -> bool:
        """Take the header of a frame.

        Returns:
            True if a `Store` follows; otherwise nobody needs the payload any more.

        Raises:
            RemoteProtocolError: If it was never granted or has the wrong length. The
                transfer has failed then.
            LocalProtocolError: If the frame is of another transfer.
        """
        self._check_id(header.transfer_id)
        index = header.index
        if not self._enter("chunk_arrived", f"chunk {index} came before any grant"):
            self._duplicates += 1
            return False
        self._check_chunk_untrusted(header)
        if index not in self._granted:
            self._duplicates += 1
            return False
        self._granted.remove(index)
        self._storing[index] = header.hash
        self._outputs.append(Store(index, header.hash))
        return True

    def chunk_stored(self, index: int) -> None:
        """Note that a chunk is written and its hash was right.

        Raises:
            LocalProtocolError: If there was no `Store` for it.
        """
        if self._enter("chunk_stored"):
            self._map.set(index, self._end_storing(index))
            self._damages_of.pop(index, None)
            self._go_on()

    def chunk_damaged(self, index: int) -> None:
        """Note that the hash of a chunk was wrong; it is asked for again.

        After `MAX_DAMAGES` of the same chunk the transfer fails.

        Raises:
            LocalProtocolError: If there was no `Store` for it.
        """
        if self._enter("chunk_damaged"):
            self._end_storing(index)
            self._again.add(index)
            self._damages += 1
            self._damages_of[index] = self._damages_of.get(index, 0) + 1
            if self._damages_of[index] == MAX_DAMAGES:
                self._fail(f"chunk {index} arrived damaged {MAX_DAMAGES} times")
            else:
                self._go_on()

    def receive_message(self, message: TransferMessage) -> None:
        """Take a control message of this transfer.

        Raises:
            RemoteProtocolError: If the sender may not say that now. The transfer has
                failed then.
            LocalProtocolError: If the message is of another transfer.
        """
        self._check_id(message.transfer_id)
        match message:
            case FileVerified():
                if self._enter("FILE_VERIFIED", "FILE_VERIFIED came before the file"):
                    self._outputs.append(Publish())
            case FileError(reason=reason):
                if self._enter("FILE_ERROR"):
                    self._fail(reason, tell_peer=False)
            case ChunkGrant() | FileReceived():
                self._enter("wrong_message", "the sender spoke as if it received")
            case _:
                assert_never(message)

    def published(self) -> None:
        """Note that the file is durable under its name.

        Raises:
            LocalProtocolError: If there was no `Publish`.
        """
        if self._enter("published"):
            self._outputs.append(TransferDone())

    def cancel(self, reason: str) -> None:
        """Give up: the owner wants it, or its storage failed.

        Args:
            reason: What the sender is told.
        """
        if self._enter("cancel"):
            self._fail(reason)

    def link_lost(self) -> None:
        """Note that what was on the way will not come; what arrived is still stored."""
        if self._enter("link_lost"):
            kept = [out for out in self._outputs if not isinstance(out, SendMessage)]
            self._outputs = deque(kept)
            self._has_link = False
            self._again |= self._granted
            self._granted.clear()

    def link_restored(self) -> None:
        """Go on where the lost link stopped."""
        if self._enter("link_restored") and not self._has_link:
            self._has_link = True
            self._go_on()

    def next_output(self) -> ReceiverOutput | None:
        """Return what is to be done next, or None."""
        return self._outputs.popleft() if self._outputs else None

    def _check_chunk_untrusted(self, header: ChunkHeader) -> None:
        """Blame the sender for a chunk that was never granted, or has a wrong length.

        One that was granted before may come late: after a duplicate, or over a
        link that was slow to end.
        """
        index = header.index
        if index >= self._map.count:
            self._blame_peer(f"chunk {index} came of a file of {self._map.count}")
        if header.length != self._map.length(index):
            self._blame_peer(
                f"chunk {index} came with {header.length} bytes instead of "
                f"{self._map.length(index)}"
            )
        if index >= self._never_granted and not self._map.has(index):
            self._blame_peer(f"chunk {index} came and was not granted")

    def _end_storing(self, index: int) -> bytes:
        stored = self._storing.pop(index, None)
        if stored is None:
            raise LocalProtocolError(f"chunk {index} is not being stored")
        return stored

    def _go_on(self) -> None:
        """Grant more, or say that every chunk is stored."""
        if self.state is ReceiverState.RECEIVING and self._map.is_complete:
            self._enter("all_stored")
        if self.state is ReceiverState.VERIFYING and self._has_link:
            self._send(FileReceived(self.transfer_id, self._map.root().hex()))
        self._grant()

    def _grant(self) -> None:
        """Grant again once half of a window is free: in few messages, and in time."""
        may_grant = self.state is ReceiverState.RECEIVING and self._has_link
        if not may_grant or self.outstanding > self._window // 2:
            return
        for run in _runs(self._take(self._window - self.outstanding)):
            self._granted.update(run)
            self._send(ChunkGrant(self.transfer_id, run.start, len(run)))

    def _take(self, room: int) -> list[int]:
        """Choose the chunks to grant next: the lost ones, then ones never granted."""
        chosen = sorted(self._again)[:room]
        self._again.difference_update(chosen)
        while len(chosen) < room and self._never_granted < self._map.count:
            chosen.append(self._never_granted)
            self._never_granted = self._map.next_missing(self._never_granted + 1)
        return chosen

    def _fail(self, reason: str, *, tell_peer: bool = True) -> None:
        self.state = ReceiverState.FAILED
        self._granted.clear()
        self._storing.clear()
        self._outputs.clear()
        if tell_peer and self._has_link:
            self._send(FileError(self.transfer_id, reason))
        self._outputs.extend((Discard(), TransferFailed(reason)))


def _runs(indexes: Iterable[int]) -> list[range]:
    """Join ascending chunk indexes into as few ranges as possible."""
    runs: list[range] = []
    for index in indexes:
        if runs and runs[-1].stop == index:
            runs[-1] = range(runs[-1].start, index + 1)
        else:
            runs.append(range(index, index + 1))
    return runs
