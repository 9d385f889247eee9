"""One peer's side of the signaling server, without a network."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sleap_rtc.proto.errors import LocalProtocolError, RemoteProtocolError
from sleap_rtc.proto.rendezvous.invite import RoomKeys, verify_registration
from sleap_rtc.proto.rendezvous.member import (
    REGISTRATION_SECONDS,
    SILENCE_SECONDS,
    STABLE_SECONDS,
    TRANSITIONS,
    Backoff,
    MemberState,
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
    MAX_LIST_BYTES,
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
    UpdateMetadata,
    decode_signal_untrusted,
    encode_signal,
)
from sleap_rtc.proto.rendezvous.server import Deliver, RoomServer

KEYS = RoomKeys.from_secret(b"k" * 32)
NOW = 1000.0
NONCE = b"n" * 16
NOTHING = Metadata()
S = MemberState
WELCOME = RegisteredAuth(KEYS.room_id, "me")


class Fixed:
    """A source of the same number for ever."""

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
    machine.receive_text_untrusted(encode_signal(signal), now)
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
        machine.connect_failed(NOW, "why")
    elif state is S.ENDED:
        machine.close()
    elif state is not S.CONNECTING:
        machine.connected(NOW)
        if state is not S.OPENING:
            receive(machine, Challenge(NONCE))
        if state is S.REGISTERED:
            receive(machine, WELCOME)
    drain(machine)
    assert machine.state is state
    return machine


# ----------------------------------------------------------------------- the good way


def test_it_asks_for_a_connection_first() -> None:
    assert drain(member()) == [Connect()]


def test_it_registers_with_a_signature_that_holds() -> None:
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


def test_it_and_the_server_understand_each_other() -> None:
    server, machine = RoomServer(), member()
    drain(machine)
    machine.connected(NOW)
    server.connection_opened(1, NONCE, NOW)
    events: list[MemberOutput] = []
    for _ in range(4):
        while (output := server.next_output()) is not None:
            if isinstance(output, Deliver):
                machine.receive_text_untrusted(output.text, NOW)
        for event in drain(machine):
            if isinstance(event, SendText):
                server.receive_text_untrusted(1, event.text, NOW)
            elif event == Registered():
                machine.discover(Filters())
                machine.send_offer("nobody", "sealed")
                events.append(event)
            else:
                events.append(event)
    assert events == [Registered(), PeersListed(0, ()), PeerUnreachable("nobody")]


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
    assert machine.state is S.REGISTERED


@pytest.mark.parametrize(
    "signal", [MetadataUpdated("me", Metadata()), DiscoverPeers("you")]
)
def test_what_is_of_no_interest_is_ignored(signal: Signal) -> None:
    assert receive(in_state(S.REGISTERED), signal) == []


# --------------------------------------------------------------------------- metadata


def test_changes_are_sent_at_once_and_after_a_reconnection() -> None:
    machine = in_state(S.REGISTERED, Metadata(("t",), {"a": 1}))
    machine.update_metadata({"b": 2})
    whole = Metadata(("t",), {"a": 1, "b": 2})
    assert sent(drain(machine)) == [
        UpdateMetadata("me", MetadataChange(whole.properties, whole.tags))
    ]
    machine.connection_lost(NOW, "why")
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


def test_too_much_metadata_is_our_own_fault() -> None:
    with pytest.raises(LocalProtocolError):
        member(Metadata((), {"x": "y" * MAX_METADATA_BYTES}))
    machine = in_state(S.REGISTERED)
    with pytest.raises(LocalProtocolError):
        machine.update_metadata({"x": "y" * MAX_METADATA_BYTES})
    assert drain(machine) == []


# ----------------------------------------------------------------------- reconnection


def test_the_delay_doubles_up_to_a_limit() -> None:
    backoff = Backoff()
    assert [backoff.delay(n, 1.0) for n in range(1, 9)] == [
        0.5,
        1,
        2,
        4,
        8,
        16,
        30,
        30,
    ]
    assert backoff.delay(10**6, 1.0) == 30
    assert backoff.delay(1, 0.0) == 0.25


def test_failures_are_tried_again_ever_more_slowly() -> None:
    machine = member(random=0.999999)
    drain(machine)
    now, delays = NOW, []
    for _ in range(8):
        machine.connect_failed(now, "refused")
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


@pytest.mark.parametrize(("lasted", "next_delay"), [(0.0, 1.0), (STABLE_SECONDS, 0.25)])
def test_only_a_stable_registration_starts_the_backoff_anew(
    lasted: float, next_delay: float
) -> None:
    machine = member()
    now = NOW
    for _ in range(2):
        machine.connect_failed(now, "refused")
        now = machine.deadline() or 0.0
        machine.handle_timeout(now)
    machine.connected(now)
    receive(machine, Challenge(NONCE), now)
    receive(machine, WELCOME, now)
    machine.connection_lost(now + lasted, "gone")
    assert drain(machine) == [Reconnecting(next_delay, "gone")]


@pytest.mark.parametrize("state", [S.OPENING, S.REGISTERING, S.REGISTERED])
def test_a_lost_connection_is_made_again(state: MemberState) -> None:
    machine = in_state(state)
    machine.connection_lost(NOW, "gone")
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
    machine.connection_lost(NOW, "gone")
    machine.handle_timeout(NOW + 1)
    machine.connected(NOW)
    receive(machine, Challenge(NONCE))
    receive(machine, WELCOME)
    request = machine.discover(Filters())
    assert request != lost
    drain(machine)
    assert receive(machine, PeerList("me", (), 0)) == [PeersListed(request, ())]


@pytest.mark.parametrize(
    ("state", "seconds"),
    [
        (S.OPENING, REGISTRATION_SECONDS),
        (S.REGISTERING, REGISTRATION_SECONDS),
        (S.REGISTERED, SILENCE_SECONDS),
    ],
)
def test_a_silent_server_is_left(state: MemberState, seconds: float) -> None:
    machine = in_state(state)
    assert machine.deadline() == NOW + seconds
    machine.handle_timeout(NOW + seconds - 0.1)
    assert drain(machine) == []
    machine.handle_timeout(NOW + seconds)
    close, reconnecting = drain(machine)
    assert isinstance(close, Close)
    assert reconnecting == Reconnecting(0.25, close.reason)
    assert machine.state is S.WAITING


def test_pings_show_that_the_server_lives() -> None:
    machine = in_state(S.REGISTERED)
    machine.heard_from(NOW + 50)
    assert machine.deadline() == NOW + 50 + SILENCE_SECONDS
    # Before the registration only progress counts.
    machine = in_state(S.OPENING)
    machine.heard_from(NOW + 5)
    assert machine.deadline() == NOW + REGISTRATION_SECONDS


# --------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("state", [S.OPENING, S.REGISTERING])
@pytest.mark.parametrize("code", ["REGISTRATION_REFUSED", "METADATA_TOO_LARGE", "NEW"])
def test_a_refusal_is_final(state: MemberState, code: str) -> None:
    machine = in_state(state)
    outputs = receive(machine, ErrorSignal(code, "wrong\nkey"))
    assert outputs == [Close("wrong key"), RegistrationRefused("wrong key")]
    assert machine.state is S.ENDED
    assert machine.deadline() is None


@pytest.mark.parametrize("code", ["ROOM_FULL", "SERVER_FULL", "TOO_MANY_MESSAGES"])
def test_a_full_room_is_tried_again(code: str) -> None:
    machine = in_state(S.REGISTERING)
    assert receive(machine, ErrorSignal(code, "the room is full")) == []
    machine.connection_lost(NOW, "it closed")
    assert drain(machine) == [Reconnecting(0.25, "the room is full")]


@given(st.text(max_size=40))
def test_garbage_of_the_server_changes_nothing(text: str) -> None:
    machine = in_state(S.REGISTERED)
    with pytest.raises(RemoteProtocolError):
        machine.receive_text_untrusted(text, NOW)
    assert machine.state is S.REGISTERED
    assert drain(machine) == []


def test_a_list_of_a_full_room_is_taken() -> None:
    machine = in_state(S.REGISTERED)
    text = '{"type":"x","y":"' + "z" * (MAX_LIST_BYTES - 20) + '"}'
    machine.receive_text_untrusted(text, NOW)
    with pytest.raises(RemoteProtocolError):
        machine.receive_text_untrusted(text + " " * 20, NOW)


def test_an_unasked_list_is_an_error() -> None:
    with pytest.raises(RemoteProtocolError, match="nobody asked"):
        receive(in_state(S.REGISTERED), PeerList("me", (), 0))


# ------------------------------------------------------- every state by every input

CONNECTED = {S.OPENING, S.REGISTERING, S.REGISTERED}

LOCAL: dict[str, tuple[Callable[[RoomMember], object], dict[MemberState, MemberState]]]
LOCAL = {
    "connected": (lambda m: m.connected(NOW), {S.CONNECTING: S.OPENING}),
    "connect_failed": (
        lambda m: m.connect_failed(NOW, "why"),
        {S.CONNECTING: S.WAITING},
    ),
    "connection_lost": (
        lambda m: m.connection_lost(NOW, "why"),
        dict.fromkeys(CONNECTED, S.WAITING),
    ),
    "close": (lambda m: m.close(), dict.fromkeys(S, S.ENDED)),
    "discover": (lambda m: m.discover(Filters()), {S.REGISTERED: S.REGISTERED}),
    "send_offer": (lambda m: m.send_offer("you", "x"), {S.REGISTERED: S.REGISTERED}),
    "send_answer": (lambda m: m.send_answer("you", "x"), {S.REGISTERED: S.REGISTERED}),
    "update_metadata": (
        lambda m: m.update_metadata({"a": 1}),
        {state: state for state in S},
    ),
    "heard_from": (lambda m: m.heard_from(NOW), {state: state for state in S}),
    "early timeout": (lambda m: m.handle_timeout(NOW), {state: state for state in S}),
    "timeout": (
        lambda m: m.handle_timeout(NOW + 1000),
        {
            **dict.fromkeys(CONNECTED, S.WAITING),
            S.WAITING: S.CONNECTING,
            S.CONNECTING: S.CONNECTING,
            S.ENDED: S.ENDED,
        },
    ),
}


@pytest.mark.parametrize("state", S)
@pytest.mark.parametrize("name", LOCAL)
def test_every_call_in_every_state(name: str, state: MemberState) -> None:
    call, targets = LOCAL[name]
    machine = in_state(state)
    if state in targets:
        call(machine)
        assert machine.state is targets[state]
        return
    deadline = machine.deadline()
    with pytest.raises(LocalProtocolError, match=state.name):
        call(machine)
    assert (machine.state, machine.deadline()) == (state, deadline)
    assert drain(machine) == []


REMOTE: dict[str, tuple[Signal, dict[MemberState, MemberState]]] = {
    "challenge": (Challenge(NONCE), {S.OPENING: S.REGISTERING}),
    "registered_auth": (WELCOME, {S.REGISTERING: S.REGISTERED}),
    "refusal": (
        ErrorSignal("REGISTRATION_REFUSED", "why"),
        {S.OPENING: S.ENDED, S.REGISTERING: S.ENDED, S.REGISTERED: S.REGISTERED},
    ),
    "peer_list": (PeerList("me", (), 0), {}),
    "offer": (OfferSignal("you", "me", "x"), {state: state for state in CONNECTED}),
    "answer": (AnswerSignal("you", "me", "x"), {state: state for state in CONNECTED}),
    "metadata_updated": (
        MetadataUpdated("me", Metadata()),
        {state: state for state in CONNECTED},
    ),
}


@pytest.mark.parametrize("state", S)
@pytest.mark.parametrize("name", REMOTE)
def test_every_message_in_every_state(name: str, state: MemberState) -> None:
    signal, targets = REMOTE[name]
    machine = in_state(state)
    if state not in CONNECTED:
        # Left over from a connection that the machine has given up.
        assert receive(machine, signal) == []
        assert machine.state is state
    elif state in targets:
        receive(machine, signal)
        assert machine.state is targets[state]
    else:
        with pytest.raises(RemoteProtocolError):
            receive(machine, signal)
        assert machine.state is state
        assert drain(machine) == []


def test_the_table_names_every_state() -> None:
    assert set(TRANSITIONS) == set(S)


@pytest.mark.parametrize("state", S)
def test_closing_closes_the_connection_once(state: MemberState) -> None:
    machine = in_state(state)
    machine.close()
    assert drain(machine) == ([Close("done")] if state in CONNECTED else [])
    machine.close()
    assert drain(machine) == []
    assert machine.deadline() is None
