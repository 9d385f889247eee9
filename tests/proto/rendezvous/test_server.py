"""The signaling server, without a network."""

from typing import get_args

import msgspec
import pytest
from msgspec.structs import replace

from sleap_rtc.proto.errors import LocalProtocolError
from sleap_rtc.proto.rendezvous.invite import RoomKeys
from sleap_rtc.proto.rendezvous.messages import (
    MAX_METADATA_BYTES,
    MAX_PEERS_PER_ROOM,
    AnswerSignal,
    Challenge,
    DiscoverPeers,
    ErrorSignal,
    Filters,
    Metadata,
    MetadataChange,
    MetadataUpdated,
    OfferSignal,
    PeerInfo,
    PeerList,
    PeerMessage,
    PeerSignal,
    Property,
    Register,
    RegisteredAuth,
    Signal,
    UnknownSignal,
    UpdateMetadata,
    decode_peer_signal_untrusted,
    decode_signal_untrusted,
    encode_signal,
)
from sleap_rtc.proto.rendezvous.server import (
    LIMITS,
    TRANSITIONS,
    ConnectionState,
    Deliver,
    Drop,
    PeerJoined,
    PeerLeft,
    Ping,
    Refused,
    RoomServer,
    ServerLimits,
    ServerOutput,
)

KEYS = RoomKeys.from_secret(b"k" * 32)
OTHER = RoomKeys.from_secret(b"o" * 32)
NOW = 1000.0
NONCE = b"n" * 16
Outputs = list[ServerOutput]


class World:
    """A server, and helpers that return its outputs."""

    def __init__(self, limits: ServerLimits = LIMITS) -> None:
        self.server = RoomServer(limits)

    def drain(self) -> Outputs:
        outputs: Outputs = []
        while (output := self.server.next_output()) is not None:
            outputs.append(output)
        return outputs

    def open(self, connection: int, now: float = NOW) -> Outputs:
        self.server.connection_opened(
            connection, NONCE + bytes([connection % 256]), now
        )
        return self.drain()

    def send(self, connection: int, signal: Signal, now: float = NOW) -> Outputs:
        message = decode_peer_signal_untrusted(encode_signal(signal))
        self.server.receive_message(connection, message, now)
        return self.drain()

    def join(
        self,
        connection: int,
        peer_id: str,
        role: str = "client",
        metadata: Metadata = Metadata(),  # noqa: B008
        keys: RoomKeys = KEYS,
    ) -> Outputs:
        self.open(connection)
        return self.send(
            connection, registration(connection, peer_id, role, metadata, keys)
        )


def registration(
    connection: int,
    peer_id: str,
    role: str = "client",
    metadata: Metadata = Metadata(),  # noqa: B008
    keys: RoomKeys = KEYS,
) -> Register:
    signature = keys.sign_registration(NONCE + bytes([connection % 256]), peer_id)
    return Register(peer_id, keys.room_id, role, keys.public_key, signature, metadata)


def heard(outputs: Outputs, connection: int) -> list[Signal]:
    """Return the signals that were sent on a connection."""
    return [
        decode_signal_untrusted(output.text, 10**6)
        for output in outputs
        if isinstance(output, Deliver) and output.connection == connection
    ]


def codes(outputs: Outputs, connection: int) -> list[str]:
    return [
        signal.code
        for signal in heard(outputs, connection)
        if isinstance(signal, ErrorSignal)
    ]


def dropped(outputs: Outputs) -> list[int]:
    return [output.connection for output in outputs if isinstance(output, Drop)]


# --------------------------------------------------------------------- registration


def test_a_connection_is_challenged() -> None:
    world = World()
    assert heard(world.open(1), 1) == [Challenge(NONCE + b"\x01")]
    with pytest.raises(LocalProtocolError):
        world.open(1)


def test_a_registered_peer_may_send_every_message_of_a_peer() -> None:
    assert set(TRANSITIONS[ConnectionState.REGISTERED]) == set(get_args(PeerSignal))


