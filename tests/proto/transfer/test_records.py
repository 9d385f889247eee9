"""The records of a TCP link, whole, in pieces, and broken."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sleap_rtc.proto.errors import LocalProtocolError, RemoteProtocolError
from sleap_rtc.proto.transfer.records import (
    LIMITS,
    RECORD_HEADER_SIZE,
    RecordDecoder,
    RecordType,
    encode_record_header,
)

Record = tuple[RecordType, bytes]

RECORDS: list[tuple[Record, bytes]] = [
    ((RecordType.MESSAGE, b"HELLO::{}"), b"\x01\x00\x00\x00\x09HELLO::{}"),
    ((RecordType.BULK, b"frames"), b"\x02\x00\x00\x00\x06frames"),
    ((RecordType.PING, b"12345678"), b"\x03\x00\x00\x00\x0812345678"),
    ((RecordType.PONG, b""), b"\x04\x00\x00\x00\x00"),
    ((RecordType.CLOSE, b"bye"), b"\x05\x00\x00\x00\x03bye"),
    ((RecordType.MESSAGE, b"x" * 65536), b"\x01\x00\x01\x00\x00" + b"x" * 65536),
]


def encode(record: Record) -> bytes:
    kind, content = record
    return encode_record_header(kind, len(content)) + content


def decode(decoder: RecordDecoder, data: bytes) -> list[Record]:
    return [(kind, bytes(part)) for kind, part in decoder.records_untrusted(data)]


def merged(records: list[Record]) -> list[Record]:
    """Join the pieces of bulk that follow each other."""
    found: list[Record] = []
    for kind, content in records:
        if kind is RecordType.BULK and found and found[-1][0] is kind:
            content = found.pop()[1] + content
        found.append((kind, content))
    return [record for record in found if record != (RecordType.BULK, b"")]


@pytest.mark.parametrize(("record", "data"), RECORDS)
def test_a_record_is_written_as_documented(record: Record, data: bytes) -> None:
    assert encode(record) == data


@pytest.mark.parametrize(("record", "data"), RECORDS)
def test_a_record_is_read_whole_and_byte_by_byte_and_with_a_trailer(
    record: Record, data: bytes
) -> None:
    assert decode(RecordDecoder(), data) == [record]
    decoder = RecordDecoder()
    pieces: list[Record] = []
    for n in range(len(data)):
        pieces += decode(decoder, data[n : n + 1])
    assert merged(pieces) == [record]
    trailer = (RecordType.CLOSE, b"the end")
    assert decode(RecordDecoder(), data + encode(trailer)) == [record, trailer]


@given(st.data())
def test_any_records_survive_any_cuts(data: st.DataObject) -> None:
    kinds = st.sampled_from(RecordType)
    records = [
        (kind, data.draw(st.binary(max_size=min(LIMITS[kind], 200))))
        for kind in data.draw(st.lists(kinds, max_size=8))
    ]
    stream = b"".join(map(encode, records))
    decoder = RecordDecoder()
    found: list[Record] = []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        found += decode(decoder, stream[:size])
        stream = stream[size:]
    assert merged(found) == merged(records)


def test_bulk_is_passed_on_before_its_record_is_whole() -> None:
    decoder = RecordDecoder()
    data = encode((RecordType.BULK, b"abcdef"))
    assert decode(decoder, data[:8]) == [(RecordType.BULK, b"abc")]
    assert decode(decoder, data[8:]) == [(RecordType.BULK, b"def")]


def test_records_before_garbage_are_read() -> None:
    data = encode((RecordType.PING, b"1")) + b"\x09\x00\x00\x00\x00"
    records = RecordDecoder().records_untrusted(data)
    assert next(records) == (RecordType.PING, b"1")
    with pytest.raises(RemoteProtocolError, match="record type 9 does not exist"):
        next(records)


@pytest.mark.parametrize("kind", RecordType)
def test_every_type_has_a_limit(kind: RecordType) -> None:
    longest = LIMITS[kind]
    header = encode_record_header(kind, longest)
    assert len(header) == RECORD_HEADER_SIZE
    assert decode(RecordDecoder(), header) == []
    with pytest.raises(LocalProtocolError):
        encode_record_header(kind, longest + 1)
    with pytest.raises(RemoteProtocolError, match=f"{kind.name} of {longest + 1} byte"):
        decode(RecordDecoder(), header[:1] + (longest + 1).to_bytes(4))


@given(st.lists(st.binary(max_size=300), max_size=10))
def test_garbage_raises_only_documented_errors(garbage: list[bytes]) -> None:
    decoder = RecordDecoder()
    try:
        for data in garbage:
            decode(decoder, data)
    except RemoteProtocolError:
        pass
