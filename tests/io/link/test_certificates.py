"""The certificate of a worker."""

import datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from sleap_rtc.io.link.certificates import (
    SERVER_NAME,
    certificate_pem_untrusted,
    make_certificate,
)
from sleap_rtc.proto.errors import RemoteProtocolError


def test_a_certificate_names_the_server_and_fits_its_key() -> None:
    made = make_certificate()
    certificate = x509.load_der_x509_certificate(made.certificate_der)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    public_key = certificate.public_key()
    assert names.value.get_values_for_type(x509.DNSName) == [SERVER_NAME]
    assert isinstance(public_key, ec.EllipticCurvePublicKey)
    assert public_key == made.private_key.public_key()
    certificate.verify_directly_issued_by(certificate)


@pytest.mark.parametrize("year", [2001, 2026, 2099])
def test_a_wrong_clock_does_not_make_a_certificate_invalid(year: int) -> None:
    certificate = x509.load_der_x509_certificate(make_certificate().certificate_der)
    then = datetime.datetime(year, 6, 1, tzinfo=datetime.UTC)
    assert certificate.not_valid_before_utc < then < certificate.not_valid_after_utc


def test_the_private_key_is_not_in_the_text_form() -> None:
    made = make_certificate()
    secret = made.private_key.private_numbers().private_value
    assert str(secret) not in repr(made)
    assert f"{secret:x}" not in repr(made)


def test_the_conversion_to_pem_keeps_a_certificate() -> None:
    made = make_certificate()
    pem = certificate_pem_untrusted(made.certificate_der)
    assert x509.load_pem_x509_certificate(pem) == x509.load_der_x509_certificate(
        made.certificate_der
    )


@given(st.binary(max_size=300))
def test_garbage_is_not_a_certificate(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        certificate_pem_untrusted(data)


def test_a_cut_certificate_is_refused() -> None:
    whole = make_certificate().certificate_der
    for size in range(0, len(whole), 7):
        with pytest.raises(RemoteProtocolError):
            certificate_pem_untrusted(whole[:size])
