"""A link between two processes of one machine, over a pair of sockets.

It carries the records of `sleap_rtc.proto.transfer.records` as they are. Neither side
has to prove anything: only a process and the child that it started hold the two
sockets.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from sleap_rtc.io.link.link import Link, LinkClosedError, LinkStatistics
from sleap_rtc.io.nursery import open_background_nursery
from sleap_rtc.proto.errors import RemoteProtocolError
from sleap_rtc.proto.messages import Message, decode_message_untrusted, encode_message
from sleap_rtc.proto.transfer.frames import Frame, FrameDecoder, encode_header
from sleap_rtc.proto.transfer.records import (
    MAX_BULK,
    RecordDecoder,
    RecordType,
    encode_record_header,
)

FLUSH_TIMEOUT = 1.0
"""Seconds that `aclose` waits until the other process has taken what was sent."""

_READ_SIZE = 256 * 1024
_MESSAGES_AHEAD = 64
_FRAMES_AHEAD = 1

_GONE = "the process of the lane has ended"
_StreamError = (trio.BrokenResourceError, trio.ClosedResourceError)


class PipeLink(Link):
    """One end; at most two frames wait in each direction.

    Args:
        stream: The socket, owned from now on.
        address: Where the connection leads that the other process has.
    """

    def __init__(self, stream: trio.SocketStream, address: str) -> None:
        self._stream = stream
        self._address = address
        self._reason = ""
        self._by_peer = False
        self._bytes_sent = 0
        self._bytes_received = 0
        self._outgoing, self._to_write = trio.open_memory_channel[bytes](0)
        self._message_in, self._messages = trio.open_memory_channel[Message](
            _MESSAGES_AHEAD
        )
        self._frame_in, self._frames = trio.open_memory_channel[Frame](_FRAMES_AHEAD)
        self._flushed = trio.Event()

    async def send_message(self, message: Message) -> None:
        """Send a control message, whole or not at all."""
        text = encode_message(message).encode()
        await self._send(_record(RecordType.MESSAGE, text))

    async def receive_message(self) -> Message:
        """Wait for the next control message."""
        try:
            return await self._messages.receive()
        except trio.EndOfChannel:
            raise self._error() from None

    async def send_frame(self, frame: Frame) -> None:
        """Send a bulk frame; waits while the other process has enough."""
        content = memoryview(b"".join((encode_header(frame.header), frame.payload)))
        pieces = range(0, len(content), MAX_BULK)
        records = (_record(RecordType.BULK, content[n : n + MAX_BULK]) for n in pieces)
        await self._send(b"".join(records))

    async def receive_frame(self) -> Frame:
        """Wait for the next bulk frame."""
        try:
            return await self._frames.receive()
        except trio.EndOfChannel:
            raise self._error() from None

    def statistics(self) -> LinkStatistics:
        """Say what crossed the pipe; the network is the other process's business."""
        return LinkStatistics(
            kind="quic",
            address=self._address,
            rtt=0.0,
            bytes_sent=self._bytes_sent,
            bytes_received=self._bytes_received,
            packets_lost=0,
            ignored_messages=0,
        )

    async def aclose(self, reason: str = "") -> None:
        """Send what was accepted for sending, tell the peer the reason, and end."""
        try:
            with trio.move_on_after(FLUSH_TIMEOUT):
                content = reason.encode(errors="replace")[:512]
                await self._send(_record(RecordType.CLOSE, content))
                await self._flushed.wait()
        except LinkClosedError:
            pass
        finally:
            self.close_now(reason)

    def close_now(self, reason: str = "") -> None:
        """End it without waiting for what is on its way."""
        self._end(f"closed: {reason}" if reason else "closed")

    async def run(self) -> None:
        """Move the bytes until either side ends the link."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write)
            try:
                await self._read_untrusted()
            except RemoteProtocolError as error:
                self._end(error.reason)
            except _StreamError:
                self._end(_GONE)
            nursery.cancel_scope.cancel(reason="the link has ended")

    # --------------------------------------------------------------------- inside

    async def _send(self, records: bytes) -> None:
        try:
            await self._outgoing.send(records)
        except _StreamError:
            raise self._error() from None

    async def _write(self) -> None:
        try:
            async for records in self._to_write:
                await self._stream.send_all(records)
                self._bytes_sent += len(records)
                if records[0] == RecordType.CLOSE:
                    self._flushed.set()
        except _StreamError:
            self._end(_GONE)

    async def _read_untrusted(self) -> None:
        records, frames = RecordDecoder(), FrameDecoder()
        while data := await self._stream.receive_some(_READ_SIZE):
            self._bytes_received += len(data)
            for kind, content in records.records_untrusted(data):
                match kind:
                    case RecordType.MESSAGE:
                        message = decode_message_untrusted(bytes(content))
                        await self._message_in.send(message)
                    case RecordType.BULK:
                        for frame in frames.receive_data_untrusted(content):
                            await self._frame_in.send(frame)
                    case RecordType.CLOSE:
                        reason = bytes(content).decode(errors="replace")
                        self._by_peer = True
                        self._end(reason or _GONE)
                        return
                    case RecordType.PING | RecordType.PONG:
                        raise RemoteProtocolError(f"a pipe carries no {kind.name}")
        self._end(_GONE)

    def _end(self, reason: str) -> None:
        """Let what arrived be taken; everything else raises from now on."""
        self._reason = self._reason or reason
        self._message_in.close()
        self._frame_in.close()
        self._to_write.close()
        self._stream.socket.close()

    def _error(self) -> LinkClosedError:
        return LinkClosedError(self._reason, by_peer=self._by_peer)


@asynccontextmanager
async def open_pipe_link(
    stream: trio.SocketStream, address: str
) -> AsyncIterator[PipeLink]:
    """Serve one end of a pipe during the body, and close it after that."""
    link = PipeLink(stream, address)
    async with open_background_nursery() as nursery:
        nursery.start_soon(link.run)
        try:
            yield link
            await link.aclose()
        finally:
            link.close_now()


async def relay(one: Link, other: Link) -> str:
    """Pass on all that arrives at either link until one of them ends.

    Returns:
        Why it ended.
    """
    reasons: list[str] = []

    async def pass_messages(source: Link, target: Link) -> None:
        try:
            while True:
                await target.send_message(await source.receive_message())
        except LinkClosedError as error:
            reasons.append(error.reason)

    async def pass_frames(source: Link, target: Link) -> None:
        try:
            while True:
                await target.send_frame(await source.receive_frame())
        except LinkClosedError as error:
            reasons.append(error.reason)
        # What had arrived is passed on before that, so nothing more is to come.
        nursery.cancel_scope.cancel(reason="a link has ended")

    async with trio.open_nursery() as nursery:
        for source, target in ((one, other), (other, one)):
            nursery.start_soon(pass_messages, source, target)
            nursery.start_soon(pass_frames, source, target)
    return reasons[0]


def _record(kind: RecordType, content: bytes | memoryview) -> bytes:
    return encode_record_header(kind, len(content)) + content
