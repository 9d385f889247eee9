"""Every trigger of the two transfer machines, in every state."""

from collections.abc import Callable
from enum import Enum

import msgspec
import pytest

from sleap_rtc.proto.errors import InvalidInput, LocalProtocolError
from sleap_rtc.proto.machine import Trigger
from sleap_rtc.proto.messages import (
    ChunkGrant,
    FileError,
    FileReceived,
    FileVerified,
)
from sleap_rtc.proto.transfer import receiver as receiving
from sleap_rtc.proto.transfer import sender as sending
from sleap_rtc.proto.transfer.chunk_map import ChunkMap
from sleap_rtc.proto.transfer.frames import ChunkHeader
from sleap_rtc.proto.transfer.machine import (
    MAX_WINDOW,
    HashMissing,
    Publish,
    ReadAndSend,
    SendMessage,
    Store,
    TransferDone,
    TransferFailed,
)
from sleap_rtc.proto.transfer.receiver import (
    LIMITS,
    Receiver,
    ReceiverLimits,
    ReceiverState,
    ReceiverTrigger,
)
from sleap_rtc.proto.transfer.sender import (
    HASH_BATCH,
    Sender,
    SenderState,
    SenderTrigger,
)
from tests.proto.transfer.world import CHUNK_SIZE, NOW, TRANSFER_ID, header_of

CONTENT = bytes(range(256)) * 16 + bytes(range(255, -1, -1)) * 16 + b"short"
COUNT = 3
HEADERS = [header_of(CONTENT, index) for index in range(COUNT)]
NO_HASH = "0" * 64
CHANGED = "the file changed while it was sent; send it again"

GRANT = ChunkGrant(TRANSFER_ID, 1, 1)
ERROR = FileError(TRANSFER_ID, "gone")
VERIFIED = FileVerified(TRANSFER_ID)


def outputs_of(machine: Receiver | Sender) -> list[msgspec.Struct]:
    outputs: list[msgspec.Struct] = []
    while (output := machine.next_output()) is not None:
        outputs.append(output)
    return outputs


def turn(machine: Receiver | Sender) -> tuple[Enum, list[msgspec.Struct]]:
    """Return the state of a machine, and its outputs so far."""
    return machine.state, outputs_of(machine)


def root() -> str:
    chunks = ChunkMap(len(CONTENT), CHUNK_SIZE)
    for header in HEADERS:
        chunks.set(header.index, header.hash)
    return chunks.root().hex()


def received() -> FileReceived:
    return FileReceived(TRANSFER_ID, root())


def failure(reason: str) -> list[msgspec.Struct]:
    """Return the outputs of a failure that is reported to the peer."""
    return [SendMessage(FileError(TRANSFER_ID, reason)), TransferFailed(reason)]


# ---------------------------------------------------------------------- receiver


def new_receiver(window: int = LIMITS.window) -> Receiver:
    chunks = ChunkMap(len(CONTENT), CHUNK_SIZE)
    return Receiver(TRANSFER_ID, chunks, ReceiverLimits(window=window))


def receiver_in(state: ReceiverState) -> Receiver:
    """Return a receiver in a state; when it is RECEIVING, chunk 0 is being stored."""
    receiver = new_receiver()
    receiver.chunk_arrived(HEADERS[0])
    if state is ReceiverState.FAILED:
        receiver.cancel("enough")
    elif state is not ReceiverState.RECEIVING:
        receiver.chunk_stored(0)
        for header in HEADERS[1:]:
            receiver.chunk_arrived(header)
            receiver.chunk_stored(header.index)
        if state is not ReceiverState.VERIFYING:
            receiver.receive_message(VERIFIED, NOW)
        if state is ReceiverState.DONE:
            receiver.published()
    outputs_of(receiver)
    assert receiver.state is state
    return receiver


_R = ReceiverState

