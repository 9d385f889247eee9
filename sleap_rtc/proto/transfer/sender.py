"""The sending side of a transfer: it sends what is asked for, and checks the end."""

from collections import deque
from collections.abc import Sequence
from enum import Enum, auto
from typing import assert_never

from sleap_rtc.proto.errors import LocalProtocolError
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
    Machine,
    ReadAndSend,
    SenderDone,
    SenderFailed,
    SenderOutput,
    TransferMessage,
    read_table,
)

READ_AHEAD = 2
"""Chunks that a sender handles at a time: one is read while one is sent."""

HASH_BATCH = 64
"""Chunks in one `HashMissing`: few enough that a cancellation is felt soon."""


class SenderState(Enum):
    """Where a sender stands."""

    SENDING = auto()
    VERIFYING = auto()
    DONE = auto()
    FAILED = auto()


SENDER_TABLE = read_table(
    SenderState,
    """
    in_state        SENDING    VERIFYING  DONE  FAILED
    CHUNK_GRANT     .          peer's     -     -
    chunk_sent      .          .          -     -
    FILE_RECEIVED   VERIFYING  peer's     -     -
    hashes_read     ours       .          -     -
    same_root       ours       DONE       ours  ours
    FILE_ERROR      FAILED     FAILED     -     -
    wrong_message   peer's     peer's     -     -
    source_changed  FAILED     FAILED     -     -
    source_failed   FAILED     FAILED     -     -
    cancel          FAILED     FAILED     -     -
    link_lost       SENDING    SENDING    -     -
    """,
)

_CHANGED = "the file changed while it was sent; send it again"


class Sender(Machine[SenderState, SenderOutput]):
    """The sending side of one transfer, from the moment on that the file is offered.

    Give it what happens: `receive_message`, `chunk_sent` for each `ReadAndSend`,
    `hashes_read` for each `HashMissing`, `source_changed`, `source_failed`, `cancel`
    and `link_lost`. After each, drain `next_output`; it hands out at most `READ_AHEAD`
    chunks at a time, so drain again after `chunk_sent`. After `link_lost` every effect
    that was handed out is void and must not be answered.

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
        super().__init__(transfer_id, SenderState.SENDING, SENDER_TABLE)
        self._hashes = ChunkMap(size, chunk_size)
        self._queue: deque[int] = deque()
        self._in_hand: list[int] = []
        self._hashing: HashMissing | None = None
        self._claimed_root = ""

    @property
    def bytes_known(self) -> int:
        """Bytes of the chunks that were sent or hashed so far, each counted once."""
        return self._hashes.bytes_there

    def receive_message(self, message: TransferMessage) -> None:
        """Take a control message of this transfer.

        Raises:
            RemoteProtocolError: If the receiver may not say that now. The transfer has
                failed then.
            LocalProtocolError: If the message is of another transfer.
        """
        self._check_id(message.transfer_id)
        match message:
            case ChunkGrant():
                if self._enter("CHUNK_GRANT", "CHUNK_GRANT came after FILE_RECEIVED"):
                    self._take_grant_untrusted(message)
            case FileReceived(root=root):
                if self._enter("FILE_RECEIVED", "FILE_RECEIVED came twice"):
                    self._claimed_root = root
                    self._queue.clear()
                    self._verify()
            case FileError(reason=reason):
                if self._enter("FILE_ERROR"):
                    self._fail(reason, tell_peer=False)
            case FileVerified():
                self._enter("wrong_message", "the receiver spoke as if it sent")
            case _:
                assert_never(message)

    def chunk_sent(self, index: int, digest: bytes) -> None:
        """Note that a chunk is on its way.

        Args:
            index: The chunk of a `ReadAndSend`.
            digest: The BLAKE3 hash that it was sent with.

        Raises:
            LocalProtocolError: If nobody asked for it.
        """
        if self._enter("chunk_sent"):
            if index not in self._in_hand:
                raise LocalProtocolError(f"chunk {index} was not to be sent")
            self._learn(index, digest)
            if self.state is not SenderState.FAILED:
                self._in_hand.remove(index)
                self._verify()

    def hashes_read(self, digests: Sequence[bytes]) -> None:
        """Take the hashes that the last `HashMissing` asked for.

        Args:
            digests: The BLAKE3 hashes of its chunks, in order.

        Raises:
            LocalProtocolError: If nobody asked, or for another number of them.
        """
        if self._enter("hashes_read"):
            wanted = self._hashing
            if wanted is None or len(digests) != wanted.count:
                raise LocalProtocolError(f"{len(digests)} hashes that nobody asked for")
            for index, digest in enumerate(digests, wanted.first):
                self._hashes.set(index, digest)
            self._hashing = None
            self._verify()

    def source_changed(self) -> None:
        """End the transfer, because the file is no longer what was offered."""
        if self._enter("source_changed"):
            self._fail(_CHANGED)

    def source_failed(self, reason: str) -> None:
        """End the transfer, because the file can't be read.

        Args:
            reason: What the receiver is told.
        """
        if self._enter("source_failed"):
            self._fail(reason)

    def cancel(self, reason: str) -> None:
        """Give up, because the owner wants it.

        Args:
            reason: What the receiver is told.
        """
        if self._enter("cancel"):
            self._fail(reason)

    def link_lost(self) -> None:
        """Forget every grant: the receiver grants again over the next link."""
        if self._enter("link_lost"):
            self._outputs.clear()
            self._queue.clear()
            self._in_hand.clear()
            self._hashing = None

    def next_output(self) -> SenderOutput | None:
        """Return what is to be done next, or None."""
        if self._outputs:
            return self._outputs.popleft()
        if self._queue and len(self._in_hand) < READ_AHEAD:
            index = self._queue.popleft()
            self._in_hand.append(index)
            return ReadAndSend(index)
        return None

    def _take_grant_untrusted(self, grant: ChunkGrant) -> None:
        first, count = grant.first, grant.count
        if first + count > self._hashes.count:
            self._blame_peer(
                f"chunks {first} to {first + count - 1} were asked for, of a file of "
                f"{self._hashes.count}"
            )
        if len(self._queue) + count > MAX_WINDOW:
            self._blame_peer(f"more than {MAX_WINDOW} chunks were asked for at once")
        self._queue.extend(range(first, first + count))

    def _learn(self, index: int, digest: bytes) -> None:
        """Note a hash; a chunk that had another one before means a changed file."""
        known = self._hashes.digest(index)
        self._hashes.set(index, digest)
        if known is not None and known != digest:
            self.source_changed()

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
            self._fail(_CHANGED)
        else:
            self._enter("same_root")
            self._send(FileVerified(self.transfer_id))
            self._outputs.append(SenderDone())

    def _fail(self, reason: str, *, tell_peer: bool = True) -> None:
        self.state = SenderState.FAILED
        self._queue.clear()
        self._outputs.clear()
        if tell_peer:
            self._send(FileError(self.transfer_id, reason))
        self._outputs.append(SenderFailed(reason))
