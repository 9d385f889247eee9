"""The self-signed certificate that a worker shows on every link.

Nobody vouches for it: it travels sealed in the answer, and the client trusts exactly
these bytes. So its name and its dates say nothing, and are the same everywhere.
"""

import datetime
import hashlib

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from sleap_rtc.proto.errors import RemoteProtocolError

SERVER_NAME = "sleap-rtc.invalid"
"""The name in every certificate; ``.invalid`` never resolves (RFC 6761)."""

# No clock of a laptop is so wrong that it would call such a certificate expired.
_VALID_FROM = datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)
_VALID_UNTIL = datetime.datetime(2100, 1, 1, tzinfo=datetime.UTC)


class Certificate(msgspec.Struct, frozen=True):
    """A certificate and its private key.

    Args:
        certificate_der: What the peer is told to trust.
        private_key: Its key, on the curve P-256.
    """

    certificate_der: bytes
    private_key: ec.EllipticCurvePrivateKey

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the certificate, as lower-case hexadecimal digits."""
        return hashlib.sha256(self.certificate_der).hexdigest()


def make_certificate() -> Certificate:
    """Make a new key and a self-signed certificate for it (ECDSA on P-256)."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, SERVER_NAME)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_VALID_FROM)
        .not_valid_after(_VALID_UNTIL)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(SERVER_NAME)]), False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    return Certificate(certificate.public_bytes(serialization.Encoding.DER), key)


def certificate_pem_untrusted(certificate_der: bytes) -> bytes:
    """Write a certificate that came from a peer as PEM, for a list of trust anchors.

    Raises:
        RemoteProtocolError: If it is not a certificate.
    """
    try:
        certificate = x509.load_der_x509_certificate(certificate_der)
        return certificate.public_bytes(serialization.Encoding.PEM)
    except ValueError:
        raise RemoteProtocolError("what the peer sent is no certificate") from None
