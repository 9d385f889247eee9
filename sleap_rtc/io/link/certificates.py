"""The self-signed certificate that a worker shows on every link.

It travels sealed in the answer, and the client trusts exactly these bytes. So its name
and its dates mean nothing, and are the same everywhere.
"""

import datetime

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from sleap_rtc.proto.errors import RemoteProtocolError

SERVER_NAME = "sleap-rtc.invalid"
"""Name in every certificate; ``.invalid`` never resolves (RFC 6761)."""

# Even a very wrong clock does not make such a certificate expired.
_VALID_FROM = datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)
_VALID_UNTIL = datetime.datetime(2100, 1, 1, tzinfo=datetime.UTC)


class Certificate(msgspec.Struct, frozen=True):
    """A certificate and its private key.

    Args:
        certificate_der: The certificate, DER.
        private_key: Its key, on the curve P-256.
    """

    certificate_der: bytes
    private_key: ec.EllipticCurvePrivateKey


def make_certificate() -> Certificate:
    """Create a new key and a self-signed certificate for it (ECDSA on P-256)."""
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
    """Convert a certificate that came from a peer to PEM, for a list of trust anchors.

    Raises:
        RemoteProtocolError: If it is not a certificate.
    """
    try:
        certificate = x509.load_der_x509_certificate(certificate_der)
        return certificate.public_bytes(serialization.Encoding.PEM)
    except ValueError:
        raise RemoteProtocolError(
            "the peer sent something that is not a certificate"
        ) from None
