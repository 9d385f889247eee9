"""A map of the stored chunks of a file, and the hash over their hashes."""

from collections.abc import Iterator

from blake3 import blake3

from sleap_rtc.proto.errors import InvalidInput, LocalProtocolError

HASH_SIZE = 32

MAX_CHUNKS = 2**20
"""Chunks of a file: 1 TiB in chunks of 1 MiB. The hashes take 32 MiB of memory."""

_ROOT_CONTEXT = "sleap-rtc chunked transfer, root of the chunk hashes, version 1"


class ChunkMap:
    """A map of the stored chunks of a file, with their hashes.

    It takes 33 bytes of memory a chunk.

    Args:
        size: Bytes of the file. A file of 0 bytes has no chunks.
        chunk_size: Bytes of every chunk but the last, which may be shorter.

    Raises:
        InvalidInput: If that makes more than `MAX_CHUNKS` chunks, or is not a file.
    """

    def __init__(self, size: int, chunk_size: int) -> None:
        if size < 0 or chunk_size < 1:
            raise InvalidInput(f"not a file: {size} bytes in chunks of {chunk_size}")
        self.size = size
        self.chunk_size = chunk_size
        self.count = -(-size // chunk_size)
        if self.count > MAX_CHUNKS:
            raise InvalidInput(
                f"a file of {size} bytes has {self.count} chunks of {chunk_size} "
                f"bytes; at most {MAX_CHUNKS} are possible, so use larger chunks"
            )
        self._there = bytearray(self.count)  # a byte each: find() is fast on bytes
        self._hashes = bytearray(self.count * HASH_SIZE)
        self._bytes_there = 0

    @property
    def bytes_there(self) -> int:
        """Bytes in the stored chunks."""
        return self._bytes_there

    @property
    def is_complete(self) -> bool:
        """True if every chunk is stored."""
        return self._bytes_there == self.size

    def length(self, index: int) -> int:
        """Return the bytes in a chunk.

        Raises:
            LocalProtocolError: If the file has no such chunk.
        """
        self._check(index)
        return min(self.chunk_size, self.size - index * self.chunk_size)

    def has(self, index: int) -> bool:
        """Return True if a chunk is stored.

        Raises:
            LocalProtocolError: If the file has no such chunk.
        """
        self._check(index)
        return bool(self._there[index])

    def digest(self, index: int) -> bytes | None:
        """Return the hash of a chunk, or None if it is not stored.

        Raises:
            LocalProtocolError: If the file has no such chunk.
        """
        if not self.has(index):
            return None
        return bytes(self._hashes[index * HASH_SIZE : (index + 1) * HASH_SIZE])

    def set(self, index: int, digest: bytes) -> None:
        """Record that a chunk is stored.

        Args:
            index: The chunk.
            digest: Its BLAKE3 hash.

        Raises:
            LocalProtocolError: If the file has no such chunk, or the hash has another
                length.
        """
        if len(digest) != HASH_SIZE:
            raise LocalProtocolError(f"a hash has {HASH_SIZE} bytes, not {len(digest)}")
        if not self.has(index):
            self._there[index] = 1
            self._bytes_there += self.length(index)
        self._hashes[index * HASH_SIZE : (index + 1) * HASH_SIZE] = digest

    def next_missing(self, start: int) -> int:
        """Return the first missing chunk from `start` on; `count` if none is left."""
        index = self._there.find(0, start)
        return self.count if index < 0 else index

    def missing(self) -> Iterator[range]:
        """Yield the missing chunks as ranges, in order."""
        first = self.next_missing(0)
        while first < self.count:
            end = self._there.find(1, first)
            end = self.count if end < 0 else end
            yield range(first, end)
            first = self.next_missing(end)

    def root(self) -> bytes:
        """Return the hash of the file.

        It is BLAKE3 in key derivation mode (which no chunk hash is) over the size of
        the file as 8 bytes, big-endian, and the hashes of its chunks in order.

        Raises:
            LocalProtocolError: If a chunk is missing.
        """
        if not self.is_complete:
            raise LocalProtocolError("a chunk is missing")
        hasher = blake3(derive_key_context=_ROOT_CONTEXT)
        hasher.update(self.size.to_bytes(8, "big"))
        hasher.update(self._hashes)
        return hasher.digest()

    def _check(self, index: int) -> None:
        if not 0 <= index < self.count:
            raise LocalProtocolError(f"no chunk {index} of {self.count}")
