"""A QUIC connection of aioquic, with the parts of its state that a link needs.

aioquic keeps them in private attributes. They are used in this module and in no other,
and `tests/io/quic/test_connection.py` checks that the installed version has each of
them. The upper bound of its version in `pyproject.toml` follows from this module.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import (
    Limit,
    QuicConnection,
    QuicConnectionState,
)
from aioquic.quic.crypto import CryptoContext
from aioquic.quic.events import ConnectionTerminated, QuicEvent
from aioquic.quic.packet import QuicFrameType, QuicPacketType
from aioquic.quic.packet_builder import (
    QuicDeliveryState,
    QuicPacketBuilder,
    QuicSentPacket,
)
from aioquic.quic.recovery import QuicPacketSpace
from aioquic.quic.stream import QuicStream
from aioquic.tls import Epoch
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from typing_extensions import override

from sleap_rtc.io.quic.congestion import AioquicCongestion, AioquicPacer

Address = tuple[Any, ...]
"""A socket address, in the form of the operating system."""

Datagram = tuple[bytes, Address]


class AioquicConnection(QuicConnection):
    """A QUIC connection whose state can be read, and whose peer can be held back.

    Args:
        configuration: See `QuicConnection`.
        congestion: Decides how much may be in flight.
        pacer: Decides when packets may be made.
        original_destination_connection_id: See `QuicConnection`.
    """

    def __init__(
        self,
        configuration: QuicConfiguration,
        congestion: AioquicCongestion,
        pacer: AioquicPacer,
        original_destination_connection_id: bytes | None = None,
    ) -> None:
        super().__init__(
            configuration=configuration,
            original_destination_connection_id=original_destination_connection_id,
        )
        self._loss._cc = congestion
        self._loss._pacer = pacer
        self._granted = 0

    # ------------------------------------------------------------------- lifetime

    @property
    def close_event(self) -> ConnectionTerminated | None:
        """The reason for the end of the connection, as soon as it is known.

        The event in the queue of aioquic follows three probe timeouts later.
        """
        return self._close_event

    @property
    def is_established(self) -> bool:
        """True from the end of the handshake until the connection closes."""
        return self._handshake_confirmed and not (
            self._close_pending or self._state is not QuicConnectionState.CONNECTED
        )

    @property
    def peer_certificate(self) -> bytes:
        """The certificate that the peer has proved to hold, DER; empty without one."""
        certificate: x509.Certificate | None = self.tls._peer_certificate
        return b"" if certificate is None else certificate.public_bytes(Encoding.DER)

    def restart_idle_timer(self, now: float) -> None:
        """Restart the idle timeout after packets have arrived (RFC 9000, 10.1)."""
        self._close_at = now + self._idle_timeout()
        self._ack_eliciting_sent_since_receipt = False

    def renew_keys(self) -> None:
        """Seal the packets that follow with new keys."""
        self.request_key_update()
        # Only a packet that aioquic makes itself starts to use them.
        self._send_probe()

    # ------------------------------------------------------- packets made elsewhere

    @property
    def peer_address(self) -> Address:
        """The address that packets are sent to."""
        address: Address = self._network_paths[0].addr
        return address

    @property
    def is_path_validated(self) -> bool:
        """True if the peer has proved that it receives at its address."""
        return self._network_paths[0].is_validated

    @property
    def peer_connection_id(self) -> bytes:
        """The destination of packets that are sent."""
        return self._peer_cid.cid

    @property
    def packet_number(self) -> int:
        """The number of the next packet to send."""
        return self._packet_number

    @property
    def sealing_context(self) -> CryptoContext:
        """The keys of 1-RTT packets that are sent."""
        return self._cryptos[Epoch.ONE_RTT].send

    @property
    def datagram_size(self) -> int:
        """The UDP payload of a full packet, in bytes."""
        return self._max_datagram_size

    @datagram_size.setter
    def datagram_size(self, size: int) -> None:
        self._max_datagram_size = size

    @property
    def send_credit(self) -> int:
        """Bytes that the peer allows to be sent on all streams together."""
        return self._remote_max_data - self._remote_max_data_used

    def use_send_credit(self, size: int) -> None:
        """Account for bytes of streams that are sent for the first time."""
        self._remote_max_data_used += size

    def register_sent(self, packets: Sequence[QuicSentPacket], now: float) -> None:
        """Account for 1-RTT packets that were made elsewhere, as `_flush_builder` does.

        Args:
            packets: With consecutive numbers, beginning with `packet_number`.
            now: When they are sent.
        """
        space = self._spaces[Epoch.ONE_RTT]
        for packet in packets:
            self._loss.on_packet_sent(packet=packet, space=space)
        self._packet_number += len(packets)
        self._network_paths[0].bytes_sent += sum(p.sent_bytes for p in packets)
        if not self._ack_eliciting_sent_since_receipt:
            # RFC 9000, 10.1: the first packet after one was received counts.
            self._close_at = now + self._idle_timeout()
            self._ack_eliciting_sent_since_receipt = True

    @property
    def is_paced(self) -> bool:
        """True if the pacer held packets back in this turn."""
        return self._pacing_at is not None

    def resume_at(self, when: float) -> None:
        """Set the time of the next turn, in which the pacer allows more packets."""
        self._pacing_at = when

    def make_probe(
        self,
        size: int,
        on_delivery: Callable[[QuicDeliveryState, int], None],
        now: float,
    ) -> list[Datagram]:
        """Return a padding-only packet whose loss is not a sign of congestion.

        Args:
            size: Its UDP payload in bytes.
            on_delivery: Called with the result and the size.
            now: When it is sent.
        """
        builder = QuicPacketBuilder(
            host_cid=self.host_cid,
            peer_cid=self._peer_cid.cid,
            version=cast(int, self._version),  # known since the handshake
            is_client=self.configuration.is_client,
            max_datagram_size=size,
            packet_number=self._packet_number,
        )
        builder.start_packet(QuicPacketType.ONE_RTT, self._cryptos[Epoch.ONE_RTT])
        frames = builder.start_frame(
            QuicFrameType.PING, handler=on_delivery, handler_args=(size,)
        )
        frames.push_bytes(bytes(builder.remaining_buffer_space))
        datagrams = self._flush_builder(
            builder=builder,
            network_path=self._network_paths[0],
            peer_cid=self._peer_cid.cid,
            now=now,
        )
        # RFC 9000, 14.4: its loss must not count as congestion.
        sent_packets = self._spaces[Epoch.ONE_RTT].sent_packets
        packet = sent_packets[self._packet_number - 1]
        self._loss._cc.on_packets_expired(packets=[packet])
        packet.in_flight = False
        return datagrams

    # ----------------------------------------------------- packets opened elsewhere

    @property
    def opening_context(self) -> CryptoContext:
        """The keys of 1-RTT packets that arrive."""
        return self._cryptos[Epoch.ONE_RTT].recv

    @property
    def packet_space(self) -> QuicPacketSpace:
        """The numbers of 1-RTT packets that have arrived."""
        return self._spaces[Epoch.ONE_RTT]

    @property
    def receive_window(self) -> Limit:
        """The bytes that the peer may send, and has sent, on all streams together."""
        return self._local_max_data

    @property
    def streams(self) -> Mapping[int, QuicStream]:
        """The open streams by their ids."""
        return self._streams

    def queue_event(self, event: QuicEvent) -> None:
        """Queue an event for `next_event`."""
        self._events.append(event)

    # ---------------------------------------------------------------- flow control

    def open_stream(self, stream_id: int) -> QuicStream:
        """Return a stream to send on, which is created if it does not exist."""
        return self._get_or_create_stream_for_send(stream_id)

    def unacknowledged(self, stream_id: int) -> int:
        """Return the bytes of our side of a stream that are not acknowledged."""
        stream = self._streams.get(stream_id)
        return 0 if stream is None else len(stream.sender._buffer)

    def unsent(self, stream_id: int) -> int:
        """Return the bytes of our side of a stream that were never sent."""
        stream = self._streams.get(stream_id)
        if stream is None:
            return 0
        return stream.sender._buffer_stop - stream.sender.highest_offset

    def grant(self, total: int) -> None:
        """Allow the peer to send this many bytes from the start of the connection."""
        self._granted = total

    @override
    def datagrams_to_send(self, now: float) -> list[Datagram]:
        """Return the datagrams to send now; the peer may send only the granted bytes.

        aioquic doubles the window whenever half of it has arrived, whether it was read
        or not. So the received bytes count as 0 during the call.
        """
        window = self._local_max_data
        window.value = max(window.value, self._granted)
        received, window.used = window.used, 0
        try:
            return super().datagrams_to_send(now)
        finally:
            window.used = received