def test_a_peer_with_the_secret_gets_in() -> None:
    outputs = World().join(1, "me", "worker")
    assert heard(outputs, 1) == [RegisteredAuth(KEYS.room_id, "me")]
    assert PeerJoined(KEYS.room_id, "me", "worker") in outputs


def test_a_signature_for_another_connection_is_refused() -> None:
    world = World()
    world.open(1)
    world.open(2)
    outputs = world.send(2, registration(1, "me"))
    assert codes(outputs, 2) == ["REGISTRATION_REFUSED"]
    assert dropped(outputs) == [2]


def test_a_signature_by_another_key_is_refused() -> None:
    world = World()
    world.open(1)
    forged = registration(1, "me", keys=OTHER)
    claimed = Register("me", KEYS.room_id, "client", KEYS.public_key, forged.signature)
    outputs = world.send(1, claimed)
    assert codes(outputs, 1) == ["REGISTRATION_REFUSED"]
    assert dropped(outputs) == [1]
    assert not [output for output in outputs if isinstance(output, PeerJoined)]


def test_a_stranger_cannot_open_a_room_with_a_key_of_their_own() -> None:
    """Key and signature fit each other, but the room is named after another key."""
    world = World()
    world.open(1)
    stranger = RoomKeys.from_secret(b"o" * 32)
    stranger.room_id = KEYS.room_id
    outputs = world.send(1, registration(1, "me", keys=stranger))
    assert codes(outputs, 1) == ["REGISTRATION_REFUSED"]
    assert dropped(outputs) == [1]
    assert not [output for output in outputs if isinstance(output, PeerJoined)]


def test_registering_again_replaces_the_metadata() -> None:
    world = World()
    world.join(1, "me", "worker", Metadata((), {"a": 1}))
    world.join(2, "you")
    outputs = world.send(1, registration(1, "me", "worker", Metadata((), {"b": 2})))
    assert dropped(outputs) == []
    assert heard(outputs, 1) == [RegisteredAuth(KEYS.room_id, "me")]
    assert not [output for output in outputs if isinstance(output, PeerJoined)]
    [listed] = heard(world.send(2, DiscoverPeers("you")), 2)
    assert isinstance(listed, PeerList)
    assert listed.peers == (PeerInfo("me", "worker", Metadata((), {"b": 2})),)


def test_a_connection_keeps_its_name_and_room() -> None:
    world = World()
    world.join(1, "me")
    assert codes(world.send(1, registration(1, "you")), 1) == ["NOT_YOU"]
    other = registration(1, "me", keys=OTHER)
    assert codes(world.send(1, other), 1) == ["NOT_YOU"]


@pytest.mark.parametrize("with_others", [False, True])
def test_a_peer_that_comes_back_replaces_itself(with_others: bool) -> None:
    world = World()
    if with_others:
        world.join(9, "bystander")
    world.join(1, "me")
    outputs = world.join(2, "me")
    assert dropped(outputs) == [1]
    assert heard(outputs, 2) == [RegisteredAuth(KEYS.room_id, "me")]
    # Late reports of the old socket change nothing.
    world.server.connection_lost(1, "gone")
    assert world.drain() == []
    assert world.send(1, DiscoverPeers("me")) == []
    assert heard(world.send(2, DiscoverPeers("me")), 2)


def test_nothing_else_works_before_the_registration() -> None:
    world = World()
    world.open(1)
    for signal in ADDRESSED:
        outputs = world.send(1, signal)
        assert codes(outputs, 1) == ["NOT_IN_ROOM"]
        assert dropped(outputs) == []


# ------------------------------------------------------------------------ messages

ADDRESSED: list[Signal] = [
    OfferSignal("me", "you", "sealed"),
    AnswerSignal("me", "you", "sealed"),
    PeerMessage("me", "you", msgspec.Raw(b'{"x":1}')),
    DiscoverPeers("me"),
    UpdateMetadata("me", MetadataChange({"a": 1})),
]


