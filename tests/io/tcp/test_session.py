"""TCP sessions over a stream in memory: no sockets, no event loop, no clock."""

import math
import random
import ssl
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from sleap_rtc.io.link.certificates import Certificate, make_certificate
from sleap_rtc.io.link.limits import LIMITS
from sleap_rtc.io.link.session import (
    MAX_REASON_BYTES,
    Client,
    Ended,
    Phase,
    Server,
)
from sleap_rtc.io.tcp.session import BATCH, TcpSession
from sleap_rtc.io.tcp.tls import TlsEngine, client_context_untrusted, server_context
from sleap_rtc.proto.errors import LocalProtocolError, RemoteProtocolError
from sleap_rtc.proto.messages import Auth, Error, FileError, FileVerified, Message
from sleap_rtc.proto.transfer.frames import ChunkHeader, Frame
from sleap_rtc.proto.transfer.records import RecordType, encode_record_header

AUTH = Auth(session="5" * 32, proof="7" * 64)
VERIFIED = FileVerified(7)
MEGABYTE = 1024 * 1024
CERTIFICATE = make_certificate()
SERVER_CONTEXT = server_context(CERTIFICATE)


def make_frame(index: int, size: int = 10_000) -> Frame:
    payload = random.Random(index).randbytes(size)
    return Frame(ChunkHeader(1, index, size, bytes(32)), payload)


def record(kind: RecordType, content: bytes) -> bytes:
    return encode_record_header(kind, len(content)) + content


class Wire:
    """A client and a server session, and the stream between them.

    Args:
        piece: Bytes that arrive at once.
        delay: Seconds that they take.
        server: The server's TLS settings.
    """

    def __init__(
        self,
        *,
        piece: int = 1_000_000,
        delay: float = 0.0,
        server: ssl.SSLContext = SERVER_CONTEXT,
    ) -> None:
        self.now = 1000.0
        self.delay = delay
        self.cut = False
        self._piece = piece
        trusted = CERTIFICATE.certificate_der
        self.client_engine = TlsEngine(
            client_context_untrusted(trusted), server_side=False
        )
        self.client = TcpSession(
            self.client_engine, "server:2", Client(trusted), now=self.now
        )
        self.server_engine = TlsEngine(server, server_side=True)
        self.server = TcpSession(self.server_engine, "client:1", Server(), now=self.now)
        self.judges = True

    def flush(self) -> int:
        """Carry everything to the other side, and its answers back."""
        carried = 0
        while not self.cut:
            moved = self.carry(self.client) + self.carry(self.server)
            if not moved:
                break
            carried += moved
        return carried

    def carry(self, source: TcpSession[Message]) -> int:
        """Carry the data that one side sends at once."""
        target = self.server if source is self.client else self.client
        if not target.wants_data:
            return 0
        data = bytes(source.data_to_send())
        source.data_sent(len(data))
        self.now += self.delay if data else 0
        for begin in range(0, len(data), self._piece):
            target.receive_data(data[begin : begin + self._piece], self.now)
            if self.judges:
                self.judge()
        return len(data)

    def judge(self) -> None:
        """Admit the client if its proof is right."""
        if (output := self.server.next_output()) is not None:
            if output.auth == AUTH:
                self.server.admit("ada", self.now)
            else:
                self.server.refuse(self.now)

    def prove(self) -> None:
        """Complete the handshake and the proof."""
        self.flush()
        self.client.send_message(AUTH)
        self.flush()
        assert self.server.state is Phase.READY

    def wait(self, seconds: float) -> None:
        """Advance the clock, and serve the deadlines."""
        end = self.now + seconds
        while True:
            due = [
                deadline
                for session in (self.client, self.server)
                if (deadline := session.deadline()) is not None
            ]
            if min(due, default=math.inf) > end:
                break
            self.now = max(self.now, min(due))
            for session in (self.client, self.server):
                session.handle_timeout(self.now)
            self.flush()
        self.now = end

    def say(self, data: bytes) -> None:
        """Send bytes from the client, bypassing its session."""
        self.client_engine.encrypt(data)
        self.flush()


@pytest.fixture
def wire() -> Wire:
    made = Wire()
    made.prove()
    return made


def state_of(session: TcpSession[Message]) -> Phase | Ended:
    return session.state


def end_of(session: TcpSession[Message]) -> str:
    assert session.ended is not None
    return session.ended.reason


