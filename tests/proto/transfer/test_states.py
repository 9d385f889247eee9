"""Every input of the two transfer machines, in every state."""

from collections.abc import Callable
from enum import Enum

import msgspec
import pytest

from sleap_rtc.proto.errors import InvalidInput, LocalProtocolError, RemoteProtocolError
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
    HashMissing,
    Publish,
    ReadAndSend,
    SenderDone,
    SenderFailed,
    SendMessage,
    Store,
    TransferDone,
    TransferFailed,
)
from sleap_rtc.proto.transfer.receiver import (
    MAX_WINDOW_BYTES,
    RECEIVER_TABLE,
    Receiver,
    ReceiverState,
)
from sleap_rtc.proto.transfer.sender import (
    HASH_BATCH,
    SENDER_TABLE,
    Sender,
    SenderState,
)
from tests.proto.transfer.world import CHUNK_SIZE, TRANSFER_ID, file_of, header_of

CONTENT = bytes(range(256)) * 32 + b"short"  # two whole chunks and a short one
COUNT = 3
HEADERS = [header_of(CONTENT, index) for index in range(COUNT)]
NO_HASH = "0" * 64


def outputs_of(machine: Receiver | Sender) -> list[msgspec.Struct]:
    outputs: list[msgspec.Struct] = []
    while (output := machine.next_output()) is not None:
        outputs.append(output)
    return outputs


def root() -> str:
    chunks = ChunkMap(len(CONTENT), CHUNK_SIZE)
    for header in HEADERS:
        chunks.set(header.index, header.hash)
    return chunks.root().hex()


# ---------------------------------------------------------------------- receiver


def receiver_in(state: ReceiverState) -> Receiver:
    """A receiver in a state; when it is RECEIVING, chunk 0 is being stored."""
    receiver = Receiver(TRANSFER_ID, file_of(len(CONTENT)))
    if state is ReceiverState.NEW:
        return receiver
    receiver.start()
    receiver.chunk_arrived(HEADERS[0])
    if state is ReceiverState.FAILED:
        receiver.cancel("enough")
    if state.value >= ReceiverState.VERIFYING.value and receiver.outstanding:
        receiver.chunk_stored(0)
        for header in HEADERS[1:]:
            receiver.chunk_arrived(header)
            receiver.chunk_stored(header.index)
        if state is not ReceiverState.VERIFYING:
            receiver.receive_message(FileVerified(TRANSFER_ID))
        if state is ReceiverState.DONE:
            receiver.published()
    outputs_of(receiver)
    assert receiver.state is state
    return receiver


RECEIVER_INPUTS: dict[str, Callable[[Receiver], object]] = {
    "start": Receiver.start,
    "chunk_arrived": lambda r: r.chunk_arrived(HEADERS[1]),
    "chunk_stored": lambda r: r.chunk_stored(0),
    "chunk_damaged": lambda r: r.chunk_damaged(0),
    "FILE_VERIFIED": lambda r: r.receive_message(FileVerified(TRANSFER_ID)),
    "FILE_ERROR": lambda r: r.receive_message(FileError(TRANSFER_ID, "gone")),
    "CHUNK_GRANT": lambda r: r.receive_message(ChunkGrant(TRANSFER_ID, 0, 1)),
    "FILE_RECEIVED": lambda r: r.receive_message(FileReceived(TRANSFER_ID, root())),
    "published": Receiver.published,
    "cancel": lambda r: r.cancel("enough"),
    "link_lost": Receiver.link_lost,
    "link_restored": Receiver.link_restored,
}

# What each input leads to, states across: a state by its first letter (N, R, V, P, D,
# F), "=" for no change and no output, "L" and "!" for the fault of this side and of
# the peer.
RECEIVER_EXPECTED = {
    "start": "RLLLLL",
    "chunk_arrived": "!R====",
    "chunk_stored": "LRLLL=",
    "chunk_damaged": "LRLLL=",
    "FILE_VERIFIED": "!!P===",
    "FILE_ERROR": "FFF===",
    "CHUNK_GRANT": "!!!!==",
    "FILE_RECEIVED": "!!!!==",
    "published": "LLLDL=",
    "cancel": "FFFF==",
    "link_lost": "NRVP==",
    "link_restored": "NRVP==",
}


def letter(state: Enum) -> str:
    return state.name[0]


