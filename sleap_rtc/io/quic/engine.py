"""The QUIC engine, set up for a link.

aioquic tells less than a link has to know. What it does not tell is read here from
its private attributes, and in `quic_fast`, and nowhere else.
"""

import logging
import ssl
from typing import Any, cast

from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import ConnectionTerminated
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from sleap_rtc.io.link.certificates import (
    SERVER_NAME,
    Certificate,
    certificate_pem_untrusted,
)
from sleap_rtc.io.link.session import ALPN
from sleap_rtc.io.quic.bulk import Payload
from sleap_rtc.io.quic.congestion import CONGESTION
from sleap_rtc.io.quic.fast_path import Address, BulkConnection, Datagram
from sleap_rtc.io.quic.packets import CONNECTION_ID_LENGTH, SUITES

__all__ = [
    "CONNECTION_ID_LENGTH",
    "DATAGRAM_SIZE",
    "FIRST_WINDOW",
    "Address",
    "Datagram",
    "QuicEngine",
    "client_engine_untrusted",
    "server_engine",
]

# The engine warns about every fault of a peer; without a handler that is printed.
logging.getLogger("quic").addHandler(logging.NullHandler())

DATAGRAM_SIZE = 1350
"""UDP payload in bytes: with IPv6 and UDP headers 1398, what most tunnels let pass."""

FIRST_WINDOW = 256 * 1024
"""What a peer may send before it is known: a message, and frames that overtook it."""

STREAM_WINDOW = 32 * 1024 * 1024
"""As long as the window of the whole connection, which is the one that counts."""


class QuicEngine(BulkConnection):
    """A QUIC connection that tells what is queued, and that can hold a peer back."""

    _granted = 0

    # -------------------------------------------------------------- what is there

    @property
    def close_event(self) -> ConnectionTerminated | None:
        """Why the connection ends, as soon as it is known.

        The engine's own event comes three probe timeouts later.
        """
        return self._close_event

    @property
    def packets_lost(self) -> int:
        """Packets that were declared lost."""
        return self.congestion.packets_lost

    @property
    def peer_certificate(self) -> bytes:
        """The certificate that the peer proved to hold, DER; empty if it has none."""
        certificate: x509.Certificate | None = self.tls._peer_certificate
        return b"" if certificate is None else certificate.public_bytes(Encoding.DER)

    def unacknowledged(self, stream_id: int) -> int:
        """Bytes of our side of a stream that the peer has not acknowledged."""
        stream = self._streams.get(stream_id)
        if stream is not None and stream is self._bulk:
            return self._bulk_sender.unacknowledged
        return 0 if stream is None else len(stream.sender._buffer)

    def unsent(self, stream_id: int) -> int:
        """Bytes of our side of a stream for bulk that were never sent so far."""
        stream = self._streams.get(stream_id)
        is_bulk = stream is not None and stream is self._bulk
        return self._bulk_sender.unsent if is_bulk else 0

    # ------------------------------------------------------------------- commands

    def send(self, stream_id: int, data: Payload) -> None:
        """Queue bytes of a stream; they are copied."""
        self.send_stream_data(stream_id, cast(bytes, data))

    def grant(self, total: int) -> None:
        """Let the peer send this many bytes, from the start of the connection."""
        self._granted = total

    def datagrams_to_send(self, now: float) -> list[Datagram]:
        """Return what to send now; what was granted is what the peer is told.

        By itself the engine would widen the window whenever half of it has arrived,
        whether anybody reads it or not.
        """
        window = self._local_max_data
        window.value = max(window.value, self._granted)
        received, window.used = window.used, 0
        try:
            return super().datagrams_to_send(now)
        finally:
            window.used = received


def client_engine_untrusted(
    certificate_der: bytes,
    *,
    idle_timeout: float,
    datagram_size: int,
    largest_datagram: int | None = None,
) -> QuicEngine:
    """Make the engine of a client that trusts one certificate.

    Args:
        certificate_der: The certificate.
        idle_timeout: Seconds of silence after which the peer counts as gone.
        datagram_size: The UDP payload to begin with, in bytes.
        largest_datagram: What it may grow to; None means that it stays.

    Raises:
        RemoteProtocolError: If the bytes are no certificate.
    """
    anchor = certificate_pem_untrusted(certificate_der)
    return QuicEngine(
        largest_datagram=largest_datagram or datagram_size,
        configuration=QuicConfiguration(
            is_client=True,
            alpn_protocols=[ALPN],
            cadata=anchor,
            verify_mode=ssl.CERT_REQUIRED,
            server_name=SERVER_NAME,
            **_common(idle_timeout, datagram_size),
        ),
    )


def server_engine(
    certificate: Certificate,
    connection_id: bytes,
    *,
    idle_timeout: float,
    datagram_size: int,
    largest_datagram: int | None = None,
) -> QuicEngine:
    """Make the engine that answers a client's first packet.

    Args:
        certificate: What to show.
        connection_id: The destination connection id of that packet.
        idle_timeout: Seconds of silence after which the peer counts as gone.
        datagram_size: The UDP payload to begin with, in bytes.
        largest_datagram: What it may grow to; None means that it stays.
    """
    return QuicEngine(
        largest_datagram=largest_datagram or datagram_size,
        configuration=QuicConfiguration(
            is_client=False,
            alpn_protocols=[ALPN],
            certificate=x509.load_der_x509_certificate(certificate.certificate_der),
            private_key=certificate.private_key,
            **_common(idle_timeout, datagram_size),
        ),
        original_destination_connection_id=connection_id,
    )


def _common(idle_timeout: float, datagram_size: int) -> dict[str, Any]:
    return {
        "cipher_suites": list(SUITES),
        "congestion_control_algorithm": CONGESTION,
        "connection_id_length": CONNECTION_ID_LENGTH,
        "idle_timeout": idle_timeout,
        "max_data": FIRST_WINDOW,
        "max_datagram_size": datagram_size,
        "max_stream_data": STREAM_WINDOW,
    }
