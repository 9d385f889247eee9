"""Rooms and the signaling server over real sockets: peers meet, and come back."""

import json
import ssl
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from sleap_rtc.io.nursery import open_background_nursery
from sleap_rtc.io.signaling.client import (
    MAX_WAITING_OFFERS,
    PeerUnreachableError,
    RegistrationRefusedError,
    open_room,
)
from sleap_rtc.proto.rendezvous.invite import RoomKeys
from sleap_rtc.proto.rendezvous.messages import (
    MAX_LIST_BYTES,
    AnswerSignal,
    Challenge,
    DiscoverPeers,
    ErrorSignal,
    Metadata,
    OfferSignal,
    RegisteredAuth,
    encode_signal,
)
from tests.io.signaling.lab import (
    DEADLINE,
    HOST,
    KEYS,
    LOG,
    QUICK,
    LogRecorder,
    Server,
    lying_server,
    running_server,
    sealed,
)

STRANGER = RoomKeys.from_secret(b"x" * 32)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    with trio.fail_after(DEADLINE):
        async with running_server() as server:
            yield server


def answer_to(offer: str) -> str:
    return json.dumps(json.loads(offer) | {"kind": "answer"})


# --------------------------------------------------------------------- golden paths


async def test_peers_are_found_by_role(server: Server) -> None:
    metadata = Metadata(("sleap-rtc",), {"gpu_memory_mb": 8000, "status": "available"})
    async with (
        server.room("worker", "worker", metadata) as worker,
        server.room("other", "client") as other,
        server.room("client") as client,
    ):
        await worker.wait_registered()
        await other.wait_registered()
        [found] = await client.discover(role="worker")
        assert (found.peer_id, found.metadata) == ("worker", metadata)
        assert len(await client.discover()) == 2
        assert await client.discover(role="observer") == []


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
        with pytest.raises(PeerUnreachableError, match="Cannot reach absent"):
            await client.exchange("absent", sealed(target="absent"))


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
        [found] = await client.discover()
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
            assert [peer.peer_id for peer in await client.discover()] == ["worker"]
        await server.logs.wait_for("peer left", peer="worker")
        assert await client.discover() == []


# -------------------------------------------------------------------------- trouble


async def test_peers_come_back_when_the_server_does(server: Server) -> None:
    async with (
        server.room("worker", "worker", Metadata((), {"a": 1})) as worker,
        server.room("client") as client,
    ):
        await worker.wait_registered()
        await client.wait_registered()
        await worker.update_metadata({"b": 2})
        await server.stop()
        await server.start()
        await server.logs.wait_for("peer joined", times=2, peer="worker")
        [found] = await client.discover(role="worker")
        assert found.metadata.properties == {"a": 1, "b": 2}


async def test_a_room_waits_for_a_server_that_is_late(server: Server) -> None:
    await server.stop()
    async with server.room("client") as client, trio.open_nursery() as nursery:
        nursery.start_soon(client.wait_registered)
        await client.failed.wait()
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
        await old.register("peer")
        assert (await old.reply())["type"] == "registered_auth"
        await new.register("peer")
        assert (await new.reply())["type"] == "registered_auth"
        assert "another connection" in (await old.closing())[1]


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
        await socket.register("mallory")
        assert (await socket.reply())["type"] == "registered_auth"
        for message in (
            OfferSignal("client", "victim", sealed()),
            DiscoverPeers("victim"),
        ):
            await socket.send_text(encode_signal(message))
            assert (await socket.reply())["code"] == "NOT_YOU"
        with pytest.raises(trio.WouldBlock):
            victim.offers.receive_nowait()


async def test_an_exception_of_the_body_leaves_the_room_unchanged(
    server: Server,
) -> None:
    async def body() -> None:
        async with server.room("client") as room:
            await room.wait_registered()
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await body()


# ---------------------------------------------------------------- a server that lies

CHALLENGE = encode_signal(Challenge(b"n" * 16))
WELCOME = encode_signal(RegisteredAuth(KEYS.room_id, "a"))


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
async def test_a_server_that_breaks_the_protocol_is_tried_again(
    texts: tuple[str, ...],
) -> None:
    logs = LogRecorder()
    with trio.fail_after(DEADLINE):
        async with (
            lying_server(*texts) as url,
            open_room(url, KEYS, "a", "client", Metadata(), log=logs.log, limits=QUICK),
        ):
            await logs.wait_for("no signaling server", times=3)


async def test_the_list_of_a_full_room_is_not_too_long() -> None:
    """The longest message of a server is longer than any message of a peer."""
    longest = '{"type":"x","y":"' + "z" * (MAX_LIST_BYTES - 19) + '"}'
    assert len(longest) == MAX_LIST_BYTES
    offer = encode_signal(OfferSignal("b", "a", "sealed"))
    with trio.fail_after(DEADLINE):
        async with (
            lying_server(CHALLENGE, WELCOME, longest, offer) as url,
            open_room(url, KEYS, "a", "client", Metadata(), log=LOG) as room,
        ):
            assert await room.offers.receive() == ("b", "sealed")
            assert room.trouble == ""


async def test_offers_that_are_not_read_are_dropped() -> None:
    logs = LogRecorder()
    offers = [
        encode_signal(OfferSignal("b", "a", f"sealed {number}"))
        for number in range(MAX_WAITING_OFFERS + 2)
    ]
    with trio.fail_after(DEADLINE):
        async with (
            lying_server(CHALLENGE, WELCOME, *offers) as url,
            open_room(url, KEYS, "a", "worker", Metadata(), log=logs.log) as room,
        ):
            await logs.wait_for("offer dropped: too many at once", times=2, peer="b")
            read = [await room.offers.receive() for _ in range(MAX_WAITING_OFFERS)]
            assert read[-1] == ("b", f"sealed {MAX_WAITING_OFFERS - 1}")
            with pytest.raises(trio.WouldBlock):
                room.offers.receive_nowait()


async def test_strange_messages_of_the_server_are_logged() -> None:
    logs = LogRecorder()
    answer = encode_signal(AnswerSignal("b", "a", "not sealed"))
    error = encode_signal(ErrorSignal("NOT_YOU", "why"))
    with trio.fail_after(DEADLINE):
        async with (
            lying_server(CHALLENGE, WELCOME, answer, error) as url,
            open_room(url, KEYS, "a", "worker", Metadata(), log=logs.log) as room,
        ):
            await logs.wait_for("not an answer", peer="b")
            await logs.wait_for(
                "the server reports an error", code="NOT_YOU", reason="why"
            )
            assert not room.failed.is_set()


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
    """A proxy in front of the server terminates TLS, as usual."""
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
                await room.failed.wait()
                assert "certificate is not trusted" in room.trouble
