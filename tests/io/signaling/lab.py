"""A signaling server to start and stop, and a peer that does nothing by itself."""

import json
import secrets
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import NoReturn

import structlog
import trio
import trio.testing
from structlog.typing import FilteringBoundLogger
from trio.testing import MockClock
from typing_extensions import override
from wsproto import ConnectionType, WSConnection
from wsproto.events import (
    AcceptConnection,
    CloseConnection,
    Event,
    Ping,
    Request,
    TextMessage,
)

from sleap_rtc.io.nursery import open_background_nursery
from sleap_rtc.io.signaling.client import RoomConnection, open_room
from sleap_rtc.io.signaling.server import serve_signaling
from sleap_rtc.proto.backoff import Backoff
from sleap_rtc.proto.rendezvous.envelope import Offer, seal_offer
from sleap_rtc.proto.rendezvous.invite import RoomKeys
from sleap_rtc.proto.rendezvous.member import MemberLimits
from sleap_rtc.proto.rendezvous.messages import (
    Challenge,
    Metadata,
    Register,
    decode_signal_untrusted,
    encode_signal,
)

KEYS = RoomKeys.from_secret(b"k" * 32)
LOG = structlog.get_logger()
QUICK = MemberLimits(backoff=Backoff(0.01, 0.05))
DEADLINE = 60.0
"""Seconds after which a test has hung; far more than any of them needs."""
HOST = "127.0.0.1"


class RawPeer:
    """One end of a WebSocket, without anything that happens by itself.

    Args:
        stream: The stream to the other end.
        kind: Which end it is.
    """

    def __init__(self, stream: trio.abc.Stream, kind: ConnectionType) -> None:
        self.stream = stream
        self._protocol = WSConnection(kind)
        self._events: deque[Event] = deque()

    async def send(self, *events: Event) -> None:
        """Send all of these at once."""
        await self.stream.send_all(b"".join(map(self._protocol.send, events)))

    async def send_text(self, text: str) -> None:
        await self.send(TextMessage(text))

    async def event(self) -> Event:
        """Wait for the next event; the end of the stream is an error."""
        while not self._events:
            data = await self.stream.receive_some()
            if not data:
                raise trio.BrokenResourceError("the connection ended")
            self._protocol.receive_data(bytes(data))
            self._events += self._protocol.events()
        return self._events.popleft()

    async def rest(self) -> list[Event]:
        """Return all events until the stream ends."""
        async for data in self.stream:
            self._protocol.receive_data(bytes(data))
            self._events += self._protocol.events()
        return list(self._events)

    async def text(self) -> str:
        """Wait for a whole message; pings are answered meanwhile."""
        parts: list[str] = []
        while True:
            event = await self.event()
            if isinstance(event, Ping):
                await self.send(event.response())
                continue
            assert isinstance(event, TextMessage), event
            parts.append(event.data)
            if event.message_finished:
                return "".join(parts)

    async def reply(self) -> dict[str, object]:
        answer = json.loads(await self.text())
        assert isinstance(answer, dict)
        return answer

    async def closing(self) -> tuple[int, str]:
        """Wait for the other end to close; return the code and the reason."""
        while not isinstance(event := await self.event(), CloseConnection):
            pass
        await self.send(event.response())
        return event.code, event.reason or ""

    async def register(self, peer_id: str) -> None:
        challenge = decode_signal_untrusted(await self.text())
        assert isinstance(challenge, Challenge)
        signature = KEYS.sign_registration(challenge.nonce, peer_id)
        await self.send_text(
            encode_signal(
                Register(peer_id, KEYS.room_id, "client", KEYS.public_key, signature)
            )
        )


class LogRecorder:
    """A logger whose entries a test can wait for.

    Attributes:
        log: The logger to pass to the product.
        entries: The fields of each entry, with the message as ``event``.
    """

    def __init__(self) -> None:
        self.log: FilteringBoundLogger = structlog.wrap_logger(
            None,
            processors=[self._record],
            wrapper_class=structlog.make_filtering_bound_logger(0),
        )
        self.entries: list[dict[str, object]] = []
        self._changed = trio.Event()

    def count(self, event: str, **fields: object) -> int:
        """Return how many entries have this message and these fields."""
        wanted = fields | {"event": event}
        return sum(wanted.items() <= entry.items() for entry in self.entries)

    async def wait_for(self, event: str, times: int = 1, **fields: object) -> None:
        """Wait until this many entries have this message and these fields."""
        while self.count(event, **fields) < times:
            await self._changed.wait()

    def _record(
        self, logger: object, method: str, entry: MutableMapping[str, object]
    ) -> NoReturn:
        self.entries.append(dict(entry))
        self._changed.set()
        self._changed = trio.Event()
        raise structlog.DropEvent


