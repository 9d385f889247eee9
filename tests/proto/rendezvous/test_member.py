"""A member of a room, without a network."""

from collections.abc import Callable

import pytest

from sleap_rtc.proto.errors import LocalProtocolError, RemoteProtocolError
from sleap_rtc.proto.machine import Trigger
from sleap_rtc.proto.rendezvous.invite import RoomKeys, verify_registration
from sleap_rtc.proto.rendezvous.member import (
    LIMITS,
    TRANSITIONS,
    MemberState,
    MemberTrigger,
    RoomMember,
)
from sleap_rtc.proto.rendezvous.member_outputs import (
    AnswerReceived,
    Close,
    Connect,
    MemberOutput,
    OfferReceived,
    PeersListed,
    PeerUnreachable,
    Reconnecting,
    Registered,
    RegistrationRefused,
    SendText,
    ServerComplained,
)
from sleap_rtc.proto.rendezvous.messages import (
    MAX_METADATA_BYTES,
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
    Register,
    RegisteredAuth,
    Signal,
    UnknownSignal,
    UpdateMetadata,
    decode_peer_signal_untrusted,
    decode_server_signal_untrusted,
    decode_signal_untrusted,
    encode_signal,
)
from sleap_rtc.proto.rendezvous.server import Deliver, RoomServer

KEYS = RoomKeys.from_secret(b"k" * 32)
NOW = 1000.0
NONCE = b"n" * 16
NOTHING = Metadata()
S, T = MemberState, MemberTrigger
WELCOME = RegisteredAuth(KEYS.room_id, "me")


class Fixed:
    """A source that always returns the same number."""

    def __init__(self, number: float = 0.0) -> None:
        self.number = number

    def random(self) -> float:
        return self.number


def member(metadata: Metadata = NOTHING, random: float = 0.0) -> RoomMember:
    return RoomMember(KEYS, "me", "worker", metadata, Fixed(random))


def drain(machine: RoomMember) -> list[MemberOutput]:
    outputs: list[MemberOutput] = []
    while (output := machine.next_output()) is not None:
        outputs.append(output)
    return outputs


def receive(
    machine: RoomMember, signal: Signal, now: float = NOW
) -> list[MemberOutput]:
    """Pass a signal to the machine as its driver does, and drain it."""
    text = encode_signal(signal)
    machine.receive_message(decode_server_signal_untrusted(text), now)
    return drain(machine)


def sent(outputs: list[MemberOutput]) -> list[Signal]:
    return [
        decode_signal_untrusted(output.text)
        for output in outputs
        if isinstance(output, SendText)
    ]


def in_state(state: MemberState, metadata: Metadata = NOTHING) -> RoomMember:
    """Bring a member into a state, with nothing left to drain."""
    machine = member(metadata)
    if state is S.WAITING:
        machine.connect_failed("why", NOW)
    elif state is not S.CONNECTING:
        machine.connected(NOW)
        if state in (S.REGISTERING, S.REGISTERED):
            receive(machine, Challenge(NONCE))
        if state is S.REGISTERED:
            receive(machine, WELCOME)
        if state is S.ENDED:
            receive(machine, ErrorSignal("REGISTRATION_REFUSED", "why"))
    drain(machine)
    assert machine.state is state
    return machine


# --------------------------------------------------------------------- golden paths


def test_a_member_asks_for_a_connection_first() -> None:
    assert drain(member()) == [Connect()]


def test_a_member_registers_with_a_valid_signature() -> None:
    machine = member(Metadata(("t",), {"a": 1}))
    drain(machine)
    machine.connected(NOW)
    [register] = sent(receive(machine, Challenge(NONCE)))
    assert isinstance(register, Register)
    assert (register.peer_id, register.room_id, register.role) == (
        "me",
        KEYS.room_id,
        "worker",
    )
    assert register.metadata == Metadata(("t",), {"a": 1})
    assert verify_registration(
        register.public_key, register.room_id, NONCE, "me", register.signature
    )
    assert receive(machine, WELCOME) == [Registered()]


def test_a_member_and_the_server_understand_each_other() -> None:
    server, machine = RoomServer(), member()
    drain(machine)
    machine.connected(NOW)
    server.connection_opened(1, NONCE, NOW)
    events: list[MemberOutput] = []
    for _ in range(4):
        while (output := server.next_output()) is not None:
            if isinstance(output, Deliver):
                signal = decode_server_signal_untrusted(output.text)
                machine.receive_message(signal, NOW)
        for event in drain(machine):
            if isinstance(event, SendText):
                sent_signal = decode_peer_signal_untrusted(event.text)
                server.receive_message(1, sent_signal, NOW)
            elif event == Registered():
                machine.discover(Filters())
                machine.send_offer("absent", "sealed")
                events.append(event)
            else:
                events.append(event)
    assert events == [Registered(), PeersListed(0, ()), PeerUnreachable("absent")]