@pytest.mark.parametrize("name", RECEIVER_INPUTS)
@pytest.mark.parametrize("state", ReceiverState)
def test_every_input_of_a_receiver_in_every_state(
    state: ReceiverState, name: str
) -> None:
    receiver = receiver_in(state)
    expected = RECEIVER_EXPECTED[name][list(ReceiverState).index(state)]
    give = RECEIVER_INPUTS[name]
    if expected == "L":
        with pytest.raises(LocalProtocolError):
            give(receiver)
        assert (receiver.state, outputs_of(receiver)) == (state, [])
    elif expected == "!":
        with pytest.raises(RemoteProtocolError) as caught:
            give(receiver)
        assert receiver.state is ReceiverState.FAILED
        assert outputs_of(receiver) == [
            SendMessage(FileError(TRANSFER_ID, caught.value.reason)),
            Discard(),
            TransferFailed(caught.value.reason),
        ]
    else:
        give(receiver)
        if expected == "=":
            assert (receiver.state, outputs_of(receiver)) == (state, [])
        assert expected in (letter(receiver.state), "=")


def test_the_receiver_table_has_no_row_that_is_not_tested() -> None:
    rows = {name for name, _ in RECEIVER_TABLE}
    inputs = set(RECEIVER_INPUTS) - {"CHUNK_GRANT", "FILE_RECEIVED"}
    assert rows == inputs | {"wrong_message", "all_stored"}


def test_a_receiver_asks_stores_verifies_and_publishes() -> None:
    receiver = Receiver(TRANSFER_ID, file_of(len(CONTENT)))
    receiver.start()
    assert outputs_of(receiver) == [SendMessage(ChunkGrant(TRANSFER_ID, 0, COUNT))]
    for header in reversed(HEADERS):
        assert receiver.chunk_arrived(header)
        assert outputs_of(receiver) == [Store(header.index, header.hash)]
        receiver.chunk_stored(header.index)
    assert outputs_of(receiver) == [SendMessage(FileReceived(TRANSFER_ID, root()))]
    receiver.receive_message(FileVerified(TRANSFER_ID))
    assert outputs_of(receiver) == [Publish()]
    receiver.published()
    assert outputs_of(receiver) == [TransferDone()]


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (ChunkHeader(TRANSFER_ID, 3, 5, bytes(32)), "chunk 3 came of a file of 3"),
        (ChunkHeader(TRANSFER_ID, 2**32 - 1, 5, bytes(32)), "came of a file of 3"),
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
def test_a_chunk_that_nobody_asked_for_ends_the_transfer(
    header: ChunkHeader, reason: str
) -> None:
    receiver = Receiver(TRANSFER_ID, file_of(len(CONTENT)), window=2)
    receiver.start()
    with pytest.raises(RemoteProtocolError, match=reason):
        receiver.chunk_arrived(header)
    assert receiver.state is ReceiverState.FAILED
    assert receiver.outstanding == 0


def test_a_chunk_that_comes_twice_is_counted_and_stored_once() -> None:
    receiver = receiver_in(ReceiverState.RECEIVING)
    assert not receiver.chunk_arrived(HEADERS[0])  # it is being stored
    receiver.chunk_stored(0)
    assert not receiver.chunk_arrived(HEADERS[0])  # it is stored
    receiver.link_lost()
    assert not receiver.chunk_arrived(HEADERS[1])  # its grant is void
    assert receiver.duplicates == 3
    assert outputs_of(receiver) == []


def test_what_belongs_to_another_transfer_is_the_callers_fault() -> None:
    receiver = receiver_in(ReceiverState.RECEIVING)
    sender = sender_in(SenderState.SENDING)
    with pytest.raises(LocalProtocolError, match="transfer 7 was given what is of 8"):
        receiver.chunk_arrived(ChunkHeader(8, 0, CHUNK_SIZE, bytes(32)))
    for machine in (receiver, sender):
        with pytest.raises(LocalProtocolError, match="of 8"):
            machine.receive_message(FileError(8, "gone"))
        assert outputs_of(machine) == []


def test_an_answer_to_no_store_is_the_callers_fault() -> None:
    receiver = receiver_in(ReceiverState.RECEIVING)
    for answer in (receiver.chunk_stored, receiver.chunk_damaged):
        with pytest.raises(LocalProtocolError, match="chunk 1 is not being stored"):
            answer(1)
    assert receiver.outstanding == COUNT


def test_a_receiver_without_a_link_says_nothing_until_it_has_one() -> None:
    receiver = Receiver(TRANSFER_ID, file_of(len(CONTENT)))
    receiver.link_lost()
    receiver.start()
    assert outputs_of(receiver) == []
    receiver.link_restored()
    receiver.link_restored()  # it counts once
    assert outputs_of(receiver) == [SendMessage(ChunkGrant(TRANSFER_ID, 0, COUNT))]


