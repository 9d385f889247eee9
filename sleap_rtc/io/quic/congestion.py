"""How fast a connection sends: its congestion control, and its pace.

Cubic takes each loss for a full queue. On a path with a round trip of 50 ms that loses
one packet in a thousand for other reasons, that leaves it 1 MB/s, whatever the path
could carry. `Congestion` measures what arrives instead, as BBR does
(draft-cardwell-iccrg-bbr-congestion-control): it sends at the highest rate that was
delivered of late, keeps at most twice in flight what the path holds, and tries a
quarter more now and then. Of the later draft-ietf-ccwg-bbr it takes the answer to
congestion: a round trip that loses more than 2 % lowers what may be in flight by 30 %.
"""

import enum
import math
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from aioquic.quic.congestion.base import (
    QuicCongestionControl,
    register_congestion_control,
)
from aioquic.quic.packet_builder import QuicSentPacket
from aioquic.quic.recovery import QuicPacketPacer

CONGESTION = "sleap-rtc"
"""The name under which aioquic finds it."""

LATENCY = 0.005
"""Seconds that timers, batches and the scheduler add to a round trip, at most."""

LOSS_LIMIT = 0.02
FEWEST_LOST = 3
"""Share and number of packets whose loss within a round trip means congestion."""

BACK_OFF = 0.7
RECOVER = 1.1
"""What may be in flight is multiplied by it after a round with and without that."""

SMALLEST_WINDOW = 4
"""Packets."""

BANDWIDTH_ROUNDS = 10
"""Rounds for which a rate counts that was once delivered."""

RTT_SECONDS = 10.0
PROBE_RTT_SECONDS = 0.2
"""How long a shortest round trip is believed, and how long it is looked for again."""

