"""The proof inside a new link, and the table of offers that it depends on."""

import pytest

from sleap_rtc.proto.errors import (
    InvalidInput,
    LocalProtocolError,
    RemoteProtocolError,
)
from sleap_rtc.proto.rendezvous.invite import RoomKeys
from sleap_rtc.proto.rendezvous.proof import (
    MAX_OUTSTANDING_OFFERS,
    OfferTable,
    link_proof,
)

KEYS = RoomKeys.from_secret(b"s" * 32)
STRANGER = RoomKeys.from_secret(b"t" * 32)
NOW = 1_700_000_000.0
NONCE = b"c" * 16
ANSWER_NONCE = b"a" * 16
CERTIFICATE = b"certificate"


def refused() -> "pytest.RaisesExc[InvalidInput]":
    return pytest.raises(InvalidInput, match=r"\Arefused\Z")


def not_proven() -> "pytest.RaisesExc[RemoteProtocolError]":
    return pytest.raises(RemoteProtocolError, match=r"\Arefused\Z")


def table() -> OfferTable:
    return OfferTable(KEYS, "worker", CERTIFICATE)


def proof(**change: object) -> str:
    arguments: dict[str, object] = {
        "keys": KEYS,
        "session": NONCE.hex(),
        "answer_nonce": ANSWER_NONCE,
        "client": "client",
        "worker": "worker",
        "certificate": CERTIFICATE,
    }
    arguments |= change
    return link_proof(arguments.pop("keys"), **arguments)  # type: ignore[arg-type]


def expecting() -> OfferTable:
    offers = table()
    offers.accept(NONCE, NOW + 10, NOW)
    offers.expect(NONCE.hex(), ANSWER_NONCE, "client", NOW + 60)
    return offers


def test_a_proof_lets_its_client_in_once() -> None:
    offers = expecting()
    assert offers.check_proof_untrusted(NONCE.hex(), proof(), NOW) == "client"
    with not_proven():
        offers.check_proof_untrusted(NONCE.hex(), proof(), NOW)


@pytest.mark.parametrize(
    "change",
    [
        {"keys": STRANGER},
        {"session": "0" * 32},
        {"answer_nonce": b"b" * 16},
        {"client": "mallory"},
        {"worker": "another"},
        {"certificate": b"another"},
    ],
)
def test_a_proof_of_anything_else_is_refused(change: dict[str, object]) -> None:
    offers = expecting()
    with not_proven():
        offers.check_proof_untrusted(NONCE.hex(), proof(**change), NOW)
    # and it does not keep the rightful client out
    assert offers.check_proof_untrusted(NONCE.hex(), proof(), NOW) == "client"


def test_a_late_proof_is_refused() -> None:
    offers = expecting()
    offers.check_proof_untrusted(NONCE.hex(), proof(), NOW + 59)
    with not_proven():
        expecting().check_proof_untrusted(NONCE.hex(), proof(), NOW + 60)


@pytest.mark.parametrize("text", ["", "é", "\ud800", "0" * 64])
def test_a_proof_of_any_text_is_refused(text: str) -> None:
    with not_proven():
        expecting().check_proof_untrusted(NONCE.hex(), text, NOW)


def test_no_proof_is_accepted_before_an_offer() -> None:
    empty = proof(session="0" * 32, answer_nonce=b"", client="")
    with not_proven():
        table().check_proof_untrusted("0" * 32, empty, -1.0)


def test_a_replayed_offer_is_refused_until_it_expires() -> None:
    offers = table()
    offers.accept(NONCE, NOW + 10, NOW)
    with refused():
        offers.accept(NONCE, NOW + 10, NOW + 9)
    offers.accept(NONCE, NOW + 30, NOW + 10)


def test_a_used_offer_cannot_be_used_again() -> None:
    offers = expecting()
    offers.check_proof_untrusted(NONCE.hex(), proof(), NOW)
    with refused():
        offers.accept(NONCE, NOW + 10, NOW + 20)
    with pytest.raises(LocalProtocolError):
        offers.expect(NONCE.hex(), ANSWER_NONCE, "client", NOW + 60)


def test_an_expired_offer_is_forgotten() -> None:
    offers = expecting()
    offers.accept(NONCE, NOW + 90, NOW + 60)
    offers.expect(NONCE.hex(), ANSWER_NONCE, "client", NOW + 90)
    assert offers.check_proof_untrusted(NONCE.hex(), proof(), NOW + 61) == "client"


def test_expecting_needs_an_accepted_offer() -> None:
    with pytest.raises(LocalProtocolError, match="follows accept"):
        table().expect(NONCE.hex(), ANSWER_NONCE, "client", NOW)


def test_the_table_is_bounded() -> None:
    offers = table()
    for number in range(MAX_OUTSTANDING_OFFERS):
        offers.accept(number.to_bytes(16, "big"), NOW + 10, NOW)
    with refused():
        offers.accept(NONCE, NOW + 10, NOW)
    offers.accept(NONCE, NOW + 20, NOW + 10)
