"""QUIC sessions over a network in memory: no sockets, no event loop, no clock."""

import heapq
import random
from collections.abc import Callable, Iterator

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from sleap_rtc.io.link.certificates import Certificate, make_certificate
from sleap_rtc.io.link.limits import LIMITS, LinkLimits
from sleap_rtc.io.link.session import (
    MAX_REASON_BYTES,
    Client,
    Phase,
    ProofShown,
    Server,
)
from sleap_rtc.io.quic.engine import (
    Datagram,
    QuicEngine,
    client_engine_untrusted,
    server_engine,
)
from sleap_rtc.io.quic.session import MessageDecoder, QuicSession
from sleap_rtc.proto.errors import LocalProtocolError, RemoteProtocolError
from sleap_rtc.proto.messages import (
    MAX_MESSAGE_BYTES,
    Auth,
    Error,
    FileError,
    FileVerified,
    Message,
    encode_message,
)
from sleap_rtc.proto.quic.mtu import SMALLEST_DATAGRAM
from sleap_rtc.proto.transfer.frames import ChunkHeader, Frame

AUTH = Auth(session="5" * 32, proof="7" * 64)
CLIENT, SERVER = ("client", 1), ("server", 2)
MEGABYTE = 1024 * 1024

CERTIFICATE = make_certificate()


def make_frame(index: int, size: int = 10_000) -> Frame:
    payload = random.Random(index).randbytes(size)
    return Frame(ChunkHeader(1, index, size, bytes(32)), payload)


