"""The sending half of a bulk stream."""

import random

from hypothesis import given
from hypothesis import strategies as st

from sleap_rtc.io.quic.bulk import BulkSender, Piece

ENDLESS = 1 << 60


@given(
    pieces=st.lists(st.binary(max_size=50), max_size=20),
    sizes=st.lists(st.integers(1, 40), min_size=1),
    seed=st.integers(),
)
def test_everything_arrives_whatever_is_lost(
    pieces: list[bytes], sizes: list[int], seed: int
) -> None:
    sender = BulkSender()
    for piece in pieces:
        sender.queue(piece)
    whole = b"".join(pieces)
    arrived = bytearray(len(whole))
    chance = random.Random(seed)
    turn = 0
    while sender.has_more(ENDLESS):
        flight: list[Piece] = []
        while sender.has_more(ENDLESS) and len(flight) < 5:
            size = sizes[turn % len(sizes)]
            turn += 1
            taken = sender.take(size, ENDLESS)
            assert 0 < taken.stop - taken.start <= size
            flight.append(taken)
        chance.shuffle(flight)
        for start, stop, views in flight:
            is_lost = chance.random() < 0.3
            if is_lost:
                sender.piece_lost(start, stop)
            else:
                sender.piece_acknowledged(start, stop)
                arrived[start:stop] = b"".join(views)
    assert arrived == whole
    assert sender.unacknowledged == 0
    assert not sender._views


def test_the_limit_of_the_peer_holds_new_bytes_but_not_lost_ones() -> None:
    sender = BulkSender()
    sender.queue(bytes(100))
    taken = sender.take(80, 60)
    assert (taken.start, taken.stop) == (0, 60)
    assert not sender.has_more(60)
    sender.piece_lost(0, 60)
    assert sender.has_more(60)
    again = sender.take(80, 60)
    assert (again.start, again.stop) == (0, 60)
    assert sender.has_more(61)


def test_acknowledged_bytes_are_released() -> None:
    sender = BulkSender()
    for _ in range(3):
        sender.queue(bytes(10))
    for _ in range(3):
        sender.take(10, ENDLESS)
    sender.piece_acknowledged(10, 20)
    assert (len(sender._views), sender.unacknowledged) == (3, 30)
    sender.piece_acknowledged(0, 10)
    assert (len(sender._views), sender.unacknowledged) == (1, 10)


def test_bytes_are_not_copied() -> None:
    data = bytearray(b"before")
    sender = BulkSender()
    sender.queue(data)
    data[:] = b"behind"
    assert b"".join(sender.take(6, ENDLESS).views) == b"behind"
