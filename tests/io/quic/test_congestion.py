"""The congestion control and the pacer of QUIC, alone; test_quic_session has links."""

import math

import pytest
from aioquic.quic.packet import QuicPacketType
from aioquic.quic.packet_builder import QuicSentPacket
from aioquic.tls import Epoch

from sleap_rtc.io.quic.congestion import (
    BURST_PACKETS,
    BURST_SECONDS,
    SMALLEST_WINDOW,
    Congestion,
    Pacer,
    Phase,
)

SIZE = 1350
RTT = 0.05


def make_packet(sent_at: float) -> QuicSentPacket:
    return QuicSentPacket(
        epoch=Epoch.ONE_RTT,
        in_flight=True,
        is_ack_eliciting=True,
        is_crypto_packet=False,
        packet_number=0,
        packet_type=QuicPacketType.ONE_RTT,
        sent_time=sent_at,
        sent_bytes=SIZE,
    )


def run_rounds(
    congestion: Congestion, now: float, rounds: int, rate: float, lost: float = 0.0
) -> float:
    """Send a window each round trip over a path of a rate; returns the time."""
    for _ in range(rounds):
        window = int(congestion.congestion_window // SIZE)
        packets = [make_packet(now) for _ in range(window)]
        for packet in packets:
            congestion.on_packet_sent(packet=packet)
        now += max(RTT, window * SIZE / rate)
        gone = int(window * lost)
        if gone:
            congestion.on_packets_lost(now=now, packets=packets[:gone])
        for packet in packets[gone:]:
            congestion.on_packet_acked(now=now, packet=packet)
        congestion.on_rtt_measurement(now=now, rtt=RTT)
    return now


def phase_of(congestion: Congestion) -> Phase:
    return congestion.phase


def test_the_bandwidth_of_the_path_is_found() -> None:
    congestion = Congestion(max_datagram_size=SIZE)
    run_rounds(congestion, 1.0, 30, rate=2e6)
    assert congestion.bandwidth == pytest.approx(2e6, rel=0.1)
    assert congestion.phase is not Phase.STARTUP
    assert congestion.bytes_in_flight == 0


def test_a_path_that_gets_slower_is_followed() -> None:
    congestion = Congestion(max_datagram_size=SIZE)
    now = run_rounds(congestion, 1.0, 30, rate=2e6)
    run_rounds(congestion, now, 30, rate=5e5)
    assert congestion.bandwidth == pytest.approx(5e5, rel=0.1)


def test_few_losses_leave_the_window_alone_and_many_do_not() -> None:
    congestion = Congestion(max_datagram_size=SIZE)
    now = run_rounds(congestion, 1.0, 30, rate=2e6)
    before = congestion.congestion_window
    now = run_rounds(congestion, now, 5, rate=2e6, lost=0.015)
    assert congestion.congestion_window > before * 0.9
    run_rounds(congestion, now, 5, rate=2e6, lost=0.1)
    assert congestion.congestion_window < before / 2
    assert congestion.packets_lost > 0


def test_the_window_recovers_after_congestion() -> None:
    congestion = Congestion(max_datagram_size=SIZE)
    now = run_rounds(congestion, 1.0, 30, rate=2e6)
    before = congestion.congestion_window
    now = run_rounds(congestion, now, 8, rate=2e6, lost=0.2)
    run_rounds(congestion, now, 80, rate=2e6)
    assert congestion.congestion_window > before / 2


def test_persistent_congestion_begins_again_with_little() -> None:
    congestion = Congestion(max_datagram_size=SIZE)
    now = run_rounds(congestion, 1.0, 30, rate=2e6)
    congestion.on_persistent_congestion()
    assert congestion.congestion_window == SMALLEST_WINDOW * SIZE
    assert congestion.phase is Phase.STARTUP
    run_rounds(congestion, now, 40, rate=2e6)
    assert congestion.bandwidth == pytest.approx(2e6, rel=0.1)


def test_the_shortest_round_trip_is_looked_for_again() -> None:
    congestion = Congestion(max_datagram_size=SIZE)
    run_rounds(congestion, 1.0, 30, rate=2e6)
    before = congestion.congestion_window
    congestion.on_rtt_measurement(now=100.0, rtt=2 * RTT)
    assert phase_of(congestion) is Phase.PROBE_RTT
    assert congestion.congestion_window < before / 2
    congestion.on_rtt_measurement(now=101.0, rtt=2 * RTT)
    assert phase_of(congestion) is Phase.CRUISE


def test_packets_that_expire_are_neither_lost_nor_in_flight() -> None:
    congestion = Congestion(max_datagram_size=SIZE)
    packet = make_packet(1.0)
    congestion.on_packet_sent(packet=packet)
    congestion.on_packets_expired(packets=[packet])
    assert (congestion.bytes_in_flight, congestion.packets_lost) == (0, 0)


# ------------------------------------------------------------------------------ pacer


def make_pacer(rate: float) -> Pacer:
    congestion = Congestion(max_datagram_size=SIZE)
    congestion.pacing_rate = rate
    pacer = Pacer(congestion)
    pacer.update_rate(10 * SIZE, RTT)
    return pacer


def test_nothing_is_held_back_before_there_is_a_rate() -> None:
    pacer = Pacer(Congestion(max_datagram_size=SIZE))
    assert pacer.budget(1.0) == math.inf
    assert pacer.next_send_time(1.0) is None


@pytest.mark.parametrize("rate", [1e4, 1e6, 1e8])
def test_what_is_sent_keeps_the_rate(rate: float) -> None:
    pacer = make_pacer(rate)
    now, sent = 1.0, 0
    while sent < 4000 * SIZE:
        due = pacer.next_send_time(now)
        if due is None:
            pacer.spend(SIZE, now)
            sent += SIZE
        else:
            assert due > now
            now = due
    # A burst may come on top.
    burst = max(BURST_PACKETS * SIZE, BURST_SECONDS * rate)
    assert (now - 1.0) * rate == pytest.approx(sent, abs=burst + 33 * SIZE)


def test_an_idle_time_saves_up_no_more_than_a_burst() -> None:
    pacer = make_pacer(1e6)
    assert pacer.budget(1000.0) <= BURST_PACKETS * SIZE


def test_an_acknowledgement_does_not_count() -> None:
    pacer = make_pacer(1e6)
    before = pacer.budget(1000.0)
    pacer.update_after_send(1000.0)
    pacer.correct(0)
    assert pacer.budget(1000.0) == before