@pytest.mark.parametrize("signal", ADDRESSED[:3])
def test_messages_reach_their_target_only(signal: Signal) -> None:
    world = World()
    world.join(1, "me")
    world.join(2, "you")
    world.join(3, "them")
    world.join(4, "you", keys=OTHER)
    assert world.send(1, signal) == [Deliver(2, encode_signal(signal))]


@pytest.mark.parametrize("signal", ADDRESSED)
def test_a_message_in_the_name_of_another_peer_is_refused(signal: Signal) -> None:
    world = World()
    world.join(1, "me")
    world.join(2, "you")
    world.join(3, "mallory")
    outputs = world.send(3, signal)
    assert codes(outputs, 3) == ["NOT_YOU"]
    assert {output.connection for output in outputs if isinstance(output, Deliver)} == {
        3
    }


@pytest.mark.parametrize("signal", ADDRESSED[:3])
def test_an_absent_target_is_reported(signal: Signal) -> None:
    world = World()
    world.join(1, "me")
    world.join(2, "you", keys=OTHER)
    [error] = heard(world.send(1, signal), 1)
    assert isinstance(error, ErrorSignal)
    assert (error.code, error.target) == ("PEER_NOT_FOUND", "you")
    assert error.reason


def test_an_update_merges_properties_and_keeps_tags() -> None:
    world = World()
    world.join(1, "me", metadata=Metadata(("t",), {"a": 1, "b": 2}))
    change = MetadataChange({"b": 3, "c": 4})
    assert heard(world.send(1, UpdateMetadata("me", change)), 1) == [
        MetadataUpdated("me", Metadata(("t",), {"a": 1, "b": 3, "c": 4}))
    ]
    change = MetadataChange({}, ())
    assert heard(world.send(1, UpdateMetadata("me", change)), 1) == [
        MetadataUpdated("me", Metadata((), {"a": 1, "b": 3, "c": 4}))
    ]


@pytest.mark.parametrize(
    "signal",
    [
        Challenge(NONCE),
        RegisteredAuth(KEYS.room_id, "me"),
        PeerList("me", (), 0),
        MetadataUpdated("me", Metadata()),
        ErrorSignal("X", "y"),
    ],
)
def test_a_message_that_only_servers_send_is_ignored(signal: Signal) -> None:
    world = World()
    world.join(1, "me")
    assert world.send(1, signal) == []


def test_a_message_of_a_newer_version_is_ignored() -> None:
    world = World()
    world.join(1, "me")
    world.server.receive_message(1, UnknownSignal("ping"), NOW)
    assert world.drain() == []


def test_a_rejected_message_ends_its_connection_only() -> None:
    world = World()
    world.join(1, "me")
    world.join(2, "you")
    world.server.reject_message(1, "malformed", NOW)
    outputs = world.drain()
    assert ErrorSignal("INVALID_MESSAGE", "malformed") in heard(outputs, 1)
    assert codes(outputs, 1) == ["INVALID_MESSAGE"]
    assert dropped(outputs) == [1]
    assert heard(world.send(2, DiscoverPeers("you")), 2) == [PeerList("you", (), 0)]


# ----------------------------------------------------------------------- discovery


def test_discovery_lists_the_other_peers_of_the_same_room() -> None:
    world = World()
    world.join(1, "me", "worker")
    world.join(2, "you", "worker")
    world.join(3, "them", "worker", keys=OTHER)
    info = PeerInfo("you", "worker", Metadata())
    for filters in (Filters(), Filters("worker")):
        outputs = world.send(1, DiscoverPeers("me", filters))
        assert heard(outputs, 1) == [PeerList("me", (info,), 1)]
    outputs = world.send(1, DiscoverPeers("me", Filters("client")))
    assert heard(outputs, 1) == [PeerList("me", (), 0)]