RECEIVER_INPUTS: dict[Trigger, Callable[[Receiver], object]] = {
    ReceiverTrigger.CHUNK_ARRIVED: lambda r: r.chunk_arrived(HEADERS[1]),
    ReceiverTrigger.CHUNK_STORED: lambda r: r.chunk_stored(0),
    ReceiverTrigger.CHUNK_DAMAGED: lambda r: r.chunk_damaged(0),
    ReceiverTrigger.PUBLISHED: Receiver.published,
    ReceiverTrigger.CANCELLED: lambda r: r.cancel("enough"),
    ChunkGrant: lambda r: r.receive_message(GRANT, NOW),
    FileReceived: lambda r: r.receive_message(received(), NOW),
    FileVerified: lambda r: r.receive_message(VERIFIED, NOW),
    FileError: lambda r: r.receive_message(ERROR, NOW),
}

RECEIVER_GUARDS = {ReceiverTrigger.ALL_STORED, ReceiverTrigger.PEER_FAULT}
"""Triggers that the machine picks itself."""

RECEIVER_CELLS: dict[
    tuple[ReceiverState, Trigger], tuple[ReceiverState, list[msgspec.Struct]]
] = {
    (_R.RECEIVING, ReceiverTrigger.CHUNK_ARRIVED): (
        _R.RECEIVING,
        [Store(1, HEADERS[1].hash)],
    ),
    (_R.RECEIVING, ReceiverTrigger.CHUNK_STORED): (_R.RECEIVING, []),
    (_R.RECEIVING, ReceiverTrigger.CHUNK_DAMAGED): (
        _R.RECEIVING,
        [SendMessage(ChunkGrant(TRANSFER_ID, 0, 1))],
    ),
    (_R.RECEIVING, ReceiverTrigger.CANCELLED): (_R.FAILED, failure("enough")),
    (_R.RECEIVING, FileError): (_R.FAILED, [TransferFailed("gone")]),
    (_R.VERIFYING, ReceiverTrigger.CANCELLED): (_R.FAILED, failure("enough")),
    (_R.VERIFYING, FileVerified): (_R.PUBLISHING, [Publish()]),
    (_R.VERIFYING, FileError): (_R.FAILED, [TransferFailed("gone")]),
    (_R.PUBLISHING, ReceiverTrigger.PUBLISHED): (_R.DONE, [TransferDone()]),
    (_R.PUBLISHING, ReceiverTrigger.CANCELLED): (_R.FAILED, failure("enough")),
}
"""The next state and the outputs, not taken from the table of the machine."""

_MESSAGES: set[Trigger] = {ChunkGrant, FileReceived, FileVerified, FileError}

RECEIVER_IGNORES: dict[ReceiverState, set[Trigger]] = {
    _R.RECEIVING: set(),
    _R.VERIFYING: {ReceiverTrigger.CHUNK_ARRIVED},
    _R.PUBLISHING: {ReceiverTrigger.CHUNK_ARRIVED, FileVerified, FileError},
    _R.DONE: {ReceiverTrigger.CHUNK_ARRIVED, ReceiverTrigger.CANCELLED, *_MESSAGES},
    _R.FAILED: set(RECEIVER_INPUTS),
}


@pytest.mark.parametrize("trigger", RECEIVER_INPUTS)
@pytest.mark.parametrize("state", ReceiverState)
def test_every_trigger_of_a_receiver_in_every_state(
    state: ReceiverState, trigger: Trigger
) -> None:
    receiver = receiver_in(state)
    give = RECEIVER_INPUTS[trigger]
    if (state, trigger) in RECEIVER_CELLS:
        give(receiver)
        assert turn(receiver) == RECEIVER_CELLS[state, trigger]
    elif trigger in RECEIVER_IGNORES[state]:
        give(receiver)
        assert turn(receiver) == (state, [])
    elif isinstance(trigger, type) or trigger is ReceiverTrigger.CHUNK_ARRIVED:
        give(receiver)
        name = trigger.__name__ if isinstance(trigger, type) else trigger.name
        reason = f"{name} is not expected in state {state.name}"
        assert outputs_of(receiver) == failure(reason)
        assert receiver.state is ReceiverState.FAILED
    else:
        with pytest.raises(LocalProtocolError):
            give(receiver)
        assert turn(receiver) == (state, [])


def test_no_trigger_of_a_receiver_is_left_out() -> None:
    for state in ReceiverState:
        row, ignored = receiving.TRANSITIONS[state].keys(), receiving.IGNORED[state]
        assert not row & ignored
        assert ignored == RECEIVER_IGNORES[state]
        tested = {trigger for other, trigger in RECEIVER_CELLS if other is state}
        assert tested == row - RECEIVER_GUARDS


