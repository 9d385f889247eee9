"""QUIC engines over a network in memory, with each combination of fast paths."""

import heapq
import random
from collections.abc import Callable
from typing import NamedTuple

import pytest
from aioquic.quic.events import (
    ConnectionTerminated,
    PingAcknowledged,
    StreamDataReceived,
)
from aioquic.tls import Epoch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from typing_extensions import override

from sleap_rtc.io.link.certificates import make_certificate
from sleap_rtc.io.link.limits import LIMITS
from sleap_rtc.io.quic import engine as engine_module
from sleap_rtc.io.quic.connection import Address, AioquicConnection
from sleap_rtc.io.quic.engine import (
    Datagram,
    FastPath,
    QuicEngine,
    client_engine_untrusted,
    server_engine,
)
from sleap_rtc.io.quic.fast_send import MAX_BYTES_PER_TURN, MAX_PACKETS_PER_TURN
from sleap_rtc.proto.errors import RemoteProtocolError
from sleap_rtc.proto.quic.congestion import BURST_PACKETS, LOSS_BACKOFF
from sleap_rtc.proto.quic.mtu import PROBED_SIZES, SMALLEST_DATAGRAM

CLIENT, SERVER = ("client", 1), ("server", 2)
MEGABYTE = 1024 * 1024
CONTROL, BULK, ANSWERS = 0, 2, 3
QUEUED, IN_FLIGHT, UNREAD = 4 * MEGABYTE, 32 * MEGABYTE, 32 * MEGABYTE

CERTIFICATE = make_certificate()
BOTH = FastPath.SEND | FastPath.RECEIVE
PATHS = [FastPath.NONE, FastPath.SEND, FastPath.RECEIVE, BOTH]


