"""Sealed offers and answers."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sleap_rtc.proto.errors import InvalidInput, LocalProtocolError
from sleap_rtc.proto.rendezvous.envelope import (
    MAX_LIFETIME,
    MAX_SEALED_CHARACTERS,
    SEAL_LIFETIME,
    Address,
    Answer,
    Offer,
    OpenedAnswer,
    OpenedOffer,
    open_answer_untrusted,
    open_offer_untrusted,
    seal_answer,
    seal_offer,
    session_untrusted,
    worker_nonce_untrusted,
)
from sleap_rtc.proto.rendezvous.invite import RoomKeys

KEYS = RoomKeys.from_secret(b"s" * 32)
STRANGER = RoomKeys.from_secret(b"t" * 32)
NOW = 1_700_000_000.0
NONCE = b"c" * 16
WORKER_NONCE = b"w" * 16
ANSWER_NONCE = b"a" * 16
AEAD = b"1" * 12
OFFER = Offer(("tcp", "quic"))
ANSWER = Answer((Address("10.0.0.1", 4000), Address("::1", 4001)), b"der", ("tcp",))


def sealed_offer(keys: RoomKeys = KEYS, expires: float = NOW + SEAL_LIFETIME) -> str:
    return seal_offer(
        keys,
        OFFER,
        sender="client",
        target="worker",
        nonce=NONCE,
        worker_nonce=WORKER_NONCE,
        aead_nonce=AEAD,
        expires=expires,
    )


def opened_offer(
    text: str,
    sender: str = "client",
    target: str = "worker",
    worker_nonce: bytes = WORKER_NONCE,
    now: float = NOW,
) -> OpenedOffer:
    return open_offer_untrusted(
        KEYS, text, sender=sender, target=target, worker_nonce=worker_nonce, now=now
    )


def sealed_answer(keys: RoomKeys = KEYS, expires: float = NOW + SEAL_LIFETIME) -> str:
    return seal_answer(
        keys,
        ANSWER,
        sender="worker",
        target="client",
        nonce=ANSWER_NONCE,
        offer_nonce=NONCE,
        aead_nonce=AEAD,
        expires=expires,
    )


def opened_answer(
    text: str,
    sender: str = "worker",
    target: str = "client",
    offer_nonce: bytes = NONCE,
    now: float = NOW,
) -> OpenedAnswer:
    return open_answer_untrusted(
        KEYS, text, sender=sender, target=target, offer_nonce=offer_nonce, now=now
    )


def refused() -> "pytest.RaisesExc[InvalidInput]":
    return pytest.raises(InvalidInput, match=r"\Arefused\Z")


def test_an_offer_arrives() -> None:
    opened = opened_offer(sealed_offer())
    assert opened == OpenedOffer(OFFER, NONCE, NOW + SEAL_LIFETIME)


def test_an_answer_arrives() -> None:
    assert opened_answer(sealed_answer()) == OpenedAnswer(ANSWER, ANSWER_NONCE)


def test_the_server_does_not_see_the_contents() -> None:
    assert "10.0.0.1" not in sealed_answer()
    assert "tcp" not in sealed_offer()


def test_both_texts_name_their_session() -> None:
    assert session_untrusted(sealed_offer()) == NONCE.hex()
    assert session_untrusted(sealed_answer()) == NONCE.hex()


@pytest.mark.parametrize(
    "change",
    [
        {"sender": "mallory"},
        {"target": "another"},
        {"worker_nonce": b"restarted-worker"},
        {"now": NOW + SEAL_LIFETIME},
        {"now": NOW + 3600},
        {"now": NOW + SEAL_LIFETIME - MAX_LIFETIME - 1},
    ],
)
def test_an_offer_out_of_place_is_refused(change: dict[str, object]) -> None:
    with refused():
        opened_offer(sealed_offer(), **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"sender": "mallory"},
        {"target": "another"},
        {"offer_nonce": b"of another offer"},
        {"now": NOW + SEAL_LIFETIME},
    ],
)
def test_an_answer_out_of_place_is_refused(change: dict[str, object]) -> None:
    with refused():
        opened_answer(sealed_answer(), **change)  # type: ignore[arg-type]


def test_clocks_may_differ_by_the_lifetime() -> None:
    opened_offer(sealed_offer(), now=NOW + SEAL_LIFETIME - 1)
    opened_offer(sealed_offer(), now=NOW - SEAL_LIFETIME)


def test_another_secret_is_refused() -> None:
    with refused():
        opened_offer(sealed_offer(STRANGER))
    with refused():
        opened_answer(sealed_answer(STRANGER))


def test_offer_and_answer_are_not_interchangeable() -> None:
    with refused():
        opened_answer(sealed_offer(), sender="client", target="worker")
    with refused():
        opened_offer(
            sealed_answer(),
            sender="worker",
            target="client",
            worker_nonce=ANSWER_NONCE,
        )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", 2),
        ("kind", "answer"),
        ("session", "0" * 32),
        ("nonce", "0" * 32),
        ("expires", NOW + 200),
        ("aead_nonce", "MTExMTExMTExMTEy"),
        ("sealed", "AAAA"),
        ("sealed", ""),
    ],
)
def test_changing_any_field_is_noticed(field: str, value: object) -> None:
    envelope = json.loads(sealed_offer())
    assert field in envelope
    altered = json.dumps(envelope | {field: value})
    with refused():
        opened_offer(altered)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("nonce", "0" * 32, {"worker_nonce": bytes(16)}),
        ("expires", NOW + 200, {}),
    ],
)
def test_an_altered_offer_is_refused_even_where_the_alteration_would_fit(
    field: str, value: object, expected: dict[str, bytes]
) -> None:
    """A carrier can write the values that the receiver expects, but not seal them."""
    altered = json.dumps(json.loads(sealed_offer()) | {field: value})
    with refused():
        opened_offer(altered, **expected)  # type: ignore[arg-type]


def test_an_altered_answer_is_refused_even_where_the_alteration_would_fit() -> None:
    altered = json.dumps(json.loads(sealed_answer()) | {"session": "0" * 32})
    with refused():
        opened_answer(altered, offer_nonce=bytes(16))


def test_an_altered_kind_is_refused_even_where_it_would_fit() -> None:
    same = seal_answer(
        KEYS,
        ANSWER,
        sender="client",
        target="worker",
        nonce=WORKER_NONCE,
        offer_nonce=NONCE,
        aead_nonce=AEAD,
        expires=NOW + SEAL_LIFETIME,
    )
    altered = json.dumps(json.loads(same) | {"kind": "offer"})
    with refused():
        opened_offer(altered)


@given(st.text() | st.binary().map(lambda raw: raw.decode("latin-1")))
def test_garbage_is_refused(text: str) -> None:
    with refused():
        opened_offer(text)
    with refused():
        opened_answer(text)
    with refused():
        session_untrusted(text)


@pytest.mark.parametrize(
    "text", ["[" * 30_000, "{}", "x" * (MAX_SEALED_CHARACTERS + 1)]
)
def test_hostile_json_is_refused(text: str) -> None:
    with refused():
        opened_offer(text)


def test_the_length_of_a_sealed_text_is_limited() -> None:
    longest = sealed_offer().ljust(MAX_SEALED_CHARACTERS)
    assert opened_offer(longest).offer == OFFER
    with refused():
        opened_offer(longest + " ")


def test_contents_are_checked_even_from_a_holder_of_the_secret() -> None:
    text = seal_offer(
        KEYS,
        Offer(()),
        sender="client",
        target="worker",
        nonce=NONCE,
        worker_nonce=WORKER_NONCE,
        aead_nonce=AEAD,
        expires=NOW + 1,
    )
    with refused():
        opened_offer(text)


def test_a_newer_peer_may_name_kinds_that_do_not_exist_here() -> None:
    newer = Offer(("pigeon", "tcp"))
    text = seal_offer(
        KEYS,
        newer,
        sender="client",
        target="worker",
        nonce=NONCE,
        worker_nonce=WORKER_NONCE,
        aead_nonce=AEAD,
        expires=NOW + 1,
    )
    assert opened_offer(text).offer == newer


def test_a_nonce_of_the_wrong_size_is_our_own_fault() -> None:
    with pytest.raises(LocalProtocolError):
        seal_answer(
            KEYS,
            ANSWER,
            sender="worker",
            target="client",
            nonce=b"short",
            offer_nonce=NONCE,
            aead_nonce=AEAD,
            expires=NOW,
        )


def test_the_worker_nonce_is_read_from_metadata() -> None:
    assert worker_nonce_untrusted({"nonce": WORKER_NONCE.hex()}) == WORKER_NONCE


@pytest.mark.parametrize("value", [None, 3, "", "g" * 32, "A" * 32, "0" * 31, ["0"]])
def test_a_bad_worker_nonce_is_noticed(value: object) -> None:
    with pytest.raises(InvalidInput, match="no session nonce"):
        worker_nonce_untrusted({"nonce": value})
    with pytest.raises(InvalidInput, match="no session nonce"):
        worker_nonce_untrusted({})
