"""Packets with a short header, sealed and opened some dozens at a time.

The engine protects one packet per call. Here the masks of header protection, which
cost as much as the encryption when each is computed alone, come from one call for a
whole batch, and a payload is copied no more than the ciphers need.
"""

from collections.abc import Sequence
from typing import NamedTuple

from aioquic.quic.crypto import CryptoContext, derive_key_iv_hp
from aioquic.quic.packet import decode_packet_number
from aioquic.tls import CipherSuite
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from sleap_rtc.proto.errors import LocalProtocolError

CONNECTION_ID_LENGTH = 8
"""Bytes of the ids of our own connections; a peer's may have another length."""

NUMBER_SIZE = 2
"""Bytes of a packet number as it is sent: enough for 32,768 packets on their way
(RFC 9000, 17.1), which is ten times what a link keeps there."""

TAG_SIZE = 16

MASK_SIZE = 16
"""Bytes that hide the header of one packet; five of them are used."""

SHORTEST_OPENED = 1 + CONNECTION_ID_LENGTH + 4 + TAG_SIZE
"""Bytes that header protection needs in order to sample a packet (RFC 9001, 5.4.2)."""

_SAMPLE_OFFSET = 1 + CONNECTION_ID_LENGTH + 4
_NONCE_SIZE = 12

SUITES = (CipherSuite.AES_128_GCM_SHA256, CipherSuite.AES_256_GCM_SHA384)
"""What connections may agree on. Every TLS 1.3 has the first (RFC 8446, 9.1); where a
processor knows AES, it takes 2.6 us for a packet, and ChaCha20 takes 3.2."""


class Opened(NamedTuple):
    """A packet that was opened."""

    number: int
    payload: bytes


class PacketKeys:
    """The keys of one direction, for 1-RTT packets.

    Args:
        context: The engine's keys, of one of `SUITES`.
    """

    def __init__(self, context: CryptoContext) -> None:
        self._secret = context.secret
        self._phase = context.key_phase << 2
        key, iv, header_key = _derive(context)
        self._cipher = AESGCM(key)
        self._iv = int.from_bytes(iv)
        self._masker = Cipher(algorithms.AES(header_key), modes.ECB()).encryptor()

    def follow(self, context: CryptoContext) -> None:
        """Take the keys after an update, which changes all but those of the headers."""
        if context.secret is self._secret:
            return
        self._secret = context.secret
        self._phase = context.key_phase << 2
        key, iv, _ = _derive(context)
        self._cipher = AESGCM(key)
        self._iv = int.from_bytes(iv)

    def seal(
        self, payloads: Sequence[bytes], first_number: int, connection_id: bytes
    ) -> list[bytes]:
        """Make the datagrams of consecutive packets.

        Args:
            payloads: The frames of each packet; four bytes at least.
            first_number: The number of the first.
            connection_id: The peer's.
        """
        first_byte = 0x40 | self._phase | NUMBER_SIZE - 1
        start = bytes((first_byte,)) + connection_id
        encrypt, iv = self._cipher.encrypt, self._iv
        sealed = [
            encrypt(
                (iv ^ number).to_bytes(_NONCE_SIZE),
                payload,
                start + (number & 0xFFFF).to_bytes(NUMBER_SIZE),
            )
            for number, payload in enumerate(payloads, first_number)
        ]
        # The sample begins four bytes behind the start of the number.
        begin = 4 - NUMBER_SIZE
        samples = b"".join([text[begin : begin + MASK_SIZE] for text in sealed])
        masks = self._masker.update(samples)
        datagrams = []
        at = 0
        for number, text in enumerate(sealed, first_number):
            mask = int.from_bytes(masks[at + 1 : at + 1 + NUMBER_SIZE])
            header = (
                bytes((first_byte ^ masks[at] & 0x1F,)),
                connection_id,
                (number & 0xFFFF ^ mask).to_bytes(NUMBER_SIZE),
                text,
            )
            datagrams.append(b"".join(header))
            at += MASK_SIZE
        return datagrams

    def masks(self, datagrams: Sequence[bytes]) -> bytes:
        """Return 16 bytes for each datagram: what hides its header."""
        end = _SAMPLE_OFFSET + MASK_SIZE
        samples = [
            data[_SAMPLE_OFFSET:end] if len(data) >= end else bytes(MASK_SIZE)
            for data in datagrams
        ]
        return self._masker.update(b"".join(samples))

    def open_untrusted(self, data: bytes, mask: bytes, expected: int) -> Opened | None:
        """Open a packet; None if it is not one of these keys.

        Args:
            data: The datagram.
            mask: Its part of `masks`.
            expected: The packet number that comes next.
        """
        first_byte = data[0] ^ mask[0] & 0x1F if len(data) >= SHORTEST_OPENED else 0
        # A short header, its reserved bits, and the phase of the keys.
        if first_byte & 0xDC != 0x40 | self._phase:
            return None
        size = (first_byte & 3) + 1
        at = 1 + CONNECTION_ID_LENGTH
        shown = int.from_bytes(data[at : at + size]) ^ int.from_bytes(
            mask[1 : 1 + size]
        )
        number = decode_packet_number(shown, 8 * size, expected)
        header = b"".join(
            (bytes((first_byte,)), data[1:at], shown.to_bytes(size)),
        )
        nonce = (self._iv ^ number).to_bytes(_NONCE_SIZE)
        try:
            payload = self._cipher.decrypt(nonce, data[at + size :], header)
        except InvalidTag:
            return None
        return Opened(number, payload)


def _derive(context: CryptoContext) -> tuple[bytes, bytes, bytes]:
    suite, secret, version = context.cipher_suite, context.secret, context.version
    if suite is None or secret is None or version is None:
        raise LocalProtocolError("there are no keys before the end of the handshake")
    return derive_key_iv_hp(cipher_suite=suite, secret=secret, version=version)
