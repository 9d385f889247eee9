"""The signaling server and rooms over real sockets on the loopback interface."""

import json
import random
import secrets
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
import structlog
import trio
import trio.lowlevel
import trio.testing
import trio_websocket
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from trio.testing import MockClock
from wsproto import ConnectionType, WSConnection
from wsproto.events import CloseConnection, Event, Ping, Request, TextMessage

from sleap_rtc.io.nursery import open_background_nursery
from sleap_rtc.io.signaling import (
    PeerUnreachableError,
    RegistrationRefusedError,
    Room,
    open_room,
)
from sleap_rtc.io.signaling_server import serve_signaling
from sleap_rtc.io.websocket import CLOSE_SECONDS, WebSocket
from sleap_rtc.proto.envelope import Offer, seal_offer
from sleap_rtc.proto.invite import RoomKeys
from sleap_rtc.proto.rendezvous import (
    MAX_SIGNAL_BYTES,
    Challenge,
    Comparison,
    DiscoverPeers,
    Metadata,
    OfferSignal,
    Register,
    RegisteredAuth,
    decode_signal_untrusted,
    encode_signal,
)
from sleap_rtc.proto.room_member import SILENCE_SECONDS, Backoff
from sleap_rtc.proto.room_server import PING_SECONDS, REGISTRATION_SECONDS

KEYS = RoomKeys.from_secret(b"k" * 32)
STRANGER = RoomKeys.from_secret(b"x" * 32)
LOG = structlog.get_logger()
QUICK = Backoff(0.01, 0.05)
DEADLINE = 20.0
HOST = "127.0.0.1"


