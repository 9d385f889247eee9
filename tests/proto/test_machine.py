"""The table of a machine, and the verbs that all machines share."""

from enum import Enum, auto

import pytest

from sleap_rtc.proto.errors import LocalProtocolError, RemoteProtocolError
from sleap_rtc.proto.machine import (
    ReconnectingMachine,
    ServerMachine,
    Table,
    move,
    move_untrusted,
)
from sleap_rtc.proto.rendezvous.member import RoomMember
from sleap_rtc.proto.rendezvous.member_outputs import MemberOutput
from sleap_rtc.proto.rendezvous.messages import Signal
from sleap_rtc.proto.rendezvous.server import RoomServer, ServerOutput

# ------------------------------------------------------- which machine has which verbs


def check_types(member: RoomMember, server: RoomServer) -> None:
    """Let mypy check each machine against its protocol. This function never runs."""
    _member: ReconnectingMachine[Signal, MemberOutput] = member
    _server: ServerMachine[Signal, ServerOutput] = server


# --------------------------------------------------------------------------- tables


class State(Enum):
    OPEN = auto()
    CLOSED = auto()


class Trigger(Enum):
    CLOSE = auto()


class Goodbye:
    pass


TABLE: Table[State] = {
    State.OPEN: {Trigger.CLOSE: State.CLOSED, Goodbye: State.CLOSED},
    State.CLOSED: {Goodbye: State.CLOSED},
}


def test_a_trigger_of_the_table_leads_to_its_state() -> None:
    assert move(TABLE, State.OPEN, Trigger.CLOSE) is State.CLOSED
    assert move_untrusted(TABLE, State.OPEN, Goodbye) is State.CLOSED


def test_any_other_trigger_is_a_fault_of_the_responsible_side() -> None:
    with pytest.raises(LocalProtocolError, match="CLOSE is not expected in"):
        move(TABLE, State.CLOSED, Trigger.CLOSE)
    with pytest.raises(RemoteProtocolError, match="CLOSE is not expected in"):
        move_untrusted(TABLE, State.CLOSED, Trigger.CLOSE)