def test_a_receiver_asks_stores_verifies_and_publishes() -> None:
    receiver = new_receiver()
    grant = SendMessage(ChunkGrant(TRANSFER_ID, 0, COUNT))
    assert turn(receiver) == (_R.RECEIVING, [grant])
    for header in reversed(HEADERS):
        assert receiver.chunk_arrived(header)
        assert turn(receiver) == (_R.RECEIVING, [Store(header.index, header.hash)])
        receiver.chunk_stored(header.index)
    assert turn(receiver) == (_R.VERIFYING, [SendMessage(received())])
    receiver.receive_message(VERIFIED, NOW)
    assert turn(receiver) == (_R.PUBLISHING, [Publish()])
    receiver.published()
    assert turn(receiver) == (_R.DONE, [TransferDone()])


@pytest.mark.parametrize("state", [_R.RECEIVING, _R.VERIFYING, _R.PUBLISHING])
def test_a_receiver_fails_for_good_at_a_fault_of_the_sender(
    state: ReceiverState,
) -> None:
    receiver = receiver_in(state)
    receiver.receive_message(GRANT, NOW)
    assert outputs_of(receiver) == failure(
        f"ChunkGrant is not expected in state {state.name}"
    )
    for give in RECEIVER_INPUTS.values():
        give(receiver)
    assert turn(receiver) == (_R.FAILED, [])


def test_a_receiver_that_has_every_chunk_only_verifies() -> None:
    complete = receiver_in(ReceiverState.VERIFYING).chunk_map
    receiver = Receiver(TRANSFER_ID, complete)
    assert outputs_of(receiver) == [SendMessage(received())]
    assert receiver.state is ReceiverState.VERIFYING


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (ChunkHeader(TRANSFER_ID, 3, 5, bytes(32)), "chunk 3 came of a file of 3"),
        (
            ChunkHeader(TRANSFER_ID, 2**32 - 1, 5, bytes(32)),
            "chunk 4294967295 came of a file of 3",
        ),
        (
            ChunkHeader(TRANSFER_ID, 0, 4095, bytes(32)),
            "chunk 0 came with 4095 bytes instead of 4096",
        ),
        (
            ChunkHeader(TRANSFER_ID, 2, 4096, bytes(32)),
            "chunk 2 came with 4096 bytes instead of 5",
        ),
        (HEADERS[2], "chunk 2 came and was not granted"),
    ],
)
def test_a_chunk_that_was_not_asked_for_ends_the_transfer(
    header: ChunkHeader, reason: str
) -> None:
    receiver = new_receiver(window=2)
    outputs_of(receiver)
    assert not receiver.chunk_arrived(header)
    assert outputs_of(receiver) == failure(reason)
    assert receiver.state is ReceiverState.FAILED


def test_a_chunk_that_comes_twice_is_stored_once() -> None:
    receiver = receiver_in(ReceiverState.RECEIVING)
    assert not receiver.chunk_arrived(HEADERS[0])  # it is being stored
    receiver.chunk_stored(0)
    assert not receiver.chunk_arrived(HEADERS[0])  # it is stored
    assert outputs_of(receiver) == []


def test_input_of_another_transfer_is_the_callers_fault() -> None:
    receiver = receiver_in(ReceiverState.RECEIVING)
    sender = sender_in(SenderState.SENDING)
    with pytest.raises(LocalProtocolError, match="transfer 7 got input of transfer 8"):
        receiver.chunk_arrived(ChunkHeader(8, 0, CHUNK_SIZE, bytes(32)))
    for machine in (receiver, sender):
        with pytest.raises(LocalProtocolError, match="of transfer 8"):
            machine.receive_message(FileError(8, "gone"), NOW)
        assert outputs_of(machine) == []


def test_a_failure_replaces_all_waiting_outputs() -> None:
    receiver = new_receiver()
    receiver.chunk_arrived(HEADERS[0])
    receiver.cancel("enough")
    assert outputs_of(receiver) == failure("enough")


