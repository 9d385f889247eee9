"""How fast a connection sends: its congestion control, and its pace."""

from collections.abc import Iterable

from aioquic.quic.congestion.base import register_congestion_control
from aioquic.quic.congestion.cubic import CubicCongestionControl
from aioquic.quic.packet_builder import QuicSentPacket
from aioquic.quic.recovery import QuicPacketPacer

BURST_PACKETS = 16
BURST_SECONDS = 0.002
"""What may be sent at once: timers are accurate to a millisecond or so."""

CONGESTION = "sleap-rtc"


class Congestion(CubicCongestionControl):
    """Cubic, which fills long lines better than Reno, with a count of losses."""

    def __init__(self, *, max_datagram_size: int) -> None:
        super().__init__(max_datagram_size=max_datagram_size)
        self.packets_lost = 0

    def on_packets_lost(self, *, now: float, packets: Iterable[QuicSentPacket]) -> None:
        """Note packets that were declared lost."""
        lost = list(packets)
        self.packets_lost += len(lost)
        super().on_packets_lost(now=now, packets=lost)


class Pacer(QuicPacketPacer):
    """A bucket of bytes that fills at the pace of the connection (RFC 9002, 7.7).

    Args:
        max_datagram_size: The largest UDP payload, in bytes.
    """

    def __init__(self, *, max_datagram_size: int) -> None:
        self.max_datagram_size = max_datagram_size
        self._rate = 0.0
        self._level = 0.0
        self._filled_at = 0.0

    def budget(self, now: float) -> float:
        """Return how many bytes may be sent now; no limit before the first rate."""
        if not self._rate:
            return float("inf")
        largest = max(
            BURST_PACKETS * self.max_datagram_size, BURST_SECONDS * self._rate
        )
        filled = self._level + (now - self._filled_at) * self._rate
        self._level = min(filled, largest)
        self._filled_at = now
        return self._level

    def spend(self, size: float, now: float) -> None:
        """Note that bytes were sent."""
        if self._rate:
            self._level = self.budget(now) - size

    def next_send_time(  # type: ignore[override] # it is annotated without None
        self, now: float
    ) -> float | None:
        """Return when something may be sent; None means now."""
        if self.budget(now) > 0:
            return None
        return now + (self.max_datagram_size - self._level) / self._rate

    def update_after_send(self, now: float) -> None:
        """Note a packet that aioquic sent by itself."""
        self.spend(self.max_datagram_size, now)

    def update_rate(self, congestion_window: int, smoothed_rtt: float) -> None:
        """Take the pace of one window for each round trip, and a quarter more."""
        self._rate = 1.25 * congestion_window / max(smoothed_rtt, 1e-3)


register_congestion_control(CONGESTION, Congestion)