class Server:
    """A server that can be stopped and started again on its port."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._scope = trio.CancelScope()
        self._stopped = trio.Event()
        self.port = 0

    async def start(self) -> None:
        self._scope, self._stopped = trio.CancelScope(), trio.Event()
        self.port = await self._nursery.start(self._run)

    async def stop(self) -> None:
        self._scope.cancel()
        await self._stopped.wait()

    async def _run(self, task_status: trio.TaskStatus[int]) -> None:
        with self._scope:
            await serve_signaling(HOST, self.port, log=LOG, task_status=task_status)
        self._stopped.set()

    @property
    def url(self) -> str:
        return f"ws://{HOST}:{self.port}"

    def room(
        self,
        peer_id: str,
        role: str = "client",
        metadata: Metadata = Metadata(),  # noqa: B008
        keys: RoomKeys = KEYS,
    ) -> AbstractAsyncContextManager[Room]:
        return open_room(
            self.url, keys, peer_id, role, metadata, log=LOG, backoff=QUICK
        )

    @asynccontextmanager
    async def socket(self) -> AsyncIterator[trio_websocket.WebSocketConnection]:
        """Connect with another implementation of WebSocket."""
        # Its own helpers leave the stream open when the server closes first.
        async with (
            open_background_nursery() as nursery,
            await trio.open_tcp_stream(HOST, self.port) as stream,
        ):
            yield await trio_websocket.wrap_client_stream(nursery, stream, HOST, "/")

    async def works(self) -> None:
        """Check that the server still serves."""
        async with self.room(f"check-{secrets.token_hex(4)}") as room:
            await room.wait_registered()


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    with trio.fail_after(DEADLINE):
        async with open_background_nursery() as nursery:
            server = Server(nursery)
            await server.start()
            yield server


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


def answer_to(offer: str) -> str:
    return json.dumps(json.loads(offer) | {"kind": "answer"})


async def until(condition: Callable[[], bool]) -> None:
    """Wait until something has happened that nobody announces."""
    while not condition():  # noqa: ASYNC110
        await trio.sleep(0.01)


def registration(nonce: bytes, peer_id: str) -> Register:
    signature = KEYS.sign_registration(nonce, peer_id)
    return Register(peer_id, KEYS.room_id, "client", KEYS.public_key, signature)


async def register(socket: trio_websocket.WebSocketConnection, peer_id: str) -> None:
    challenge = decode_signal_untrusted(str(await socket.get_message()))
    assert isinstance(challenge, Challenge)
    message = registration(challenge.nonce, peer_id)
    await socket.send_message(encode_signal(message))


async def reply(socket: trio_websocket.WebSocketConnection) -> dict[str, object]:
    answer = json.loads(await socket.get_message())
    assert isinstance(answer, dict)
    return answer


async def closing(socket: trio_websocket.WebSocketConnection) -> tuple[int, str]:
    """Wait for the server to close; give the code and the reason."""
    with pytest.raises(trio_websocket.ConnectionClosed) as caught:
        await socket.get_message()
    assert caught.value.reason is not None
    return caught.value.reason.code, caught.value.reason.reason or ""


async def wait_for_peers(room: Room, *peers: str) -> None:
    """Ask until the room holds exactly these other peers."""
    while True:
        found = await room.discover()
        if sorted(peer.peer_id for peer in found) == sorted(peers):
            return
        await trio.sleep(0.06)


# ---------------------------------------------------------------------- the good way


async def test_a_peer_is_found_by_role_and_properties(server: Server) -> None:
    metadata = Metadata(("sleap-rtc",), {"gpu_memory_mb": 8000, "status": "available"})
    async with (
        server.room("worker", "worker", metadata) as worker,
        server.room("other", "worker") as other,
        server.room("client") as client,
    ):
        await worker.wait_registered()
        await other.wait_registered()
        found = await client.discover(
            role="worker", properties={"gpu_memory_mb": Comparison(at_least=4000)}
        )
        assert [(peer.peer_id, peer.metadata) for peer in found] == [
            ("worker", metadata)
        ]
        assert len(await client.discover(role="worker")) == 2
        assert await client.discover(role="worker", tags=("none",)) == []


async def test_an_offer_gets_its_answer(server: Server) -> None:
    async with (
        server.room("worker", "worker") as worker,
        server.room("client") as client,
        trio.open_nursery() as nursery,
    ):
        await worker.wait_registered()

        async def serve() -> None:
            sender, offer = await worker.offers.receive()
            assert sender == "client"
            await worker.answer(sender, answer_to(offer))

        nursery.start_soon(serve)
        offer = sealed()
        assert await client.exchange("worker", offer) == answer_to(offer)


async def test_answers_find_their_offers_in_any_order(server: Server) -> None:
    results: dict[str, str] = {}
    async with (
        server.room("worker", "worker") as worker,
        server.room("client") as client,
        trio.open_nursery() as nursery,
    ):
        await worker.wait_registered()

        async def ask(offer: str) -> None:
            results[offer] = await client.exchange("worker", offer)

        for _ in range(5):
            nursery.start_soon(ask, sealed())
        offers = [await worker.offers.receive() for _ in range(5)]
        for sender, offer in reversed(offers):
            await worker.answer(sender, answer_to(offer))
    assert len(results) == 5
    assert all(answer == answer_to(offer) for offer, answer in results.items())


async def test_an_absent_peer_is_unreachable(server: Server) -> None:
    async with server.room("client") as client:
        with pytest.raises(PeerUnreachableError, match="nobody can't be reached"):
            await client.exchange("nobody", sealed(target="nobody"))


async def test_changed_properties_reach_the_room(server: Server) -> None:
    async with (
        server.room("worker", "worker", Metadata(("t",), {"a": 1, "b": 2})) as worker,
        server.room("client") as client,
    ):
        await worker.update_metadata({"b": 3})
        await worker.wait_registered()
        await worker.update_metadata({"c": 4})
        # The server handles one connection's messages in order, not those of two.
        await worker.discover()
        [found] = await client.discover(properties={"c": 4})
        assert found.metadata == Metadata(("t",), {"a": 1, "b": 3, "c": 4})


async def test_rooms_do_not_see_each_other(server: Server) -> None:
    async with server.room("a") as one, server.room("b", keys=STRANGER) as two:
        await two.wait_registered()
        assert await one.discover() == []
        with pytest.raises(PeerUnreachableError):
            await one.exchange("b", sealed(target="b"))


async def test_a_peer_is_gone_when_its_socket_closes(server: Server) -> None:
    async with server.room("client") as client:
        async with server.room("worker", "worker") as worker:
            await worker.wait_registered()
            await wait_for_peers(client, "worker")
        await wait_for_peers(client)


# -------------------------------------------------------------------------- trouble


async def test_peers_come_back_when_the_server_does(server: Server) -> None:
    async with (
        server.room("worker", "worker", Metadata((), {"a": 1})) as worker,
        server.room("client") as client,
    ):
        await worker.wait_registered()
        await wait_for_peers(client, "worker")
        await worker.update_metadata({"b": 2})
        await server.stop()
        await server.start()
        await wait_for_peers(client, "worker")
        [found] = await client.discover(role="worker")
        assert found.metadata.properties == {"a": 1, "b": 2}


async def test_a_room_waits_for_a_server_that_is_late(server: Server) -> None:
    await server.stop()
    async with server.room("client") as client, trio.open_nursery() as nursery:
        nursery.start_soon(client.wait_registered)
        await trio.sleep(0.05)
        await server.start()


async def test_an_exchange_does_not_outlive_the_connection(server: Server) -> None:
    async with (
        server.room("worker", "worker") as worker,
        server.room("client") as client,
        trio.open_nursery() as nursery,
    ):
        await worker.wait_registered()

        async def stop() -> None:
            await worker.offers.receive()
            await server.stop()

        nursery.start_soon(stop)
        with pytest.raises(
            PeerUnreachableError, match="connection to the signaling server was"
        ):
            await client.exchange("worker", sealed())


async def test_the_same_peer_on_a_new_socket_replaces_the_old_one(
    server: Server,
) -> None:
    async with server.socket() as old, server.socket() as new:
        await register(old, "peer")
        assert (await reply(old))["type"] == "registered_auth"
        await register(new, "peer")
        assert (await reply(new))["type"] == "registered_auth"
        assert "another connection" in (await closing(old))[1]


async def test_the_wrong_key_is_refused_for_good(server: Server) -> None:
    class Forger(RoomKeys):
        """Holds another secret, but claims the room."""

    forger = Forger.from_secret(b"y" * 32)
    forger.room_id, forger.public_key = KEYS.room_id, KEYS.public_key
    async with server.room("client", keys=forger) as room:
        with pytest.raises(RegistrationRefusedError, match="signature"):
            await room.wait_registered()
        with pytest.raises(RegistrationRefusedError):
            await room.discover()
        with pytest.raises(trio.EndOfChannel):
            await room.offers.receive()


async def test_impersonation_is_refused(server: Server) -> None:
    async with server.room("victim") as victim, server.socket() as socket:
        await victim.wait_registered()
        await register(socket, "mallory")
        assert (await reply(socket))["type"] == "registered_auth"
        for message in (
            OfferSignal("client", "victim", sealed()),
            DiscoverPeers("victim"),
        ):
            await socket.send_message(encode_signal(message))
            assert (await reply(socket))["code"] == "NOT_YOU"
        with pytest.raises(trio.WouldBlock):
            victim.offers.receive_nowait()


async def test_a_slow_reader_stalls_nobody_and_is_dropped(server: Server) -> None:
    """One peer never reads; others flood it until the server gives it up."""
    with structlog.testing.capture_logs() as logs:
        await flood_a_slow_reader(server)
    assert {"peer": "slow", "reason": "it does not read what it is sent"}.items() <= {
        key: value
        for entry in logs
        if entry["event"] == "peer left" and entry["peer"] == "slow"
        for key, value in entry.items()
    }.items()


async def flood_a_slow_reader(server: Server) -> None:
    big = "x" * 30_000

    async def flood(number: int) -> None:
        while True:
            async with server.socket() as sender:
                await register(sender, f"flood-{number}")
                await sender.get_message()
                for _ in range(25):
                    signal = OfferSignal(f"flood-{number}", "slow", big)
                    await sender.send_message(encode_signal(signal))

    async with server.room("client") as client, server.socket() as slow:
        await register(slow, "slow")
        assert (await reply(slow))["type"] == "registered_auth"
        # From here on it takes in one message more, and nothing else.
        async with open_background_nursery() as floods:
            for number in range(4):
                floods.start_soon(flood, number)
            there = True
            while there:
                await trio.sleep(0.06)
                with trio.fail_after(2):
                    found = await client.discover()
                there = "slow" in [peer.peer_id for peer in found]


GARBAGE = [
    b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc",
    b"GET / HTTP/1.1\r\nHost: \xff\xfe\r\nUpgrade: websocket\r\n"
    b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 8\r\nSec-WebSocket-Key: x\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    b"\x00" * 100_000,
    b"\r\n\r\n",
    b"SSH-2.0-OpenSSH\r\n\r\n",
]


@pytest.mark.parametrize("data", GARBAGE)
async def test_garbage_closes_its_own_connection_only(
    server: Server, data: bytes
) -> None:
    async with server.room("client") as client:
        await client.wait_registered()
        stream = await trio.open_tcp_stream(HOST, server.port)
        async with stream:
            answer = b""
            try:
                await stream.send_all(data)
                async for part in stream:
                    answer += part
            except trio.BrokenResourceError:
                pass
        assert not answer or answer.startswith(b"HTTP/1.1 4")
        assert await client.discover() == []
    await server.works()


HANDSHAKE = (
    b"GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)


async def test_random_bytes_never_hurt_the_server(server: Server) -> None:
    """Garbage before and after the handshake, and handshakes with a wrong byte."""
    source = random.Random(20)
    for number in range(150):
        noise = source.randbytes(source.randrange(1, 200))
        broken = bytearray(HANDSHAKE)
        for _ in range(source.randrange(1, 4)):
            broken[source.randrange(len(broken))] = source.randrange(256)
        data = [noise, HANDSHAKE + noise, bytes(broken) + noise][number % 3]
        stream = await trio.open_tcp_stream(HOST, server.port)
        async with stream:
            try:
                await stream.send_all(data)
                await stream.send_eof()
                async for _ in stream:
                    pass
            except trio.BrokenResourceError:
                pass
    await server.works()


@pytest.mark.parametrize(
    "message",
    ["garbage", "[]", "{}", '{"type":"register"}', "[" * 20_000, "\x00"],
)
async def test_a_broken_message_closes_with_a_reason(
    server: Server, message: str
) -> None:
    async with server.socket() as socket:
        await socket.get_message()
        await socket.send_message(message)
        error = await reply(socket)
        assert (error["type"], error["code"]) == ("error", "INVALID_MESSAGE")
        assert await closing(socket) == (1000, str(error["reason"])[:120])
    await server.works()


@pytest.mark.parametrize("message", [b"binary", "x" * (MAX_SIGNAL_BYTES + 1)])
async def test_an_unsuitable_message_closes_with_a_reason(
    server: Server, message: bytes | str
) -> None:
    async with server.socket() as socket:
        await socket.get_message()
        await socket.send_message(message)
        code, reason = await closing(socket)
        assert code == (1003 if isinstance(message, bytes) else 1009)
        assert reason
    await server.works()


async def test_pings_are_answered(server: Server) -> None:
    async with server.socket() as socket:
        await socket.ping(b"payload")


async def test_a_flood_of_messages_is_cut_off(server: Server) -> None:
    async with server.socket() as socket:
        await register(socket, "flood")
        for _ in range(60):
            await socket.send_message('{"type":"unknown"}')
        assert (await reply(socket))["type"] == "registered_auth"
        assert (await reply(socket))["code"] == "TOO_MANY_MESSAGES"
        assert "messages per second" in (await closing(socket))[1]
    await server.works()


# ---------------------------------------------------------------- a server that lies


@asynccontextmanager
async def lying_server(*texts: str) -> AsyncIterator[str]:
    """Serve these messages to everybody."""

    async def handle(request: trio_websocket.WebSocketRequest) -> None:
        socket = await request.accept()
        try:
            for text in texts:
                await socket.send_message(text)
            await socket.get_message()
            await socket.get_message()
        except trio_websocket.ConnectionClosed:
            pass

    async with open_background_nursery() as nursery:
        serve = partial(
            trio_websocket.serve_websocket, handle, HOST, 0, ssl_context=None
        )
        listening = await nursery.start(serve)
        yield f"ws://{HOST}:{listening.port}"


CHALLENGE = encode_signal(Challenge(b"n" * 16))


@pytest.mark.parametrize(
    "texts",
    [
        ("garbage",),
        (CHALLENGE, CHALLENGE),
        ('{"type":"registered_auth","room_id":"' + "0" * 32 + '","peer_id":"a"}',),
        (CHALLENGE, '{"type":"peer_list","to_peer_id":"a","peers":[],"count":0}'),
        (CHALLENGE, '{"type":"error","code":"ROOM_FULL","reason":"full"}', "garbage"),
    ],
)
async def test_a_broken_server_is_left_and_tried_again(texts: tuple[str, ...]) -> None:
    with trio.fail_after(DEADLINE), structlog.testing.capture_logs() as logs:
        async with (
            lying_server(*texts) as url,
            open_room(
                url,
                KEYS,
                "a",
                "client",
                Metadata(),
                log=structlog.get_logger(),
                backoff=QUICK,
            ),
        ):
            await until(
                lambda: [e["event"] for e in logs].count("no signaling server") >= 3
            )


async def test_a_port_without_a_server_says_so() -> None:
    with trio.fail_after(DEADLINE), structlog.testing.capture_logs() as logs:
        [listener] = await trio.open_tcp_listeners(0, host=HOST)
        port = listener.socket.getsockname()[1]
        await listener.aclose()
        log = structlog.get_logger()
        async with open_room(
            f"ws://{HOST}:{port}", KEYS, "a", "client", Metadata(), log=log
        ):
            await until(lambda: bool(logs))
    assert "refused" in logs[0]["reason"]
    assert str(port) in logs[0]["reason"]


async def test_a_web_server_is_named_as_such() -> None:
    async def answer(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")

    with trio.fail_after(DEADLINE), structlog.testing.capture_logs() as logs:
        async with open_background_nursery() as nursery:
            listeners = await nursery.start(
                partial(trio.serve_tcp, answer, 0, host=HOST)
            )
            port = listeners[0].socket.getsockname()[1]
            log = structlog.get_logger()
            async with open_room(
                f"ws://{HOST}:{port}", KEYS, "a", "client", Metadata(), log=log
            ):
                await until(lambda: bool(logs))
    assert "HTTP 404" in logs[0]["reason"]


async def test_what_the_body_raises_leaves_the_room_unchanged(server: Server) -> None:
    async def body() -> None:
        async with server.room("client") as room:
            await room.wait_registered()
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await body()


# ---------------------------------------------------------------------------- wss://


def make_tls(folder: Path) -> tuple[ssl.SSLContext, Path]:
    """Make the TLS side of a server called localhost, and its certificate."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
        .sign(key, hashes.SHA256())
    )
    pem = folder / "certificate.pem"
    pem.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_file = folder / "key.pem"
    key_file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem, key_file)
    return context, pem