def test_lists_carry_the_number_of_their_request() -> None:
    machine = in_state(S.REGISTERED)
    first, second = machine.discover(Filters()), machine.discover(Filters("worker"))
    assert first != second
    assert sent(drain(machine)) == [
        DiscoverPeers("me"),
        DiscoverPeers("me", Filters("worker")),
    ]
    peers = (PeerInfo("you", "worker", Metadata()),)
    assert receive(machine, PeerList("me", peers, 1)) == [PeersListed(first, peers)]
    assert receive(machine, PeerList("me", (), 0)) == [PeersListed(second, ())]


def test_offers_and_answers_pass() -> None:
    machine = in_state(S.REGISTERED)
    machine.send_offer("you", "one")
    machine.send_answer("you", "two")
    assert sent(drain(machine)) == [
        OfferSignal("me", "you", "one"),
        AnswerSignal("me", "you", "two"),
    ]
    assert receive(machine, OfferSignal("you", "me", "three")) == [
        OfferReceived("you", "three")
    ]
    assert receive(machine, AnswerSignal("you", "me", "four")) == [
        AnswerReceived("you", "four")
    ]


def test_errors_become_events() -> None:
    machine = in_state(S.REGISTERED)
    unreachable = ErrorSignal("PEER_NOT_FOUND", "why", "you")
    assert receive(machine, unreachable) == [PeerUnreachable("you")]
    assert receive(machine, ErrorSignal("NOT_YOU", "a\x1b[2Jb")) == [
        ServerComplained("NOT_YOU", "ab")
    ]
    # Only this code with a target is about a peer.
    for other in (ErrorSignal("PEER_NOT_FOUND", "why"), ErrorSignal("X", "why", "you")):
        assert receive(machine, other) == [ServerComplained(other.code, "why")]
    assert machine.state is S.REGISTERED


@pytest.mark.parametrize(
    "signal", [MetadataUpdated("me", Metadata()), DiscoverPeers("you")]
)
def test_a_message_for_other_peers_is_ignored(signal: Signal) -> None:
    assert receive(in_state(S.REGISTERED), signal) == []


# --------------------------------------------------------------------------- metadata


def test_changes_are_sent_at_once_and_after_a_reconnection() -> None:
    machine = in_state(S.REGISTERED, Metadata(("t",), {"a": 1}))
    machine.update_metadata({"b": 2})
    whole = Metadata(("t",), {"a": 1, "b": 2})
    assert sent(drain(machine)) == [
        UpdateMetadata("me", MetadataChange(whole.properties, whole.tags))
    ]
    machine.connection_lost("why", NOW)
    machine.update_metadata({"c": 3})
    assert sent(drain(machine)) == []
    deadline = machine.deadline()
    assert deadline is not None
    machine.handle_timeout(deadline)
    machine.connected(NOW)
    [register] = sent(receive(machine, Challenge(NONCE)))
    assert isinstance(register, Register)
    assert register.metadata.properties == {"a": 1, "b": 2, "c": 3}
    assert sent(receive(machine, WELCOME)) == []


def test_a_change_while_registering_follows_the_registration() -> None:
    machine = in_state(S.REGISTERING)
    machine.update_metadata({"a": 1})
    assert drain(machine) == []
    assert sent(receive(machine, WELCOME)) == [
        UpdateMetadata("me", MetadataChange({"a": 1}, ()))
    ]


def test_a_change_that_changes_nothing_is_not_sent() -> None:
    machine = in_state(S.REGISTERED, Metadata((), {"a": 1}))
    machine.update_metadata({"a": 1})
    assert drain(machine) == []
    machine.update_metadata({"a": 2})
    assert len(sent(drain(machine))) == 1
    machine.update_metadata({"a": 2})
    assert drain(machine) == []


def test_too_much_metadata_is_our_own_fault() -> None:
    with pytest.raises(LocalProtocolError):
        member(Metadata((), {"x": "y" * MAX_METADATA_BYTES}))
    machine = in_state(S.REGISTERED)
    with pytest.raises(LocalProtocolError):
        machine.update_metadata({"x": "y" * MAX_METADATA_BYTES})
    assert drain(machine) == []


# ----------------------------------------------------------------------- reconnection


def test_failed_attempts_are_repeated_ever_more_slowly() -> None:
    machine = member(random=0.999999)
    drain(machine)
    now, delays = NOW, []
    for _ in range(8):
        machine.connect_failed("refused", now)
        [event] = drain(machine)
        assert isinstance(event, Reconnecting)
        assert event.reason == "refused"
        delays.append(round(event.delay, 3))
        assert machine.deadline() == now + event.delay
        now += event.delay
        machine.handle_timeout(now)
        assert drain(machine) == [Connect()]
        assert machine.deadline() is None
    assert delays == [0.5, 1, 2, 4, 8, 16, 30, 30]


