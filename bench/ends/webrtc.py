"""One end of a WebRTC data channel, made with aiortc.

    python -m bench.ends.webrtc send FILE
    python -m bench.ends.webrtc receive FILE

It needs a Python that has aiortc, and nothing of this project. An offer or an answer is
one line, on standard output and standard input.
"""

import asyncio
import json
import sys
from pathlib import Path

from aiortc import (
    RTCConfiguration,
    RTCDataChannel,
    RTCPeerConnection,
    RTCSessionDescription,
)

from bench.ends.usage import Stopwatch

PIECE = 16 * 1024
"""Bytes in one message, which every WebRTC peer takes."""

AHEAD = 1024 * 1024
"""Bytes that wait in the channel at most."""


def show(connection: RTCPeerConnection) -> None:
    """Print this end's description."""
    local = connection.localDescription
    print(json.dumps({"sdp": local.sdp, "type": local.type}), flush=True)


async def read_description() -> RTCSessionDescription:
    """Read the other end's description."""
    line = await asyncio.to_thread(sys.stdin.readline)
    return RTCSessionDescription(**json.loads(line))


def has_opened(channel: RTCDataChannel) -> asyncio.Event:
    """Return an event that is set when the channel is open."""
    opened = asyncio.Event()
    channel.on("open", opened.set)
    return opened


async def send(connection: RTCPeerConnection, path: Path) -> None:
    """Send a file, and wait until the other end has it."""
    channel = connection.createDataChannel("bulk", ordered=True)
    channel.bufferedAmountLowThreshold = AHEAD // 2
    opened, has_room, done = has_opened(channel), asyncio.Event(), asyncio.Event()
    channel.on("bufferedamountlow", has_room.set)
    channel.on("message", lambda _: done.set())
    await connection.setLocalDescription(await connection.createOffer())
    show(connection)
    await connection.setRemoteDescription(await read_description())
    await opened.wait()
    stopwatch = Stopwatch()
    channel.send(str(path.stat().st_size))
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            has_room.clear()
            channel.send(piece)
            if channel.bufferedAmount > AHEAD:
                await has_room.wait()
    await done.wait()
    stopwatch.tell()


async def receive(connection: RTCPeerConnection, path: Path) -> None:
    """Write the received bytes to a file."""
    channels: asyncio.Queue[RTCDataChannel] = asyncio.Queue()
    connection.on("datachannel", channels.put_nowait)
    await connection.setRemoteDescription(await read_description())
    await connection.setLocalDescription(await connection.createAnswer())
    show(connection)
    channel = await channels.get()
    stopwatch = Stopwatch()
    left, done = -1, asyncio.Event()
    with path.open("wb") as file:

        def take(message: str | bytes) -> None:
            nonlocal left
            if isinstance(message, str):
                left = int(message)
            else:
                left -= file.write(message)
            if left == 0:
                done.set()

        channel.on("message", take)
        await done.wait()
    stopwatch.tell()
    channel.send("done")
    closed = asyncio.Event()
    channel.on("close", closed.set)
    await closed.wait()


async def main() -> None:
    """Run the end that the command line names."""
    role, path = sys.argv[1], Path(sys.argv[2])
    connection = RTCPeerConnection(RTCConfiguration(iceServers=[]))
    try:
        await (send if role == "send" else receive)(connection, path)
    finally:
        await connection.close()


if __name__ == "__main__":
    asyncio.run(main())
