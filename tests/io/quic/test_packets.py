"""Packets with a short header, beside those that aioquic makes and reads."""

import pytest
from aioquic.quic.crypto import CryptoContext, next_key_phase
from aioquic.quic.packet import QuicProtocolVersion
from aioquic.tls import CipherSuite
from hypothesis import given
from hypothesis import strategies as st

from sleap_rtc.io.quic.packets import (
    CONNECTION_ID_LENGTH,
    MASK_SIZE,
    SUITES,
    PacketKeys,
)
from sleap_rtc.proto.errors import LocalProtocolError

CONNECTION_ID = bytes(range(CONNECTION_ID_LENGTH))
HEADER_SIZE = 1 + CONNECTION_ID_LENGTH


def make_context(suite: CipherSuite = SUITES[0]) -> CryptoContext:
    size = 48 if suite is CipherSuite.AES_256_GCM_SHA384 else 32
    context = CryptoContext()
    context.setup(
        cipher_suite=suite,
        secret=bytes(range(size)),
        version=QuicProtocolVersion.VERSION_1,
    )
    return context


CONTEXT = make_context()


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("first", [0, 250, 65_530, 1 << 40])
def test_sealed_packets_are_opened_by_both(suite: CipherSuite, first: int) -> None:
    context = make_context(suite)
    payloads = [bytes((n,)) * (4 + 100 * n) for n in range(12)]
    keys = PacketKeys(context)
    datagrams = keys.seal(payloads, first, CONNECTION_ID)
    masks = keys.masks(datagrams)
    for index, data in enumerate(datagrams):
        number = first + index
        mask = masks[MASK_SIZE * index :][:MASK_SIZE]
        assert keys.open_untrusted(data, mask, number) == (number, payloads[index])
        _, payload, found, _ = context.decrypt_packet(data, HEADER_SIZE, number)
        assert (found, payload) == (number, payloads[index])


@pytest.mark.parametrize("number_size", [1, 2, 3, 4])
def test_packets_of_aioquic_are_opened(number_size: int) -> None:
    keys = PacketKeys(CONTEXT)
    number = 0x123456
    shown = number & (1 << 8 * number_size) - 1
    first = bytes((0x40 | number_size - 1,))
    header = first + CONNECTION_ID + shown.to_bytes(number_size)
    data = CONTEXT.encrypt_packet(header, b"some payload", number)
    opened = keys.open_untrusted(data, keys.masks([data]), number)
    assert opened == (number, b"some payload")


def test_an_update_of_the_keys_is_adopted() -> None:
    context = make_context()
    keys = PacketKeys(context)
    old = keys.seal([b"payload"], 1, CONNECTION_ID)
    updated = next_key_phase(context)
    context.aead, context.secret = updated.aead, updated.secret
    context.key_phase = updated.key_phase
    keys.follow(context)
    new = keys.seal([b"payload"], 2, CONNECTION_ID)
    masks = keys.masks(old + new)
    assert keys.open_untrusted(old[0], masks[:MASK_SIZE], 1) is None
    assert keys.open_untrusted(new[0], masks[MASK_SIZE:], 2) == (2, b"payload")
    assert context.decrypt_packet(new[0], HEADER_SIZE, 2)[1] == b"payload"


def test_keys_do_not_exist_before_the_handshake() -> None:
    with pytest.raises(LocalProtocolError, match="handshake"):
        PacketKeys(CryptoContext())


@given(st.binary(max_size=100))
def test_garbage_is_not_opened(data: bytes) -> None:
    keys = PacketKeys(CONTEXT)
    assert keys.open_untrusted(data, keys.masks([data]), 7) is None


@given(at=st.integers(0, 200), flip=st.integers(1, 255))
def test_a_packet_that_was_altered_is_not_opened(at: int, flip: int) -> None:
    keys = PacketKeys(CONTEXT)
    (data,) = keys.seal([b"payload" * 20], 7, CONNECTION_ID)
    altered = bytearray(data)
    altered[at % len(data)] ^= flip
    data = bytes(altered)
    assert keys.open_untrusted(data, keys.masks([data]), 7) is None
