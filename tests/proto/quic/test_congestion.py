"""The congestion control and the pacer, without a transport."""

import math

import pytest

from sleap_rtc.proto.quic.congestion import (
    BURST_PACKETS,
    BURST_SECONDS,
    GAIN_CYCLE,
    INITIAL_WINDOW,
    LOSS_RECOVERY,
    MIN_RTT_SECONDS,
    MINIMUM_WINDOW,
    PROBE_RTT_SECONDS,
    REFILL_PACKETS,
    SCHEDULING_DELAY,
    WINDOW_PACING_GAIN,
    CongestionControl,
    Pacer,
    Phase,
)

SIZE = 1350
RTT = 0.05
RATE = 2e6


def run_round(
    control: CongestionControl, now: float, rate: float, lost: float = 0.0
) -> float:
    """Send a window over a path of a rate, and acknowledge it; return the time."""
    count = control.congestion_window // SIZE
    for _ in range(count):
        control.packet_sent(SIZE, now)
    sent_at, now = now, now + max(RTT, count * SIZE / rate)
    lost_count = int(count * lost)
    for _ in range(lost_count):
        control.packet_lost(SIZE)
    for _ in range(count - lost_count):
        control.packet_acknowledged(SIZE, sent_at)
    control.rtt_measured(RTT, now)
    return now


def run_rounds(
    control: CongestionControl, now: float, rounds: int, rate: float, lost: float = 0.0
) -> float:
    for _ in range(rounds):
        now = run_round(control, now, rate, lost)
    return now


def run_steadily(
    control: CongestionControl, now: float, seconds: float, rate: float, clump: float
) -> float:
    """Send at a steady rate, and acknowledge in clumps; return the time."""
    interval, end, sent_at = SIZE / rate, now + seconds, now
    unacknowledged: list[float] = []
    while now < end:
        now += clump
        while sent_at < now:
            control.packet_sent(SIZE, sent_at)
            unacknowledged.append(sent_at)
            sent_at += interval
        arrived = [at for at in unacknowledged if at <= now - RTT]
        unacknowledged = unacknowledged[len(arrived) :]
        for at in arrived:
            control.packet_acknowledged(SIZE, at)
        if arrived:
            control.rtt_measured(now - arrived[-1], now)
    return now


def phase_of(control: CongestionControl) -> Phase:
    return control.phase


@pytest.fixture
def control() -> CongestionControl:
    return CongestionControl(SIZE)


def test_the_bandwidth_of_the_path_is_found(control: CongestionControl) -> None:
    run_rounds(control, 1.0, 30, RATE)
    assert control.bandwidth == pytest.approx(RATE, rel=0.1)
    assert control.phase is Phase.PROBE_BW
    assert control.bytes_in_flight == 0


def test_a_path_that_becomes_slower_is_followed(control: CongestionControl) -> None:
    now = run_rounds(control, 1.0, 30, RATE)
    run_rounds(control, now, 30, RATE / 4)
    assert control.bandwidth == pytest.approx(RATE / 4, rel=0.1)


@pytest.mark.parametrize("clump", [0.001, 0.01, 0.04])
def test_acknowledgements_that_come_together_do_not_raise_the_bandwidth(
    control: CongestionControl, clump: float
) -> None:
    run_steadily(control, 1.0, 3.0, RATE, clump)
    assert control.bandwidth == pytest.approx(RATE, rel=0.15)


def test_startup_is_followed_by_drain_and_then_by_the_gain_cycle(
    control: CongestionControl,
) -> None:
    now, phases = 1.0, [control.phase]
    for _ in range(30):
        now = run_round(control, now, RATE)
        if control.phase is not phases[-1]:
            phases.append(control.phase)
        if phases[-1] is Phase.PROBE_BW:
            break
    assert phases == [Phase.STARTUP, Phase.DRAIN, Phase.PROBE_BW]
    # The cycle begins with the gain that drains the rest of the queue.
    assert control.pacing_rate == pytest.approx(GAIN_CYCLE[1] * control.bandwidth)


def test_each_round_has_the_next_gain_of_the_cycle(control: CongestionControl) -> None:
    now = run_rounds(control, 1.0, 30, RATE)
    gains = []
    for _ in range(2 * len(GAIN_CYCLE)):
        now = run_round(control, now, RATE)
        gains.append(round(control.pacing_rate / control.bandwidth, 3))
    probe = gains.index(max(GAIN_CYCLE))
    assert tuple(gains[probe : probe + len(GAIN_CYCLE)]) == GAIN_CYCLE
    assert gains[: len(GAIN_CYCLE)] == gains[len(GAIN_CYCLE) :]


def test_a_round_is_not_shorter_than_the_accuracy_of_timers(
    control: CongestionControl,
) -> None:
    now, step, changes = run_rounds(control, 1.0, 30, RATE), 0.001, 0
    for _ in range(100):
        before = control.pacing_rate / control.bandwidth
        control.packet_sent(SIZE, now)
        now += step
        control.packet_acknowledged(SIZE, now - step)
        control.rtt_measured(step, now)
        changes += round(control.pacing_rate / control.bandwidth - before, 3) != 0
    assert 0 < changes <= 100 * step / SCHEDULING_DELAY