def test_a_link_lost_while_verifying_makes_the_receiver_ask_again() -> None:
    receiver = receiver_in(ReceiverState.VERIFYING)
    receiver.link_lost()
    assert outputs_of(receiver) == []
    receiver.link_restored()
    assert outputs_of(receiver) == [SendMessage(FileReceived(TRANSFER_ID, root()))]


def test_the_last_write_may_end_while_there_is_no_link() -> None:
    receiver = receiver_in(ReceiverState.RECEIVING)
    for header in HEADERS[1:]:
        receiver.chunk_arrived(header)
    outputs_of(receiver)
    receiver.link_lost()
    for index in range(COUNT):
        receiver.chunk_stored(index)
    assert outputs_of(receiver) == []
    receiver.link_restored()
    assert outputs_of(receiver) == [SendMessage(FileReceived(TRANSFER_ID, root()))]


def test_messages_that_were_not_taken_die_with_the_link_but_effects_do_not() -> None:
    receiver = Receiver(TRANSFER_ID, file_of(len(CONTENT)))
    receiver.start()
    receiver.chunk_arrived(HEADERS[0])
    receiver.link_lost()
    assert outputs_of(receiver) == [Store(0, HEADERS[0].hash)]


def test_a_receiver_that_gives_up_without_a_link_tells_only_its_owner() -> None:
    receiver = receiver_in(ReceiverState.RECEIVING)
    receiver.link_lost()
    receiver.cancel("enough")
    assert outputs_of(receiver) == [Discard(), TransferFailed("enough")]


def test_large_chunks_get_no_more_than_the_limit() -> None:
    chunk_size = 16 * 1024 * 1024
    offer = OfferedFile(name="a", size=100 * chunk_size, chunk_size=chunk_size)
    receiver = Receiver(TRANSFER_ID, offer, window=16)
    receiver.start()
    assert receiver.outstanding * chunk_size == MAX_WINDOW_BYTES


@pytest.mark.parametrize("window", [0, -1, MAX_WINDOW + 1])
def test_a_window_has_limits(window: int) -> None:
    with pytest.raises(LocalProtocolError, match="window"):
        Receiver(TRANSFER_ID, file_of(1), window=window)


def test_the_map_of_another_file_is_refused() -> None:
    with pytest.raises(LocalProtocolError, match="another file"):
        Receiver(TRANSFER_ID, file_of(1), chunk_map=ChunkMap(2, CHUNK_SIZE))


def test_an_offer_of_too_many_chunks_is_the_peers_fault() -> None:
    with pytest.raises(InvalidInput, match="use larger chunks"):
        Receiver(TRANSFER_ID, file_of(2**50))


def test_large_chunks_make_a_small_window() -> None:
    chunk_size = 16 * 1024 * 1024
    offer = OfferedFile(name="a", size=100 * chunk_size, chunk_size=chunk_size)
    receiver = Receiver(TRANSFER_ID, offer, window=MAX_WINDOW)
    receiver.start()
    assert receiver.outstanding * chunk_size == MAX_WINDOW_BYTES


# ------------------------------------------------------------------------ sender


def sender_in(state: SenderState) -> Sender:
    """A sender in a state: SENDING with chunk 0 in hand, VERIFYING while it hashes."""
    sender = Sender(TRANSFER_ID, len(CONTENT), CHUNK_SIZE)
    if state is SenderState.SENDING:
        sender.receive_message(ChunkGrant(TRANSFER_ID, 0, 1))
    elif state is SenderState.FAILED:
        sender.cancel("enough")
    else:
        sender.receive_message(FileReceived(TRANSFER_ID, root()))
    outputs_of(sender)
    if state is SenderState.DONE:
        sender.hashes_read([header.hash for header in HEADERS])
        outputs_of(sender)
    assert sender.state is state
    return sender


SENDER_INPUTS: dict[str, Callable[[Sender], object]] = {
    "CHUNK_GRANT": lambda s: s.receive_message(ChunkGrant(TRANSFER_ID, 1, 1)),
    "FILE_RECEIVED": lambda s: s.receive_message(FileReceived(TRANSFER_ID, root())),
    "FILE_ERROR": lambda s: s.receive_message(FileError(TRANSFER_ID, "gone")),
    "FILE_VERIFIED": lambda s: s.receive_message(FileVerified(TRANSFER_ID)),
    "chunk_sent": lambda s: s.chunk_sent(0, HEADERS[0].hash),
    "hashes_read": lambda s: s.hashes_read([header.hash for header in HEADERS]),
    "source_changed": Sender.source_changed,
    "source_failed": lambda s: s.source_failed("the disk broke"),
    "cancel": lambda s: s.cancel("enough"),
    "link_lost": Sender.link_lost,
}

