"""What peers tell each other past the signaling server: sealed offers and answers.

An offer is bound to both peer ids, to a fresh nonce of the client, to the nonce that
the worker publishes (a new one whenever it starts), and to a time. An answer is bound
to the offer's nonce and to one of its own. So whoever carries them can neither read,
nor alter, nor replay them. On the new link the client then proves that it is the one
who got the answer.

In this module ``now`` and ``expires`` are seconds since 1970 (wall clock), because two
machines have to agree on them.
"""

import hashlib
import hmac
import re
from collections.abc import Mapping
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from sleap_rtc.proto.errors import (
    InvalidInput,
    LocalProtocolError,
    RemoteProtocolError,
)
from sleap_rtc.proto.messages import Nonce
from sleap_rtc.proto.rendezvous.invite import RoomKeys, join_fields
from sleap_rtc.proto.route.kinds import LinkKindName

NONCE_BYTES = 16
AEAD_NONCE_BYTES = 12

SEAL_LIFETIME = 150.0
"""Seconds from sealing to expiry. Half of what is accepted, so that the clocks of two
laptops may differ by this much in either direction."""

MAX_SECONDS_AHEAD = 300.0
"""How far ahead an expiry may lie: it bounds how long a worker remembers offers."""

MAX_OUTSTANDING_OFFERS = 1024
"""Three offers a second for the whole of `MAX_SECONDS_AHEAD`. Only holders of the
secret get this far, so it stops a client that went wild, not an attacker."""

MAX_SEALED_CHARACTERS = 32 * 1024
"""Half of a signaling message; the largest answer takes less than that."""

_REFUSED = "refused"

# -------------------------------------------------------------- offers and answers


class Offer(msgspec.Struct, frozen=True):
    """What a client asks a worker for: a link, of one of these kinds."""

    kinds: Annotated[tuple[LinkKindName, ...], Meta(min_length=1, max_length=8)]


class Address(msgspec.Struct, frozen=True):
    """Where a worker listens, TCP and UDP alike."""

    host: Annotated[str, Meta(min_length=1, max_length=255)]
    port: Annotated[int, Meta(ge=1, le=65535)]


class Answer(msgspec.Struct, frozen=True):
    """Where a worker can be reached, and the certificate to trust there.

    Args:
        addresses: In the order of the worker's preference.
        certificate: The worker's self-signed certificate, DER.
        kinds: The kinds of link that it listens for.
    """

    addresses: Annotated[tuple[Address, ...], Meta(min_length=1, max_length=32)]
    certificate: Annotated[bytes, Meta(min_length=1, max_length=8192)]
    kinds: Annotated[tuple[LinkKindName, ...], Meta(min_length=1, max_length=8)]


class OpenedOffer(msgspec.Struct, frozen=True):
    """An offer that was sealed by a holder of the room secret.

    Args:
        offer: What it says.
        nonce: The client's nonce; as hexadecimal digits it names the session.
        expires: When the worker may forget it.
    """

    offer: Offer
    nonce: bytes
    expires: float


class OpenedAnswer(msgspec.Struct, frozen=True):
    """An answer to the offer that was asked about, and the worker's own nonce."""

    answer: Answer
    nonce: bytes


_Kind = Literal["offer", "answer"]


class _Envelope(msgspec.Struct, frozen=True):
    """What a sealed text looks like: JSON, with bytes in base64.

    Everything but the sealed part is associated data, and so are the two peer ids,
    which the receiver knows already.
    """

    version: Literal[1]
    kind: _Kind
    session: Nonce
    nonce: Nonce
    expires: float
    aead_nonce: Annotated[
        bytes, Meta(min_length=AEAD_NONCE_BYTES, max_length=AEAD_NONCE_BYTES)
    ]
    sealed: bytes


_NO_ENVELOPE = _Envelope(
    version=1,
    kind="offer",
    session="0" * 2 * NONCE_BYTES,
    nonce="0" * 2 * NONCE_BYTES,
    expires=0.0,
    aead_nonce=bytes(AEAD_NONCE_BYTES),
    sealed=bytes(64),
)
"""Stands in for a text that is no envelope, so that it takes the same path."""


def _associated(
    kind: _Kind, sender: str, target: str, session: str, nonce: str, expires: float
) -> bytes:
    fields = ("sleap-rtc/1", kind, sender, target, session, nonce, repr(expires))
    return join_fields(*(field.encode() for field in fields))


