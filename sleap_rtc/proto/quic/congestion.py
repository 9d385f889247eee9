"""Congestion control and pacing of a connection.

Loss-based control takes each loss for a full queue: on a path with a round trip of
50 ms that loses one packet in a thousand at random, Cubic is left with 1 MB/s, whatever
the path could carry. `CongestionControl` measures the rate of delivery instead, as BBR
does (draft-cardwell-iccrg-bbr-congestion-control-00): it sends at the highest rate that
was delivered recently, keeps at most twice the bandwidth-delay product in flight, and
probes for a quarter more once in a gain cycle. Its answer to congestion comes from the
later draft-ietf-ccwg-bbr: a round that loses more than 2 % lowers the limit of what may
be in flight by 30 %.

The terms are those of the drafts. A *round* is one round trip of data; a path whose
sender has nothing more to send is *application-limited* and shows no bandwidth.
"""

import enum
import math
from collections import deque
from typing import NamedTuple, assert_never

from sleap_rtc.proto.machine import Table, move

INITIAL_WINDOW = 10
MINIMUM_WINDOW = 4
"""Packets that may always be in flight, even at the start (BBRMinPipeCwnd)."""

SCHEDULING_DELAY = 0.005
"""Seconds that timers, batches and the scheduler add to a round trip, at most."""

LOSS_THRESHOLD = 0.02
MIN_LOST_PACKETS = 3
"""Share and number of packets whose loss within a round means congestion."""

LOSS_BACKOFF = 0.7
LOSS_RECOVERY = 1.1
"""Factors of the in-flight limit after a round with and without congestion."""

BANDWIDTH_ROUNDS = 10
"""Rounds in which the highest rate of delivery counts as the bandwidth."""

MIN_RTT_SECONDS = 10.0
"""Seconds for which a minimum round trip time is valid."""

PROBE_RTT_SECONDS = 0.2
"""Seconds that a new minimum round trip time is probed for."""