class Pair:
    """Two engines, and the datagrams between them.

    Args:
        fast_path: The fast paths of both engines.
        seed: Makes a run repeatable.
        loss: Share of the datagrams that are lost.
        delay: Seconds that a datagram takes.
        jitter: Largest further delay in seconds; datagrams overtake each other.
        mtu: The largest datagram that arrives, in bytes.
        largest_datagram: UDP payload in bytes that datagrams may grow to.
    """

    def __init__(
        self,
        fast_path: FastPath = BOTH,
        *,
        seed: int = 0,
        loss: float = 0.0,
        delay: float = 0.02,
        jitter: float = 0.0,
        mtu: int = 65_535,
        largest_datagram: int = SMALLEST_DATAGRAM,
    ) -> None:
        self.now = 1000.0
        self.loss, self.mtu = loss, mtu
        self._random = random.Random(seed)
        self._delay, self._jitter = delay, jitter
        self._wire: list[tuple[float, int, QuicEngine, Datagram]] = []
        self.datagrams_sent = 0
        limits = replace(LIMITS, largest_datagram=largest_datagram)
        self.client = client_engine_untrusted(
            CERTIFICATE.certificate_der,
            limits,
            fast_path=fast_path,
        )
        self.server = server_engine(
            CERTIFICATE,
            self.client.connection.original_destination_connection_id,
            limits,
            fast_path=fast_path,
        )
        self.received: dict[QuicEngine, dict[int, bytearray]] = {
            self.client: {CONTROL: bytearray(), ANSWERS: bytearray()},
            self.server: {CONTROL: bytearray(), BULK: bytearray()},
        }
        self.pings: list[int] = []
        self.ends: list[ConnectionTerminated] = []
        self.client.connect(SERVER, self.now)
        self.flush(self.client)
        self.run_until(lambda: self.is_established)

    @property
    def is_established(self) -> bool:
        engines = (self.client, self.server)
        return all(engine.connection.is_established for engine in engines)

    def flush(self, engine: QuicEngine) -> list[Datagram]:
        """Send the datagrams of an engine, and read its received data."""
        is_client = engine is self.client
        target = self.server if is_client else self.client
        source = CLIENT if is_client else SERVER
        datagrams = engine.datagrams_to_send(self.now)
        for data, _ in datagrams:
            self.datagrams_sent += 1
            if self._random.random() >= self.loss and len(data) <= self.mtu:
                arrival = self.now + self._delay + self._random.random() * self._jitter
                entry = (arrival, self.datagrams_sent, target, (data, source))
                heapq.heappush(self._wire, entry)
        while (event := engine.next_event()) is not None:
            match event:
                case StreamDataReceived():
                    self.received[engine][event.stream_id] += event.data
                case PingAcknowledged():
                    self.pings.append(event.uid)
                case ConnectionTerminated():
                    self.ends.append(event)
        return datagrams

    def step(self) -> bool:
        """Advance to the next event; return False if there will be none."""
        times = [self._wire[0][0]] if self._wire else []
        engines = (self.client, self.server)
        times += [due for engine in engines if (due := engine.deadline()) is not None]
        if not times:
            return False
        self.now = max(self.now, min(times))
        batches: dict[QuicEngine, list[Datagram]] = {}
        while self._wire and self._wire[0][0] <= self.now:
            _, _, target, datagram = heapq.heappop(self._wire)
            batches.setdefault(target, []).append(datagram)
        for engine, batch in batches.items():
            engine.receive_datagrams(batch, self.now)
        for engine in engines:
            due = engine.deadline()
            is_due = due is not None and due <= self.now
            engine.handle_timeout(self.now)
            if is_due or engine in batches:
                self.flush(engine)
        return True

    def run_until(self, done: Callable[[], bool], steps: int = 100_000) -> None:
        for _ in range(steps):
            if done():
                return
            if not self.step():
                break
        assert done(), f"still not so at {self.now}"

    def transfer(self, size: int) -> float:
        """Send bulk to the server; return the bytes per second of the second half."""
        arrived = self.received[self.server][BULK]
        before, queued, half_at = len(arrived), 0, self.now
        piece = random.Random(size).randbytes(MEGABYTE // 4)

        def done() -> bool:
            nonlocal queued, half_at
            while (
                queued < size
                and self.client.unsent(BULK) < QUEUED
                and self.client.unacknowledged(BULK) < IN_FLIGHT
            ):
                self.client.send_bulk(BULK, piece)
                queued += len(piece)
                self.flush(self.client)
            if len(arrived) - before < size // 2:
                half_at = self.now
            self.server.grant(len(arrived) + UNREAD)
            return len(arrived) - before >= size

        self.run_until(done)
        return size / 2 / max(self.now - half_at, 1e-3)


@pytest.fixture(params=PATHS, ids=str)
def fast_path(request: pytest.FixtureRequest) -> FastPath:
    path: FastPath = request.param
    return path


# ------------------------------------------------------------------ whatever the paths


@pytest.mark.parametrize(
    ("loss", "jitter"), [(0.0, 0.0), (0.05, 0.0), (0.0, 0.05), (0.05, 0.05)]
)
def test_both_kinds_of_streams_arrive_whole(
    fast_path: FastPath, loss: float, jitter: float
) -> None:
    pair = Pair(fast_path, seed=5, loss=loss, jitter=jitter)
    pair.client.grant(UNREAD)
    pair.server.grant(UNREAD)
    pair.client.send(CONTROL, b"opened")
    pair.flush(pair.client)
    pair.run_until(lambda: bool(pair.received[pair.server][CONTROL]))
    sent = {stream: random.Random(stream).randbytes(400_000) for stream in (0, 2, 3)}
    for at in range(0, 400_000, 10_000):
        for engine, bulk in ((pair.client, BULK), (pair.server, ANSWERS)):
            engine.send_bulk(bulk, sent[bulk][at : at + 10_000])
            engine.send(CONTROL, sent[CONTROL][at : at + 10_000])
            pair.flush(engine)
    at_client, at_server = pair.received[pair.client], pair.received[pair.server]

    def done() -> bool:
        engines = ((pair.client, BULK), (pair.server, ANSWERS))
        return not any(
            engine.unacknowledged(stream)
            for engine, bulk in engines
            for stream in (CONTROL, bulk)
        )

    pair.run_until(done)
    assert at_client == {CONTROL: sent[CONTROL], ANSWERS: sent[ANSWERS]}
    assert at_server == {CONTROL: b"opened" + sent[CONTROL], BULK: sent[BULK]}
    assert pair.client.unsent(BULK) == 0


def test_a_peer_sends_no_more_than_was_granted(fast_path: FastPath) -> None:
    pair = Pair(fast_path)
    pair.server.grant(2 * MEGABYTE)
    for _ in range(4):
        pair.client.send_bulk(BULK, bytes(MEGABYTE))
    pair.flush(pair.client)
    pair.flush(pair.server)
    arrived = pair.received[pair.server][BULK]
    pair.run_until(lambda: len(arrived) == 2 * MEGABYTE)
    for uid in range(10):
        pair.client.send_ping(uid)
        pair.flush(pair.client)
        pair.run_until(lambda: uid in pair.pings)  # noqa: B023
    assert len(arrived) == 2 * MEGABYTE
    pair.server.grant(4 * MEGABYTE)
    pair.flush(pair.server)
    pair.run_until(lambda: len(arrived) == 4 * MEGABYTE)


def test_random_losses_do_not_slow_a_transfer_down(fast_path: FastPath) -> None:
    # Cubic gets less than 1 MB/s over this path, which is limited by the loss only.
    pair = Pair(fast_path, seed=3, loss=0.001, delay=0.025)
    assert pair.transfer(15 * MEGABYTE) > 4e6
    assert pair.client.packets_lost > 0


def test_a_transfer_after_an_idle_time_is_as_fast_as_before(
    fast_path: FastPath,
) -> None:
    pair = Pair(fast_path, delay=0.025)
    before = pair.transfer(15 * MEGABYTE)
    for uid in range(30):
        pair.now += 2
        pair.client.send_ping(uid)
        pair.flush(pair.client)
        pair.run_until(lambda: uid in pair.pings)  # noqa: B023
    assert pair.transfer(15 * MEGABYTE) > before / 2


def test_a_path_that_loses_much_counts_as_congested(fast_path: FastPath) -> None:
    pair = Pair(fast_path, seed=3, delay=0.025)
    pair.transfer(3 * MEGABYTE)
    before = pair.client.congestion.congestion_window
    pair.loss = 0.2
    pair.transfer(9 * MEGABYTE)
    assert pair.client.congestion.congestion_window < LOSS_BACKOFF * before


def test_datagrams_grow_as_far_as_the_path_allows(fast_path: FastPath) -> None:
    pair = Pair(fast_path, largest_datagram=16_383, mtu=9000)
    pair.transfer(2 * MEGABYTE)
    assert pair.client.connection.datagram_size == 8952
    assert pair.client.packets_lost == 0


@pytest.mark.parametrize("fast_path", [FastPath.SEND, BOTH], ids=str)
def test_a_path_that_begins_to_drop_large_datagrams_does_not_end_a_link(
    fast_path: FastPath,
) -> None:
    # aioquic fills its probes with lost data of its own streams: none of them would
    # be small enough to arrive, and to show that larger packets are lost.
    pair = Pair(fast_path, largest_datagram=16_383, mtu=9000)
    pair.transfer(MEGABYTE)
    pair.mtu = 1400
    pair.transfer(MEGABYTE)
    assert pair.client.connection.datagram_size <= 1400
    assert not pair.ends


def test_a_window_that_holds_no_datagram_does_not_halt_a_transfer(
    fast_path: FastPath,
) -> None:
    pair = Pair(fast_path, largest_datagram=16_383)
    pair.transfer(MEGABYTE)
    pair.run_until(lambda: pair.client.unacknowledged(BULK) == 0)
    pair.client.congestion.congestion_window = 10_000
    began = pair.now
    pair.transfer(MEGABYTE)
    # Otherwise only the acknowledgement of a ping would widen the window.
    assert pair.now - began < 1
    assert pair.client.connection.datagram_size == 16_383


def test_keys_are_renewed_before_they_wear_out(
    fast_path: FastPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "PACKETS_PER_KEY", 500)
    pair = Pair(fast_path, loss=0.001)
    keys = set()
    for _ in range(4):
        pair.transfer(MEGABYTE)
        keys.add(pair.client.connection._cryptos[Epoch.ONE_RTT].send.secret)
    assert len(keys) > 1
    assert not pair.ends


def test_bulk_is_sent_at_the_pacing_rate(fast_path: FastPath) -> None:
    pair = Pair(fast_path)
    pair.transfer(2 * MEGABYTE)
    pair.run_until(lambda: pair.client.unacknowledged(BULK) == 0)
    # Nothing is acknowledged from here on, so the rate stays.
    pair.loss, rate = 1.0, 1e6
    pair.client.congestion.pacing_rate = rate
    pair.client.congestion.congestion_window = 10 * MEGABYTE
    pair.client.send_bulk(BULK, bytes(MEGABYTE))
    began, sent = pair.now, 0
    pair.now += 1
    while pair.now < began + 1.05:
        sent += sum(len(data) for data, _ in pair.flush(pair.client))
        pair.now += 0.001
    burst = BURST_PACKETS * SMALLEST_DATAGRAM
    assert 0.05 * rate <= sent <= 0.05 * rate + burst + SMALLEST_DATAGRAM


def test_packets_of_acknowledgements_do_not_count_against_the_pace(
    fast_path: FastPath,
) -> None:
    pair = Pair(fast_path)
    pair.transfer(4 * MEGABYTE)
    # The server has sent hundreds of packets, most of them acknowledgements.
    pair.server.send_ping(7)
    assert pair.flush(pair.server)


def test_datagrams_may_grow_to_the_largest_size_that_is_probed() -> None:
    assert LIMITS.largest_datagram == PROBED_SIZES[-1]


# ----------------------------------------------------------------------- the fast paths


@pytest.mark.parametrize("largest", [SMALLEST_DATAGRAM, 16_383])
def test_a_turn_makes_a_bounded_number_of_packets(largest: int) -> None:
    pair = Pair(largest_datagram=largest)
    pair.transfer(MEGABYTE)
    for _ in range(4):
        pair.client.send_bulk(BULK, bytes(MEGABYTE))
    pair.client.congestion.congestion_window = 100 * MEGABYTE
    datagrams = pair.client.datagrams_to_send(pair.now)
    assert 1 < len(datagrams) <= MAX_PACKETS_PER_TURN + 2
    assert sum(len(data) for data, _ in datagrams) < MAX_BYTES_PER_TURN * 1.1
    deadline = pair.client.deadline()
    assert deadline is not None
    assert deadline - pair.now < 0.1


@pytest.mark.parametrize("payload", [b"", b"\x01", b"\x08\x02", b"\x0c\x02" + bytes(9)])
def test_a_sealed_packet_of_any_length_ends_at_most_its_connection(
    payload: bytes,
) -> None:
    pair = Pair()
    client = pair.client.connection
    number = client.packet_number
    # Only with a number of four bytes a packet may hold less than two bytes.
    header = b"\x43" + client.peer_connection_id + number.to_bytes(4)
    data = client.sealing_context.encrypt_packet(header, payload, number)
    pair.server.receive_datagrams([(data, CLIENT)], pair.now)
    pair.flush(pair.server)


def test_bulk_takes_the_fast_path_after_each_renewal_of_keys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_module, "PACKETS_PER_KEY", 500)
    pair = Pair()
    slow = 0

    class Counting(AioquicConnection):
        @override
        def receive_datagram(self, data: bytes, addr: Address, now: float) -> None:
            nonlocal slow
            slow += 1
            super().receive_datagram(data, addr, now)

    pair.server.connection.__class__ = Counting
    sent = pair.client.connection.packet_number
    pair.transfer(4 * MEGABYTE)
    sent = pair.client.connection.packet_number - sent
    assert sent > 2500
    assert slow < sent / 50