@pytest.mark.parametrize("trusted", [True, False])
async def test_a_secure_server_is_used_only_if_it_is_trusted(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusted: bool
) -> None:
    """In front of the server stands a proxy that ends TLS, as is usual."""
    context, certificate = make_tls(tmp_path)
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))

    async def pump(source: trio.abc.Stream, sink: trio.abc.Stream) -> None:
        try:
            async for data in source:
                await sink.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    async def proxy(stream: trio.SSLStream[trio.SocketStream]) -> None:
        async with (
            stream,
            await trio.open_tcp_stream(HOST, server.port) as behind,
            open_background_nursery() as nursery,
        ):
            nursery.start_soon(pump, behind, stream)
            await pump(stream, behind)

    with structlog.testing.capture_logs() as logs:
        async with open_background_nursery() as nursery:
            serve = partial(
                trio.serve_ssl_over_tcp,
                proxy,
                0,
                context,
                host=HOST,
                https_compatible=True,
            )
            [listener] = await nursery.start(serve)
            port = listener.transport_listener.socket.getsockname()[1]
            url = f"wss://localhost:{port}"
            async with open_room(url, KEYS, "a", "client", Metadata(), log=LOG) as room:
                if trusted:
                    assert await room.discover() == []
                else:
                    await until(lambda: any("reason" in entry for entry in logs))
    if not trusted:
        [reason] = [entry["reason"] for entry in logs if "retry_in" in entry]
        assert "certificate is not trusted" in reason