@pytest.mark.parametrize(
    ("lasted", "next_delay"), [(0.0, 1.0), (LIMITS.stable_after, 0.25)]
)
def test_only_a_stable_registration_resets_the_backoff(
    lasted: float, next_delay: float
) -> None:
    machine = member()
    now = NOW
    for _ in range(2):
        machine.connect_failed("refused", now)
        now = machine.deadline() or 0.0
        machine.handle_timeout(now)
    machine.connected(now)
    receive(machine, Challenge(NONCE), now)
    receive(machine, WELCOME, now)
    machine.connection_lost("gone", now + lasted)
    assert drain(machine) == [Reconnecting(next_delay, "gone")]


def test_a_stable_registration_resets_the_backoff_once() -> None:
    machine = in_state(S.REGISTERED)
    now = NOW + LIMITS.stable_after
    machine.connection_lost("gone", now)
    delays = [0.25]
    for _ in range(3):
        drain(machine)
        now = machine.deadline() or 0.0
        machine.handle_timeout(now)
        machine.connect_failed("refused", now)
        delays.append((machine.deadline() or 0.0) - now)
    assert delays == [0.25, 0.5, 1.0, 2.0]


@pytest.mark.parametrize("state", [S.OPENING, S.REGISTERING, S.REGISTERED])
def test_a_lost_connection_is_made_again(state: MemberState) -> None:
    machine = in_state(state)
    machine.connection_lost("gone", NOW)
    assert machine.state is S.WAITING
    assert not machine.is_connected
    assert drain(machine) == [Reconnecting(0.25, "gone")]
    machine.handle_timeout(NOW + 0.25)
    assert drain(machine) == [Connect()]
    machine.connected(NOW)
    receive(machine, Challenge(NONCE))
    assert receive(machine, WELCOME) == [Registered()]


def test_a_request_does_not_outlive_its_connection() -> None:
    machine = in_state(S.REGISTERED)
    lost = machine.discover(Filters())
    machine.connection_lost("gone", NOW)
    machine.handle_timeout(NOW + 1)
    machine.connected(NOW)
    receive(machine, Challenge(NONCE))
    receive(machine, WELCOME)
    request = machine.discover(Filters())
    assert request != lost
    drain(machine)
    assert receive(machine, PeerList("me", (), 0)) == [PeersListed(request, ())]


@pytest.mark.parametrize(
    ("state", "seconds", "reason"),
    [
        (
            S.OPENING,
            LIMITS.registration_timeout,
            "did not complete the registration in time",
        ),
        (
            S.REGISTERING,
            LIMITS.registration_timeout,
            "did not complete the registration in time",
        ),
        (S.REGISTERED, LIMITS.silence_timeout, "fell silent"),
    ],
)
def test_the_connection_to_a_silent_server_is_closed(
    state: MemberState, seconds: float, reason: str
) -> None:
    machine = in_state(state)
    assert machine.deadline() == NOW + seconds
    machine.handle_timeout(NOW + seconds - 0.1)
    assert drain(machine) == []
    machine.handle_timeout(NOW + seconds)
    whole = f"the signaling server {reason}"
    assert drain(machine) == [Close(whole), Reconnecting(0.25, whole)]
    assert machine.state is S.WAITING


def test_a_sign_of_life_of_the_server_moves_the_deadline() -> None:
    machine = in_state(S.REGISTERED)
    machine.heard_from(NOW + 50)
    assert machine.deadline() == NOW + 50 + LIMITS.silence_timeout
    receive(machine, MetadataUpdated("me", NOTHING), NOW + 60)
    assert machine.deadline() == NOW + 60 + LIMITS.silence_timeout
    # Before the registration only progress counts.
    machine = in_state(S.OPENING)
    machine.heard_from(NOW + 5)
    assert machine.deadline() == NOW + LIMITS.registration_timeout


# --------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("state", [S.OPENING, S.REGISTERING])
@pytest.mark.parametrize("code", ["REGISTRATION_REFUSED", "METADATA_TOO_LARGE", "NEW"])
def test_a_refusal_is_final(state: MemberState, code: str) -> None:
    machine = in_state(state)
    assert machine.refusal == ""
    outputs = receive(machine, ErrorSignal(code, "wrong\nkey"))
    assert outputs == [Close("wrong key"), RegistrationRefused("wrong key")]
    assert machine.refusal == "wrong key"
    assert machine.state is S.ENDED
    assert machine.deadline() is None


@pytest.mark.parametrize("code", ["ROOM_FULL", "SERVER_FULL", "TOO_MANY_MESSAGES"])
def test_a_full_room_is_tried_again(code: str) -> None:
    machine = in_state(S.REGISTERING)
    assert receive(machine, ErrorSignal(code, "the room is full")) == []
    machine.connection_lost("it closed", NOW)
    assert drain(machine) == [Reconnecting(0.25, "the room is full")]


