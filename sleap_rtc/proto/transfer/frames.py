"""The binary bulk frame: one chunk of one file, with its hash.

A bulk stream is a sequence of frames: a header of 48 bytes, then the payload.

=======  =====  =======================================================
offset   bytes  field (big-endian)
=======  =====  =======================================================
0        4      ``SRC1``
4        4      transfer id
8        4      chunk index
12       4      length of the payload in bytes, 1 to 16 MiB
16       32     BLAKE3 hash of the payload
=======  =====  =======================================================
"""

import struct

import msgspec

from sleap_rtc.proto.errors import LocalProtocolError, RemoteProtocolError

MAGIC = b"SRC1"
MAX_PAYLOAD = 16 * 1024 * 1024
"""Bytes of the largest chunk that `OfferedFile` allows."""

_HEADER = struct.Struct(">4sIII32s")
HEADER_SIZE = _HEADER.size


class ChunkHeader(msgspec.Struct, frozen=True):
    """The header of a frame, which names the chunk and its hash.

    Args:
        transfer_id: The transfer, an unsigned 32-bit number.
        index: The place of the chunk in its file, from 0.
        length: Bytes of payload.
        hash: BLAKE3 hash of the payload, 32 bytes.
    """

    transfer_id: int
    index: int
    length: int
    hash: bytes


class Frame(msgspec.Struct, frozen=True):
    """A header and its payload, whose hash is not checked yet."""

    header: ChunkHeader
    payload: bytes | bytearray | memoryview


def encode_header(header: ChunkHeader) -> bytes:
    """Encode the header of a frame.

    Raises:
        LocalProtocolError: If a field does not fit.
    """
    if not 0 < header.length <= MAX_PAYLOAD or len(header.hash) != 32:
        raise LocalProtocolError(f"not a chunk: {header}")
    try:
        return _HEADER.pack(
            MAGIC, header.transfer_id, header.index, header.length, header.hash
        )
    except struct.error:  # a number of more than 32 bits
        raise LocalProtocolError(f"not a chunk: {header}") from None


class FrameDecoder:
    """Cut a bulk stream into frames.

    Call `receive_data_untrusted` with the bytes that arrive; it returns the frames that
    became whole. At most one incomplete frame is held. After an error the stream is
    lost: every further call raises the same error.
    """

    def __init__(self) -> None:
        self._head = bytearray()
        self._header: ChunkHeader | None = None
        self._payload = bytearray()
        self._filled = 0
        self._error: RemoteProtocolError | None = None

    def receive_data_untrusted(self, data: bytes | memoryview) -> list[Frame]:
        """Parse bytes of the stream.

        Args:
            data: Any number of bytes; a frame may begin and end anywhere in them.

        Returns:
            The frames that these bytes completed, in order.

        Raises:
            RemoteProtocolError: If the bytes are not a frame, or it is too long.
        """
        if self._error is not None:
            raise self._error
        frames: list[Frame] = []
        view = memoryview(data)
        while view:
            if self._header is None:
                view = self._fill_header(view)
            else:
                view = self._fill_payload(view, self._header, frames)
        return frames

    def _fill_header(self, view: memoryview) -> memoryview:
        missing = HEADER_SIZE - len(self._head)
        self._head += view[:missing]
        if len(self._head) == HEADER_SIZE:
            self._header = self._parse_header()
            self._head.clear()
            self._payload = bytearray(self._header.length)
            self._filled = 0
        return view[missing:]

    def _fill_payload(
        self, view: memoryview, header: ChunkHeader, frames: list[Frame]
    ) -> memoryview:
        end = min(self._filled + len(view), header.length)
        taken = end - self._filled
        self._payload[self._filled : end] = view[:taken]
        self._filled = end
        if end == header.length:
            frames.append(Frame(header, self._payload))
            self._header, self._payload, self._filled = None, bytearray(), 0
        return view[taken:]

    def _parse_header(self) -> ChunkHeader:
        magic, transfer_id, index, length, digest = _HEADER.unpack(self._head)
        if magic != MAGIC:
            self._error = RemoteProtocolError("a bulk stream does not hold frames")
        elif not 0 < length <= MAX_PAYLOAD:
            self._error = RemoteProtocolError(
                f"a frame of {length} bytes is not between 1 and {MAX_PAYLOAD}"
            )
        if self._error is not None:
            raise self._error
        return ChunkHeader(transfer_id, index, length, digest)
