"""Sealed offers and answers, which peers exchange through the signaling server.

An offer is bound to both peer ids, to a fresh nonce of the client, to the nonce that
the worker publishes (a new one at each start), and to a time. An answer is bound to the
offer's nonce and to a nonce of its own. So the server can neither read, nor alter, nor
replay them. `sleap_rtc.proto.rendezvous.proof` handles the proof on the new link.

In this module ``now`` and ``expires`` are seconds since 1970 (wall clock), because two
machines have to agree on them.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Literal, TypeVar, assert_never

import msgspec
from msgspec import Meta

from sleap_rtc.proto.errors import InvalidInput, LocalProtocolError
from sleap_rtc.proto.messages import Nonce
from sleap_rtc.proto.rendezvous.invite import RoomKeys, join_fields
from sleap_rtc.proto.route.kinds import LinkKindName, Target

NONCE_BYTES = 16
AEAD_NONCE_BYTES = 12

SEAL_LIFETIME = 150.0
"""Seconds from sealing to expiry. It is half of `MAX_LIFETIME`, so that the clocks of
two laptops may differ by this much in either direction."""

MAX_LIFETIME = 300.0
"""Seconds from now to the latest expiry that is accepted. It limits how long a worker
remembers an offer."""

MAX_SEALED_CHARACTERS = 32 * 1024
"""Characters of a sealed text, half of a signaling message. The largest answer is
shorter."""

REFUSED = "refused"
"""The reason of every refusal, so that it reveals nothing."""

_KindText = Annotated[str, Meta(min_length=1, max_length=32)]
"""The name of a kind of link, which may be newer than this program."""

# -------------------------------------------------------------- offers and answers


class Offer(msgspec.Struct, frozen=True):
    """The request of a client for a link.

    Args:
        kinds: The kinds of link that the client would dial. They are informative: the
            answer does not depend on them.
    """

    kinds: Annotated[tuple[_KindText, ...], Meta(min_length=1, max_length=8)]


class Address(msgspec.Struct, frozen=True):
    """An address that a worker listens on, over TCP and over UDP."""

    host: Annotated[str, Meta(min_length=1, max_length=255)]
    port: Annotated[int, Meta(ge=1, le=65535)]


class Answer(msgspec.Struct, frozen=True):
    """The addresses of a worker, and the certificate to trust there.

    Args:
        addresses: In the order of the worker's preference.
        certificate: The worker's self-signed certificate, DER.
        kinds: The kinds of link that the worker listens for.
    """

    addresses: Annotated[tuple[Address, ...], Meta(min_length=1, max_length=32)]
    certificate: Annotated[bytes, Meta(min_length=1, max_length=8192)]
    kinds: Annotated[tuple[_KindText, ...], Meta(min_length=1, max_length=8)]

    def targets(self, kind: LinkKindName) -> tuple[Target, ...]:
        """Return where links of a kind reach the worker, the best target first."""
        match kind:
            case "tcp" | "quic":
                return tuple((each.host, each.port) for each in self.addresses)
            case _:
                assert_never(kind)


class OpenedOffer(msgspec.Struct, frozen=True):
    """An offer that was sealed by a holder of the room secret.

    Args:
        offer: Its content.
        nonce: The client's nonce; its hexadecimal digits name the session.
        expires: When the worker may forget it.
    """

    offer: Offer
    nonce: bytes
    expires: float


class OpenedAnswer(msgspec.Struct, frozen=True):
    """The answer to an offer, and the worker's own nonce."""

    answer: Answer
    nonce: bytes


_Kind = Literal["offer", "answer"]


class _Associated(msgspec.Struct, frozen=True):
    """The associated data of the AEAD, to which a sealed content is bound.

    Args:
        kind: Offer or answer.
        sender: Peer id of the sender.
        target: Peer id of the receiver.
        session: The client's nonce in hexadecimal digits.
        nonce: The worker's nonce in hexadecimal digits.
        expires: When the text expires.
    """

    kind: _Kind
    sender: str
    target: str
    session: str
    nonce: str
    expires: float

    def to_bytes(self) -> bytes:
        """Encode the fields so that no two different sets give the same bytes."""
        fields = (
            "sleap-rtc/1",
            self.kind,
            self.sender,
            self.target,
            self.session,
            self.nonce,
            repr(self.expires),
        )
        return join_fields(*(field.encode() for field in fields))


