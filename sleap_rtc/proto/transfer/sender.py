"""The sending side of a transfer: it sends requested chunks, and verifies the file."""

from collections import deque
from collections.abc import Sequence
from enum import Enum, auto
from typing import assert_never

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
from sleap_rtc.proto.transfer.machine import (
    MAX_WINDOW,
    HashMissing,
    ReadAndSend,
    ReceiverMessage,
    SenderOutput,
    TransferDone,
    TransferMachine,
    TransferMessage,
)

READ_AHEAD = 2
"""Chunks that a sender handles at a time: one is read while one is sent."""

HASH_BATCH = 64
"""Chunks in one `HashMissing`: few enough that a cancellation takes effect soon."""


class SenderState(Enum):
    """Phases of a sender."""

    SENDING = auto()
    VERIFYING = auto()  #   the receiver has all, and the hashes are compared
    DONE = auto()
    FAILED = auto()


class SenderTrigger(Enum):
    """Causes of a transition, besides messages."""

    CHUNK_SENT = auto()
    HASHES_READ = auto()
    SAME_ROOT = auto()
    SOURCE_CHANGED = auto()
    CANCELLED = auto()
    PEER_FAULT = auto()


_S, _T = SenderState, SenderTrigger

TRANSITIONS: Table[SenderState] = {
    _S.SENDING: {
        ChunkGrant: _S.SENDING,
        _T.CHUNK_SENT: _S.SENDING,
        FileReceived: _S.VERIFYING,
        FileError: _S.FAILED,
        _T.SOURCE_CHANGED: _S.FAILED,
        _T.CANCELLED: _S.FAILED,
        _T.PEER_FAULT: _S.FAILED,
    },
    _S.VERIFYING: {
        _T.CHUNK_SENT: _S.VERIFYING,
        _T.HASHES_READ: _S.VERIFYING,
        _T.SAME_ROOT: _S.DONE,
        FileError: _S.FAILED,
        _T.SOURCE_CHANGED: _S.FAILED,
        _T.CANCELLED: _S.FAILED,
        _T.PEER_FAULT: _S.FAILED,
    },
    _S.DONE: {},
    _S.FAILED: {},
}

_AFTER_THE_END: frozenset[Trigger] = frozenset(
    {
        ChunkGrant,
        FileReceived,
        FileVerified,
        FileError,
        _T.CHUNK_SENT,
        _T.HASHES_READ,
        _T.SOURCE_CHANGED,
        _T.CANCELLED,
    }
)

IGNORED: Ignored[SenderState] = {
    _S.SENDING: frozenset(),
    _S.VERIFYING: frozenset(),
    _S.DONE: _AFTER_THE_END,
    _S.FAILED: _AFTER_THE_END,
}
"""The sender finishes what was under way when the transfer ended, and the receiver may
send on."""

_CHANGED = "the file changed while it was sent; send it again"