# In VERIFYING nothing is in hand any more, so that `chunk_sent` is a mistake there; the
# test of a late `chunk_sent` below has the other case.
SENDER_EXPECTED = {
    "CHUNK_GRANT": "S!==",
    "FILE_RECEIVED": "V!==",
    "FILE_ERROR": "FF==",
    "FILE_VERIFIED": "!!==",
    "chunk_sent": "SL==",
    "hashes_read": "LD==",
    "source_changed": "FF==",
    "source_failed": "FF==",
    "cancel": "FF==",
    "link_lost": "SS==",
}


@pytest.mark.parametrize("name", SENDER_INPUTS)
@pytest.mark.parametrize("state", SenderState)
def test_every_input_of_a_sender_in_every_state(state: SenderState, name: str) -> None:
    sender = sender_in(state)
    expected = SENDER_EXPECTED[name][list(SenderState).index(state)]
    give = SENDER_INPUTS[name]
    if expected == "L":
        with pytest.raises(LocalProtocolError):
            give(sender)
        assert (sender.state, outputs_of(sender)) == (state, [])
    elif expected == "!":
        with pytest.raises(RemoteProtocolError) as caught:
            give(sender)
        assert sender.state is SenderState.FAILED
        assert outputs_of(sender) == [
            SendMessage(FileError(TRANSFER_ID, caught.value.reason)),
            SenderFailed(caught.value.reason),
        ]
    else:
        give(sender)
        if expected == "=":
            assert (sender.state, outputs_of(sender)) == (state, [])
        assert expected in (letter(sender.state), "=")


def test_the_sender_table_has_no_row_that_is_not_tested() -> None:
    rows = {name for name, _ in SENDER_TABLE}
    assert rows == set(SENDER_INPUTS) - {"FILE_VERIFIED"} | {
        "wrong_message",
        "same_root",
    }


def test_a_sender_serves_grants_in_order_and_two_at_a_time() -> None:
    sender = Sender(TRANSFER_ID, len(CONTENT), CHUNK_SIZE)
    sender.receive_message(ChunkGrant(TRANSFER_ID, 1, 2))
    sender.receive_message(ChunkGrant(TRANSFER_ID, 0, 1))
    assert outputs_of(sender) == [ReadAndSend(1), ReadAndSend(2)]
    sender.chunk_sent(2, HEADERS[2].hash)
    assert outputs_of(sender) == [ReadAndSend(0)]
    sender.chunk_sent(1, HEADERS[1].hash)
    sender.chunk_sent(0, HEADERS[0].hash)
    assert sender.bytes_known == len(CONTENT)
    sender.receive_message(FileReceived(TRANSFER_ID, root()))
    assert outputs_of(sender) == [
        SendMessage(FileVerified(TRANSFER_ID)),
        SenderDone(),
    ]


def test_the_verdict_waits_for_chunks_that_are_in_hand() -> None:
    sender = Sender(TRANSFER_ID, len(CONTENT), CHUNK_SIZE)
    sender.receive_message(ChunkGrant(TRANSFER_ID, 0, 3))
    outputs_of(sender)
    sender.chunk_sent(0, HEADERS[0].hash)
    outputs_of(sender)
    sender.receive_message(FileReceived(TRANSFER_ID, root()))
    assert outputs_of(sender) == []
    sender.chunk_sent(1, HEADERS[1].hash)
    assert outputs_of(sender) == []
    sender.chunk_sent(2, HEADERS[2].hash)
    assert sender.state is SenderState.DONE


def test_hashes_that_are_missing_are_read_in_batches() -> None:
    count = HASH_BATCH + 2
    sender = Sender(TRANSFER_ID, count * CHUNK_SIZE, CHUNK_SIZE)
    sender.receive_message(ChunkGrant(TRANSFER_ID, 1, 1))
    outputs_of(sender)
    sender.chunk_sent(1, bytes(32))
    sender.receive_message(FileReceived(TRANSFER_ID, NO_HASH))
    batches = [(0, 1), (2, HASH_BATCH)]
    for first, size in batches:
        assert outputs_of(sender) == [HashMissing(first, size)]
        sender.hashes_read([bytes(32)] * size)
    assert sender.state is SenderState.FAILED  # NO_HASH is not their root


