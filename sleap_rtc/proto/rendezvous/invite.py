"""Invites, and the keys that are derived from them.

An invite holds the address of a signaling server and a secret of 256 bits. Three keys
are derived from the secret (HKDF-SHA256, RFC 5869), each for one purpose:

* an Ed25519 key, whose public half names the room and whose signature opens it;
* a ChaCha20-Poly1305 key, which seals offers and answers (see
  `sleap_rtc.proto.rendezvous.envelope`);
* an HMAC key, with which a client proves itself on a new link (see
  `sleap_rtc.proto.rendezvous.proof`).

The signaling server sees only the public key.
"""

import base64
import hashlib
import hmac
import ipaddress
import re
from urllib.parse import urlsplit

import msgspec
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from typing_extensions import override

from sleap_rtc.proto.errors import InvalidInput, LocalProtocolError

SECRET_BYTES = 32
MAX_URL_CHARACTERS = 512
"""Characters of an address, so that an invite is short enough for a chat."""

_PREFIX = "sleap-rtc-"
_INVITE_VERSION = 1
_CHECKSUM_BYTES = 4
_DAMAGED = "this invite is damaged: copy it again, from its first to its last character"


# ------------------------------------------------------------------------ invites


class Invite(msgspec.Struct, frozen=True):
    """The signaling server of a room, and the secret of its peers.

    Args:
        url: Address of the signaling server, ``ws://`` or ``wss://``.
        secret: `SECRET_BYTES` random bytes.

    Raises:
        InvalidInput: If the address is not acceptable.
        LocalProtocolError: If the secret has the wrong length.
    """

    url: str
    secret: bytes

    def __post_init__(self) -> None:
        _check_url(self.url)
        if len(self.secret) != SECRET_BYTES:
            raise LocalProtocolError(f"the secret must have {SECRET_BYTES} bytes")

    @override
    def __repr__(self) -> str:
        return f"Invite(url={self.url!r})"

    @override
    def __rich_repr__(self) -> list[tuple[str, str]]:
        return [("url", self.url)]

    @property
    def is_loopback(self) -> bool:
        """True if the server can only be reached from its own machine."""
        host = urlsplit(self.url).hostname or ""
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost" or host.endswith(".localhost")


def _check_url(url: str) -> None:
    """Check the address of a signaling server.

    Raises:
        InvalidInput: If it is not acceptable.
    """
    if len(url) > MAX_URL_CHARACTERS:
        raise InvalidInput(
            f"the signaling address is longer than {MAX_URL_CHARACTERS} characters"
        )
    if not re.fullmatch(r"[!-~]+", url):
        raise InvalidInput(
            "the signaling address must be printable ASCII without spaces"
        )
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise InvalidInput("the signaling address is not a valid URL") from None
    if parts.scheme not in ("ws", "wss"):
        raise InvalidInput("the signaling address must start with ws:// or wss://")
    if not parts.hostname or port == 0:
        raise InvalidInput("the signaling address must name a host, and no port 0")
    if parts.username is not None or parts.fragment:
        raise InvalidInput(
            "the signaling address must not hold a user name or a fragment"
        )


def encode_invite(invite: Invite) -> str:
    """Encode an invite as one word that needs no quotes in any shell.

    Returns:
        ``sleap-rtc-`` and letters, digits, ``-`` and ``_``.
    """
    body = bytes([_INVITE_VERSION]) + invite.secret + invite.url.encode()
    return _PREFIX + _to_text(body + _checksum(body))


def decode_invite_untrusted(text: str) -> Invite:
    """Parse an invite that a user pasted; white space in it does not matter.

    Raises:
        InvalidInput: If it is not an invite; the reason is for the user who pasted it.
    """
    word = "".join(text.split())
    if not word.startswith(_PREFIX):
        raise InvalidInput(f"this is not an invite, which starts with {_PREFIX}")
    encoded = word.removeprefix(_PREFIX)
    if not re.fullmatch(r"[A-Za-z0-9_-]+", encoded):
        raise InvalidInput(_DAMAGED)
    try:
        raw = base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))
    except ValueError:
        raise InvalidInput(_DAMAGED) from None
    body, checksum = raw[:-_CHECKSUM_BYTES], raw[-_CHECKSUM_BYTES:]
    # Comparing the text again also notices a change in the unused last bits.
    if checksum != _checksum(body) or _to_text(raw) != encoded or not body:
        raise InvalidInput(_DAMAGED)
    if body[0] != _INVITE_VERSION:
        raise InvalidInput(
            "this invite was made by a newer sleap-rtc: update sleap-rtc here"
        )
    secret, url = body[1 : 1 + SECRET_BYTES], body[1 + SECRET_BYTES :]
    try:
        return Invite(url.decode("ascii"), secret)
    except (InvalidInput, LocalProtocolError, UnicodeDecodeError):
        raise InvalidInput(_DAMAGED) from None


