"""TLS 1.3 between memory buffers, set up for a link."""

import os
import secrets
import ssl
import tempfile
from collections.abc import Iterator

from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
)

from sleap_rtc.io.link.certificates import (
    SERVER_NAME,
    Certificate,
    certificate_pem_untrusted,
)
from sleap_rtc.io.link.session import ALPN
from sleap_rtc.proto.errors import RemoteProtocolError

PLAIN_BUFFER = 256 * 1024
"""Bytes that are decrypted in one step: few large steps are faster."""


def client_context_untrusted(certificate_der: bytes) -> ssl.SSLContext:
    """Create the settings of a client that trusts one certificate.

    Raises:
        RemoteProtocolError: If the bytes are not a certificate.
    """
    anchor = certificate_pem_untrusted(certificate_der)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cadata=anchor.decode())
    except ssl.SSLError:
        raise RemoteProtocolError(
            "the peer sent something that is not a certificate"
        ) from None
    return _restricted(context)


def server_context(certificate: Certificate) -> ssl.SSLContext:
    """Create the settings of a server. It writes a file, so call it in a thread.

    The library reads keys from files only. The file is private, encrypted with a
    password that is not kept, and removed before this returns.
    """
    password = secrets.token_bytes(32)
    key = certificate.private_key.private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(password)
    )
    shown = x509.load_der_x509_certificate(certificate.certificate_der)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # Links are not resumed.
    context.num_tickets = 0
    with tempfile.TemporaryDirectory(prefix="sleap-rtc-") as directory:
        path = os.path.join(directory, "certificate.pem")
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(fd, "wb") as file:
            file.write(key + shown.public_bytes(Encoding.PEM))
        context.load_cert_chain(path, password=password)
    return _restricted(context)


def _restricted(context: ssl.SSLContext) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols([ALPN])
    return context


class TlsEngine:
    """One TLS connection, without a socket.

    Args:
        context: Its settings.
        server_side: True for the side that shows the certificate.

    Attributes:
        secured: True once the handshake is done.
    """

    def __init__(self, context: ssl.SSLContext, *, server_side: bool) -> None:
        self.secured = False
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming,
            self._outgoing,
            server_side=server_side,
            server_hostname=None if server_side else SERVER_NAME,
        )
        self._plain = memoryview(bytearray())
        self._fault: RemoteProtocolError | None = None

    @property
    def peer_certificate(self) -> bytes | None:
        """The certificate that the peer proved to hold, DER."""
        return self._tls.getpeercert(binary_form=True)

    def shake_hands_untrusted(self, data: bytes | memoryview = b"") -> None:
        """Continue the handshake as far as the bytes of the peer allow.

        Raises:
            RemoteProtocolError: If it failed.
        """
        self._incoming.write(data)
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return
        except ssl.SSLCertVerificationError as error:
            raise RemoteProtocolError(
                f"not the expected peer: {error.verify_message}"
            ) from None
        except ssl.SSLError as error:
            raise RemoteProtocolError(_explain(error)) from None
        if self._tls.selected_alpn_protocol() != ALPN:
            raise RemoteProtocolError(f"the peer does not speak {ALPN}")
        self.secured = True

    def decrypt_untrusted(self, data: bytes | memoryview) -> Iterator[memoryview]:
        """Decrypt bytes that arrived after the handshake; exhaust the iterator.

        Yields:
            The plain bytes. A piece is overwritten when the next one is requested.

        Raises:
            RemoteProtocolError: If they are damaged, or the peer ended TLS. The bytes
                before the fault have been yielded.
        """
        self._incoming.write(data)
        if not self._plain:
            self._plain = memoryview(bytearray(PLAIN_BUFFER))
        while filled := self._fill_plain():
            yield self._plain[:filled]
        if self._fault is not None:
            raise self._fault

    def _fill_plain(self) -> int:
        """Decrypt until the buffer is full, or more has to arrive."""
        filled = 0
        while filled < PLAIN_BUFFER and self._fault is None:
            room = self._plain[filled:]
            try:
                # With a buffer, of any kind, it returns the number of bytes.
                count: int = self._tls.read(len(room), room)  # type: ignore[assignment]
            except ssl.SSLWantReadError:
                break
            except ssl.SSLError as error:
                self._fault = RemoteProtocolError(_explain(error))
                break
            if not count:
                self._fault = RemoteProtocolError("it ended TLS without a reason")
            filled += count
        return filled

    def encrypt(self, data: bytes) -> None:
        """Encrypt bytes for `take`; after a fault they are discarded.

        Args:
            data: Many small pieces would cost more than one large one.
        """
        if self._fault is None:
            self._tls.write(data)

    def take(self) -> bytes:
        """Remove and return all bytes to send."""
        return self._outgoing.read()


def _explain(error: ssl.SSLError) -> str:
    words = (error.reason or "it is broken").replace("_", " ").lower()
    return f"TLS failed: {words}"