class SharedListener(trio.abc.Listener[trio.SocketStream]):
    """A listener that stays open when its server stops, so that it keeps its port."""

    def __init__(self, listener: trio.SocketListener) -> None:
        self._listener = listener

    @override
    async def accept(self) -> trio.SocketStream:
        return await self._listener.accept()

    @override
    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


class Server:
    """A server that can be stopped and started again on its port.

    While it is stopped, connections are accepted and closed at once.

    Args:
        listener: The socket that it listens on.
        nursery: Runs its tasks.

    Attributes:
        port: The port that it listens on.
        logs: The log of the server.
    """

    def __init__(self, listener: trio.SocketListener, nursery: trio.Nursery) -> None:
        self.port: int = listener.socket.getsockname()[1]
        self.logs = LogRecorder()
        self._listener = SharedListener(listener)
        self._nursery = nursery
        self._scope = trio.CancelScope()
        self._ended = trio.Event()
        self._ended.set()

    async def start(self) -> None:
        await self._replace(self._serve)

    async def stop(self) -> None:
        await self._replace(self._refuse)

    async def _replace(self, serve: Callable[[], Awaitable[None]]) -> None:
        """End the running task and start another one."""
        self._scope.cancel(reason="another task takes over")
        await self._ended.wait()
        self._scope, self._ended = trio.CancelScope(), trio.Event()
        self._nursery.start_soon(self._run, serve)

    async def _run(self, serve: Callable[[], Awaitable[None]]) -> None:
        with self._scope:
            await serve()
        self._ended.set()

    async def _serve(self) -> None:
        await serve_signaling([self._listener], log=self.logs.log)

    async def _refuse(self) -> None:
        while True:
            await trio.aclose_forcefully(await self._listener.accept())

    @property
    def url(self) -> str:
        return f"ws://{HOST}:{self.port}"

    def room(
        self,
        peer_id: str,
        role: str = "client",
        metadata: Metadata = Metadata(),  # noqa: B008
        keys: RoomKeys = KEYS,
    ) -> AbstractAsyncContextManager[RoomConnection]:
        return open_room(self.url, keys, peer_id, role, metadata, log=LOG, limits=QUICK)

    @asynccontextmanager
    async def socket(self) -> AsyncIterator[RawPeer]:
        """Connect, up to the end of the handshake."""
        async with await trio.open_tcp_stream(HOST, self.port) as stream:
            peer = RawPeer(stream, ConnectionType.CLIENT)
            await peer.send(Request(host=HOST, target="/"))
            assert isinstance(await peer.event(), AcceptConnection)
            yield peer

    async def check(self) -> None:
        """Check that the server still serves."""
        async with self.room(f"check-{secrets.token_hex(4)}") as room:
            await room.wait_registered()


@asynccontextmanager
async def running_server() -> AsyncIterator[Server]:
    [listener] = await trio.open_tcp_listeners(0, host=HOST)
    async with listener, open_background_nursery() as nursery:
        server = Server(listener, nursery)
        await server.start()
        yield server


@asynccontextmanager
async def lying_server(*texts: str) -> AsyncIterator[str]:
    """Serve these messages on each connection; yield the URL."""

    async def handle(stream: trio.SocketStream) -> None:
        peer = RawPeer(stream, ConnectionType.SERVER)
        try:
            assert isinstance(await peer.event(), Request)
            await peer.send(AcceptConnection())
            for text in texts:
                await peer.send_text(text)
            await peer.closing()
        except trio.BrokenResourceError:
            pass

    async with plain_server(handle) as port:
        yield f"ws://{HOST}:{port}"


@asynccontextmanager
async def plain_server(
    handle: Callable[[trio.SocketStream], object],
) -> AsyncIterator[int]:
    """Serve anything over TCP; yield the port."""
    async with open_background_nursery() as nursery:
        [listener] = await trio.open_tcp_listeners(0, host=HOST)
        await nursery.start(trio.serve_listeners, handle, [listener])
        yield listener.socket.getsockname()[1]


def sealed(sender: str = "client", target: str = "worker") -> str:
    return seal_offer(
        KEYS,
        Offer(("tcp",)),
        sender=sender,
        target=target,
        nonce=secrets.token_bytes(16),
        worker_nonce=b"w" * 16,
        aead_nonce=secrets.token_bytes(12),
        expires=1.0,
    )


async def pass_time(clock: MockClock, seconds: float) -> None:
    """Move the clock, and wait until all tasks have dealt with it."""
    clock.jump(seconds)
    await trio.testing.wait_all_tasks_blocked(0.05)