def _to_text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _checksum(body: bytes) -> bytes:
    return hashlib.sha256(b"sleap-rtc invite" + body).digest()[:_CHECKSUM_BYTES]


# --------------------------------------------------------------------------- keys


class RoomKeys:
    """The keys of one room; its repr shows none of them.

    Attributes:
        public_key: The room's Ed25519 public key, 32 bytes.
        room_id: The public name of the room: 32 hexadecimal digits.
    """

    def __init__(self, signing: bytes, sealing: bytes, proof: bytes) -> None:
        self._signing = Ed25519PrivateKey.from_private_bytes(signing)
        self._sealing = ChaCha20Poly1305(sealing)
        self._proof = proof
        self.public_key = self._signing.public_key().public_bytes_raw()
        self.room_id = _room_id(self.public_key)

    @classmethod
    def from_secret(cls, secret: bytes) -> "RoomKeys":
        """Derive the keys from the secret of an invite.

        Raises:
            LocalProtocolError: If the secret has the wrong length.
        """
        if len(secret) != SECRET_BYTES:
            raise LocalProtocolError(f"the secret must have {SECRET_BYTES} bytes")
        return cls(
            _derive(secret, b"sleap-rtc/1 room signature"),
            _derive(secret, b"sleap-rtc/1 sealed envelope"),
            _derive(secret, b"sleap-rtc/1 link proof"),
        )

    def sign_registration(self, server_nonce: bytes, peer_id: str) -> bytes:
        """Return the signature that answers a challenge of a server, 64 bytes."""
        return self._signing.sign(
            _registration_input(self.room_id, server_nonce, peer_id)
        )

    def seal(self, aead_nonce: bytes, data: bytes, associated: bytes) -> bytes:
        """Encrypt and authenticate, RFC 8439. A nonce must never be used twice."""
        return self._sealing.encrypt(aead_nonce, data, associated)

    def unseal(
        self, aead_nonce: bytes, sealed: bytes, associated: bytes
    ) -> bytes | None:
        """Decrypt the result of `seal`; None if any argument differs."""
        try:
            return self._sealing.decrypt(aead_nonce, sealed, associated)
        except InvalidTag:
            return None

    def authenticate(self, data: bytes) -> str:
        """Return the HMAC of some data: 64 hexadecimal digits."""
        return hmac.new(self._proof, data, hashlib.sha256).hexdigest()


def _derive(secret: bytes, purpose: bytes) -> bytes:
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=purpose).derive(secret)


def _room_id(public_key: bytes) -> str:
    return hashlib.sha256(public_key).hexdigest()[:32]


def join_fields(*fields: bytes) -> bytes:
    """Join fields so that no two different lists give the same bytes."""
    return b"".join(len(field).to_bytes(4, "big") + field for field in fields)


def _registration_input(room_id: str, nonce: bytes, peer_id: str) -> bytes:
    return join_fields(
        b"sleap-rtc/1 register", room_id.encode(), nonce, peer_id.encode()
    )


def verify_registration(
    public_key: bytes, room_id: str, nonce: bytes, peer_id: str, signature: bytes
) -> bool:
    """Return whether a peer has proved that it holds the secret of a room.

    Args:
        public_key: The key that the peer sent.
        room_id: The room that the peer named.
        nonce: The challenge of the server on this connection.
        peer_id: The name that the peer asked for.
        signature: The peer's answer to the challenge.
    """
    if _room_id(public_key) != room_id:
        return False
    try:
        key = Ed25519PublicKey.from_public_bytes(public_key)
        key.verify(signature, _registration_input(room_id, nonce, peer_id))
    except (InvalidSignature, ValueError):
        return False
    return True
