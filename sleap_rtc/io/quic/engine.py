"""The QUIC engine of a link: aioquic with our congestion control and fast paths."""

import enum
import logging
import ssl
from collections.abc import Sequence
from typing import Any, cast

from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import ConnectionTerminated, QuicEvent
from aioquic.quic.packet_builder import QuicDeliveryState
from cryptography import x509

from sleap_rtc.io.link.certificates import (
    SERVER_NAME,
    Certificate,
    certificate_pem_untrusted,
)
from sleap_rtc.io.link.limits import LinkLimits
from sleap_rtc.io.link.session import ALPN
from sleap_rtc.io.quic.bulk import Payload
from sleap_rtc.io.quic.congestion import AioquicCongestion, AioquicPacer
from sleap_rtc.io.quic.connection import Address, AioquicConnection, Datagram
from sleap_rtc.io.quic.fast_receive import FastReceiver
from sleap_rtc.io.quic.fast_send import FastSender
from sleap_rtc.io.quic.packets import CONNECTION_ID_LENGTH, SUITES
from sleap_rtc.proto.quic.congestion import CongestionControl, Pacer
from sleap_rtc.proto.quic.mtu import SMALLEST_DATAGRAM, MtuSearch

__all__ = [
    "CONNECTION_ID_LENGTH",
    "FIRST_WINDOW",
    "Address",
    "Datagram",
    "FastPath",
    "QuicEngine",
    "client_engine_untrusted",
    "server_engine",
]

# aioquic warns about every fault of a peer; without a handler, Python prints it.
logging.getLogger("quic").addHandler(logging.NullHandler())

FIRST_WINDOW = 256 * 1024
"""Bytes that a peer may send before its proof is accepted: a message, and frames that
overtook it."""

STREAM_WINDOW = 32 * 1024 * 1024
"""Bytes of one stream that a peer may send: as many as on the whole connection, so that
only the window of the connection counts."""

PACKETS_PER_KEY = 4_000_000
"""Packets after which the keys are renewed: AES-GCM allows 2^23 (RFC 9001, 6.6)."""


class FastPath(enum.Flag):
    """Directions of bulk data that bypass aioquic; see docs/performance.md."""

    NONE = 0
    SEND = enum.auto()
    RECEIVE = enum.auto()


FAST_PATH = FastPath.SEND | FastPath.RECEIVE


