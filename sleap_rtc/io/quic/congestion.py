"""The congestion control and the pacer of a connection, in the form that aioquic calls.

The decisions are made in `sleap_rtc.proto.quic.congestion` and in
`sleap_rtc.proto.quic.mtu`. The classes here forward the reports of aioquic to them.
"""

from collections.abc import Iterable

from aioquic.quic.congestion.base import QuicCongestionControl
from aioquic.quic.packet_builder import QuicSentPacket
from aioquic.quic.recovery import QuicPacketPacer
from typing_extensions import override

from sleap_rtc.proto.quic.congestion import CongestionControl, Pacer
from sleap_rtc.proto.quic.mtu import MtuSearch


class AioquicCongestion(QuicCongestionControl):
    """Forwards the packets of a connection, those of the fast path included.

    Args:
        control: Decides how much may be in flight.
        pacer: Is charged with each packet that is in flight.
        mtu: Gets the sizes of packets that arrive or are lost.
    """

    def __init__(
        self, control: CongestionControl, pacer: Pacer, mtu: MtuSearch
    ) -> None:
        self._control = control
        self._pacer = pacer
        self._mtu = mtu

    @property
    @override
    def bytes_in_flight(self) -> int:  # type: ignore[override] # aioquic only reads it
        """Return the bytes in flight."""
        return self._control.bytes_in_flight

    @property
    @override
    def congestion_window(self) -> int:  # type: ignore[override] # likewise
        """Return the bytes that may be in flight."""
        return self._control.congestion_window

    @override
    def on_packet_sent(self, *, packet: QuicSentPacket) -> None:
        """Forward a packet that counts as in flight."""
        sent_at = packet.sent_time or 0.0
        self._control.packet_sent(packet.sent_bytes, sent_at)
        self._pacer.packet_sent(packet.sent_bytes, sent_at)

    @override
    def on_packet_acked(self, *, now: float, packet: QuicSentPacket) -> None:
        """Forward a packet that arrived."""
        self._control.packet_acknowledged(packet.sent_bytes, packet.sent_time or 0.0)
        self._mtu.packet_acknowledged(packet.sent_bytes)

    @override
    def on_packets_expired(self, *, packets: Iterable[QuicSentPacket]) -> None:
        """Forward packets that aioquic no longer tracks."""
        for packet in packets:
            self._control.packet_expired(packet.sent_bytes)

    @override
    def on_packets_lost(self, *, now: float, packets: Iterable[QuicSentPacket]) -> None:
        """Forward packets that were declared lost."""
        for packet in packets:
            self._control.packet_lost(packet.sent_bytes)
            self._mtu.packet_lost(packet.sent_bytes)

    @override
    def on_persistent_congestion(self) -> None:
        """Report that no packet has arrived for a long time."""
        self._control.persistent_congestion()

    @override
    def on_rtt_measurement(self, *, now: float, rtt: float) -> None:
        """Forward the end of an acknowledgement, after its packets."""
        self._control.rtt_measured(rtt, now)


class AioquicPacer(QuicPacketPacer):
    """Decides when aioquic may make a packet.

    aioquic makes all packets of a turn before it reports their sizes. Until then each
    packet counts as a full one in the pacer's budget. `end_turn` removes these counts,
    because the real sizes have been charged by then.

    Args:
        control: Provides the size of a full packet.
        pacer: Holds the budget.
    """

    def __init__(self, control: CongestionControl, pacer: Pacer) -> None:
        self._control = control
        self._pacer = pacer
        self._packets = 0

    def end_turn(self) -> None:
        """Forget the packets of the turn, which have been charged."""
        self._packets = 0

    @override
    def next_send_time(  # type: ignore[override] # it is annotated without None
        self, now: float
    ) -> float | None:
        """Return when the next packet may be made; None means now."""
        pending = self._packets * self._control.max_datagram_size
        return self._pacer.next_send_time(now, pending)

    @override
    def update_after_send(self, now: float) -> None:
        """Count a packet that was made."""
        self._packets += 1

    @override
    def update_rate(self, congestion_window: int, smoothed_rtt: float) -> None:
        """Do nothing: the rate is part of the congestion control."""
