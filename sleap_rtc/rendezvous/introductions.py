"""Introductions: from a shared room to a link between a client and a worker.

`sleap_rtc.proto.rendezvous.envelope` seals and checks the offers and answers. This
module adds entropy and the time, and sends them through the room.
"""

import secrets
import time
from collections.abc import Callable

import msgspec
import structlog

from sleap_rtc.errors import NoWorkerError, RefusedError
from sleap_rtc.io.signaling.client import PeerUnreachableError, RoomConnection
from sleap_rtc.proto.errors import InvalidInput, RemoteProtocolError
from sleap_rtc.proto.messages import Auth
from sleap_rtc.proto.rendezvous.envelope import (
    AEAD_NONCE_BYTES,
    NONCE_BYTES,
    SEAL_LIFETIME,
    Address,
    Answer,
    Offer,
    open_answer_untrusted,
    open_offer_untrusted,
    seal_answer,
    seal_offer,
    worker_nonce_untrusted,
)
from sleap_rtc.proto.rendezvous.invite import RoomKeys
from sleap_rtc.proto.rendezvous.proof import OfferTable, link_proof
from sleap_rtc.proto.rendezvous.workers import Candidate
from sleap_rtc.proto.route.kinds import LINK_KINDS, LinkKindName


class Introduction(msgspec.Struct, frozen=True):
    """The data that a client needs to open a link to a worker."""

    answer: Answer
    auth: Auth


async def ask_worker(
    room: RoomConnection,
    keys: RoomKeys,
    worker: Candidate,
    kinds: tuple[LinkKindName, ...] = LINK_KINDS,
) -> Introduction:
    """Send an offer to a worker, and open its answer.

    It waits without a time limit of its own.

    Args:
        room: The room that both peers are in.
        keys: Keys of the room.
        worker: The worker to ask.
        kinds: The kinds of link that the client can use.

    Raises:
        NoWorkerError: If the worker has left the room.
        RefusedError: If the answer does not come from a holder of the room secret.
    """
    offer_nonce = secrets.token_bytes(NONCE_BYTES)
    try:
        sealed = seal_offer(
            keys,
            Offer(kinds),
            sender=room.peer_id,
            target=worker.peer_id,
            nonce=offer_nonce,
            worker_nonce=worker_nonce_untrusted({"nonce": worker.card.nonce}),
            aead_nonce=secrets.token_bytes(AEAD_NONCE_BYTES),
            expires=time.time() + SEAL_LIFETIME,
        )
        text = await room.exchange(worker.peer_id, sealed)
        opened = open_answer_untrusted(
            keys,
            text,
            sender=worker.peer_id,
            target=room.peer_id,
            offer_nonce=offer_nonce,
            now=time.time(),
        )
    except PeerUnreachableError:
        raise NoWorkerError(
            f"The worker {worker.peer_id} has left the room.",
            "Try again: it may come back. `sleap-rtc workers` lists the workers.",
        ) from None
    except InvalidInput:
        raise RefusedError(
            f"The answer of {worker.peer_id} could not be verified.",
            "Check that both clocks are right within two minutes, and that both sides "
            "hold the same invite (`sleap-rtc invite`).",
        ) from None
    session = offer_nonce.hex()
    proof = link_proof(
        keys,
        session=session,
        answer_nonce=opened.nonce,
        client=room.peer_id,
        worker=worker.peer_id,
        certificate=opened.answer.certificate,
    )
    return Introduction(opened.answer, Auth(session, proof))


class Authenticator:
    """Answers the offers that reach a worker, and checks the proofs of its clients.

    Args:
        keys: Keys of the room.
        peer_id: The worker's peer id.
        certificate: The certificate of the worker's links, DER.
        log: Log of refusals.

    Attributes:
        nonce: Published by the worker, so that no offer outlives this process.
    """

    def __init__(
        self,
        keys: RoomKeys,
        peer_id: str,
        certificate: bytes,
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self.nonce = secrets.token_bytes(NONCE_BYTES)
        self._keys = keys
        self._peer_id = peer_id
        self._certificate = certificate
        self._log = log
        self._offers = OfferTable(keys, peer_id, certificate)

    async def answer_offers(
        self,
        room: RoomConnection,
        addresses: Callable[[], tuple[Address, ...]],
        kinds: tuple[LinkKindName, ...],
    ) -> None:
        """Answer every valid offer until cancelled; log and drop the others.

        Args:
            room: The room that the offers come from.
            addresses: Returns the addresses of the worker's links at present.
            kinds: The kinds of link that the worker listens for.
        """
        async for sender, text in room.offers:
            try:
                sealed = self._answer(sender, text, addresses(), kinds)
            except InvalidInput as error:
                self._log.warning(
                    "offer refused: wrong secret, replayed, altered or too old",
                    peer=sender,
                    reason=error.reason,
                )
                continue
            await room.answer(sender, sealed)

    def authenticate(self, auth: Auth) -> str:
        """Check the proof on a new link.

        Returns:
            The client's peer id.

        Raises:
            RemoteProtocolError: If it is not a proof, or not the first on a link.
        """
        try:
            return self._offers.check_proof_untrusted(
                auth.session, auth.proof, time.time()
            )
        except RemoteProtocolError:
            self._log.warning("link refused: it did not prove the room secret")
            raise

    def _answer(
        self,
        sender: str,
        text: str,
        addresses: tuple[Address, ...],
        kinds: tuple[LinkKindName, ...],
    ) -> str:
        now = time.time()
        opened = open_offer_untrusted(
            self._keys,
            text,
            sender=sender,
            target=self._peer_id,
            worker_nonce=self.nonce,
            now=now,
        )
        self._offers.accept(opened.nonce, opened.expires, now)
        answer_nonce = secrets.token_bytes(NONCE_BYTES)
        expires = now + SEAL_LIFETIME
        self._offers.expect(opened.nonce.hex(), answer_nonce, sender, expires)
        return seal_answer(
            self._keys,
            Answer(addresses, self._certificate, kinds),
            sender=self._peer_id,
            target=sender,
            nonce=answer_nonce,
            offer_nonce=opened.nonce,
            aead_nonce=secrets.token_bytes(AEAD_NONCE_BYTES),
            expires=expires,
        )
