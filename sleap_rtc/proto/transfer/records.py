"""The records of a TCP link: everything on one stream, message by message.

A record is a type in one byte, the length of its content in four bytes (big-endian),
and the content. Section 3.2 of docs/protocol.md lists the types.
"""

import enum
import struct
from collections.abc import Iterator

from sleap_rtc.proto.errors import LocalProtocolError, RemoteProtocolError
from sleap_rtc.proto.messages import MAX_MESSAGE_BYTES

MAX_BULK = 64 * 1024
"""Bytes of bulk in a record: a message never waits for more than that."""

_HEADER = struct.Struct(">BI")
RECORD_HEADER_SIZE = _HEADER.size


class RecordType(enum.IntEnum):
    """Type of a record."""

    MESSAGE = 1
    BULK = 2
    PING = 3
    PONG = 4
    CLOSE = 5


LIMITS = {
    RecordType.MESSAGE: MAX_MESSAGE_BYTES,
    RecordType.BULK: MAX_BULK,
    RecordType.PING: 8,
    RecordType.PONG: 8,
    RecordType.CLOSE: 512,
}
"""Bytes of content that a record of each type holds at most."""


def encode_record_header(kind: RecordType, length: int) -> bytes:
    """Encode the header of a record.

    Raises:
        LocalProtocolError: If the content is too long.
    """
    if not 0 <= length <= LIMITS[kind]:
        raise LocalProtocolError(f"a {kind.name} of {length} bytes is over the limit")
    return _HEADER.pack(kind, length)


class RecordDecoder:
    """Splits a stream into records.

    It holds at most one incomplete record. Bulk is not held: its content is yielded in
    pieces as it arrives.
    """

    def __init__(self) -> None:
        self._head = bytearray()
        self._kind: RecordType | None = None
        self._missing = 0
        self._content = bytearray()

    def records_untrusted(
        self, data: bytes | memoryview
    ) -> Iterator[tuple[RecordType, bytes | memoryview]]:
        """Parse bytes of the stream; exhaust the iterator.

        Args:
            data: Any number of bytes, cut anywhere.

        Yields:
            Each complete record, and each piece of bulk, which is a part of `data`.

        Raises:
            RemoteProtocolError: If the bytes are not a record. The stream is lost then.
        """
        view = memoryview(data)
        while view or (self._kind is not None and not self._missing):
            if self._kind is None:
                view = self._fill_header_untrusted(view)
                continue
            kind, piece = self._kind, view[: self._missing]
            view = view[len(piece) :]
            self._missing -= len(piece)
            if not self._missing:
                self._kind = None
            if kind is RecordType.BULK:
                yield kind, piece
                continue
            self._content += piece
            if not self._missing:
                content, self._content = bytes(self._content), bytearray()
                yield kind, content

    def _fill_header_untrusted(self, view: memoryview) -> memoryview:
        needed = RECORD_HEADER_SIZE - len(self._head)
        self._head += view[:needed]
        if len(self._head) == RECORD_HEADER_SIZE:
            number, length = _HEADER.unpack(self._head)
            self._head.clear()
            try:
                kind = RecordType(number)
            except ValueError:
                raise RemoteProtocolError(
                    f"record type {number} does not exist"
                ) from None
            if length > LIMITS[kind]:
                raise RemoteProtocolError(
                    f"a {kind.name} of {length} bytes is too long"
                )
            self._kind, self._missing = kind, length
        return view[needed:]