# ----------------------------------------------------------------- opening a session


@pytest.mark.parametrize("piece", [1, 7, 1_000_000])
def test_a_right_proof_opens_the_session_under_its_name(piece: int) -> None:
    wire = Wire(piece=piece)
    wire.flush()
    assert state_of(wire.client) is Phase.READY
    assert state_of(wire.server) is Phase.UNPROVEN
    wire.client.send_message(AUTH)
    wire.flush()
    assert state_of(wire.server) is Phase.READY
    assert wire.server.peer == "ada"


def test_data_after_the_proof_waits_for_the_answer() -> None:
    wire = Wire()
    wire.judges = False
    wire.flush()
    wire.client.send_message(AUTH)
    wire.client.send_frame(make_frame(1))
    wire.client.send_message(VERIFIED)
    wire.client.send_message(AUTH)
    wire.flush()
    wire.client.close("bye", wire.now)
    wire.flush()
    assert state_of(wire.server) is Phase.JUDGING
    assert not wire.server.wants_data
    assert not wire.server.has_message
    wire.judge()
    assert wire.server.next_output() is None
    assert wire.server.peer == "ada"
    wire.flush()
    assert wire.server.next_message() == VERIFIED
    assert wire.server.next_message() == AUTH
    frame = wire.server.next_frame()
    assert frame is not None
    assert frame.payload == make_frame(1).payload
    assert wire.server.state == Ended("bye", finished=True)


def test_a_session_that_ended_while_its_proof_was_checked_stays_ended() -> None:
    for answer in (TcpSession.refuse, lambda s, now: s.admit("ada", now)):
        wire = Wire()
        wire.judges = False
        wire.flush()
        wire.client.send_message(AUTH)
        wire.flush()
        wire.server.connection_lost("it is gone")
        answer(wire.server, wire.now)
        assert end_of(wire.server) == "it is gone"


def test_a_proof_whose_check_takes_too_long_is_given_up() -> None:
    wire = Wire()
    wire.judges = False
    wire.flush()
    wire.client.send_message(AUTH)
    wire.wait(LIMITS.handshake_timeout + 0.1)
    assert end_of(wire.server) == "no answer for 10 s"


@pytest.mark.parametrize(
    "first",
    [
        Auth(session="5" * 32, proof="8" * 64),
        Auth(session="6" * 32, proof="7" * 64),
        VERIFIED,
        Error("let me in"),
    ],
)
def test_anything_but_the_right_proof_is_refused_in_the_same_words(
    first: Message,
) -> None:
    wire = Wire()
    wire.flush()
    wire.client.send_message(first)
    wire.client.send_message(AUTH)
    wire.flush()
    assert wire.server.peer == ""
    assert wire.server.state == Ended("refused", is_fault=True)
    assert wire.client.state == Ended("refused", finished=True)


def test_bulk_before_the_proof_is_refused() -> None:
    wire = Wire()
    wire.flush()
    wire.client.send_frame(make_frame(1))
    wire.flush()
    assert end_of(wire.client) == "refused"


def test_a_client_without_a_proof_has_ten_seconds() -> None:
    wire = Wire()
    wire.flush()
    wire.wait(LIMITS.handshake_timeout - 0.1)
    assert wire.server.ended is None
    wire.wait(0.2)
    assert end_of(wire.client) == "no proof for 10 s"


def test_a_server_that_never_answers_is_given_up() -> None:
    wire = Wire()
    wire.cut = True
    wire.wait(LIMITS.handshake_timeout + 0.1)
    assert end_of(wire.client) == "no answer for 10 s"


def other_certificate() -> ssl.SSLContext:
    return server_context(make_certificate())


def other_protocol() -> ssl.SSLContext:
    context = server_context(CERTIFICATE)
    context.set_alpn_protocols(["h2"])
    return context


def old_version() -> ssl.SSLContext:
    context = server_context(CERTIFICATE)
    context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    return context


@pytest.mark.parametrize(
    ("server", "words"),
    [
        (other_certificate, "not the expected peer"),
        (other_protocol, "does not speak sleap-rtc/1"),
        (old_version, "TLS failed: "),
    ],
)
def test_a_client_refuses_another_server(
    server: Callable[[], ssl.SSLContext], words: str
) -> None:
    # The engine of the server accepts settings that the client has to refuse.
    wire = Wire(server=server())
    wire.flush()
    assert words in end_of(wire.client)
    assert wire.server.state is not Phase.READY