def test_a_peer_is_gone_with_its_socket() -> None:
    world = World()
    world.join(1, "me")
    world.join(2, "you")
    world.server.connection_lost(2, "it went away")
    assert world.drain() == [PeerLeft(KEYS.room_id, "you", "it went away")]
    assert heard(world.send(1, DiscoverPeers("me")), 1) == [PeerList("me", (), 0)]


# -------------------------------------------------------------------------- limits


def test_too_many_messages_end_the_connection() -> None:
    world = World()
    world.open(1)
    for _ in range(int(LIMITS.message_burst)):
        assert dropped(world.send(1, DiscoverPeers("me"))) == []
    outputs = world.send(1, DiscoverPeers("me"))
    assert codes(outputs, 1) == ["TOO_MANY_MESSAGES"]
    assert dropped(outputs) == [1]


def test_a_steady_rate_is_accepted() -> None:
    world = World()
    world.join(1, "me")
    now = NOW
    for _ in range(500):
        now += 1.0 / LIMITS.messages_per_second
        assert dropped(world.send(1, DiscoverPeers("me"), now)) == []


def test_twice_the_rate_ends_the_connection_after_the_burst() -> None:
    world = World()
    world.join(1, "me")
    accepted, now = 0, NOW
    while dropped(world.send(1, DiscoverPeers("me"), now)) == []:
        accepted += 1
        now += 0.5 / LIMITS.messages_per_second
    # Each message costs one token and gets half of one back.
    assert LIMITS.message_burst < accepted < 2 * LIMITS.message_burst


def test_pings_count_as_messages() -> None:
    world = World()
    world.join(1, "me")
    alive = [
        world.server.heard_from(1, NOW) for _ in range(int(LIMITS.message_burst) + 1)
    ]
    assert alive[0]
    assert not alive[-1]
    assert dropped(world.drain()) == [1]


def test_connections_are_limited() -> None:
    world = World(replace(LIMITS, max_connections=3))
    for connection in range(3):
        assert dropped(world.open(connection)) == []
    outputs = world.open(3)
    assert codes(outputs, 3) == ["SERVER_FULL"]
    assert dropped(outputs) == [3]
    world.server.connection_lost(0, "gone")
    assert dropped(world.open(4)) == []


def test_peers_of_a_room_are_limited() -> None:
    world = World()
    for number in range(MAX_PEERS_PER_ROOM):
        world.join(number, f"peer-{number}")
    outputs = world.join(200, "another")
    assert codes(outputs, 200) == ["ROOM_FULL"]
    assert dropped(outputs) == [200]
    # A peer that comes back replaces itself.
    assert dropped(world.join(201, "peer-3")) == [3]
    world.server.connection_lost(4, "gone")
    world.drain()
    assert dropped(world.join(202, "another")) == []


def test_rooms_are_limited() -> None:
    assert LIMITS.max_rooms < LIMITS.max_connections
    world = World(replace(LIMITS, max_rooms=2))
    for number in range(2):
        world.join(number, "peer", keys=RoomKeys.from_secret(bytes([number]) * 32))
    outputs = world.join(5, "peer")
    assert codes(outputs, 5) == ["SERVER_FULL"]
    assert dropped(outputs) == [5]
    # A room that exists takes more peers.
    assert dropped(world.join(7, "other", keys=RoomKeys.from_secret(bytes(32)))) == []
    world.server.connection_lost(7, "gone")
    # A room ends with its last peer.
    world.server.connection_lost(0, "gone")
    world.drain()
    assert dropped(world.join(6, "peer")) == []


def test_metadata_is_limited() -> None:
    big: dict[str, Property] = {"x": "y" * MAX_METADATA_BYTES}
    world = World()
    outputs = world.join(1, "me", metadata=Metadata((), big))
    assert codes(outputs, 1) == ["METADATA_TOO_LARGE"]
    world.join(2, "you", metadata=Metadata((), {"a": 1}))
    change = MetadataChange(big)
    assert codes(world.send(2, UpdateMetadata("you", change)), 2) == [
        "METADATA_TOO_LARGE"
    ]
    [same] = heard(world.send(2, UpdateMetadata("you", MetadataChange())), 2)
    assert same == MetadataUpdated("you", Metadata((), {"a": 1}))