class Sender(
    TransferMachine[SenderState, SenderOutput], Machine[TransferMessage, SenderOutput]
):
    """The sending side of one transfer, from the offer of the file on.

    Report what happens: `receive_message`, `chunk_sent` for each `ReadAndSend`,
    `hashes_read` for each `HashMissing`, `source_changed`, and `cancel` if the owner or
    its storage gives up. After each, drain `next_output`. It returns at most
    `READ_AHEAD` chunks at a time, so drain it again after `chunk_sent`.

    A new sender of the same file can take over at any time: the hashes that this one
    keeps are only a cache.

    Args:
        transfer_id: The number that the two sides use.
        size: Bytes of the file.
        chunk_size: Bytes of a chunk, as offered.

    Raises:
        InvalidInput: If that makes too many chunks.
    """

    def __init__(self, transfer_id: int, size: int, chunk_size: int) -> None:
        super().__init__(
            transfer_id, SenderState.SENDING, transitions=TRANSITIONS, ignored=IGNORED
        )
        self._hashes = ChunkMap(size, chunk_size)
        self._queue: deque[int] = deque()
        self._in_hand: list[int] = []
        self._hashing: HashMissing | None = None
        self._claimed_root = ""

    @property
    def bytes_known(self) -> int:
        """Bytes of the chunks that were sent or hashed so far, each counted once."""
        return self._hashes.bytes_there

    @override
    def receive_message(self, message: TransferMessage, now: float) -> None:
        """Handle a control message of this transfer.

        Raises:
            LocalProtocolError: If the message is of another transfer.
        """
        self._check_id(message.transfer_id)
        is_expected = self._move_untrusted(type(message))
        if not is_expected or not isinstance(message, ReceiverMessage):
            return  # the messages of a sender are never expected
        match message:
            case ChunkGrant():
                self._receive_grant_untrusted(message)
            case FileReceived(root=root):
                self._claimed_root = root
                self._verify()
            case FileError(reason=reason):
                self._report_failure(reason, tell_peer=False)
            case _:
                assert_never(message)

    def chunk_sent(self, index: int, digest: bytes) -> None:
        """Record that a chunk is on its way.

        Args:
            index: The chunk of a `ReadAndSend`.
            digest: The BLAKE3 hash that it was sent with.

        Raises:
            LocalProtocolError: If there was no `ReadAndSend` for it.
        """
        if self._move(SenderTrigger.CHUNK_SENT):
            if index not in self._in_hand:
                raise LocalProtocolError(f"chunk {index} was not to be sent")
            self._in_hand.remove(index)
            known = self._hashes.digest(index)
            if known not in (None, digest):  # an earlier frame had another hash
                self.source_changed()
            else:
                self._hashes.set(index, digest)
                self._verify()

    def hashes_read(self, digests: Sequence[bytes]) -> None:
        """Record the hashes that the last `HashMissing` asked for.

        Args:
            digests: The BLAKE3 hashes of its chunks, in order.

        Raises:
            LocalProtocolError: If none were asked for, or another number of them.
        """
        if self._move(SenderTrigger.HASHES_READ):
            wanted = self._hashing
            if wanted is None or len(digests) != wanted.count:
                raise LocalProtocolError(f"{len(digests)} hashes were not asked for")
            for index, digest in enumerate(digests, wanted.first):
                self._hashes.set(index, digest)
            self._hashing = None
            self._verify()

    def source_changed(self) -> None:
        """End the transfer because the file is no longer the one that was offered."""
        if self._move(SenderTrigger.SOURCE_CHANGED):
            self._report_failure(_CHANGED)

    def cancel(self, reason: str) -> None:
        """End the transfer because the owner or its storage gave up.

        Args:
            reason: Why, for the receiver.
        """
        if self._move(SenderTrigger.CANCELLED):
            self._report_failure(reason)

    @override
    def next_output(self) -> SenderOutput | None:
        if self._outputs:
            return self._outputs.popleft()
        is_sending = self.state is SenderState.SENDING
        if is_sending and self._queue and len(self._in_hand) < READ_AHEAD:
            index = self._queue.popleft()
            self._in_hand.append(index)
            return ReadAndSend(index)
        return None

    def _receive_grant_untrusted(self, grant: ChunkGrant) -> None:
        first, count = grant.first, grant.count
        if first + count > self._hashes.count:
            self._blame_peer(
                f"chunks {first} to {first + count - 1} were asked for, of a file of "
                f"{self._hashes.count}"
            )
        elif len(self._queue) + count > MAX_WINDOW:
            self._blame_peer(f"more than {MAX_WINDOW} chunks were asked for at once")
        else:
            self._queue.extend(range(first, first + count))

    def _verify(self) -> None:
        """Compare the root that the receiver claims, as soon as our own is known."""
        # The hash of a chunk in hand becomes known when it has been sent.
        if self.state is not SenderState.VERIFYING or self._hashing or self._in_hand:
            return
        if not self._hashes.is_complete:
            run = next(self._hashes.missing())
            self._hashing = HashMissing(run.start, min(len(run), HASH_BATCH))
            self._outputs.append(self._hashing)
        elif self._hashes.root().hex() != self._claimed_root:
            self.source_changed()
        else:
            self._move(SenderTrigger.SAME_ROOT)
            self._send(FileVerified(self.transfer_id))
            self._outputs.append(TransferDone())

    @override
    def _blame_peer(self, reason: str) -> None:
        self._move(SenderTrigger.PEER_FAULT)
        self._report_failure(reason)