def test_the_certificate_is_compared_after_the_handshake() -> None:
    wire = Wire()
    expected = Client(CERTIFICATE.certificate_der + b"?")
    wire.client = TcpSession(wire.client_engine, "server:2", expected, now=wire.now)
    wire.flush()
    assert "not the expected peer" in end_of(wire.client)


# ------------------------------------------------------------------- sending things


@pytest.mark.parametrize("piece", [1, 1000, 1_000_000])
def test_messages_and_frames_go_both_ways(piece: int) -> None:
    wire = Wire(piece=piece)
    wire.prove()
    frames = [make_frame(n, 1 + 7919 * n % 60_000) for n in range(6)]
    for n, frame in enumerate(frames):
        for session in (wire.client, wire.server):
            session.send_frame(frame)
            session.send_message(FileError(n, "x" * n))
    wire.flush()
    for session in (wire.client, wire.server):
        for n, frame in enumerate(frames):
            assert session.next_message() == FileError(n, "x" * n)
            found = session.next_frame()
            assert found is not None
            assert found.header == frame.header
            assert found.payload == frame.payload
        assert session.next_message() is None
        assert session.next_frame() is None


def test_a_message_overtakes_the_bulk_that_was_queued_before(wire: Wire) -> None:
    for index in range(4):
        wire.client.send_frame(make_frame(index, MEGABYTE))
    assert wire.carry(wire.client) <= BATCH * 1.01
    wire.client.send_message(VERIFIED)
    wire.carry(wire.client)
    assert wire.server.next_message() == VERIFIED
    assert not wire.server.has_frame


def test_the_length_of_a_batch_is_limited(wire: Wire) -> None:
    wire.client.send_frame(make_frame(1, 5 * MEGABYTE))
    batches = []
    while size := wire.carry(wire.client):
        batches.append(size)
    assert max(batches) <= BATCH * 1.01
    assert len(batches) == 5 * MEGABYTE // BATCH + 1


def test_unread_frames_hold_the_sender_back_until_they_are_read(wire: Wire) -> None:
    for index in range(40):
        wire.client.send_frame(make_frame(index, MEGABYTE))
    wire.flush()
    assert not wire.server.wants_data
    assert not wire.client.all_sent
    read = 0
    while (frame := wire.server.next_frame()) is not None:
        assert frame.header.index == read
        read += 1
        if wire.server.has_news:
            wire.flush()
    assert read == 40
    assert wire.client.all_sent