# ---------------------------------------------------------------------------- time


def test_a_connection_that_does_not_register_is_dropped() -> None:
    world = World()
    assert world.server.deadline() is None
    world.open(1)
    assert world.server.deadline() == NOW + LIMITS.registration_timeout
    world.send(1, DiscoverPeers("me"), NOW + 1)
    world.server.handle_timeout(NOW + LIMITS.registration_timeout - 0.1)
    assert world.drain() == []
    world.server.handle_timeout(NOW + LIMITS.registration_timeout)
    assert world.drain() == [Drop(1, "it did not register in time")]
    assert world.server.deadline() is None


def test_silent_peers_are_pinged_and_then_dropped() -> None:
    world = World()
    world.join(1, "me")
    outputs: Outputs = []
    while (deadline := world.server.deadline()) is not None:
        world.server.handle_timeout(deadline)
        outputs += world.drain()
    pings = int(LIMITS.idle_timeout // LIMITS.ping_interval)
    assert outputs[:-2] == [Ping(1)] * pings
    assert outputs[-2:] == [Drop(1, "silent"), PeerLeft(KEYS.room_id, "me", "silent")]
    assert world.send(1, DiscoverPeers("me")) == []


def test_a_sign_of_life_keeps_a_peer() -> None:
    world = World()
    world.join(1, "me")
    for step in range(1, 20):
        now = NOW + step * LIMITS.idle_timeout / 2
        world.server.handle_timeout(now)
        assert dropped(world.drain()) == []
        assert world.server.heard_from(1, now)


def test_asking_for_the_deadline_changes_nothing() -> None:
    world = World()
    world.join(1, "me")
    deadlines = {world.server.deadline() for _ in range(3)}
    assert len(deadlines) == 1
    world.server.handle_timeout(NOW)
    assert world.drain() == []


def test_refusals_are_events_without_secrets() -> None:
    world = World()
    world.open(1)
    [event] = [
        output
        for output in world.send(1, registration(2, "me"))
        if isinstance(output, Refused)
    ]
    assert event.connection == 1
    assert event.code == "REGISTRATION_REFUSED"


# ------------------------------------------------------- every state by every input


@pytest.mark.parametrize("state", ["never opened", "challenged", "registered", "lost"])
@pytest.mark.parametrize("call", ["message", "reject", "heard", "lost", "timeout"])
def test_every_input_is_harmless_in_every_state(state: str, call: str) -> None:
    world = World()
    world.join(2, "witness")
    if state != "never opened":
        world.open(1)
    if state in ("registered", "lost"):
        world.send(1, registration(1, "me"))
    if state == "lost":
        world.server.connection_lost(1, "gone")
        world.drain()
    match call:
        case "reject":
            world.server.reject_message(1, "malformed", NOW)
            is_open = state in ("challenged", "registered")
            assert dropped(world.drain()) == ([1] if is_open else [])
        case "message":
            outputs = world.send(1, DiscoverPeers("me"))
            expected = {"challenged": "ErrorSignal", "registered": "PeerList"}
            answers = [type(signal).__name__ for signal in heard(outputs, 1)]
            assert answers == [expected[state]] if state in expected else not answers
        case "heard":
            alive = world.server.heard_from(1, NOW)
            assert alive is (state in ("challenged", "registered"))
        case "lost":
            world.server.connection_lost(1, "gone")
            left = [type(output) for output in world.drain()]
            assert left == ([PeerLeft] if state == "registered" else [])
        case "timeout":
            world.server.handle_timeout(NOW)
            assert world.drain() == []
    assert heard(world.send(2, DiscoverPeers("witness")), 2)