class _Envelope(msgspec.Struct, frozen=True):
    """The JSON of a sealed text, with bytes in base64.

    All fields but the sealed part are associated data, and so are the two peer ids,
    which the receiver has already.
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


_INVALID = _Envelope(
    version=1,
    kind="offer",
    session="0" * 2 * NONCE_BYTES,
    nonce="0" * 2 * NONCE_BYTES,
    expires=0.0,
    aead_nonce=bytes(AEAD_NONCE_BYTES),
    sealed=bytes(64),
)
"""Stand-in for a text that is not an envelope: its refusal takes as much work."""


# ------------------------------------------------------------------------- sealing


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
        keys: Keys of the room.
        offer: The content.
        sender: The client's peer id.
        target: The worker's peer id.
        nonce: `NONCE_BYTES` fresh random bytes; they name the session.
        worker_nonce: The nonce that the worker publishes, see `worker_nonce_untrusted`.
        aead_nonce: `AEAD_NONCE_BYTES` fresh random bytes.
        expires: When the text expires: now plus `SEAL_LIFETIME`.

    Returns:
        The text for the signaling server.
    """
    associated = _Associated(
        kind="offer",
        sender=sender,
        target=target,
        session=_digits(nonce),
        nonce=_digits(worker_nonce),
        expires=float(expires),
    )
    return _seal(keys, offer, associated, aead_nonce)


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
    """Seal the answer of a worker; ``offer_nonce`` is the nonce of the opened offer.

    The other arguments are those of `seal_offer`, with the worker as the sender.
    """
    associated = _Associated(
        kind="answer",
        sender=sender,
        target=target,
        session=_digits(offer_nonce),
        nonce=_digits(nonce),
        expires=float(expires),
    )
    return _seal(keys, answer, associated, aead_nonce)


def _seal(
    keys: RoomKeys, content: Offer | Answer, associated: _Associated, aead_nonce: bytes
) -> str:
    plain = msgspec.json.encode(content)
    envelope = _Envelope(
        version=1,
        kind=associated.kind,
        session=associated.session,
        nonce=associated.nonce,
        expires=associated.expires,
        aead_nonce=aead_nonce,
        sealed=keys.seal(aead_nonce, plain, associated.to_bytes()),
    )
    return msgspec.json.encode(envelope).decode()


def _digits(nonce: bytes) -> str:
    if len(nonce) != NONCE_BYTES:
        raise LocalProtocolError(f"a nonce must have {NONCE_BYTES} bytes")
    return nonce.hex()


# ------------------------------------------------------------------------- opening


def session_untrusted(text: str) -> str:
    """Return the session that a sealed text claims to belong to, without a proof.

    Raises:
        InvalidInput: If it is not a sealed text.
    """
    envelope = _envelope_untrusted(text)
    if envelope is _INVALID:
        raise InvalidInput(REFUSED)
    return envelope.session


def worker_nonce_untrusted(properties: Mapping[str, object]) -> bytes:
    """Return the nonce that a worker publishes in its metadata, property ``nonce``.

    Raises:
        InvalidInput: If it publishes none.
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
        keys: Keys of the room.
        text: The text that the signaling server delivered.
        sender: The client's peer id, according to the server.
        target: The worker's own peer id.
        worker_nonce: The nonce that the worker publishes at present.
        now: Seconds since 1970.

    Raises:
        InvalidInput: If anything is wrong with it, always for the same reason. A replay
            is noticed by `OfferTable.accept`.
    """
    envelope = _envelope_untrusted(text)
    expected = _Associated(
        kind="offer",
        sender=sender,
        target=target,
        session=envelope.session,
        nonce=worker_nonce.hex(),
        expires=envelope.expires,
    )
    offer = _open(keys, envelope, expected, Offer, now)
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
        InvalidInput: If anything is wrong with it, always for the same reason.
    """
    envelope = _envelope_untrusted(text)
    expected = _Associated(
        kind="answer",
        sender=sender,
        target=target,
        session=offer_nonce.hex(),
        nonce=envelope.nonce,
        expires=envelope.expires,
    )
    answer = _open(keys, envelope, expected, Answer, now)
    return OpenedAnswer(answer, bytes.fromhex(envelope.nonce))


def _envelope_untrusted(text: str) -> _Envelope:
    if len(text) > MAX_SEALED_CHARACTERS:
        return _INVALID
    try:
        return msgspec.json.decode(text, type=_Envelope)
    except (ValueError, RecursionError):
        return _INVALID


_Content = TypeVar("_Content", Offer, Answer)


def _open(
    keys: RoomKeys,
    envelope: _Envelope,
    expected: _Associated,
    content: type[_Content],
    now: float,
) -> _Content:
    """Decrypt first and check afterwards, so that the time taken reveals nothing.

    The associated data are those that the receiver expects, not those that the envelope
    claims: any difference makes the decryption fail.
    """
    plain = keys.unseal(envelope.aead_nonce, envelope.sealed, expected.to_bytes())
    timely = now < envelope.expires <= now + MAX_LIFETIME
    honest = (envelope.kind, envelope.session, envelope.nonce) == (
        expected.kind,
        expected.session,
        expected.nonce,
    )
    if plain is None or not (timely and honest):
        raise InvalidInput(REFUSED)
    try:
        return msgspec.json.decode(plain, type=content)
    except (ValueError, RecursionError):
        raise InvalidInput(REFUSED) from None