GAIN_CYCLE = (1.25, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
"""Pacing gains of `Phase.PROBE_BW`, one a round: probe, drain the queue of the probe,
then cruise."""

STARTUP_GAIN = 2.77
"""Pacing gain that doubles the rate each round: 4 ln 2."""

WINDOW_GAIN = 2.0
"""Congestion window in bandwidth-delay products."""

PROBE_RTT_WINDOW_GAIN = 0.5
"""Congestion window in bandwidth-delay products while the minimum round trip time is
probed for."""

WINDOW_PACING_GAIN = 1.25
"""Windows a round trip that are sent before the bandwidth is known (RFC 9002, 7.7)."""

FULL_PIPE_GROWTH = 1.25
FULL_PIPE_ROUNDS = 3
"""Growth of the bandwidth, and rounds without it after which the pipe is full."""

BURST_PACKETS = 16
BURST_SECONDS = 0.004
"""Packets, or seconds at the pacing rate, that may be sent in one burst: timers are
accurate to a millisecond or so."""

REFILL_PACKETS = 32
REFILL_SECONDS = 0.002
"""Packets, or seconds at the pacing rate, that an empty pacer waits for, whichever is
less: one large turn costs less than many small ones."""


class Phase(enum.Enum):
    """State of the control."""

    STARTUP = "doubles the rate each round until the bandwidth is found"
    DRAIN = "empties the queue that startup has built"
    PROBE_BW = "keeps the bandwidth and probes for more in gain cycles"
    PROBE_RTT = "keeps little in flight to measure the minimum round trip time"


class PhaseTrigger(enum.Enum):
    """Triggers of the control."""

    PIPE_FULL = enum.auto()
    """The bandwidth no longer grows, or a round was congested."""

    QUEUE_DRAINED = enum.auto()
    MIN_RTT_EXPIRED = enum.auto()
    MIN_RTT_PROBED = enum.auto()
    PERSISTENT_CONGESTION = enum.auto()


TRANSITIONS: Table[Phase] = {
    Phase.STARTUP: {
        PhaseTrigger.PIPE_FULL: Phase.DRAIN,
        PhaseTrigger.PERSISTENT_CONGESTION: Phase.STARTUP,
    },
    Phase.DRAIN: {
        PhaseTrigger.QUEUE_DRAINED: Phase.PROBE_BW,
        PhaseTrigger.PERSISTENT_CONGESTION: Phase.STARTUP,
    },
    Phase.PROBE_BW: {
        PhaseTrigger.MIN_RTT_EXPIRED: Phase.PROBE_RTT,
        PhaseTrigger.PERSISTENT_CONGESTION: Phase.STARTUP,
    },
    Phase.PROBE_RTT: {
        PhaseTrigger.MIN_RTT_PROBED: Phase.PROBE_BW,
        PhaseTrigger.PERSISTENT_CONGESTION: Phase.STARTUP,
    },
}
"""The transitions of `CongestionControl`."""


class _Flight(NamedTuple):
    """State of the delivery when packets of one send time were sent.

    Args:
        sent_at: The send time.
        delivered: Bytes that had been delivered.
        delivered_at: When the last of them were acknowledged.
        first_sent_at: When the last of them were sent.
        is_app_limited: True if the sender had run out of data.
    """

    sent_at: float
    delivered: int
    delivered_at: float
    first_sent_at: float
    is_app_limited: bool


class CongestionControl:
    """A model of the path: its bandwidth, and its minimum round trip time.

    The transport reports each packet that counts as in flight: first `packet_sent`,
    then one of `packet_acknowledged`, `packet_lost` and `packet_expired`. It calls
    `rtt_measured` once for each acknowledgement, after its packets, and
    `application_limited` when it has nothing more to send. It may send while
    `bytes_in_flight` is below `congestion_window`, at the `pacing_rate`.

    Args:
        max_datagram_size: The UDP payload of a full packet, in bytes.

    Attributes:
        max_datagram_size: As above; the transport may change it.
        phase: The state.
        bytes_in_flight: Bytes that were sent and are neither acknowledged nor lost.
        congestion_window: Bytes that may be in flight.
        pacing_rate: Bytes per second to send at; 0 means without a limit.
        packets_lost: Packets that were declared lost.
    """

    def __init__(self, max_datagram_size: int) -> None:
        self.max_datagram_size = max_datagram_size
        self.bytes_in_flight = 0
        self.congestion_window = INITIAL_WINDOW * max_datagram_size
        self.packets_lost = 0
        self._min_rtt = math.inf
        self._min_rtt_at = 0.0
        self._delivered = 0
        self._delivered_at = 0.0
        self._first_sent_at = 0.0
        self._app_limited_until = -1
        self._flights: deque[_Flight] = deque()
        self.phase = Phase.STARTUP
        self._reset_model()

    def _reset_model(self) -> None:
        self.pacing_rate = 0.0
        self._rates: deque[float] = deque((0.0,), maxlen=BANDWIDTH_ROUNDS)
        self._in_flight_limit = math.inf
        self._full_bandwidth = 0.0
        self._full_rounds = 0
        self._is_pipe_full = False
        self._cycle_index = 0
        self._probe_rtt_until = 0.0
        self._next_round_delivered = self._delivered
        self._round_began_at = 0.0
        self._round_delivered = self._delivered
        self._round_lost_bytes = 0
        self._round_lost_packets = 0
        self._newly_acknowledged = 0

    @property
    def bandwidth(self) -> float:
        """Bytes per second that the path carries; 0 before the first measurement."""
        return max(self._rates)

    # ---------------------------------------------------------------------- reports

    def packet_sent(self, size: int, now: float) -> None:
        """Count a packet as in flight."""
        if not self._flights or self._flights[-1].sent_at != now:
            if not self.bytes_in_flight:
                self._delivered_at = self._first_sent_at = now
            flight = _Flight(
                now,
                self._delivered,
                self._delivered_at,
                self._first_sent_at,
                self._delivered <= self._app_limited_until,
            )
            self._flights.append(flight)
        self.bytes_in_flight += size

    def packet_acknowledged(self, size: int, sent_at: float) -> None:
        """Count a packet as delivered; `rtt_measured` follows."""
        self.bytes_in_flight -= size
        self._delivered += size
        self._newly_acknowledged += size
        self._first_sent_at = sent_at

    def packet_lost(self, size: int) -> None:
        """Count a packet as lost."""
        self.bytes_in_flight -= size
        self.packets_lost += 1
        self._round_lost_bytes += size
        self._round_lost_packets += 1

    def packet_expired(self, size: int) -> None:
        """Count a packet as no longer in flight, with an unknown fate."""
        self.bytes_in_flight -= size

    def persistent_congestion(self) -> None:
        """Start again with the minimum window (RFC 9002, 7.6)."""
        self._move(PhaseTrigger.PERSISTENT_CONGESTION)
        self._reset_model()
        self.congestion_window = self._minimum_window

    def application_limited(self) -> None:
        """Exclude the packets in flight from the measurement of the bandwidth."""
        self._app_limited_until = self._delivered + self.bytes_in_flight

    def rtt_measured(self, rtt: float, now: float) -> None:
        """Update the model after an acknowledgement."""
        is_expired = now > self._min_rtt_at + MIN_RTT_SECONDS
        if rtt <= self._min_rtt or (self.phase is Phase.PROBE_RTT and is_expired):
            self._min_rtt, self._min_rtt_at, is_expired = rtt, now, False
        flight = self._sample_rate(now)
        self._delivered_at = now
        if (
            flight is not None
            and flight.delivered >= self._next_round_delivered
            and now >= self._round_began_at + SCHEDULING_DELAY
        ):
            self._end_round(now, flight.is_app_limited)
        self._change_phase(now, is_expired)
        self._set_window(rtt)

    # ------------------------------------------------------------------------ model

    def _sample_rate(self, now: float) -> _Flight | None:
        """Measure the rate of delivery; return the flight of the newest packet.

        draft-cheng-iccrg-delivery-rate-estimation-00: the data that was delivered
        since that flight began, over the longer of the times in which it was sent and
        acknowledged.
        """
        sent_at, flights = self._first_sent_at, self._flights
        while flights and flights[0].sent_at < sent_at:
            flights.popleft()
        if not flights or flights[0].sent_at > sent_at:
            return None
        flight = flights[0]
        interval = max(flight.sent_at - flight.first_sent_at, now - flight.delivered_at)
        # A shorter interval only means that several acknowledgements came together.
        if interval >= max(self._min_rtt, 1e-3):
            rate = (self._delivered - flight.delivered) / interval
            if not flight.is_app_limited or rate > self.bandwidth:
                self._rates[-1] = max(self._rates[-1], rate)
        return flight

    def _end_round(self, now: float, is_app_limited: bool) -> None:
        """Adapt the model to the round that has ended, and begin the next."""
        delivered = self._delivered - self._round_delivered
        is_congested = (
            self._round_lost_packets >= MIN_LOST_PACKETS
            and self._round_lost_bytes
            > LOSS_THRESHOLD * (delivered + self._round_lost_bytes)
        )
        # The losses at the end of startup come from its own queue. A flow that
        # backed off here would get almost no share of a path that another flow fills.
        if is_congested and self.phase is not Phase.STARTUP:
            in_flight = min(self.congestion_window, self._in_flight_limit)
            self._in_flight_limit = max(LOSS_BACKOFF * in_flight, self._minimum_window)
        elif self._in_flight_limit < 2 * self._bdp(WINDOW_GAIN):
            self._in_flight_limit *= LOSS_RECOVERY
        else:
            self._in_flight_limit = math.inf
        self._check_full_pipe(is_congested, is_app_limited)
        self._cycle_index = (self._cycle_index + 1) % len(GAIN_CYCLE)
        self._next_round_delivered = self._round_delivered = self._delivered
        self._round_began_at = now
        self._round_lost_bytes = self._round_lost_packets = 0
        if not is_app_limited:
            self._rates.append(0.0)

    def _check_full_pipe(self, is_congested: bool, is_app_limited: bool) -> None:
        """Check whether startup has reached the bandwidth of the path."""
        if self.bandwidth >= FULL_PIPE_GROWTH * self._full_bandwidth:
            self._full_bandwidth, self._full_rounds = self.bandwidth, 0
        elif not is_app_limited:
            self._full_rounds += 1
        if is_congested or self._full_rounds >= FULL_PIPE_ROUNDS:
            self._is_pipe_full = True

    def _change_phase(self, now: float, is_min_rtt_expired: bool) -> None:
        match self.phase:
            case Phase.STARTUP:
                if self._is_pipe_full:
                    self._move(PhaseTrigger.PIPE_FULL)
            case Phase.DRAIN:
                if self.bytes_in_flight <= self._bdp(1.0):
                    self._move(PhaseTrigger.QUEUE_DRAINED)
                    self._cycle_index = 1
            case Phase.PROBE_BW:
                if is_min_rtt_expired:
                    self._move(PhaseTrigger.MIN_RTT_EXPIRED)
                    self._probe_rtt_until = now + PROBE_RTT_SECONDS
            case Phase.PROBE_RTT:
                if now >= self._probe_rtt_until:
                    self._move(PhaseTrigger.MIN_RTT_PROBED)
                    self._cycle_index = 1
            case _:
                assert_never(self.phase)

    def _move(self, trigger: PhaseTrigger) -> None:
        self.phase = move(TRANSITIONS, self.phase, trigger)

    def _set_window(self, rtt: float) -> None:
        """Set the window and the pacing rate from the model."""
        newly, self._newly_acknowledged = self._newly_acknowledged, 0
        if not self.bandwidth:
            self.congestion_window += newly  # slow start, until there is a rate
            by_window = WINDOW_PACING_GAIN * self.congestion_window
            self.pacing_rate = by_window / max(rtt, 1e-3)
            return
        window = self._bdp(WINDOW_GAIN)
        match self.phase:
            case Phase.STARTUP:
                gain = STARTUP_GAIN
                window = max(window, self.congestion_window)
                window = min(window, self.congestion_window + newly)
            case Phase.DRAIN:
                gain = 1 / STARTUP_GAIN
            case Phase.PROBE_BW:
                gain = GAIN_CYCLE[self._cycle_index]
            case Phase.PROBE_RTT:
                gain, window = 1.0, self._bdp(PROBE_RTT_WINDOW_GAIN)
            case _:
                assert_never(self.phase)
        window = max(min(window, self._in_flight_limit), self._minimum_window)
        self.congestion_window = int(window)
        self.pacing_rate = gain * self.bandwidth

    def _bdp(self, gain: float) -> float:
        """Return a multiple of the bandwidth-delay product, in bytes."""
        if math.isinf(self._min_rtt):
            return self.congestion_window
        return gain * self.bandwidth * (self._min_rtt + SCHEDULING_DELAY)

    @property
    def _minimum_window(self) -> int:
        return MINIMUM_WINDOW * self.max_datagram_size


class Pacer:
    """A token bucket that fills at the pacing rate (RFC 9002, 7.7).

    Args:
        congestion: The control that sets the rate.
    """

    def __init__(self, congestion: CongestionControl) -> None:
        self._congestion = congestion
        self._level = 0.0
        self._filled_at = 0.0

    def budget(self, now: float) -> float:
        """Return the bytes that may be sent now; infinite without a rate."""
        rate = self._congestion.pacing_rate
        if not rate:
            return math.inf
        filled = self._level + (now - self._filled_at) * rate
        burst = BURST_PACKETS * self._congestion.max_datagram_size
        self._level = min(filled, max(burst, BURST_SECONDS * rate))
        self._filled_at = now
        return self._level

    def packet_sent(self, size: int, now: float) -> None:
        """Charge a packet."""
        if self._congestion.pacing_rate:
            self._level = self.budget(now) - size

    def next_send_time(self, now: float, pending: int = 0) -> float | None:
        """Return when a packet may be sent; None means now.

        Args:
            now: The time.
            pending: Bytes of packets that were made and are not charged yet.
        """
        budget = self.budget(now) - pending
        if budget > 0:
            return None
        rate = self._congestion.pacing_rate
        refill = REFILL_PACKETS * self._congestion.max_datagram_size
        return now + (min(refill, REFILL_SECONDS * rate) - budget) / rate
