"""Introductions: a client and a worker get from a shared room to a proof."""

import json
import secrets
import time
from collections.abc import AsyncIterator

import pytest
import trio

from sleap_rtc.errors import NoWorkerError, RefusedError
from sleap_rtc.proto.errors import RemoteProtocolError
from sleap_rtc.proto.messages import Auth
from sleap_rtc.proto.rendezvous.envelope import (
    AEAD_NONCE_BYTES,
    NONCE_BYTES,
    SEAL_LIFETIME,
    Address,
    Answer,
    Offer,
    seal_offer,
)
from sleap_rtc.proto.rendezvous.invite import RoomKeys
from sleap_rtc.proto.rendezvous.workers import Candidate, WorkerCard
from sleap_rtc.proto.route.kinds import LINK_KINDS, LinkKindName
from sleap_rtc.rendezvous.introductions import Authenticator, Introduction, ask_worker
from tests.io.signaling.lab import (
    DEADLINE,
    KEYS,
    LogRecorder,
    Server,
    running_server,
    sealed,
)

STRANGER = RoomKeys.from_secret(b"x" * 32)
CERTIFICATE = b"certificate"
REFUSED_OFFER = "offer refused: wrong secret, replayed, altered or too old"
REFUSED_LINK = "link refused: it did not prove the room secret"
LISTENING: tuple[LinkKindName, ...] = ("quic",)
ADDRESSES = (Address("192.0.2.7", 4000),)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    with trio.fail_after(DEADLINE):
        async with running_server() as server:
            yield server


@pytest.fixture
def logs() -> LogRecorder:
    return LogRecorder()


@pytest.fixture
async def worker(
    server: Server, logs: LogRecorder, nursery: trio.Nursery
) -> AsyncIterator[Authenticator]:
    """A worker that answers offers in the room."""
    authenticator = Authenticator(KEYS, "worker", CERTIFICATE, logs.log)
    async with server.room("worker", "worker") as room:
        nursery.start_soon(
            authenticator.answer_offers, room, lambda: ADDRESSES, LISTENING
        )
        await room.wait_registered()
        yield authenticator


def candidate(nonce: bytes) -> Candidate:
    return Candidate("worker", WorkerCard(nonce=nonce.hex()))


async def introduce(server: Server, worker: Authenticator) -> Introduction:
    async with server.room("client") as room:
        return await ask_worker(room, KEYS, candidate(worker.nonce))


async def test_an_introduction_has_the_answer_and_a_proof(
    server: Server, worker: Authenticator
) -> None:
    introduction = await introduce(server, worker)
    assert introduction.answer == Answer(ADDRESSES, CERTIFICATE, LISTENING)
    assert worker.authenticate(introduction.auth) == "client"


async def test_a_proof_is_accepted_once(
    server: Server, worker: Authenticator, logs: LogRecorder
) -> None:
    introduction = await introduce(server, worker)
    worker.authenticate(introduction.auth)
    with pytest.raises(RemoteProtocolError):
        worker.authenticate(introduction.auth)
    assert logs.count(REFUSED_LINK) == 1


async def test_a_wrong_proof_does_not_end_the_session(
    server: Server, worker: Authenticator
) -> None:
    introduction = await introduce(server, worker)
    with pytest.raises(RemoteProtocolError):
        worker.authenticate(Auth(introduction.auth.session, "0" * 64))
    assert worker.authenticate(introduction.auth) == "client"


async def test_a_worker_that_has_left_is_reported(server: Server) -> None:
    async with server.room("client") as room:
        with pytest.raises(NoWorkerError, match="worker has left the room"):
            await ask_worker(room, KEYS, candidate(bytes(16)))


async def test_a_worker_without_a_nonce_is_refused(server: Server) -> None:
    async with server.room("client") as room:
        with pytest.raises(RefusedError, match="could not be verified"):
            await ask_worker(room, KEYS, Candidate("worker", WorkerCard()))


async def test_an_answer_that_is_not_sealed_by_the_room_is_refused(
    server: Server, nursery: trio.Nursery
) -> None:
    async with server.room("worker", "worker") as worker, server.room("client") as room:
        await worker.wait_registered()

        async def echo() -> None:
            """Answer with the offer itself, which names the right session."""
            sender, offer = await worker.offers.receive()
            changed = json.dumps(json.loads(offer) | {"kind": "answer"})
            await worker.answer(sender, changed)

        nursery.start_soon(echo)
        with pytest.raises(RefusedError, match="answer of worker could not be"):
            await ask_worker(room, KEYS, candidate(bytes(16)))


async def test_an_invalid_offer_is_logged_and_the_next_one_is_answered(
    server: Server, worker: Authenticator, logs: LogRecorder, nursery: trio.Nursery
) -> None:
    async with server.room("client") as room:
        # An expired offer, one for an earlier process of the worker, and one of a
        # holder of another secret: none of them gets an answer.
        nursery.start_soon(room.exchange, "worker", sealed())
        await logs.wait_for(REFUSED_OFFER, peer="client")
        nursery.start_soon(ask_worker, room, KEYS, candidate(bytes(16)))
        await logs.wait_for(REFUSED_OFFER, times=2, peer="client")
        nursery.start_soon(ask_worker, room, STRANGER, candidate(worker.nonce))
        await logs.wait_for(REFUSED_OFFER, times=3, peer="client")
        introduction = await ask_worker(room, KEYS, candidate(worker.nonce))
        nursery.cancel_scope.cancel()
    assert worker.authenticate(introduction.auth) == "client"


async def test_a_replayed_offer_gets_no_second_answer(
    server: Server, worker: Authenticator, logs: LogRecorder, nursery: trio.Nursery
) -> None:
    offer = seal_offer(
        KEYS,
        Offer(LINK_KINDS),
        sender="client",
        target="worker",
        nonce=secrets.token_bytes(NONCE_BYTES),
        worker_nonce=worker.nonce,
        aead_nonce=secrets.token_bytes(AEAD_NONCE_BYTES),
        expires=time.time() + SEAL_LIFETIME,
    )
    async with server.room("client") as room:
        await room.exchange("worker", offer)
        nursery.start_soon(room.exchange, "worker", offer)
        await logs.wait_for(REFUSED_OFFER, peer="client")
        nursery.cancel_scope.cancel()