def test_a_report_without_a_store_is_the_callers_fault() -> None:
    receiver = receiver_in(ReceiverState.RECEIVING)
    for answer in (receiver.chunk_stored, receiver.chunk_damaged):
        with pytest.raises(LocalProtocolError, match="chunk 1 is not being stored"):
            answer(1)
    assert receiver.outstanding == COUNT


@pytest.mark.parametrize("window", [0, -1, MAX_WINDOW + 1])
def test_a_window_has_limits(window: int) -> None:
    with pytest.raises(LocalProtocolError, match="window"):
        new_receiver(window=window)


def test_large_chunks_make_a_small_window() -> None:
    chunk_size = 16 * 1024 * 1024
    chunks = ChunkMap(100 * chunk_size, chunk_size)
    receiver = Receiver(TRANSFER_ID, chunks)
    assert receiver.outstanding * chunk_size == LIMITS.window_bytes


# ------------------------------------------------------------------------ sender


def new_sender(size: int = len(CONTENT)) -> Sender:
    return Sender(TRANSFER_ID, size, CHUNK_SIZE)


def sender_in(state: SenderState, *, in_hand: bool = True) -> Sender:
    """Return a sender in a state.

    When it is SENDING, chunk 0 is in hand. When it is VERIFYING, either chunk 0 is in
    hand, or chunk 1 was sent and the other hashes are being read.
    """
    sender = new_sender()
    if state is SenderState.FAILED:
        sender.cancel("enough")
    elif state is SenderState.DONE or not in_hand:
        sender.receive_message(ChunkGrant(TRANSFER_ID, 1, 1), NOW)
        outputs_of(sender)
        sender.chunk_sent(1, HEADERS[1].hash)
        sender.receive_message(received(), NOW)
        if state is SenderState.DONE:
            sender.hashes_read([HEADERS[0].hash])
            sender.hashes_read([HEADERS[2].hash])
    else:
        sender.receive_message(ChunkGrant(TRANSFER_ID, 0, 1), NOW)
        outputs_of(sender)
        if state is SenderState.VERIFYING:
            sender.receive_message(received(), NOW)
    outputs_of(sender)
    assert sender.state is state
    return sender


_S = SenderState

SENDER_INPUTS: dict[Trigger, Callable[[Sender], object]] = {
    SenderTrigger.CHUNK_SENT: lambda s: s.chunk_sent(0, HEADERS[0].hash),
    SenderTrigger.HASHES_READ: lambda s: s.hashes_read([HEADERS[0].hash]),
    SenderTrigger.SOURCE_CHANGED: Sender.source_changed,
    SenderTrigger.CANCELLED: lambda s: s.cancel("enough"),
    ChunkGrant: lambda s: s.receive_message(GRANT, NOW),
    FileReceived: lambda s: s.receive_message(received(), NOW),
    FileVerified: lambda s: s.receive_message(VERIFIED, NOW),
    FileError: lambda s: s.receive_message(ERROR, NOW),
}

SENDER_GUARDS = {SenderTrigger.SAME_ROOT, SenderTrigger.PEER_FAULT}
"""Triggers that the machine picks itself."""

SENDER_CELLS: dict[
    tuple[SenderState, Trigger], tuple[SenderState, list[msgspec.Struct]]
] = {
    (_S.SENDING, SenderTrigger.CHUNK_SENT): (_S.SENDING, []),
    (_S.SENDING, SenderTrigger.SOURCE_CHANGED): (_S.FAILED, failure(CHANGED)),
    (_S.SENDING, SenderTrigger.CANCELLED): (_S.FAILED, failure("enough")),
    (_S.SENDING, ChunkGrant): (_S.SENDING, [ReadAndSend(1)]),
    (_S.SENDING, FileReceived): (_S.VERIFYING, []),
    (_S.SENDING, FileError): (_S.FAILED, [TransferFailed("gone")]),
    (_S.VERIFYING, SenderTrigger.CHUNK_SENT): (_S.VERIFYING, [HashMissing(1, 2)]),
    (_S.VERIFYING, SenderTrigger.HASHES_READ): (_S.VERIFYING, [HashMissing(2, 1)]),
    (_S.VERIFYING, SenderTrigger.SOURCE_CHANGED): (_S.FAILED, failure(CHANGED)),
    (_S.VERIFYING, SenderTrigger.CANCELLED): (_S.FAILED, failure("enough")),
    (_S.VERIFYING, FileError): (_S.FAILED, [TransferFailed("gone")]),
}
"""The next state and the outputs, not taken from the table of the machine."""

