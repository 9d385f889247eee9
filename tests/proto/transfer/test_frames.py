"""The bulk frame: its bytes, and a decoder that takes them in any pieces."""

import tracemalloc

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from sleap_rtc.proto.errors import LocalProtocolError, RemoteProtocolError
from sleap_rtc.proto.transfer.frames import (
    HEADER_SIZE,
    MAX_PAYLOAD,
    ChunkHeader,
    Frame,
    FrameDecoder,
    encode_header,
)

NUMBERS = st.integers(0, 2**32 - 1)
PAYLOADS = st.binary(min_size=1, max_size=200)


def header_of(payload: bytes, transfer_id: int = 1, index: int = 2) -> ChunkHeader:
    return ChunkHeader(transfer_id, index, len(payload), blake3(payload).digest())


def wire(*payloads: bytes) -> bytes:
    return b"".join(encode_header(header_of(p)) + p for p in payloads)


def read(data: bytes, *, piece: int) -> list[tuple[ChunkHeader, bytes]]:
    """Decode a stream that arrives in pieces of a size."""
    decoder = FrameDecoder()
    frames: list[Frame] = []
    for start in range(0, len(data), piece):
        frames += decoder.receive_data_untrusted(data[start : start + piece])
    return [(frame.header, bytes(frame.payload)) for frame in frames]


def test_the_header_is_the_documented_bytes() -> None:
    header = ChunkHeader(0x01020304, 0x0A0B0C0D, 0x00100000, bytes(range(32)))
    assert HEADER_SIZE == 48
    assert encode_header(header) == (
        b"SRC1\x01\x02\x03\x04\x0a\x0b\x0c\x0d\x00\x10\x00\x00" + bytes(range(32))
    )


@given(NUMBERS, NUMBERS, PAYLOADS)
def test_every_frame_survives_the_wire(
    transfer_id: int, index: int, payload: bytes
) -> None:
    header = header_of(payload, transfer_id, index)
    frames = FrameDecoder().receive_data_untrusted(encode_header(header) + payload)
    assert frames == [Frame(header, bytearray(payload))]


@pytest.mark.parametrize("piece", [1, 2, 47, 48, 49, 1000])
def test_frames_are_cut_out_whatever_the_pieces_are(piece: int) -> None:
    payloads = (b"a", b"b" * 300, b"c" * 48)
    expected = [(header_of(payload), payload) for payload in payloads]
    assert read(wire(*payloads), piece=piece) == expected


def test_a_trailer_is_kept_for_later() -> None:
    decoder = FrameDecoder()
    second = wire(b"second")
    (first,) = decoder.receive_data_untrusted(wire(b"first") + second[:50])
    assert bytes(first.payload) == b"first"
    (frame,) = decoder.receive_data_untrusted(second[50:])
    assert bytes(frame.payload) == b"second"


@given(st.lists(PAYLOADS, max_size=4), st.lists(st.integers(1, 120), min_size=1))
def test_any_pieces_give_the_same_frames(
    payloads: list[bytes], pieces: list[int]
) -> None:
    data = wire(*payloads)
    decoder = FrameDecoder()
    frames: list[Frame] = []
    turn = 0
    while data:
        piece = pieces[turn % len(pieces)]
        frames += decoder.receive_data_untrusted(memoryview(data)[:piece])
        data = data[piece:]
        turn += 1
    assert [bytes(frame.payload) for frame in frames] == payloads


def test_a_payload_is_unchanged_when_more_data_arrives() -> None:
    decoder = FrameDecoder()
    arriving = bytearray(wire(b"one"))
    (frame,) = decoder.receive_data_untrusted(memoryview(arriving))
    arriving[:] = bytes(len(arriving))
    decoder.receive_data_untrusted(wire(b"two"))
    assert bytes(frame.payload) == b"one"


def test_an_empty_piece_changes_nothing() -> None:
    decoder = FrameDecoder()
    assert decoder.receive_data_untrusted(b"") == []
    data = wire(b"whole")
    decoder.receive_data_untrusted(data[:2])
    assert decoder.receive_data_untrusted(b"") == []
    (frame,) = decoder.receive_data_untrusted(data[2:])
    assert bytes(frame.payload) == b"whole"


@pytest.mark.parametrize("length", [0, MAX_PAYLOAD + 1, 2**32 - 1])
def test_a_length_outside_the_limits_takes_no_memory(length: int) -> None:
    data = b"SRC1" + bytes(8) + length.to_bytes(4, "big") + bytes(32)
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError, match=f"a frame of {length} bytes"):
            FrameDecoder().receive_data_untrusted(data)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_the_longest_payload_arrives() -> None:
    payload = bytes(MAX_PAYLOAD)
    (frame,) = FrameDecoder().receive_data_untrusted(wire(payload))
    assert len(frame.payload) == MAX_PAYLOAD


def test_a_broken_stream_stays_broken() -> None:
    decoder = FrameDecoder()
    with pytest.raises(RemoteProtocolError) as first:
        decoder.receive_data_untrusted(b"HTTP/1.1 200 OK".ljust(HEADER_SIZE))
    with pytest.raises(RemoteProtocolError) as second:
        decoder.receive_data_untrusted(wire(b"good"))
    assert second.value.reason == first.value.reason


@given(st.lists(st.binary(max_size=100)))
def test_garbage_is_refused_and_nothing_else(pieces: list[bytes]) -> None:
    decoder = FrameDecoder()
    for piece in pieces:
        try:
            decoder.receive_data_untrusted(piece)
        except RemoteProtocolError:
            return


@pytest.mark.parametrize(
    "header",
    [
        ChunkHeader(1, 2, 0, bytes(32)),
        ChunkHeader(1, 2, MAX_PAYLOAD + 1, bytes(32)),
        ChunkHeader(1, 2, 3, bytes(31)),
        ChunkHeader(2**32, 2, 3, bytes(32)),
        ChunkHeader(1, 2**32, 3, bytes(32)),
        ChunkHeader(-1, 2, 3, bytes(32)),
        ChunkHeader(1, 2, -3, bytes(32)),
    ],
)
def test_a_header_that_does_not_fit_is_the_callers_fault(header: ChunkHeader) -> None:
    with pytest.raises(LocalProtocolError, match="not a chunk"):
        encode_header(header)