def seal_offer(
    keys: RoomKeys,
    offer: Offer,
    *,
    sender: str,
    target: str,
    nonce: bytes,
    worker_nonce: bytes,
    aead_nonce: bytes,
    expires: float,
) -> str:
    """Seal an offer of a client.

    Args:
        keys: The room's.
        offer: What to say.
        sender: The client's peer id.
        target: The worker's peer id.
        nonce: `NONCE_BYTES` fresh random bytes; they name the session.
        worker_nonce: What the worker publishes, see `worker_nonce_untrusted`.
        aead_nonce: `AEAD_NONCE_BYTES` fresh random bytes.
        expires: When it loses its value: now plus `SEAL_LIFETIME`.

    Returns:
        The text for the signaling server.
    """
    return _seal(
        keys,
        "offer",
        msgspec.json.encode(offer),
        (sender, target),
        (nonce, worker_nonce),
        aead_nonce,
        expires,
    )


def seal_answer(
    keys: RoomKeys,
    answer: Answer,
    *,
    sender: str,
    target: str,
    nonce: bytes,
    offer_nonce: bytes,
    aead_nonce: bytes,
    expires: float,
) -> str:
    """Seal the answer of a worker; ``offer_nonce`` is that of the opened offer.

    The other arguments are those of `seal_offer`, with the worker as the sender.
    """
    return _seal(
        keys,
        "answer",
        msgspec.json.encode(answer),
        (sender, target),
        (offer_nonce, nonce),
        aead_nonce,
        expires,
    )


def _seal(
    keys: RoomKeys,
    kind: _Kind,
    content: bytes,
    peers: tuple[str, str],
    nonces: tuple[bytes, bytes],
    aead_nonce: bytes,
    expires: float,
) -> str:
    if any(len(nonce) != NONCE_BYTES for nonce in nonces):
        raise LocalProtocolError(f"a nonce must have {NONCE_BYTES} bytes")
    session, nonce = nonces[0].hex(), nonces[1].hex()
    expires = float(expires)
    associated = _associated(kind, *peers, session, nonce, expires)
    sealed = keys.seal(aead_nonce, content, associated)
    envelope = _Envelope(1, kind, session, nonce, expires, aead_nonce, sealed)
    return msgspec.json.encode(envelope).decode()


def session_untrusted(text: str) -> str:
    """Read which session a sealed text claims to belong to; nothing is proven yet.

    Raises:
        InvalidInput: If it is no sealed text.
    """
    envelope = _envelope_untrusted(text)
    if envelope is _NO_ENVELOPE:
        raise InvalidInput(_REFUSED)
    return envelope.session


def worker_nonce_untrusted(properties: Mapping[str, object]) -> bytes:
    """Read the nonce that a worker publishes in its metadata, property ``nonce``.

    Raises:
        InvalidInput: If there is none.
    """
    text = properties.get("nonce")
    if not isinstance(text, str) or not re.fullmatch(r"[0-9a-f]{32}", text):
        raise InvalidInput("this worker publishes no session nonce")
    return bytes.fromhex(text)


def open_offer_untrusted(
    keys: RoomKeys,
    text: str,
    *,
    sender: str,
    target: str,
    worker_nonce: bytes,
    now: float,
) -> OpenedOffer:
    """Open an offer that reached a worker.

    Args:
        keys: The room's.
        text: What the signaling server delivered.
        sender: The client's peer id, according to the server.
        target: The worker's own peer id.
        worker_nonce: What the worker publishes at present.
        now: Seconds since 1970.

    Raises:
        InvalidInput: If anything is wrong with it, in the same words whatever
            it was. A replay is noticed by `OfferLedger.accept`.
    """
    envelope = _envelope_untrusted(text)
    nonces = (envelope.session, worker_nonce.hex())
    offer = _open(keys, "offer", Offer, envelope, (sender, target), nonces, now)
    return OpenedOffer(offer, bytes.fromhex(envelope.session), envelope.expires)


def open_answer_untrusted(
    keys: RoomKeys,
    text: str,
    *,
    sender: str,
    target: str,
    offer_nonce: bytes,
    now: float,
) -> OpenedAnswer:
    """Open the answer to one offer of a client.

    The arguments are those of `open_offer_untrusted`, with the worker as the sender.

    Raises:
        InvalidInput: If anything is wrong with it, always in the same words.
    """
    envelope = _envelope_untrusted(text)
    nonces = (offer_nonce.hex(), envelope.nonce)
    answer = _open(keys, "answer", Answer, envelope, (sender, target), nonces, now)
    return OpenedAnswer(answer, bytes.fromhex(envelope.nonce))


def _envelope_untrusted(text: str) -> _Envelope:
    if len(text) > MAX_SEALED_CHARACTERS:
        return _NO_ENVELOPE
    try:
        return msgspec.json.decode(text, type=_Envelope)
    except (ValueError, RecursionError):
        return _NO_ENVELOPE


_Content = TypeVar("_Content", Offer, Answer)