def test_accepted_packets_are_recorded_as_aioquic_records_them(
    fast_path: FastPath,
) -> None:
    pair = Pair(fast_path)
    pair.transfer(MEGABYTE)
    space = pair.server.connection.packet_space
    largest = space.largest_received_packet
    assert largest > 700
    assert space.expected_packet_number in (largest, largest + 1)
    assert all(number in space.received_packets for number in range(largest + 1))
    assert space.largest_received_time == pair.now
    assert pair.server.connection.receive_window.used == MEGABYTE


class Sealed(NamedTuple):
    """A packet with the right keys and any content.

    Args:
        skipped: Packet numbers before it that are left out.
        payload: Its frames.
    """

    skipped: int
    payload: bytes


def write_integer(value: int, size: int) -> bytes:
    mark = {1: 0, 2: 1, 4: 2, 8: 3}[size]
    return (value % (1 << 8 * size - 2) | mark << 8 * size - 2).to_bytes(size)


@st.composite
def stream_frames(draw: st.DrawFn) -> bytes:
    """Write a frame with data of a stream, which may contradict itself."""
    data = draw(st.binary(max_size=40))
    kind = draw(st.sampled_from([0x08, 0x0A, 0x0C, 0x0D, 0x0E, 0x0F]))
    frame = bytes((kind, draw(st.sampled_from([0, 2, 2, 2, 3, 6]))))
    if kind & 4:
        offset = draw(st.sampled_from([0, 0, 5, 20, 300_000, 1 << 40]))
        frame += write_integer(offset, draw(st.sampled_from([1, 4, 8])))
    if kind & 2:
        length = len(data) + draw(st.sampled_from([0, 0, 0, -1, 1]))
        frame += write_integer(max(0, length), draw(st.sampled_from([2, 4, 8])))
    return frame + data


