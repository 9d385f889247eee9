"""Packets with a short header, sealed and opened in batches.

aioquic protects one packet per call. Here one call computes the masks of header
protection for a whole batch: one by one, they cost as much as the encryption. A payload
is copied no more often than the ciphers need.
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
"""Bytes of the connection ids that we choose; those of a peer may be longer."""

NUMBER_SIZE = 2
"""Bytes of a packet number in a header: enough for 32,768 packets in flight (RFC 9000,
17.1), ten times as many as a link has."""

TAG_SIZE = 16
"""Bytes at the end of a packet that prove its integrity."""

STREAM_FRAME, WITH_OFFSET, WITH_LENGTH = 0x08, 0x04, 0x02
"""The type of a frame with data of a stream, and its flags (RFC 9000, 19.8)."""

MASK_SIZE = 16
"""Bytes of the mask of one header; five of them are used."""

MIN_PACKET_SIZE = 1 + CONNECTION_ID_LENGTH + 4 + TAG_SIZE
"""Bytes of the smallest packet that header protection can sample (RFC 9001, 5.4.2)."""

_SAMPLE_OFFSET = 1 + CONNECTION_ID_LENGTH + 4
_NONCE_SIZE = 12

SUITES = (CipherSuite.AES_128_GCM_SHA256, CipherSuite.AES_256_GCM_SHA384)
"""Cipher suites that are offered. Every TLS 1.3 has the first (RFC 8446, 9.1). With AES
instructions it takes 2.6 us for a packet, and ChaCha20 takes 3.2."""


class Opened(NamedTuple):
    """The number and the frames of a packet."""

    number: int
    payload: bytes


class PacketKeys:
    """The keys of one direction, for 1-RTT packets.

    Args:
        context: The keys of aioquic, of one of `SUITES`.
    """

    def __init__(self, context: CryptoContext) -> None:
        self._secret = context.secret
        self._phase = context.key_phase << 2
        key, iv, header_key = _derive(context)
        self._cipher = AESGCM(key)
        self._iv = int.from_bytes(iv)
        self._masker = Cipher(algorithms.AES(header_key), modes.ECB()).encryptor()

    def follow(self, context: CryptoContext) -> None:
        """Adopt the keys of an update (RFC 9001, 6); those of the headers stay."""
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
        """Return the datagrams of consecutive packets.

        Args:
            payloads: The frames of each packet, at least four bytes.
            first_number: The number of the first packet.
            connection_id: The one that the peer has chosen.
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
        # The sample begins four bytes after the start of the number.
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
        """Return the masks of the headers, `MASK_SIZE` bytes for each datagram."""
        end = _SAMPLE_OFFSET + MASK_SIZE
        samples = [
            data[_SAMPLE_OFFSET:end] if len(data) >= end else bytes(MASK_SIZE)
            for data in datagrams
        ]
        return self._masker.update(b"".join(samples))

    def open_untrusted(self, data: bytes, mask: bytes, expected: int) -> Opened | None:
        """Return the content of a packet; None if these keys did not seal it.

        Args:
            data: The datagram.
            mask: Its part of `masks`.
            expected: The next packet number.
        """
        first_byte = data[0] ^ mask[0] & 0x1F if len(data) >= MIN_PACKET_SIZE else 0
        # The form of the header, its reserved bits, and the phase of the keys.
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
        raise LocalProtocolError("keys do not exist before the end of the handshake")
    return derive_key_iv_hp(cipher_suite=suite, secret=secret, version=version)