class Network:
    """A client and a server session, and the datagrams between them.

    Args:
        seed: Makes a run repeatable.
        loss: Share of the datagrams that get lost.
        delay: Seconds that a datagram takes.
        jitter: Largest further delay in seconds; datagrams overtake each other.
        mtu: The longest datagram that arrives, in bytes.
        shown: The certificate of the server.
        limits: The limits of both sides.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        loss: float = 0.0,
        delay: float = 0.02,
        jitter: float = 0.0,
        mtu: int = 65_535,
        shown: Certificate = CERTIFICATE,
        limits: LinkLimits = LIMITS,
    ) -> None:
        self.now = 1000.0
        self.mtu = mtu
        self.loss = loss
        self._random = random.Random(seed)
        self._delay, self._jitter = delay, jitter
        self._wire: list[tuple[float, int, bool, Datagram]] = []
        self._sent = 0
        engine_limits = replace(limits, largest_datagram=SMALLEST_DATAGRAM)
        engine = client_engine_untrusted(
            CERTIFICATE.certificate_der,
            engine_limits,
        )
        engine.connect(SERVER, self.now)
        self.client = QuicSession(
            engine,
            "server:2",
            Client(CERTIFICATE.certificate_der),
            limits=limits,
            now=self.now,
        )
        self.server_engine = server_engine(
            shown,
            engine.connection.original_destination_connection_id,
            engine_limits,
        )
        self.client_engine = engine
        self.server = QuicSession(
            self.server_engine, "client:1", Server(), limits=limits, now=self.now
        )
        self.proof: Auth | None = None
        self.judges = True
        self._server_started = False
        self.flush(self.client)

    def flush(self, session: QuicSession[Message]) -> None:
        """Send the datagrams of a session, and collect its outputs."""
        to_server = session is self.client
        if to_server or self._server_started:
            source = CLIENT if to_server else SERVER
            for data, _ in session.datagrams_to_send(self.now):
                self._sent += 1
                if self._random.random() >= self.loss and len(data) <= self.mtu:
                    arrival = self.now + self._delay
                    arrival += self._random.random() * self._jitter
                    entry = (arrival, self._sent, to_server, (data, source))
                    heapq.heappush(self._wire, entry)
        while (output := session.next_output()) is not None:
            if isinstance(output, ProofShown):
                self.proof = output.auth
                if self.judges:
                    self.judge()

    def judge(self) -> None:
        """Admit the client if its proof is right."""
        if self.proof == AUTH:
            self.server.admit("ada", self.now)
        else:
            self.server.refuse(self.now)
        self.flush(self.server)

    def step(self) -> bool:
        """Process the next event; return False if none is left."""
        sessions = (self.client, self.server)
        times = [self._wire[0][0]] if self._wire else []
        times += [d for s in sessions if (d := s.deadline()) is not None]
        if not times:
            return False
        self.now = max(self.now, min(times))
        while self._wire and self._wire[0][0] <= self.now:
            _, _, to_server, datagram = heapq.heappop(self._wire)
            self._server_started |= to_server
            target = self.server if to_server else self.client
            target.receive_datagrams([datagram], self.now)
        for session in sessions:
            deadline = session.deadline()
            if deadline is not None and deadline <= self.now:
                session.handle_timeout(self.now)
            self.flush(session)
        return True

    def run_until(self, done: Callable[[], bool], steps: int = 200_000) -> None:
        """Process events until a condition is true; fail if it never is."""
        for _ in range(steps):
            if done():
                return
            if not self.step():
                break
        assert done(), f"still not so at {self.now}: {self.client.ended}"

    def prove(self) -> None:
        """Complete the handshake and the proof."""
        self.run_until(lambda: self.client.state is Phase.READY)
        self.client.send_message(AUTH)
        self.flush(self.client)
        self.run_until(lambda: self.server.state is Phase.READY)
        self.run_until(lambda: self.client.all_sent)


@pytest.fixture
def network() -> Network:
    made = Network()
    made.prove()
    return made


def messages_of(session: QuicSession[Message]) -> Iterator[Message]:
    while (message := session.next_message()) is not None:
        yield message


def frames_of(session: QuicSession[Message]) -> Iterator[Frame]:
    while (frame := session.next_frame()) is not None:
        yield frame


# ----------------------------------------------------------------- opening a session


def test_a_right_proof_opens_the_session_under_its_name() -> None:
    network = Network()
    network.run_until(lambda: network.client.state is Phase.READY)
    assert network.server.peer == ""
    network.client.send_message(AUTH)
    network.flush(network.client)
    network.run_until(lambda: network.server.state is Phase.READY)
    assert network.server.peer == "ada"


def test_data_after_the_proof_waits_for_the_answer() -> None:
    network = Network()
    network.judges = False
    network.run_until(lambda: network.client.state is Phase.READY)
    network.client.send_message(AUTH)
    network.client.send_message(Error("first"))
    network.client.send_frame(make_frame(1))
    network.flush(network.client)
    network.run_until(lambda: network.server.state is Phase.JUDGING)
    network.client.send_message(Error("second"))
    network.flush(network.client)
    network.run_until(lambda: network.client.all_sent)
    network.client.close("bye", network.now)
    network.flush(network.client)
    network.run_until(lambda: network.server_engine.close_event is not None)
    assert not network.server.has_message
    assert not network.server.has_frame
    network.judge()
    assert list(messages_of(network.server)) == [Error("first"), Error("second")]
    frames = list(frames_of(network.server))
    assert [frame.payload for frame in frames] == [make_frame(1).payload]
    assert network.server.ended is not None
    assert network.server.ended.reason == "bye"


def test_a_proof_whose_check_takes_too_long_is_given_up() -> None:
    network = Network()
    network.judges = False
    network.run_until(lambda: network.client.state is Phase.READY)
    network.client.send_message(AUTH)
    network.flush(network.client)
    network.run_until(lambda: network.server.ended is not None)
    network.judge()
    assert network.server.ended is not None
    assert network.server.ended.reason == "no answer for 10 s"


def refusal(network: Network) -> str:
    network.run_until(lambda: network.client.ended is not None)
    network.run_until(lambda: network.server.ended is not None)
    assert network.server.peer == ""
    assert network.client.ended is not None
    assert not network.client.ended.is_fault
    return network.client.ended.reason


@pytest.mark.parametrize(
    "first",
    [
        Auth(session="5" * 32, proof="8" * 64),
        Auth(session="6" * 32, proof="7" * 64),
        FileVerified(7),
        Error("let me in"),
    ],
)
def test_anything_but_the_right_proof_is_refused_in_the_same_words(
    first: Message,
) -> None:
    network = Network()
    network.run_until(lambda: network.client.state is Phase.READY)
    network.client.send_message(first)
    network.client.send_message(AUTH)
    network.flush(network.client)
    assert refusal(network) == "refused"


def test_a_client_without_a_proof_has_ten_seconds() -> None:
    network = Network()
    begin = network.now
    assert refusal(network) == "no proof for 10 s"
    assert network.now - begin == pytest.approx(LIMITS.handshake_timeout, abs=1)


def test_a_client_without_a_proof_can_use_little_memory() -> None:
    network = Network()
    network.run_until(lambda: network.client.state is Phase.READY)
    for index in range(4):
        network.client.send_frame(make_frame(index, MEGABYTE))
    network.flush(network.client)
    network.run_until(lambda: network.client.ended is not None)
    assert network.server.bytes_received < 300_000


def test_frames_that_overtake_the_proof_are_kept() -> None:
    network = Network(jitter=0.3)
    network.run_until(lambda: network.client.state is Phase.READY)
    network.client.send_message(AUTH)
    frames = [make_frame(index, 1000) for index in range(20)]
    for frame in frames:
        network.client.send_frame(frame)
        network.flush(network.client)
    received: list[Frame] = []

    def done() -> bool:
        received.extend(frames_of(network.server))
        return len(received) == 20

    network.run_until(done)
    assert [frame.payload for frame in received] == [f.payload for f in frames]


def test_another_certificate_of_the_same_name_is_refused() -> None:
    network = Network(shown=make_certificate())
    network.run_until(lambda: network.client.ended is not None)
    assert network.client.ended is not None
    assert "not the expected peer" in network.client.ended.reason


def test_another_certificate_with_the_same_key_is_refused() -> None:
    key = CERTIFICATE.private_key
    expected = x509.load_der_x509_certificate(CERTIFICATE.certificate_der)
    other = (
        x509.CertificateBuilder()
        .subject_name(expected.subject)
        .issuer_name(expected.issuer)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(expected.not_valid_before_utc)
        .not_valid_after(expected.not_valid_after_utc)
        .add_extension(expected.extensions[0].value, False)
        .sign(key, hashes.SHA256())
    )
    shown = Certificate(other.public_bytes(Encoding.DER), key)
    network = Network(shown=shown)
    network.run_until(lambda: network.client.ended is not None)


def test_a_server_that_never_answers_is_given_up() -> None:
    network = Network(loss=1.0)
    begin = network.now
    network.run_until(lambda: network.client.ended is not None)
    assert network.now - begin == pytest.approx(10, abs=2)
    assert network.client.ended is not None
    assert network.client.ended.describe("server:2").startswith("server:2: no answer")


# ------------------------------------------------------------------- sending things


def test_messages_arrive_in_order_both_ways(network: Network) -> None:
    sent = [FileError(n, "x" * (n % 900)) for n in range(500)]
    for message in sent:
        network.client.send_message(message)
        network.server.send_message(message)
    network.flush(network.client)
    network.flush(network.server)
    at_server: list[Message] = []
    at_client: list[Message] = []

    def done() -> bool:
        at_server.extend(messages_of(network.server))
        at_client.extend(messages_of(network.client))
        return len(at_server) == len(at_client) == 500

    network.run_until(done)
    assert at_server == at_client == sent


@pytest.mark.parametrize("seed", range(5))
def test_messages_and_frames_survive_a_bad_network_in_order(seed: int) -> None:
    network = Network(seed, loss=0.05, delay=0.03, jitter=0.05)
    network.prove()
    frames = [make_frame(n, 1 + 7919 * n % 60_000) for n in range(25)]
    for n, frame in enumerate(frames):
        for session in (network.client, network.server):
            session.send_frame(frame)
            session.send_message(FileError(n, "line"))
            network.flush(session)
    got: dict[str, list[bytes]] = {"client": [], "server": []}
    lines: dict[str, list[Message]] = {"client": [], "server": []}

    def done() -> bool:
        for name, session in (("client", network.client), ("server", network.server)):
            got[name] += [bytes(frame.payload) for frame in frames_of(session)]
            lines[name] += messages_of(session)
        counts = [len(x) for x in got.values()] + [len(x) for x in lines.values()]
        return counts == [25] * 4

    network.run_until(done)
    for name in ("client", "server"):
        assert got[name] == [frame.payload for frame in frames]
        assert lines[name] == [FileError(n, "line") for n in range(25)]
    assert network.client.packets_lost + network.server.packets_lost > 0


def test_a_message_overtakes_the_bulk_that_was_queued_before(network: Network) -> None:
    for index in range(8):
        network.client.send_frame(make_frame(index, MEGABYTE))
    network.client.send_message(FileVerified(7))
    network.flush(network.client)
    network.run_until(lambda: network.server.has_message)
    assert network.server.bytes_received < MEGABYTE


class Flow:
    """Sends frames to the server as fast as there is room for them."""

    def __init__(self, network: Network, frames: int) -> None:
        self.sent = 0
        self._network = network
        self._frames = frames

    def step(self) -> None:
        client = self._network.client
        while client.has_room_for_frame and self.sent < self._frames:
            client.send_frame(make_frame(self.sent, MEGABYTE))
            self.sent += 1
        self._network.step()


def test_the_grants_of_a_sender_leave_room_for_messages(
    network: Network,
) -> None:
    flow = Flow(network, 8)
    while network.server.bytes_received < 8 * MEGABYTE:
        flow.step()
    network.client.send_message(FileVerified(7))
    network.flush(network.client)
    network.run_until(lambda: network.server.has_message)


def test_unread_frames_hold_the_sender_back_until_they_are_read(
    network: Network,
) -> None:
    flow = Flow(network, 48)
    while network.now < 1015:
        flow.step()
    assert flow.sent < 48
    assert network.server.bytes_received < LIMITS.max_unread * 1.1
    assert network.server.ended is None
    read = 0
    while read < 48:
        read += len(list(frames_of(network.server)))
        network.flush(network.server)
        flow.step()
        assert network.now < 1060


@pytest.mark.parametrize(
    ("limits", "value"),
    [
        (replace(LIMITS, max_unsent_frames=4 * MEGABYTE), 4 * MEGABYTE),
        (replace(LIMITS, max_unacknowledged_frames=2 * MEGABYTE), 2 * MEGABYTE),
    ],
)
def test_unsent_and_unacknowledged_frames_leave_no_room(
    limits: LinkLimits, value: int
) -> None:
    network = Network(limits=limits)
    network.prove()
    network.loss = 1.0
    count = 0
    while network.client.has_room_for_frame:
        network.client.send_frame(make_frame(count, MEGABYTE))
        count += 1
    assert count == value // MEGABYTE
    assert not network.client.all_sent
    network.loss = 0.0
    network.flush(network.client)
    network.run_until(lambda: network.client.all_sent)
    assert network.client.has_room_for_frame


def test_frames_on_the_way_take_no_room_in_the_queue(network: Network) -> None:
    flow = Flow(network, 24)
    most = 0
    while not (network.client.all_sent and flow.sent == 24):
        flow.step()
        engine = network.client._engine
        most = max(most, engine.unacknowledged(network.client._our_bulk))
        list(frames_of(network.server))
        network.flush(network.server)
        assert network.now < 1060
    assert most > LIMITS.max_unsent_frames + MEGABYTE


def test_a_frame_must_match_its_header(network: Network) -> None:
    wrong = Frame(ChunkHeader(1, 0, 5, bytes(32)), b"four")
    with pytest.raises(LocalProtocolError, match="length"):
        network.client.send_frame(wrong)
    assert network.client.all_sent


def test_pings_measure_the_round_trip(network: Network) -> None:
    network.run_until(lambda: network.now > 1010)
    assert network.client.rtt == pytest.approx(0.04, rel=0.2)
    assert network.server.rtt == pytest.approx(0.04, rel=0.2)


# ------------------------------------------------------------------- ending a session


def test_an_idle_session_stays_open(network: Network) -> None:
    network.run_until(lambda: network.now > 1000 + 3600)
    assert network.client.ended is None
    assert network.server.ended is None
    assert network.client.bytes_sent < 1_000_000


@pytest.mark.parametrize("seed", range(5))
def test_a_dead_peer_is_detected_in_time(seed: int) -> None:
    network = Network(seed)
    network.prove()
    death = network.now + 3 + random.Random(seed).random() * 3
    network.run_until(lambda: network.now >= death)
    network.loss = 1.0
    network.run_until(lambda: network.client.ended is not None)
    assert LIMITS.idle_timeout - 2.5 <= network.now - death <= 12.1
    assert network.client.ended is not None
    assert network.client.ended.reason == "no answer for 10 s"
    assert network.client.ended.is_fault
    assert network.client.ended.silent_for == 10.0


def test_a_close_carries_its_reason(network: Network) -> None:
    network.server.close("time for tea", network.now)
    network.flush(network.server)
    network.run_until(lambda: network.client.ended is not None)
    assert network.client.ended is not None
    assert network.client.ended.reason == "time for tea"
    assert not network.client.ended.is_fault
    assert network.server.ended is not None
    assert network.server.ended.reason == "closed: time for tea"
    network.run_until(lambda: network.client.finished and network.server.finished)
    assert network.client.deadline() is None


def test_a_peer_that_missed_the_close_gets_it_again(network: Network) -> None:
    network.loss = 1.0
    network.server.close("time for tea", network.now)
    network.flush(network.server)
    network.loss = 0.0
    network.client.send_message(FileVerified(7))
    network.flush(network.client)
    network.run_until(lambda: network.client.ended is not None)
    assert network.client.ended is not None
    assert network.client.ended.reason == "time for tea"


@pytest.mark.parametrize("reason", ["x" * 5000, "\N{SNOWMAN}" * 5000, "a\x1b[2Jb\n"])
def test_any_reason_can_be_sent(network: Network, reason: str) -> None:
    network.client.close(reason, network.now)
    network.flush(network.client)
    network.run_until(lambda: network.server.ended is not None)
    assert network.server.ended is not None
    arrived = network.server.ended.reason
    assert arrived.isprintable()
    assert 0 < len(arrived.encode()) <= MAX_REASON_BYTES
    assert arrived[0] == reason[0]


def test_data_that_arrived_before_the_close_can_still_be_read(network: Network) -> None:
    network.client.send_message(FileVerified(7))
    network.client.send_frame(make_frame(1))
    network.flush(network.client)
    network.run_until(lambda: network.client.all_sent)
    network.client.close("done", network.now)
    network.flush(network.client)
    network.run_until(lambda: network.server.ended is not None)
    assert list(messages_of(network.server)) == [FileVerified(7)]
    assert len(list(frames_of(network.server))) == 1


# ------------------------------------------------------------------------ bad peers


def reason_for_client(network: Network) -> str:
    """Return the reason that the client receives."""
    network.flush(network.client)
    network.run_until(lambda: network.client.ended is not None)
    assert network.client.ended is not None
    assert not network.client.ended.is_fault
    assert network.server.ended is not None
    assert network.server.ended.is_fault
    return network.client.ended.reason


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\x00\x00\x00\x05hello", "no NAME"),
        (b"\x00\x00\x00\x02\xff\xff", "UTF-8"),
        (b"\x00\x01\x00\x01", "too long"),
        (b"\xff\xff\xff\xff", "too long"),
        (b"\x00\x00\x00\x00", "no NAME"),
        (b"\x00\x00\x00\x0fJOB_CANCEL::all", "JOB_CANCEL"),
    ],
)
def test_garbage_among_the_messages_ends_the_session(
    network: Network, data: bytes, why: str
) -> None:
    network.client_engine.send(0, data)
    assert why in reason_for_client(network)


def test_garbage_among_the_frames_ends_the_session(network: Network) -> None:
    network.client_engine.send(2, bytes(100))
    assert "frames" in reason_for_client(network)


@pytest.mark.parametrize("stream", [4, 6])
def test_another_stream_ends_the_session(network: Network, stream: int) -> None:
    network.client_engine.send(stream, b"hello")
    assert f"no stream {stream}" in reason_for_client(network)


@pytest.mark.parametrize("stream", [0, 2])
def test_the_end_of_a_stream_ends_the_session(network: Network, stream: int) -> None:
    network.client_engine.connection.send_stream_data(stream, b"", end_stream=True)
    assert "broken off" in reason_for_client(network)


def test_a_reset_stream_ends_the_session(network: Network) -> None:
    network.client_engine.connection.reset_stream(0, 7)
    assert "broken off" in reason_for_client(network)


def test_a_refused_stream_ends_the_session(network: Network) -> None:
    network.server.send_frame(make_frame(1))
    network.flush(network.server)
    network.run_until(lambda: network.client.has_frame)
    network.client_engine.connection.stop_stream(3, 7)
    assert "broken off" in reason_for_client(network)


def test_a_gap_that_would_take_much_memory_ends_the_session(network: Network) -> None:
    # A peer that ignores its window, and sends the far end of a stream first.
    network.client_engine.send(2, b"x")
    client = network.client_engine.connection
    client._remote_max_data = 10**12
    sender = client._streams[2].sender
    client._streams[2].max_stream_data_remote = 10**12
    sender._buffer_start = sender.highest_offset = 10**11
    sender._buffer_stop = 10**11 + 1
    sender._pending.subtract(0, 10**12)
    sender._pending.add(10**11, 10**11 + 1)
    network.flush(network.client)
    network.run_until(lambda: network.server.ended is not None)
    assert network.server.ended is not None
    assert "more than it may" in network.server.ended.reason


def test_unknown_messages_are_counted_and_skipped(network: Network) -> None:
    text = b"NEWER_THAN_US::field::field"
    network.client_engine.send(0, len(text).to_bytes(4) + text)
    network.client.send_message(FileVerified(7))
    network.flush(network.client)
    network.run_until(lambda: network.server.has_message)
    assert list(messages_of(network.server)) == [FileVerified(7)]
    assert network.server.ignored_messages == 1


@given(st.lists(st.binary(min_size=1, max_size=1500), max_size=5))
@settings(max_examples=50, deadline=None)
def test_garbage_datagrams_change_nothing(garbage: list[bytes]) -> None:
    network = Network()
    network.prove()
    for data in garbage:
        network.server.receive_datagrams([(data, CLIENT)], network.now)
        network.client.receive_datagrams([(data, SERVER)], network.now)
    network.client.send_message(FileVerified(7))
    network.flush(network.client)
    network.run_until(lambda: network.server.has_message)
    assert network.client.ended is None


# ------------------------------------------------------------------ states and pieces


def states() -> Iterator[tuple[Phase | None, Network]]:
    yield Phase.HANDSHAKE, Network()
    unproven = Network()
    unproven.run_until(lambda: unproven.server.state is Phase.UNPROVEN)
    yield Phase.UNPROVEN, unproven
    ready = Network()
    ready.prove()
    yield Phase.READY, ready
    judging = Network()
    judging.judges = False
    judging.run_until(lambda: judging.client.state is Phase.READY)
    judging.client.send_message(AUTH)
    judging.flush(judging.client)
    judging.run_until(lambda: judging.server.state is Phase.JUDGING)
    yield Phase.JUDGING, judging
    ended = Network()
    ended.prove()
    ended.server.close("over", ended.now)
    ended.flush(ended.server)
    yield None, ended


def test_only_a_ready_session_sends() -> None:
    for state, network in states():
        session = network.server
        assert session.ended if state is None else session.state is state
        if state is Phase.READY:
            session.send_message(FileVerified(7))
            session.send_frame(make_frame(1))
            continue
        name = "ended" if state is None else state.value
        before = session.state
        with pytest.raises(LocalProtocolError, match=name):
            session.send_message(FileVerified(7))
        with pytest.raises(LocalProtocolError, match=name):
            session.send_frame(make_frame(1))
        assert session.state is before


def test_a_session_can_be_closed_in_every_state_and_again() -> None:
    for state, network in states():
        session = network.client if state is Phase.HANDSHAKE else network.server
        before = session.ended
        session.close("first", network.now)
        session.close("second", network.now)
        assert session.ended is not None
        assert session.ended == (before or session.ended)
        assert "second" not in session.ended.reason
        network.run_until(lambda: session.finished)  # noqa: B023


def test_a_timeout_that_is_not_due_changes_nothing() -> None:
    for state, network in states():
        session = network.client if state is Phase.HANDSHAKE else network.server
        network.flush(session)
        before = (session.state, session.deadline(), session.bytes_sent)
        for _ in range(3):
            session.handle_timeout(network.now)
        assert session.datagrams_to_send(network.now) == []
        assert (session.state, session.bytes_sent) == (before[0], before[2])


@given(st.binary(max_size=200), st.integers(1, 50))
def test_a_message_decoder_raises_only_documented_errors(
    data: bytes, step: int
) -> None:
    decoder = MessageDecoder()
    for start in range(0, len(data), step):
        decoder.receive_data(data[start : start + step])
        try:
            while decoder.next_text_untrusted() is not None:
                pass
        except RemoteProtocolError:
            return


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_a_message_decoder_accepts_any_cuts(step: int) -> None:
    sent = [FileVerified(7), Error("x" * (MAX_MESSAGE_BYTES - 7))]
    texts = [encode_message(message).encode() for message in sent]
    data = b"".join(len(text).to_bytes(4) + text for text in texts)
    decoder = MessageDecoder()
    received: list[bytes] = []
    for start in range(0, len(data), step):
        decoder.receive_data(data[start : start + step])
        while (framed := decoder.next_text_untrusted()) is not None:
            received.append(framed[0])
    assert received == texts


def test_an_engine_needs_a_certificate() -> None:
    with pytest.raises(RemoteProtocolError, match="not a certificate"):
        client_engine_untrusted(b"garbage", LIMITS)


def test_an_engine_has_no_certificate_before_the_handshake() -> None:
    engine: QuicEngine = Network().client_engine
    assert engine.peer_certificate == b""
    assert engine.unacknowledged(0) == 0
