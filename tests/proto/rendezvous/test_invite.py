"""Invites and room keys."""

import base64
import hashlib
import shlex
import string

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from sleap_rtc.proto.errors import InvalidInput, LocalProtocolError
from sleap_rtc.proto.rendezvous.invite import (
    MAX_URL_CHARACTERS,
    Invite,
    RoomKeys,
    decode_invite_untrusted,
    encode_invite,
    verify_registration,
)

SECRET = bytes(range(32))
INVITE = Invite("wss://lab.example.org:8443/room?x=1", SECRET)
NONCE = b"n" * 16


def test_an_invite_survives_the_trip() -> None:
    assert decode_invite_untrusted(encode_invite(INVITE)) == INVITE


def test_an_invite_is_one_word_in_every_shell() -> None:
    text = encode_invite(INVITE)
    assert shlex.split(text) == [text]
    assert set(text) <= set(string.ascii_letters + string.digits + "-_")
    assert not text.startswith("-")


def test_white_space_from_a_chat_window_does_not_matter() -> None:
    text = encode_invite(INVITE)
    assert decode_invite_untrusted(f"  {text[:40]}\n {text[40:]}\n") == INVITE


def test_every_wrong_character_is_noticed() -> None:
    text = encode_invite(INVITE)
    start = len("sleap-rtc-")
    for place in range(start, len(text)):
        for other in "Ab0_-":
            if other == text[place]:
                continue
            typo = text[:place] + other + text[place + 1 :]
            with pytest.raises(InvalidInput, match="damaged: copy it again"):
                decode_invite_untrusted(typo)


@pytest.mark.parametrize("url", ["ws://host", "ws://host1", "ws://host12"])
def test_a_change_of_unused_bits_is_noticed(url: str) -> None:
    """The last character of base64 may hold bits that decode to nothing."""
    text = encode_invite(Invite(url, SECRET))
    for last in set(string.ascii_letters + string.digits + "-_") - {text[-1]}:
        with pytest.raises(InvalidInput, match="damaged"):
            decode_invite_untrusted(text[:-1] + last)


def with_checksum(body: bytes) -> str:
    """Encode the body of an invite, as docs/protocol.md describes it."""
    whole = body + hashlib.sha256(b"sleap-rtc invite" + body).digest()[:4]
    return "sleap-rtc-" + base64.urlsafe_b64encode(whole).rstrip(b"=").decode()


def test_an_invite_has_the_documented_form() -> None:
    assert encode_invite(INVITE) == with_checksum(
        b"\x01" + SECRET + INVITE.url.encode()
    )


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "damaged"),
        (b"\x02" + SECRET + b"ws://host", "a newer sleap-rtc"),
        (b"\x01" + SECRET[:-1], "damaged"),
        (b"\x01" + SECRET, "damaged"),
        (b"\x01" + SECRET + b"http://host", "damaged"),
        (b"\x01" + SECRET + "ws://hôst".encode(), "damaged"),
    ],
)
def test_a_checksum_alone_makes_no_invite(body: bytes, reason: str) -> None:
    with pytest.raises(InvalidInput, match=reason):
        decode_invite_untrusted(with_checksum(body))


@pytest.mark.parametrize("length", [1, 10, 11, 12, 20, 60, -1, -2])
def test_a_truncated_invite_is_noticed(length: int) -> None:
    with pytest.raises(InvalidInput):
        decode_invite_untrusted(encode_invite(INVITE)[:length])


@given(st.text())
def test_garbage_is_not_an_invite(text: str) -> None:
    for candidate in (text, f"sleap-rtc-{text}"):
        with pytest.raises(InvalidInput):
            decode_invite_untrusted(candidate)


def test_another_kind_of_text_is_named() -> None:
    with pytest.raises(InvalidInput, match="starts with sleap-rtc-"):
        decode_invite_untrusted("sleap-session:eyJyIjogImEifQ==")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "http://host",
        "ws://",
        "ws:///path",
        "ws://host:0",
        "ws://host:99999",
        "ws://host:x",
        "ws://me:password@host",
        "ws://host#part",
        "ws://ho st",
        "ws://host\n",
        "ws://hôst",
        "ws://[::1",
        "ws://" + "h" * MAX_URL_CHARACTERS,
    ],
)
def test_a_bad_address_makes_no_invite(url: str) -> None:
    with pytest.raises(InvalidInput, match="signaling address"):
        Invite(url, SECRET)


def test_a_short_secret_makes_no_invite() -> None:
    with pytest.raises(LocalProtocolError, match="32 bytes"):
        Invite("ws://host", b"short")
    with pytest.raises(LocalProtocolError, match="32 bytes"):
        RoomKeys.from_secret(b"short")