def _open(
    keys: RoomKeys,
    kind: _Kind,
    content: type[_Content],
    envelope: _Envelope,
    peers: tuple[str, str],
    nonces: tuple[str, str],
    now: float,
) -> _Content:
    """Decrypt first and judge afterwards, so that time tells nothing."""
    # What the receiver expects goes in here, not what the envelope claims: any
    # difference makes the decryption fail.
    associated = _associated(kind, *peers, *nonces, envelope.expires)
    plain = keys.unseal(envelope.aead_nonce, envelope.sealed, associated)
    timely = now < envelope.expires <= now + MAX_SECONDS_AHEAD
    honest = (envelope.kind, envelope.session, envelope.nonce) == (kind, *nonces)
    if plain is None or not (timely and honest):
        raise InvalidInput(_REFUSED)
    try:
        return msgspec.json.decode(plain, type=content)
    except (ValueError, RecursionError):
        raise InvalidInput(_REFUSED) from None


# ----------------------------------------------------------- proof inside the link


def link_proof(
    keys: RoomKeys,
    *,
    session: str,
    answer_nonce: bytes,
    client: str,
    worker: str,
    certificate: bytes,
) -> str:
    """Compute what a client sends first on a new link.

    It names the worker's certificate, so it is worth nothing on any other connection.

    Args:
        keys: The room's.
        session: The offer's nonce as hexadecimal digits.
        answer_nonce: The nonce of the opened answer.
        client: The client's peer id.
        worker: The worker's peer id.
        certificate: The worker's certificate, DER.

    Returns:
        64 hexadecimal digits.
    """
    return keys.authenticate(
        join_fields(
            b"sleap-rtc/1 link",
            session.encode(),
            answer_nonce,
            client.encode(),
            worker.encode(),
            hashlib.sha256(certificate).digest(),
        )
    )


class _Expected(msgspec.Struct, frozen=True):
    """A link that may come, until it expires."""

    answer_nonce: bytes
    client: str
    expires: float


_NOBODY = _Expected(b"", "", float("-inf"))
"""Stands in for an unknown session, so that it takes the same path."""


class OfferLedger:
    """What a worker remembers of offers: no replay, and one link for each.

    Call `accept` for every opened offer, `expect` once it is answered, and
    `check_proof_untrusted` when a link presents its proof.

    Args:
        keys: The room's.
        worker: The worker's peer id.
        certificate: The worker's certificate, DER.
    """

    def __init__(self, keys: RoomKeys, worker: str, certificate: bytes) -> None:
        self._keys = keys
        self._worker = worker
        self._certificate = certificate
        self._seen: dict[str, float] = {}
        self._expected: dict[str, _Expected] = {}

    def accept(self, nonce: bytes, expires: float, now: float) -> None:
        """Note an opened offer until it expires.

        Raises:
            InvalidInput: If this nonce was there before, or there are too many.
        """
        self._forget_expired(now)
        session = nonce.hex()
        if session in self._seen or len(self._seen) >= MAX_OUTSTANDING_OFFERS:
            raise InvalidInput(_REFUSED)
        self._seen[session] = expires

    def expect(
        self, session: str, answer_nonce: bytes, client: str, expires: float
    ) -> None:
        """Wait for the link of an accepted offer.

        Args:
            session: The offer's nonce as hexadecimal digits.
            answer_nonce: The nonce of the answer.
            client: Who may come.
            expires: Until when.

        Raises:
            LocalProtocolError: If the offer was not accepted, or answered before.
        """
        if session not in self._seen or session in self._expected:
            raise LocalProtocolError("expect() follows accept(), once")
        self._expected[session] = _Expected(answer_nonce, client, expires)
        self._seen[session] = max(expires, self._seen[session])

    def check_proof_untrusted(self, session: str, proof: str, now: float) -> str:
        """Let a client in, once.

        A wrong proof leaves the session as it is: else whoever saw the offer pass by
        could keep its client out.

        Args:
            session: What the client calls the session.
            proof: What it proves it with, see `link_proof`.
            now: Seconds since 1970.

        Returns:
            The client's peer id.

        Raises:
            RemoteProtocolError: If anything is wrong, always in the same words.
        """
        expected = self._expected.get(session, _NOBODY)
        right = link_proof(
            self._keys,
            session=session,
            answer_nonce=expected.answer_nonce,
            client=expected.client,
            worker=self._worker,
            certificate=self._certificate,
        )
        matches = hmac.compare_digest(
            right.encode(), proof.encode("utf-8", "surrogatepass")
        )
        if not matches or now >= expected.expires:
            raise RemoteProtocolError(_REFUSED)
        self._expected[session] = _NOBODY
        return expected.client

    def _forget_expired(self, now: float) -> None:
        for session in [key for key, end in self._seen.items() if now >= end]:
            del self._seen[session]
            self._expected.pop(session, None)