# ----------------------------------------------------- deadlines, on a clock of its own


@pytest.mark.timeout(20)
async def test_who_says_nothing_is_dropped(mock_clock: MockClock) -> None:
    async with open_background_nursery() as nursery:
        server = Server(nursery)
        await server.start()
        async with await trio.open_tcp_stream(HOST, server.port) as stream:
            await trio.testing.wait_all_tasks_blocked(0.05)
            mock_clock.jump(REGISTRATION_SECONDS)
            assert await stream.receive_some() == b""


async def pass_time(clock: MockClock, seconds: float) -> None:
    """Let time pass, and whatever happens then happen."""
    clock.jump(seconds)
    await trio.testing.wait_all_tasks_blocked(0.05)


@pytest.mark.timeout(20)
async def test_pings_tell_who_is_there(mock_clock: MockClock) -> None:
    """Of two silent peers, the one that does not answer pings is dropped."""
    async with open_background_nursery() as nursery:
        server = Server(nursery)
        await server.start()
        async with (
            server.socket() as healthy,
            await trio.open_tcp_stream(HOST, server.port) as stream,
        ):
            await register(healthy, "healthy")
            assert (await reply(healthy))["type"] == "registered_auth"
            deaf = WSConnection(ConnectionType.CLIENT)
            await stream.send_all(deaf.send(Request(host=HOST, target="/")))
            challenge: list[Event] = []
            while len(challenge) < 2:
                deaf.receive_data(await stream.receive_some())
                challenge += deaf.events()
            assert isinstance(challenge[1], TextMessage)
            nonce = decode_signal_untrusted(challenge[1].data)
            assert isinstance(nonce, Challenge)
            text = encode_signal(registration(nonce.nonce, "deaf"))
            await stream.send_all(deaf.send(TextMessage(text)))
            for _ in range(5):
                await trio.testing.wait_all_tasks_blocked(0.05)
                await pass_time(mock_clock, PING_SECONDS)
            received = b""
            async for part in stream:
                received += part
            deaf.receive_data(received)
            kinds = [type(event) for event in deaf.events()]
            assert kinds == [TextMessage, Ping, Ping, Ping, Ping, CloseConnection]
            await healthy.send_message(encode_signal(DiscoverPeers("healthy")))
            assert (await reply(healthy))["peers"] == []