def test_few_losses_leave_the_window_alone_and_many_do_not(
    control: CongestionControl,
) -> None:
    now = run_rounds(control, 1.0, 30, RATE)
    before = control.congestion_window
    for _ in range(5):
        now = run_round(control, now, RATE, lost=0.019)
        assert control.congestion_window > before * 0.9
    run_rounds(control, now, 5, RATE, lost=0.1)
    assert control.congestion_window < before / 2
    assert control.packets_lost > 0
    assert control.bytes_in_flight == 0


def test_the_window_recovers_after_congestion(control: CongestionControl) -> None:
    now = run_rounds(control, 1.0, 30, RATE)
    before = control.congestion_window
    now = run_rounds(control, now, 8, RATE, lost=0.2)
    low = control.congestion_window
    now = run_rounds(control, now, 1, RATE)
    assert control.congestion_window == pytest.approx(LOSS_RECOVERY * low, rel=0.01)
    run_rounds(control, now, 80, RATE)
    assert control.congestion_window > before / 2


def test_persistent_congestion_starts_again_with_the_minimum_window(
    control: CongestionControl,
) -> None:
    now = run_rounds(control, 1.0, 30, RATE)
    control.persistent_congestion()
    assert control.congestion_window == MINIMUM_WINDOW * SIZE
    assert control.phase is Phase.STARTUP
    assert control.bandwidth == 0
    run_rounds(control, now, 40, RATE)
    assert control.bandwidth == pytest.approx(RATE, rel=0.1)


def test_the_minimum_round_trip_time_is_measured_again(
    control: CongestionControl,
) -> None:
    now = run_rounds(control, 1.0, 30, RATE)
    before = control.congestion_window
    now += MIN_RTT_SECONDS + 1
    control.rtt_measured(2 * RTT, now)
    assert phase_of(control) is Phase.PROBE_RTT
    assert control.congestion_window < before / 2
    control.rtt_measured(2 * RTT, now + PROBE_RTT_SECONDS / 2)
    assert phase_of(control) is Phase.PROBE_RTT
    control.rtt_measured(2 * RTT, now + PROBE_RTT_SECONDS)
    assert phase_of(control) is Phase.PROBE_BW


def test_packets_that_expire_are_neither_lost_nor_in_flight(
    control: CongestionControl,
) -> None:
    control.packet_sent(SIZE, 1.0)
    control.packet_expired(SIZE)
    assert (control.bytes_in_flight, control.packets_lost) == (0, 0)


def test_an_idle_time_with_pings_does_not_lower_the_bandwidth(
    control: CongestionControl,
) -> None:
    now = run_rounds(control, 1.0, 30, RATE)
    before = control.bandwidth
    for _ in range(30):
        control.application_limited()
        control.packet_sent(40, now)
        control.packet_acknowledged(40, now)
        control.rtt_measured(RTT, now + RTT)
        now += 2
    assert control.bandwidth == before


def test_the_window_sets_the_pace_before_the_bandwidth_is_known(
    control: CongestionControl,
) -> None:
    control.rtt_measured(RTT, 1.0)
    window = INITIAL_WINDOW * SIZE
    assert control.pacing_rate == pytest.approx(WINDOW_PACING_GAIN * window / RTT)


# ------------------------------------------------------------------------------ pacer


def make_pacer(rate: float) -> Pacer:
    control = CongestionControl(SIZE)
    control.pacing_rate = rate
    return Pacer(control)


def test_nothing_is_held_back_without_a_rate(control: CongestionControl) -> None:
    pacer = Pacer(control)
    pacer.packet_sent(SIZE, 1.0)
    assert pacer.budget(1.0) == math.inf
    assert pacer.next_send_time(1.0, pending=SIZE) is None


@pytest.mark.parametrize("rate", [1e4, 1e6, 1e8])
def test_packets_keep_the_rate(rate: float) -> None:
    pacer = make_pacer(rate)
    now, sent = 1.0, 0
    while sent < 4000 * SIZE:
        due = pacer.next_send_time(now)
        if due is None:
            pacer.packet_sent(SIZE, now)
            sent += SIZE
        else:
            assert due > now
            now = due
    # A burst may come on top.
    burst = max(BURST_PACKETS * SIZE, BURST_SECONDS * rate)
    limit = burst + (REFILL_PACKETS + 1) * SIZE
    assert (now - 1.0) * rate == pytest.approx(sent, abs=limit)


def test_an_idle_time_saves_up_no_more_than_a_burst() -> None:
    assert make_pacer(1e6).budget(1000.0) == BURST_PACKETS * SIZE
    assert make_pacer(1e8).budget(1000.0) == pytest.approx(BURST_SECONDS * 1e8)


def test_packets_that_are_not_charged_yet_use_up_the_budget() -> None:
    pacer = make_pacer(1e6)
    budget = pacer.budget(1000.0)
    assert pacer.next_send_time(1000.0, pending=int(budget) - 1) is None
    due = pacer.next_send_time(1000.0, pending=int(budget) + SIZE)
    assert due is not None
    assert due > 1000.0
    assert pacer.budget(1000.0) == budget