def test_unread_messages_hold_the_sender_back_however_short_they_are(
    wire: Wire,
) -> None:
    for _ in range(LIMITS.max_unread // 500):
        wire.client.send_message(VERIFIED)
    wire.flush()
    assert not wire.server.wants_data
    while wire.server.next_message() is not None:
        pass
    assert wire.server.wants_data


def test_unsent_data_leaves_no_room(wire: Wire) -> None:
    client = wire.client
    assert client.all_sent
    while client.has_room_for_frame:
        client.send_frame(make_frame(1, 100_000))
    while client.has_room_for_message:
        client.send_message(FileError(1, "x" * 60_000))
    assert not client.all_sent
    size = wire.flush()
    assert size >= LIMITS.max_unsent_frames + LIMITS.max_unsent_messages
    assert client.has_room_for_frame
    assert client.has_room_for_message
    assert client.all_sent


def test_bytes_to_send_stay_until_they_are_sent(wire: Wire) -> None:
    wire.client.send_message(VERIFIED)
    first = bytes(wire.client.data_to_send())
    assert bytes(wire.client.data_to_send()) == first
    wire.client.data_sent(3)
    assert bytes(wire.client.data_to_send()) == first[3:]
    assert not wire.client.all_sent


def test_a_frame_must_match_its_header(wire: Wire) -> None:
    with pytest.raises(LocalProtocolError, match="another length"):
        wire.client.send_frame(Frame(ChunkHeader(1, 1, 5, bytes(32)), b"four"))


# ---------------------------------------------------------------------- time passing


def test_pings_measure_the_round_trip() -> None:
    wire = Wire(delay=0.01)
    wire.prove()
    wire.wait(30)
    for session in (wire.client, wire.server):
        assert session.ended is None
        assert 0.005 < session.rtt < 0.05


def test_pings_of_a_peer_that_does_not_read_get_one_answer(wire: Wire) -> None:
    for n in range(1000):
        wire.client_engine.encrypt(record(RecordType.PING, bytes([n % 256])))
    wire.carry(wire.client)
    assert len(wire.server.data_to_send()) < 100


def test_a_wrong_pong_changes_nothing(wire: Wire) -> None:
    before = wire.server.rtt
    for content in (b"", b"\xff" * 8, b"\x00"):
        wire.say(record(RecordType.PONG, content))
    assert wire.server.rtt == before
    assert wire.server.ended is None


def test_a_silent_peer_is_detected_in_time(wire: Wire) -> None:
    wire.cut = True
    wire.wait(LIMITS.idle_timeout - 0.1)
    assert wire.server.ended is None
    wire.wait(0.2)
    for session in (wire.client, wire.server):
        assert session.ended is not None
        assert session.ended.reason == "no answer for 10 s"
        assert session.ended.silent_for == 10.0


def test_a_side_that_does_not_read_does_not_blame_its_peer(wire: Wire) -> None:
    for index in range(40):
        wire.client.send_frame(make_frame(index, MEGABYTE))
    wire.flush()
    assert not wire.server.wants_data
    wire.wait(10 * LIMITS.idle_timeout)
    assert wire.client.ended is None
    assert wire.server.ended is None
    while wire.server.next_frame() is not None:
        wire.flush()
    wire.wait(LIMITS.idle_timeout / 2)
    assert wire.server.ended is None


def test_a_timeout_that_is_not_due_changes_nothing(wire: Wire) -> None:
    for session in (wire.client, wire.server):
        deadline = session.deadline()
        assert deadline is not None
        session.handle_timeout(wire.now)
        assert session.deadline() == deadline
        assert not session.data_to_send()


# --------------------------------------------------------------------- how it ends


@pytest.mark.parametrize(
    ("reason", "arrives"),
    [
        ("enough", "enough"),
        ("", "the peer closed the link"),
        ("a\x1b[31mb\n", "ab "),
        ("\x1b[31m", "the peer closed the link"),
        ("ä" * 600, "ä" * (MAX_REASON_BYTES // 2)),
        ("\ud800", "?"),
    ],
)
def test_a_close_carries_its_reason(wire: Wire, reason: str, arrives: str) -> None:
    wire.server.close(reason, wire.now)
    wire.flush()
    assert wire.client.state == Ended(arrives, finished=True)
    assert end_of(wire.server) == (f"closed: {reason}" if reason else "closed")


def test_a_side_that_closes_waits_a_little_for_its_peer(wire: Wire) -> None:
    wire.server.close("bye", wire.now)
    assert not wire.server.finished
    wire.cut = True
    wire.wait(LIMITS.close_timeout - 0.1)
    assert not wire.server.finished
    wire.wait(0.2)
    assert wire.server.finished
    assert wire.server.deadline() is None


def test_data_that_arrived_before_the_close_can_still_be_read(wire: Wire) -> None:
    wire.client.send_message(VERIFIED)
    wire.client.send_frame(make_frame(1))
    wire.flush()
    wire.client.close("bye", wire.now)
    wire.flush()
    assert wire.server.ended is not None
    assert wire.server.next_message() == VERIFIED
    assert wire.server.next_frame() is not None


def test_data_after_the_end_is_discarded(wire: Wire) -> None:
    wire.server.close("bye", wire.now)
    wire.client.send_message(VERIFIED)
    wire.carry(wire.client)
    assert wire.server.next_message() is None


def test_a_session_can_be_closed_in_every_state_and_again() -> None:
    fresh, secured, ready = Wire(), Wire(), Wire()
    secured.flush()
    ready.prove()
    for wire, state in (
        (fresh, Phase.HANDSHAKE),
        (secured, Phase.UNPROVEN),
        (ready, Phase.READY),
    ):
        assert wire.server.state is state
        wire.server.close("first", wire.now)
        wire.server.close("second", wire.now)
        wire.server.connection_lost("later")
        assert end_of(wire.server) == "closed: first"
        assert wire.server.finished


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_lost_connection_ends_every_state(steps: int) -> None:
    wire = Wire()
    if steps:
        wire.flush()
    if steps == 2:
        wire.prove()
    wire.server.connection_lost("it is gone")
    assert end_of(wire.server) == "it is gone"
    assert wire.server.finished
    assert wire.server.deadline() is None
    wire.server.handle_timeout(wire.now + 99)
    assert end_of(wire.server) == "it is gone"


def test_only_a_ready_session_sends() -> None:
    fresh, secured, ended = Wire(), Wire(), Wire()
    secured.flush()
    ended.prove()
    ended.server.close("", ended.now)
    for wire in (fresh, secured, ended):
        state = wire.server.state
        with pytest.raises(LocalProtocolError, match="not ready"):
            wire.server.send_message(VERIFIED)
        with pytest.raises(LocalProtocolError, match="not ready"):
            wire.server.send_frame(make_frame(1))
        assert wire.server.state is state


# -------------------------------------------------------------------------- garbage


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x00\x00\x00\x00\x00", "record type 0 does not exist"),
        (b"\x06\x00\x00\x00\x00", "record type 6 does not exist"),
        (b"\x01\x00\x01\x00\x01", "MESSAGE of 65537 bytes is too long"),
        (b"\x02\xff\xff\xff\xff", "BULK of 4294967295 bytes is too long"),
        (record(RecordType.MESSAGE, b"hello"), "no NAME"),
        (record(RecordType.MESSAGE, b"\xff\xfe"), "not valid UTF-8"),
        (record(RecordType.MESSAGE, b""), "no NAME"),
        (record(RecordType.MESSAGE, b"JOB_CANCEL::?"), "JOB_CANCEL: "),
        (record(RecordType.BULK, b"not a frame" * 9), "does not hold frames"),
    ],
)
def test_garbage_ends_the_session_and_both_sides_get_the_reason(
    wire: Wire, data: bytes, words: str
) -> None:
    wire.client.send_message(VERIFIED)
    wire.flush()
    wire.say(data)
    assert words in end_of(wire.server)
    assert words in end_of(wire.client)
    assert wire.server.next_message() == VERIFIED


def test_a_second_proof_is_an_unexpected_message(wire: Wire) -> None:
    wire.client.send_message(AUTH)
    wire.flush()
    assert wire.server.next_message() == AUTH


def test_unknown_messages_are_counted_and_skipped(wire: Wire) -> None:
    wire.say(record(RecordType.MESSAGE, b"NEWER::x"))
    assert wire.server.ignored_messages == 1
    assert wire.server.next_message() is None
    assert wire.server.wants_data


def test_damaged_bytes_end_the_session_after_the_earlier_data(wire: Wire) -> None:
    wire.client.send_message(VERIFIED)
    data = bytes(wire.client.data_to_send())
    wire.client.data_sent(len(data))
    wire.client.send_message(Error("damaged"))
    damaged = bytearray(wire.client.data_to_send())
    damaged[-1] ^= 1
    wire.server.receive_data(data + damaged, wire.now)
    assert "TLS failed" in end_of(wire.server)
    assert wire.server.next_message() == VERIFIED
    assert wire.server.next_message() is None


@pytest.mark.parametrize("seed", range(20))
def test_garbage_instead_of_a_handshake_ends_only_the_session(seed: int) -> None:
    garbage = random.Random(seed)
    wire = Wire()
    wire.server.receive_data(garbage.randbytes(garbage.randrange(6, 2000)), wire.now)
    if wire.server.ended is None:  # it looks like the start of a long record
        wire.cut = True
        wire.wait(LIMITS.handshake_timeout + 1)
    assert wire.server.ended is not None


def test_a_plain_request_is_not_a_handshake() -> None:
    wire = Wire()
    wire.server.receive_data(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", wire.now)
    assert "TLS failed: http request" in end_of(wire.server)


# ------------------------------------------------------------------------------ TLS


def test_a_client_needs_a_certificate() -> None:
    with pytest.raises(RemoteProtocolError, match="not a certificate"):
        client_context_untrusted(b"?")


def test_the_file_of_the_key_is_gone_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen: list[bytes] = []
    real = ssl.SSLContext.load_cert_chain

    def look(self: ssl.SSLContext, path: str, *, password: bytes) -> None:
        seen.append(Path(path).read_bytes())
        real(self, path, password=password)

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", look)
    server_context(Certificate(CERTIFICATE.certificate_der, CERTIFICATE.private_key))
    assert b"BEGIN ENCRYPTED PRIVATE KEY" in seen[0]
    assert list(tmp_path.iterdir()) == []