@pytest.mark.parametrize(
    ("url", "loopback"),
    [
        ("ws://127.0.0.1:1", True),
        ("ws://127.8.8.8:1", True),
        ("ws://[::1]:1", True),
        ("ws://localhost", True),
        ("ws://LOCALHOST:80", True),
        ("ws://room.localhost", True),
        ("ws://192.168.0.1", False),
        ("wss://localhost.example.org", False),
    ],
)
def test_a_loopback_invite_is_known(url: str, loopback: bool) -> None:
    assert Invite(url, SECRET).is_loopback is loopback


def test_no_repr_shows_the_secret() -> None:
    keys = RoomKeys.from_secret(SECRET)
    shown = repr(INVITE) + str(INVITE) + str(INVITE.__rich_repr__()) + repr(keys)
    assert repr(SECRET)[2:-1] not in shown
    assert SECRET.hex() not in shown
    assert "lab.example.org" in shown


def test_the_same_secret_gives_the_same_room() -> None:
    one, two = RoomKeys.from_secret(SECRET), RoomKeys.from_secret(SECRET)
    other = RoomKeys.from_secret(SECRET[::-1])
    assert one.room_id == two.room_id != other.room_id
    assert len(one.room_id) == 32
    assert set(one.room_id) <= set("0123456789abcdef")


def verified(keys: RoomKeys, signature: bytes, **change: object) -> bool:
    """Verify a registration of "peer" with all `keys`, except the changed arguments."""
    arguments: dict[str, object] = {
        "public_key": keys.public_key,
        "room_id": keys.room_id,
        "nonce": NONCE,
        "peer_id": "peer",
        "signature": signature,
    }
    return verify_registration(**(arguments | change))  # type: ignore[arg-type]


def test_a_registration_is_verified() -> None:
    keys = RoomKeys.from_secret(SECRET)
    assert verified(keys, keys.sign_registration(NONCE, "peer"))


def test_the_key_must_be_the_one_that_the_room_is_named_after() -> None:
    """The stranger's signature fits the stranger's key, and names the room."""
    room, stranger = RoomKeys.from_secret(SECRET), RoomKeys.from_secret(b"o" * 32)
    stranger.room_id = room.room_id
    signature = stranger.sign_registration(NONCE, "peer")
    Ed25519PublicKey.from_public_bytes(stranger.public_key).verify(
        signature, signed_fields(room.room_id, NONCE, "peer")
    )
    assert not verified(room, signature, public_key=stranger.public_key)


def test_the_signature_must_be_made_with_the_key_of_the_room() -> None:
    """The stranger shows the right key, and signs the right fields with another."""
    room, stranger = RoomKeys.from_secret(SECRET), RoomKeys.from_secret(b"o" * 32)
    stranger.room_id = room.room_id
    assert not verified(room, stranger.sign_registration(NONCE, "peer"))


@pytest.mark.parametrize("signature", [b"", bytes(64), b"x" * 65])
def test_bytes_that_are_not_a_signature_are_refused(signature: bytes) -> None:
    assert not verified(RoomKeys.from_secret(SECRET), signature)


@pytest.mark.parametrize(("nonce", "peer_id"), [(b"m" * 16, "peer"), (NONCE, "other")])
def test_the_signature_must_be_for_this_nonce_and_this_peer(
    nonce: bytes, peer_id: str
) -> None:
    """A signature of the room's own key is replayed elsewhere."""
    keys = RoomKeys.from_secret(SECRET)
    signature = keys.sign_registration(nonce, peer_id)
    assert verified(keys, signature, nonce=nonce, peer_id=peer_id)
    assert not verified(keys, signature)


@pytest.mark.parametrize("public_key", [b"", b"short", bytes(32)])
def test_an_invalid_key_is_refused_even_if_the_room_is_named_after_it(
    public_key: bytes,
) -> None:
    room_id = hashlib.sha256(public_key).hexdigest()[:32]
    assert not verify_registration(public_key, room_id, NONCE, "peer", b"x" * 64)


def signed_fields(room_id: str, nonce: bytes, peer_id: str) -> bytes:
    """The bytes that a registration signs, as docs/protocol.md describes them."""
    fields = [b"sleap-rtc/1 register", room_id.encode(), nonce, peer_id.encode()]
    return b"".join(len(field).to_bytes(4, "big") + field for field in fields)


def test_a_registration_signs_the_documented_fields() -> None:
    keys = RoomKeys.from_secret(SECRET)
    public_key = Ed25519PublicKey.from_public_bytes(keys.public_key)
    public_key.verify(
        keys.sign_registration(NONCE, "peer"),
        signed_fields(keys.room_id, NONCE, "peer"),
    )