SENDER_IGNORES: dict[SenderState, set[Trigger]] = {
    _S.SENDING: set(),
    _S.VERIFYING: set(),
    _S.DONE: set(SENDER_INPUTS),
    _S.FAILED: set(SENDER_INPUTS),
}


@pytest.mark.parametrize("trigger", SENDER_INPUTS)
@pytest.mark.parametrize("state", SenderState)
def test_every_trigger_of_a_sender_in_every_state(
    state: SenderState, trigger: Trigger
) -> None:
    sender = sender_in(
        state,
        in_hand=trigger is not SenderTrigger.HASHES_READ
        or state is SenderState.SENDING,
    )
    give = SENDER_INPUTS[trigger]
    if (state, trigger) in SENDER_CELLS:
        give(sender)
        assert turn(sender) == SENDER_CELLS[state, trigger]
    elif trigger in SENDER_IGNORES[state]:
        give(sender)
        assert turn(sender) == (state, [])
    elif isinstance(trigger, type):
        give(sender)
        reason = f"{trigger.__name__} is not expected in state {state.name}"
        assert outputs_of(sender) == failure(reason)
        assert sender.state is SenderState.FAILED
    else:
        with pytest.raises(LocalProtocolError):
            give(sender)
        assert turn(sender) == (state, [])


def test_no_trigger_of_a_sender_is_left_out() -> None:
    for state in SenderState:
        row, ignored = sending.TRANSITIONS[state].keys(), sending.IGNORED[state]
        assert not row & ignored
        assert ignored == SENDER_IGNORES[state]
        tested = {trigger for other, trigger in SENDER_CELLS if other is state}
        assert tested == row - SENDER_GUARDS


def test_a_sender_serves_grants_in_order_and_two_at_a_time() -> None:
    sender = new_sender()
    sender.receive_message(ChunkGrant(TRANSFER_ID, 1, 2), NOW)
    sender.receive_message(ChunkGrant(TRANSFER_ID, 0, 1), NOW)
    assert outputs_of(sender) == [ReadAndSend(1), ReadAndSend(2)]
    sender.chunk_sent(2, HEADERS[2].hash)
    assert outputs_of(sender) == [ReadAndSend(0)]
    sender.chunk_sent(1, HEADERS[1].hash)
    sender.chunk_sent(0, HEADERS[0].hash)
    assert turn(sender) == (_S.SENDING, [])
    assert sender.bytes_known == len(CONTENT)
    sender.receive_message(received(), NOW)
    assert turn(sender) == (_S.DONE, [SendMessage(VERIFIED), TransferDone()])


def test_a_sender_reads_the_chunks_of_an_earlier_sender_before_it_verifies() -> None:
    sender = new_sender()
    sender.receive_message(received(), NOW)
    assert turn(sender) == (_S.VERIFYING, [HashMissing(0, COUNT)])
    sender.hashes_read([header.hash for header in HEADERS])
    assert turn(sender) == (_S.DONE, [SendMessage(VERIFIED), TransferDone()])


@pytest.mark.parametrize("state", [_S.SENDING, _S.VERIFYING])
def test_a_sender_fails_for_good_at_a_fault_of_the_receiver(state: SenderState) -> None:
    sender = sender_in(state)
    sender.receive_message(VERIFIED, NOW)
    assert outputs_of(sender) == failure(
        f"FileVerified is not expected in state {state.name}"
    )
    for give in SENDER_INPUTS.values():
        give(sender)
    assert turn(sender) == (_S.FAILED, [])


def test_the_verdict_waits_for_chunks_that_are_in_hand() -> None:
    sender = new_sender()
    sender.receive_message(ChunkGrant(TRANSFER_ID, 0, 3), NOW)
    outputs_of(sender)
    sender.chunk_sent(0, HEADERS[0].hash)
    outputs_of(sender)
    sender.receive_message(received(), NOW)
    assert outputs_of(sender) == []
    sender.chunk_sent(1, HEADERS[1].hash)
    assert outputs_of(sender) == []
    sender.chunk_sent(2, HEADERS[2].hash)
    assert outputs_of(sender) == [SendMessage(VERIFIED), TransferDone()]