@pytest.mark.parametrize("number", [0, 2, 4])
def test_the_wrong_number_of_hashes_is_the_callers_fault(number: int) -> None:
    sender = sender_in(SenderState.VERIFYING)
    with pytest.raises(LocalProtocolError, match="nobody asked for"):
        sender.hashes_read([bytes(32)] * number)
    assert sender.bytes_known == 0


@pytest.mark.parametrize(("first", "count"), [(3, 1), (0, 4), (2**32 - 1, 2**32 - 1)])
def test_a_grant_outside_the_file_ends_the_transfer(first: int, count: int) -> None:
    sender = Sender(TRANSFER_ID, len(CONTENT), CHUNK_SIZE)
    with pytest.raises(RemoteProtocolError, match="of a file of 3"):
        sender.receive_message(ChunkGrant(TRANSFER_ID, first, count))
    assert sender.state is SenderState.FAILED


def test_a_grant_of_more_than_the_largest_window_ends_the_transfer() -> None:
    sender = Sender(TRANSFER_ID, 1000 * CHUNK_SIZE, CHUNK_SIZE)
    sender.receive_message(ChunkGrant(TRANSFER_ID, 0, MAX_WINDOW))
    with pytest.raises(RemoteProtocolError, match="more than 64 chunks"):
        sender.receive_message(ChunkGrant(TRANSFER_ID, 0, 1))
    assert sender.state is SenderState.FAILED


def test_a_sender_hands_out_few_chunks_at_a_time() -> None:
    sender = Sender(TRANSFER_ID, 9 * CHUNK_SIZE, CHUNK_SIZE)
    sender.receive_message(ChunkGrant(TRANSFER_ID, 0, 3))
    assert outputs_of(sender) == [ReadAndSend(0), ReadAndSend(1)]
    sender.chunk_sent(0, bytes(32))
    assert outputs_of(sender) == [ReadAndSend(2)]


def test_the_verdict_waits_for_the_chunks_in_hand() -> None:
    sender = Sender(TRANSFER_ID, len(CONTENT), CHUNK_SIZE)
    sender.receive_message(ChunkGrant(TRANSFER_ID, 0, 1))
    assert outputs_of(sender) == [ReadAndSend(0)]
    sender.receive_message(FileReceived(TRANSFER_ID, root()))
    assert outputs_of(sender) == []
    sender.chunk_sent(0, HEADERS[0].hash)
    assert outputs_of(sender) == [HashMissing(1, COUNT - 1)]


def test_another_root_means_a_changed_file() -> None:
    sender = Sender(TRANSFER_ID, 0, CHUNK_SIZE)
    sender.receive_message(FileReceived(TRANSFER_ID, NO_HASH))
    reason = "the file changed while it was sent; send it again"
    assert outputs_of(sender) == [
        SendMessage(FileError(TRANSFER_ID, reason)),
        SenderFailed(reason),
    ]


def test_the_loss_of_the_link_voids_what_the_sender_was_asked() -> None:
    sender = Sender(TRANSFER_ID, len(CONTENT), CHUNK_SIZE)
    sender.receive_message(ChunkGrant(TRANSFER_ID, 0, 3))
    assert sender.next_output() == ReadAndSend(0)
    sender.link_lost()
    assert outputs_of(sender) == []
    with pytest.raises(LocalProtocolError, match="was not to be sent"):
        sender.chunk_sent(0, HEADERS[0].hash)
    sender.receive_message(FileReceived(TRANSFER_ID, root()))
    sender.link_lost()
    assert outputs_of(sender) == []
    sender.receive_message(FileReceived(TRANSFER_ID, root()))
    assert outputs_of(sender) == [HashMissing(0, COUNT)]


def test_chunks_that_the_receiver_no_longer_waits_for_are_not_sent() -> None:
    sender = Sender(TRANSFER_ID, len(CONTENT), CHUNK_SIZE)
    sender.receive_message(ChunkGrant(TRANSFER_ID, 0, 3))
    assert sender.next_output() == ReadAndSend(0)
    sender.receive_message(FileReceived(TRANSFER_ID, root()))
    assert outputs_of(sender) == []
    sender.chunk_sent(0, HEADERS[0].hash)
    assert outputs_of(sender) == [HashMissing(1, 2)]