class QuicEngine:
    """A QUIC connection with one stream for bulk data each way.

    After each input and command the driver sends what `datagrams_to_send` returns,
    drains `next_event`, and then reads `deadline`.

    Args:
        configuration: The settings of the connection.
        limits: The limits of the link.
        original_destination_connection_id: For a server: the id in the client's first
            packet.
        fast_path: The directions of bulk data that take the fast path.

    Attributes:
        connection: The connection of aioquic.
        congestion: Its congestion control.
    """

    def __init__(
        self,
        configuration: QuicConfiguration,
        limits: LinkLimits,
        *,
        original_destination_connection_id: bytes | None = None,
        fast_path: FastPath = FAST_PATH,
    ) -> None:
        size = configuration.max_datagram_size
        self.congestion = CongestionControl(size)
        self._mtu = MtuSearch(size, limits.largest_datagram)
        self._pacer = Pacer(self.congestion)
        self._packet_pacer = AioquicPacer(self.congestion, self._pacer)
        self.connection = AioquicConnection(
            configuration,
            AioquicCongestion(self.congestion, self._pacer, self._mtu),
            self._packet_pacer,
            original_destination_connection_id,
        )
        self._sends_fast = FastPath.SEND in fast_path
        self._sender: FastSender | None = None
        self._receiver: FastReceiver | None = None
        if FastPath.RECEIVE in fast_path:
            self._receiver = FastReceiver(self.connection)
        self._renew_keys_at = PACKETS_PER_KEY
        self._deadline: float | None = None

    # ------------------------------------------------------------------- properties

    @property
    def host_cid(self) -> bytes:
        """The connection id that the peer's packets begin with."""
        return self.connection.host_cid

    @property
    def close_event(self) -> ConnectionTerminated | None:
        """The reason for the end of the connection, as soon as it is known."""
        return self.connection.close_event

    @property
    def packets_lost(self) -> int:
        """Packets that were declared lost."""
        return self.congestion.packets_lost

    @property
    def peer_certificate(self) -> bytes:
        """The certificate that the peer has proved to hold, DER; empty without one."""
        return self.connection.peer_certificate

    def unacknowledged(self, stream_id: int) -> int:
        """Return the bytes of our side of a stream that are not acknowledged."""
        if self._sender is not None and self._sender.stream_id == stream_id:
            return self._sender.unacknowledged
        return self.connection.unacknowledged(stream_id)

    def unsent(self, stream_id: int) -> int:
        """Return the bytes of our side of a stream that were never sent."""
        if self._sender is not None and self._sender.stream_id == stream_id:
            return self._sender.unsent
        return self.connection.unsent(stream_id)

    # --------------------------------------------------------------------- commands

    def connect(self, address: Address, now: float) -> None:
        """Begin the handshake of a client."""
        self.connection.connect(address, now)

    def send(self, stream_id: int, data: Payload) -> None:
        """Queue bytes of a stream; they are copied."""
        self.connection.send_stream_data(stream_id, cast(bytes, data))

    def send_bulk(self, stream_id: int, data: Payload) -> None:
        """Queue bytes of the only bulk stream.

        They need not be copied, so the caller must not change them.
        """
        if not self._sends_fast:
            self.send(stream_id, data)
            return
        if self._sender is None:
            self._sender = FastSender(
                self.connection, self.congestion, self._pacer, stream_id
            )
        self._sender.queue(data)

    def send_ping(self, uid: int) -> None:
        """Queue a ping; `PingAcknowledged` with its id follows."""
        self.connection.send_ping(uid)

    def grant(self, total: int) -> None:
        """Allow the peer to send this many bytes from the start of the connection."""
        self.connection.grant(total)

    def close(self, error_code: int, reason: str) -> None:
        """Close the connection."""
        self.connection.close(error_code, reason_phrase=reason)

    # ------------------------------------------------------------------------ input

    def receive_datagrams(self, datagrams: Sequence[Datagram], now: float) -> None:
        """Receive a batch of datagrams; garbage among them is ignored."""
        if self._receiver is not None:
            self._receiver.receive_datagrams(datagrams, now)
            return
        for data, address in datagrams:
            self.connection.receive_datagram(data, address, now)

    def handle_timeout(self, now: float) -> None:
        """Run the timers that have expired; do nothing before `deadline`."""
        if self._deadline is not None and now >= self._deadline:
            self.connection.handle_timer(now)

    # ----------------------------------------------------------------------- output

    def datagrams_to_send(self, now: float) -> list[Datagram]:
        """Return what to send now."""
        datagrams = self._packets_to_send(now)
        # aioquic arms its loss timer in this call. A timer may expire a rounding error
        # too early for aioquic, so the time has to move forward.
        timer = self.connection.get_timer()
        self._deadline = None if timer is None else max(timer, now + 1e-6)
        return datagrams

    def deadline(self) -> float | None:
        """Return when to call `handle_timeout`; None if never."""
        return self._deadline

    def next_event(self) -> QuicEvent | None:
        """Remove and return the oldest event; None if there is none."""
        return self.connection.next_event()

    def _packets_to_send(self, now: float) -> list[Datagram]:
        """Return what aioquic has to send, then bulk, then a probe."""
        connection, congestion = self.connection, self.congestion
        connection.datagram_size = congestion.max_datagram_size = self._mtu.size
        datagrams = connection.datagrams_to_send(now)
        self._packet_pacer.end_turn()
        if not connection.is_established or not connection.is_path_validated:
            return datagrams
        if self._sender is not None:
            datagrams += self._sender.datagrams_to_send(now)
        self._check_application_limit()
        if (size := self._mtu.next_probe()) is not None:
            datagrams += connection.make_probe(size, self._on_probe_delivery, now)
        if connection.packet_number >= self._renew_keys_at:
            self._renew_keys_at = connection.packet_number + PACKETS_PER_KEY
            connection.renew_keys()
        return datagrams

    def _check_application_limit(self) -> None:
        """Report to congestion control if neither window nor pace held data back."""
        congestion = self.congestion
        window = congestion.congestion_window - congestion.bytes_in_flight
        if window >= congestion.max_datagram_size and not self.connection.is_paced:
            congestion.application_limited()

    def _on_probe_delivery(self, delivery: QuicDeliveryState, size: int) -> None:
        if delivery is QuicDeliveryState.ACKED:
            self._mtu.probe_acknowledged(size)
        else:
            self._mtu.probe_lost()


def client_engine_untrusted(
    certificate_der: bytes,
    limits: LinkLimits,
    *,
    fast_path: FastPath = FAST_PATH,
) -> QuicEngine:
    """Return the engine of a client that trusts one certificate.

    Args:
        certificate_der: The certificate.
        limits: The limits of the link.
        fast_path: The directions of bulk data that take the fast path.

    Raises:
        RemoteProtocolError: If the bytes are not a certificate.
    """
    anchor = certificate_pem_untrusted(certificate_der)
    return QuicEngine(
        QuicConfiguration(
            is_client=True,
            alpn_protocols=[ALPN],
            cadata=anchor,
            verify_mode=ssl.CERT_REQUIRED,
            server_name=SERVER_NAME,
            **_common(limits),
        ),
        limits,
        fast_path=fast_path,
    )


def server_engine(
    certificate: Certificate,
    connection_id: bytes,
    limits: LinkLimits,
    *,
    fast_path: FastPath = FAST_PATH,
) -> QuicEngine:
    """Return the engine that answers a client's first packet.

    Args:
        certificate: The certificate to show.
        connection_id: The destination connection id of that packet.
        limits: The limits of the link.
        fast_path: The directions of bulk data that take the fast path.
    """
    return QuicEngine(
        QuicConfiguration(
            is_client=False,
            alpn_protocols=[ALPN],
            certificate=x509.load_der_x509_certificate(certificate.certificate_der),
            private_key=certificate.private_key,
            **_common(limits),
        ),
        limits,
        original_destination_connection_id=connection_id,
        fast_path=fast_path,
    )


def _common(limits: LinkLimits) -> dict[str, Any]:
    return {
        "cipher_suites": list(SUITES),
        "connection_id_length": CONNECTION_ID_LENGTH,
        "idle_timeout": limits.idle_timeout,
        "max_data": FIRST_WINDOW,
        "max_datagram_size": SMALLEST_DATAGRAM,
        "max_stream_data": STREAM_WINDOW,
    }