def test_hashes_that_are_missing_are_read_in_batches() -> None:
    count = HASH_BATCH + 3
    sender = new_sender(count * CHUNK_SIZE)
    sender.receive_message(ChunkGrant(TRANSFER_ID, 1, 1), NOW)
    outputs_of(sender)
    sender.chunk_sent(1, bytes(32))
    sender.receive_message(FileReceived(TRANSFER_ID, NO_HASH), NOW)
    batches = [(0, 1), (2, HASH_BATCH), (2 + HASH_BATCH, 1)]
    for first, size in batches:
        assert outputs_of(sender) == [HashMissing(first, size)]
        sender.hashes_read([bytes(32)] * size)
    assert outputs_of(sender) == failure(CHANGED)  # NO_HASH is not their root


@pytest.mark.parametrize("number", [0, 2, 4])
def test_the_wrong_number_of_hashes_is_the_callers_fault(number: int) -> None:
    sender = sender_in(SenderState.VERIFYING, in_hand=False)
    known = sender.bytes_known
    with pytest.raises(LocalProtocolError, match="were not asked for"):
        sender.hashes_read([bytes(32)] * number)
    assert sender.bytes_known == known


@pytest.mark.parametrize(("first", "count"), [(3, 1), (0, 4), (2**32 - 1, 2**32 - 1)])
def test_a_grant_outside_the_file_ends_the_transfer(first: int, count: int) -> None:
    sender = new_sender()
    sender.receive_message(ChunkGrant(TRANSFER_ID, first, count), NOW)
    last = first + count - 1
    assert outputs_of(sender) == failure(
        f"chunks {first} to {last} were asked for, of a file of 3"
    )
    assert sender.state is SenderState.FAILED


def test_a_grant_of_more_than_the_largest_window_ends_the_transfer() -> None:
    sender = new_sender(1000 * CHUNK_SIZE)
    sender.receive_message(ChunkGrant(TRANSFER_ID, 0, MAX_WINDOW), NOW)
    sender.receive_message(ChunkGrant(TRANSFER_ID, 0, 1), NOW)
    assert outputs_of(sender) == failure("more than 64 chunks were asked for at once")
    assert sender.state is SenderState.FAILED


def test_another_root_means_a_changed_file() -> None:
    sender = new_sender(0)
    sender.receive_message(FileReceived(TRANSFER_ID, NO_HASH), NOW)
    assert outputs_of(sender) == failure(CHANGED)


def test_another_hash_of_a_chunk_that_was_sent_means_a_changed_file() -> None:
    sender = new_sender()
    for digest in (HEADERS[0].hash, HEADERS[1].hash):
        sender.receive_message(ChunkGrant(TRANSFER_ID, 0, 1), NOW)
        assert outputs_of(sender) == [ReadAndSend(0)]
        sender.chunk_sent(0, digest)
    assert outputs_of(sender) == failure(CHANGED)


def test_a_chunk_that_was_not_asked_for_cannot_have_been_sent() -> None:
    sender = new_sender()
    with pytest.raises(LocalProtocolError, match="was not to be sent"):
        sender.chunk_sent(0, HEADERS[0].hash)


def test_chunks_that_the_receiver_no_longer_waits_for_are_not_sent() -> None:
    sender = new_sender()
    sender.receive_message(ChunkGrant(TRANSFER_ID, 0, 3), NOW)
    assert sender.next_output() == ReadAndSend(0)
    sender.receive_message(received(), NOW)
    assert outputs_of(sender) == []
    sender.chunk_sent(0, HEADERS[0].hash)
    assert outputs_of(sender) == [HashMissing(1, 2)]


def test_a_sender_that_failed_sends_nothing_more() -> None:
    sender = new_sender()
    sender.receive_message(ChunkGrant(TRANSFER_ID, 0, 3), NOW)
    sender.cancel("enough")
    assert outputs_of(sender) == failure("enough")


def test_a_file_of_too_many_chunks_is_refused() -> None:
    with pytest.raises(InvalidInput, match="use larger chunks"):
        new_sender(2**50)