CYCLE = (1.25, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
"""Share of the bandwidth at which to send, in one round after the other."""

STARTUP_GAIN = 2.77
WINDOW_GAIN = 2.0
FULL_GROWTH = 1.25
FULL_ROUNDS = 3
"""Startup ends when the rate has not grown by a quarter for three rounds."""

BURST_PACKETS = 16
BURST_SECONDS = 0.004
"""What may be sent at once: timers are accurate to a millisecond or so."""

WORTHWHILE_PACKETS = 32
WORTHWHILE_SECONDS = 0.002
"""What is waited for, as many small turns cost more than a large one."""


class Phase(enum.Enum):
    """What the controller does."""

    STARTUP = "looks for the bandwidth"
    DRAIN = "empties the queue that this has made"
    CRUISE = "keeps the bandwidth, and tries for more in cycles"
    PROBE_RTT = "looks for the shortest round trip"


class _Burst(NamedTuple):
    """What was known when packets were sent, which all have the same time."""

    sent_at: float
    delivered: int
    delivered_at: float
    acknowledged_sent_at: float
    is_idle: bool


class Congestion(QuicCongestionControl):
    """A model of the path: its bandwidth, and its shortest round trip.

    Args:
        max_datagram_size: The largest UDP payload, in bytes.

    Attributes:
        phase: What it does.
        packets_lost: Packets that were declared lost.
        pacing_rate: Bytes per second; 0 while nothing is known.
    """

    def __init__(self, *, max_datagram_size: int) -> None:
        super().__init__(max_datagram_size=max_datagram_size)
        self.max_datagram_size = max_datagram_size
        self.packets_lost = 0
        self.pacing_rate = 0.0
        self._min_rtt = math.inf
        self._min_rtt_at = 0.0
        self._delivered = 0
        self._delivered_at = 0.0
        self._acknowledged_sent_at = 0.0
        self._idle_until = 0
        self._bursts: deque[_Burst] = deque()
        self._begin()

    def _begin(self) -> None:
        self.phase = Phase.STARTUP
        self._rates: deque[float] = deque((0.0,), maxlen=BANDWIDTH_ROUNDS)
        self._ceiling = math.inf
        self._full_rate = 0.0
        self._full_rounds = 0
        self._cycle = 0
        self._phase_until = 0.0
        self._round_ends = self._delivered
        self._round_began_at = 0.0
        self._round_delivered = self._delivered
        self._round_lost = 0
        self._round_lost_packets = 0
        self._newly_acknowledged = 0

    @property
    def bandwidth(self) -> float:
        """Bytes per second that the path is thought to carry."""
        return max(self._rates)

    def note_idle(self) -> None:
        """Note that there is nothing to send: what is in flight shows no bandwidth."""
        self._idle_until = self._delivered + self.bytes_in_flight

    # --------------------------------------------------------- what aioquic calls

    def on_packet_sent(self, *, packet: QuicSentPacket) -> None:
        """Note a packet that was sent."""
        sent_at = packet.sent_time or 0.0
        if not self._bursts or self._bursts[-1].sent_at != sent_at:
            if not self.bytes_in_flight:
                self._delivered_at = self._acknowledged_sent_at = sent_at
            burst = _Burst(
                sent_at,
                self._delivered,
                self._delivered_at,
                self._acknowledged_sent_at,
                self._delivered < self._idle_until,
            )
            self._bursts.append(burst)
        self.bytes_in_flight += packet.sent_bytes

    def on_packet_acked(self, *, now: float, packet: QuicSentPacket) -> None:
        """Note a packet that arrived."""
        size = packet.sent_bytes
        self.bytes_in_flight -= size
        self._delivered += size
        self._newly_acknowledged += size
        self._acknowledged_sent_at = packet.sent_time or 0.0

    def on_packets_expired(self, *, packets: Iterable[QuicSentPacket]) -> None:
        """Forget packets about which nothing will be heard."""
        for packet in packets:
            self.bytes_in_flight -= packet.sent_bytes

    def on_packets_lost(self, *, now: float, packets: Iterable[QuicSentPacket]) -> None:
        """Note packets that were declared lost."""
        for packet in packets:
            self.bytes_in_flight -= packet.sent_bytes
            self.packets_lost += 1
            self._round_lost += packet.sent_bytes
            self._round_lost_packets += 1

    def on_persistent_congestion(self) -> None:
        """Begin again, after nothing has arrived for long (RFC 9002, 7.6)."""
        self._begin()
        self.pacing_rate = 0.0
        self.congestion_window = SMALLEST_WINDOW * self.max_datagram_size

    def on_rtt_measurement(self, *, now: float, rtt: float) -> None:
        """Take a whole acknowledgement into account, after its packets."""
        is_stale = now > self._min_rtt_at + RTT_SECONDS
        if rtt <= self._min_rtt or (self.phase is Phase.PROBE_RTT and is_stale):
            self._min_rtt, self._min_rtt_at, is_stale = rtt, now, False
        burst = self._sample(now)
        self._delivered_at = now
        if (
            burst is not None
            and burst.delivered >= self._round_ends
            and now >= self._round_began_at + LATENCY
        ):
            self._end_round(now, burst.is_idle)
        self._change_phase(now, is_stale)
        self._set_window()

    # --------------------------------------------------------------------- inside

    def _sample(self, now: float) -> _Burst | None:
        """Measure the rate of delivery (draft-cheng-iccrg-delivery-rate-estimation)."""
        sent_at, bursts = self._acknowledged_sent_at, self._bursts
        while bursts and bursts[0].sent_at < sent_at:
            bursts.popleft()
        if not bursts or bursts[0].sent_at > sent_at:
            return None
        burst = bursts[0]
        interval = max(
            burst.sent_at - burst.acknowledged_sent_at, now - burst.delivered_at
        )
        # What took less than a round trip was only acknowledged in a heap.
        if interval >= max(self._min_rtt, 1e-3):
            rate = (self._delivered - burst.delivered) / interval
            if not burst.is_idle or rate > self.bandwidth:
                self._rates[-1] = max(self._rates[-1], rate)
        return burst

    def _end_round(self, now: float, is_idle: bool) -> None:
        """Draw the conclusions of one round trip."""
        delivered = self._delivered - self._round_delivered
        is_congested = (
            self._round_lost_packets >= FEWEST_LOST
            and self._round_lost > LOSS_LIMIT * (delivered + self._round_lost)
        )
        # The losses with which startup ends are those of its own queue. Who backed off
        # for them would hardly get a share of a path that another one fills.
        if is_congested and self.phase is not Phase.STARTUP:
            window = min(self.congestion_window, self._ceiling)
            self._ceiling = max(BACK_OFF * window, self._smallest_window)
        elif self._ceiling < 2 * self._target(WINDOW_GAIN):
            self._ceiling *= RECOVER
        else:
            self._ceiling = math.inf
        if self.phase is Phase.STARTUP:
            self._judge_startup(is_congested, is_idle)
        self._cycle = (self._cycle + 1) % len(CYCLE)
        self._round_ends = self._round_delivered = self._delivered
        self._round_began_at = now
        self._round_lost = self._round_lost_packets = 0
        if not is_idle:
            self._rates.append(0.0)

    def _judge_startup(self, is_congested: bool, is_idle: bool) -> None:
        if self.bandwidth >= FULL_GROWTH * self._full_rate:
            self._full_rate, self._full_rounds = self.bandwidth, 0
        elif not is_idle:
            self._full_rounds += 1
        if is_congested or self._full_rounds >= FULL_ROUNDS:
            self.phase = Phase.DRAIN

    def _change_phase(self, now: float, is_stale: bool) -> None:
        match self.phase:
            case Phase.DRAIN if self.bytes_in_flight <= self._target(1.0):
                self.phase, self._cycle = Phase.CRUISE, 1
            case Phase.CRUISE if is_stale:
                self.phase, self._phase_until = (
                    Phase.PROBE_RTT,
                    now + PROBE_RTT_SECONDS,
                )
            case Phase.PROBE_RTT if now >= self._phase_until:
                self.phase, self._cycle = Phase.CRUISE, 1

    def _set_window(self) -> None:
        """Set the window and the pace by what is known."""
        newly, self._newly_acknowledged = self._newly_acknowledged, 0
        if not self.bandwidth:
            self.congestion_window += newly  # slow start, until there is a rate
            return
        gain, window = CYCLE[self._cycle], self._target(WINDOW_GAIN)
        match self.phase:
            case Phase.STARTUP:
                gain = STARTUP_GAIN
                window = max(window, self.congestion_window)
                window = min(window, self.congestion_window + newly)
            case Phase.DRAIN:
                gain = 1 / STARTUP_GAIN
            case Phase.PROBE_RTT:
                gain, window = 1.0, self._target(0.5)
        window = max(min(window, self._ceiling), self._smallest_window)
        self.congestion_window = int(window)
        self.pacing_rate = gain * self.bandwidth

    def _target(self, gain: float) -> float:
        """Return bytes in flight: a multiple of what the path holds."""
        if math.isinf(self._min_rtt):
            return self.congestion_window
        return gain * self.bandwidth * (self._min_rtt + LATENCY)

    @property
    def _smallest_window(self) -> int:
        return SMALLEST_WINDOW * self.max_datagram_size


class Pacer(QuicPacketPacer):
    """A bucket of bytes that fills at the pace of the connection (RFC 9002, 7.7).

    Args:
        congestion: Which sets the pace.
    """

    def __init__(self, congestion: Congestion) -> None:
        self._congestion = congestion
        self._rate = 0.0
        self._level = 0.0
        self._filled_at = 0.0
        self._guessed = 0

    def budget(self, now: float) -> float:
        """Return how many bytes may be sent now; no limit before the first rate."""
        if not self._rate:
            return math.inf
        filled = self._level + (now - self._filled_at) * self._rate
        burst = BURST_PACKETS * self._congestion.max_datagram_size
        self._level = min(filled, max(burst, BURST_SECONDS * self._rate))
        self._filled_at = now
        return self._level

    def spend(self, size: int, now: float) -> None:
        """Note that bytes were sent."""
        if self._rate:
            self._level = self.budget(now) - size

    def next_send_time(  # type: ignore[override] # it is annotated without None
        self, now: float
    ) -> float | None:
        """Return when something may be sent; None means now."""
        if self.budget(now) > 0:
            return None
        train = WORTHWHILE_PACKETS * self._congestion.max_datagram_size
        worthwhile = min(train, WORTHWHILE_SECONDS * self._rate)
        return now + (worthwhile - self._level) / self._rate

    def update_after_send(self, now: float) -> None:
        """Note a packet of aioquic's own making, whose size it does not tell."""
        self.spend(self._congestion.max_datagram_size, now)
        self._guessed += self._congestion.max_datagram_size

    def correct(self, size: int) -> None:
        """Note how much those packets were: acknowledgements do not count at all."""
        self._level += self._guessed - size
        self._guessed = 0

    def update_rate(self, congestion_window: int, smoothed_rtt: float) -> None:
        """Take the pace from the congestion control, or a window a round trip."""
        by_window = 1.25 * congestion_window / max(smoothed_rtt, 1e-3)
        self._rate = self._congestion.pacing_rate or by_window


register_congestion_control(CONGESTION, Congestion)