@given(
    st.lists(
        st.builds(
            Sealed,
            st.sampled_from([0, 0, 0, 1]),
            stream_frames() | st.binary(max_size=40),
        ),
        min_size=1,
        max_size=6,
    )
)
@settings(max_examples=60, deadline=None)
def test_the_fast_path_accepts_the_same_packets_as_aioquic(
    packets: list[Sealed],
) -> None:
    results = []
    for fast_path in (FastPath.NONE, FastPath.RECEIVE):
        pair = Pair(fast_path)
        # Open both streams, so that the fast path can accept either.
        pair.client.send(CONTROL, b"hello")
        pair.client.send(BULK, b"hello")
        pair.flush(pair.client)
        pair.run_until(lambda: pair.client.unacknowledged(BULK) == 0)  # noqa: B023
        client, server = pair.client.connection, pair.server.connection
        number = server.packet_space.largest_received_packet
        numbers = []
        for packet in packets:
            number += 1 + packet.skipped
            numbers.append(number)
            context = client.sealing_context
            header = bytes((0x43 | context.key_phase << 2,)) + client.peer_connection_id
            header += number.to_bytes(4)
            data = context.encrypt_packet(header, packet.payload, number)
            pair.server.receive_datagrams([(data, CLIENT)], pair.now)
        close = server.close_event
        space = server.packet_space
        while (event := pair.server.next_event()) is not None:
            if isinstance(event, StreamDataReceived):
                pair.received[pair.server].setdefault(event.stream_id, bytearray())
                pair.received[pair.server][event.stream_id] += event.data
        results.append(
            (
                pair.received[pair.server],
                close and (close.error_code, close.frame_type, close.reason_phrase),
                server.receive_window.used,
                space.largest_received_packet - number,
                len(space.ack_queue),
                [number in space.received_packets for number in numbers],
            )
        )
    assert results[0] == results[1]


def test_a_client_trusts_nothing_that_is_not_a_certificate() -> None:
    with pytest.raises(RemoteProtocolError, match="certificate"):
        client_engine_untrusted(b"garbage", LIMITS)
