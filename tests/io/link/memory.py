"""A link between two peers of one process, which can be cut and can harm frames."""

from collections.abc import Callable
from typing import Any

import trio
from typing_extensions import override

from sleap_rtc.io.link.link import Link, LinkClosedError, LinkStatistics, ReceivedT_co
from sleap_rtc.io.link.session import Client, Role, Server
from sleap_rtc.proto.errors import RemoteProtocolError
from sleap_rtc.proto.messages import (
    ClientMessage,
    Message,
    WorkerMessage,
    encode_message,
)
from sleap_rtc.proto.transfer.frames import Frame, FrameDecoder, encode_header

FRAMES_ON_THE_WAY = 4


class MemoryLink(Link[ReceivedT_co]):
    """One end; everything crosses it as the bytes that a network would carry.

    `harm` is called with each frame that is sent, and returns what arrives instead. A
    message that the role of the peer may not send ends the link.
    """

    def __init__(self, role: Role[ReceivedT_co]) -> None:
        self._role = role
        self.harm: Callable[[Frame], list[Frame]] = lambda frame: [frame]
        self.frames_sent = 0
        self._cut = False
        self._reason = ""
        self._message_out, self._message_in = trio.open_memory_channel[str](100)
        self._frame_out, self._frame_in = trio.open_memory_channel[list[bytes]](
            FRAMES_ON_THE_WAY
        )
        self._peer: MemoryLink[Any] = self

    @classmethod
    def pair(cls) -> tuple["MemoryLink[WorkerMessage]", "MemoryLink[ClientMessage]"]:
        """Return the end of the client, and that of the worker."""
        make: type[MemoryLink[Any]] = cls
        one, other = make(Client(b"")), make(Server())
        one._peer, other._peer = other, one
        return one, other

    @property
    def is_cut(self) -> bool:
        return self._cut

    def cut(self, reason: str) -> None:
        """Lose the link at both ends."""
        for end in (self, self._peer):
            if not end._cut:
                end._reason = reason
                end._message_out.close()
                end._frame_out.close()
                end._message_in.close()
                end._frame_in.close()
                end._cut = True

    @override
    async def send_message(self, message: Message) -> None:
        text = encode_message(message)
        try:
            await self._message_out.send(text)
        except (trio.ClosedResourceError, trio.BrokenResourceError):
            raise self._error() from None

    @override
    async def receive_message(self) -> ReceivedT_co:
        try:
            text = await self._peer._message_in.receive()
            return self._role.decode_untrusted(text.encode())
        except RemoteProtocolError as error:
            self.cut(error.reason)
            raise self._error() from None
        except (trio.ClosedResourceError, trio.EndOfChannel):
            raise self._error() from None

    @override
    async def send_frame(self, frame: Frame) -> None:
        self.frames_sent += 1
        for arriving in self.harm(frame):
            parts = [encode_header(arriving.header), bytes(arriving.payload)]
            try:
                await self._frame_out.send(parts)
            except (trio.ClosedResourceError, trio.BrokenResourceError):
                raise self._error() from None

    @override
    async def receive_frame(self) -> Frame:
        try:
            parts = await self._peer._frame_in.receive()
        except (trio.ClosedResourceError, trio.EndOfChannel):
            raise self._error() from None
        decoder = FrameDecoder()
        (frame,) = [f for part in parts for f in decoder.receive_data_untrusted(part)]
        return frame

    @override
    def statistics(self) -> LinkStatistics:
        return LinkStatistics("tcp", "memory", 0.0, 0, 0, 0, 0)

    @override
    async def aclose(self, reason: str = "") -> None:
        self.cut(reason)
        await trio.lowlevel.checkpoint()

    @override
    def close_now(self, reason: str = "") -> None:
        self.cut(reason)

    def _error(self) -> LinkClosedError:
        return LinkClosedError(self._reason)