@pytest.mark.timeout(20)
async def test_a_server_that_falls_silent_is_left(mock_clock: MockClock) -> None:
    """Its pings do not come, though the connection looks open."""
    welcome = RegisteredAuth(KEYS.room_id, "a")
    with structlog.testing.capture_logs() as logs:
        async with (
            lying_server(CHALLENGE, encode_signal(welcome)) as url,
            open_room(url, KEYS, "a", "client", Metadata(), log=LOG) as room,
        ):
            await room.wait_registered()
            await trio.testing.wait_all_tasks_blocked(0.05)
            await pass_time(mock_clock, SILENCE_SECONDS)
            await pass_time(mock_clock, CLOSE_SECONDS)
    events = [entry["event"] for entry in logs]
    assert events[:2] == ["registered", "no signaling server"]
    assert logs[1]["reason"] == "the signaling server fell silent"


async def test_a_cancelled_owner_cuts_no_frame() -> None:
    """What the other end gets is whole, however much of it is on the way."""

    class Nobody:
        def received_text(self, text: str) -> None: ...

        def heard(self) -> None: ...

    ours, theirs = trio.testing.lockstep_stream_pair()
    socket = WebSocket.of_server(ours, MAX_SIGNAL_BYTES)
    peer = WSConnection(ConnectionType.CLIENT)
    received: list[Event] = []
    scope = trio.CancelScope()

    async def own() -> None:
        with scope:
            await socket.run(Nobody())

    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(own)
            await theirs.send_all(peer.send(Request(host=HOST, target="/")))
            peer.receive_data(bytes(await theirs.receive_some()))
            socket.send_text("x" * 50_000)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
            async for part in theirs:
                peer.receive_data(bytes(part))
                received += peer.events()
    texts = [event for event in received if isinstance(event, TextMessage)]
    assert sum(len(event.data) for event in texts) == 50_000
    assert texts[-1].message_finished