def test_a_complaint_explains_the_end_of_its_own_connection_only() -> None:
    machine = in_state(S.REGISTERING)
    receive(machine, ErrorSignal("ROOM_FULL", "the room is full"))
    machine.connection_lost("it closed", NOW)
    machine.handle_timeout(NOW + 1)
    machine.connected(NOW + 1)
    drain(machine)
    machine.connection_lost("the cable is cut", NOW + 1)
    assert drain(machine) == [Reconnecting(0.5, "the cable is cut")]


def test_a_list_without_a_request_is_an_error() -> None:
    with pytest.raises(RemoteProtocolError, match="without a request"):
        receive(in_state(S.REGISTERED), PeerList("me", (), 0))


# ------------------------------------------------------- every state by every input

CONNECTED = {S.OPENING, S.REGISTERING, S.REGISTERED}

LOCAL = {T.CONNECTED, T.CONNECT_FAILED, T.CONNECTION_LOST}

ACTIONS: dict[Trigger, tuple[Callable[[RoomMember], object], list[type]]] = {
    T.CONNECTED: (lambda m: m.connected(NOW), []),
    T.CONNECT_FAILED: (lambda m: m.connect_failed("why", NOW), [Reconnecting]),
    T.CONNECTION_LOST: (lambda m: m.connection_lost("why", NOW), [Reconnecting]),
    T.TIMEOUT: (lambda m: m.handle_timeout(NOW + 1000), [Close, Reconnecting]),
    T.REFUSED: (
        lambda m: m.receive_message(ErrorSignal("REGISTRATION_REFUSED", "why"), NOW),
        [Close, RegistrationRefused],
    ),
    Challenge: (lambda m: m.receive_message(Challenge(NONCE), NOW), [SendText]),
    RegisteredAuth: (lambda m: m.receive_message(WELCOME, NOW), [Registered]),
}
"""The cause of each trigger, and its outputs where the table allows it."""


def test_every_state_and_trigger_is_tested() -> None:
    assert set(TRANSITIONS) == set(S)
    assert set().union(*TRANSITIONS.values()) == set(ACTIONS)


@pytest.mark.parametrize("state", S)
@pytest.mark.parametrize("trigger", ACTIONS)
def test_a_trigger_leads_to_the_state_of_the_table(
    trigger: Trigger, state: MemberState
) -> None:
    act, outputs = ACTIONS[trigger]
    machine = in_state(state)
    deadline = machine.deadline()
    if trigger in TRANSITIONS[state]:
        act(machine)
        assert machine.state is TRANSITIONS[state][trigger]
        if (state, trigger) == (S.WAITING, T.TIMEOUT):
            outputs = [Connect]
        assert [type(output) for output in drain(machine)] == outputs
        return
    if trigger in LOCAL:
        with pytest.raises(LocalProtocolError, match=state.name):
            act(machine)
    elif isinstance(trigger, type) and state in CONNECTED:
        with pytest.raises(RemoteProtocolError, match=state.name):
            act(machine)
    else:
        # Nothing is due, or the message is left over from an earlier connection.
        act(machine)
    assert (machine.state, machine.deadline()) == (state, deadline)
    is_complaint = (state, trigger) == (S.REGISTERED, T.REFUSED)
    expected: list[type] = [ServerComplained] if is_complaint else []
    assert [type(output) for output in drain(machine)] == expected


@pytest.mark.parametrize("state", S)
@pytest.mark.parametrize(
    "command",
    [
        lambda m: m.discover(Filters()),
        lambda m: m.send_offer("you", "x"),
        lambda m: m.send_answer("you", "x"),
    ],
)
def test_messages_are_sent_to_the_room_only_by_a_registered_member(
    command: Callable[[RoomMember], object], state: MemberState
) -> None:
    machine = in_state(state)
    if state is S.REGISTERED:
        command(machine)
        assert [type(output) for output in drain(machine)] == [SendText]
    else:
        with pytest.raises(LocalProtocolError, match=state.name):
            command(machine)
        assert drain(machine) == []
    assert machine.state is state


@pytest.mark.parametrize("state", S)
@pytest.mark.parametrize(
    "act",
    [
        lambda m: m.update_metadata({"a": 1}),
        lambda m: m.heard_from(NOW),
        lambda m: m.handle_timeout(NOW),
        lambda m: m.receive_message(MetadataUpdated("me", Metadata()), NOW),
        lambda m: m.receive_message(UnknownSignal("ping"), NOW),
    ],
)
def test_other_inputs_change_no_state(
    act: Callable[[RoomMember], object], state: MemberState
) -> None:
    machine = in_state(state)
    act(machine)
    assert machine.state is state
