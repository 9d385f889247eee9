"""The map of a file's chunks, and the hash over their hashes."""

from itertools import pairwise

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from sleap_rtc.proto.errors import InvalidInput, LocalProtocolError
from sleap_rtc.proto.transfer.chunk_map import HASH_SIZE, MAX_CHUNKS, ChunkMap

DIGEST = bytes(range(HASH_SIZE))


@pytest.mark.parametrize(
    ("size", "lengths"),
    [
        (0, []),
        (1, [1]),
        (9, [9]),
        (10, [10]),
        (11, [10, 1]),
        (30, [10, 10, 10]),
    ],
)
def test_a_file_is_cut_into_chunks(size: int, lengths: list[int]) -> None:
    chunks = ChunkMap(size, 10)
    assert [chunks.length(index) for index in range(chunks.count)] == lengths


def test_a_file_without_chunks_is_complete() -> None:
    chunks = ChunkMap(0, 10)
    assert chunks.is_complete
    assert chunks.next_missing(0) == 0
    assert list(chunks.missing()) == []
    assert len(chunks.root()) == HASH_SIZE


@given(count=st.integers(0, 40), there=st.sets(st.integers(0, 39)))
def test_the_chunks_that_were_not_set_are_missing(count: int, there: set[int]) -> None:
    there = {index for index in there if index < count}
    chunks = ChunkMap(count, 1)
    for index in there:
        chunks.set(index, DIGEST)
    runs = list(chunks.missing())
    assert {index for run in runs for index in run} == set(range(count)) - there
    assert all(a.stop < b.start for a, b in pairwise(runs))
    assert chunks.bytes_there == len(there)
    assert chunks.is_complete == (len(there) == count)
    for start in range(count):
        absent = [index for index in range(start, count) if index not in there]
        assert chunks.next_missing(start) == (absent[0] if absent else count)


def test_setting_a_chunk_twice_counts_it_once_and_keeps_the_last_hash() -> None:
    chunks = ChunkMap(15, 10)
    chunks.set(1, DIGEST)
    chunks.set(1, DIGEST[::-1])
    assert chunks.bytes_there == 5
    assert chunks.digest(1) == DIGEST[::-1]
    assert chunks.digest(0) is None


def test_the_root_is_the_documented_hash() -> None:
    chunks = ChunkMap(11, 10)
    chunks.set(1, DIGEST[::-1])
    chunks.set(0, DIGEST)
    expected = blake3(
        (11).to_bytes(8, "big") + DIGEST + DIGEST[::-1],
        derive_key_context=(
            "sleap-rtc chunked transfer, root of the chunk hashes, version 1"
        ),
    )
    assert chunks.root() == expected.digest()


def test_the_root_depends_on_size_order_and_hashes() -> None:
    roots = set()
    for size, digests in [
        (19, (DIGEST, DIGEST[::-1])),
        (20, (DIGEST, DIGEST[::-1])),
        (20, (DIGEST[::-1], DIGEST)),
        (20, (DIGEST, DIGEST)),
    ]:
        chunks = ChunkMap(size, 10)
        for index, digest in enumerate(digests):
            chunks.set(index, digest)
        roots.add(chunks.root())
    assert len(roots) == 4


def test_an_incomplete_map_has_no_root() -> None:
    chunks = ChunkMap(11, 10)
    chunks.set(0, DIGEST)
    with pytest.raises(LocalProtocolError, match="missing"):
        chunks.root()


@pytest.mark.parametrize("index", [-1, 2, 2**40])
def test_a_chunk_outside_the_file_is_an_error(index: int) -> None:
    chunks = ChunkMap(11, 10)
    for call in (chunks.length, chunks.has, chunks.digest):
        with pytest.raises(LocalProtocolError, match=f"no chunk {index} of 2"):
            call(index)
    with pytest.raises(LocalProtocolError, match=f"no chunk {index} of 2"):
        chunks.set(index, DIGEST)


def test_a_hash_of_another_length_is_refused() -> None:
    chunks = ChunkMap(11, 10)
    with pytest.raises(LocalProtocolError, match="32 bytes, not 31"):
        chunks.set(0, DIGEST[1:])
    assert not chunks.has(0)


@pytest.mark.parametrize(("size", "chunk_size"), [(-1, 10), (1, 0), (2**50, 4096)])
def test_an_impossible_file_has_no_map(size: int, chunk_size: int) -> None:
    with pytest.raises(InvalidInput):
        ChunkMap(size, chunk_size)


def test_the_largest_file_has_a_map() -> None:
    assert ChunkMap(MAX_CHUNKS * 4096, 4096).count == MAX_CHUNKS
    with pytest.raises(InvalidInput, match="use larger chunks"):
        ChunkMap(MAX_CHUNKS * 4096 + 1, 4096)
