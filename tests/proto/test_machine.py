"""Transitions are looked up in a table; what is not there is somebody's fault."""

from enum import Enum, auto

import pytest

from sleap_rtc.proto.errors import LocalProtocolError, RemoteProtocolError
from sleap_rtc.proto.machine import Table, move, move_untrusted


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


def test_any_other_trigger_is_the_fault_of_the_responsible_side() -> None:
    with pytest.raises(LocalProtocolError, match="CLOSE is not expected in"):
        move(TABLE, State.CLOSED, Trigger.CLOSE)
    with pytest.raises(RemoteProtocolError, match="CLOSE is not expected in"):
        move_untrusted(TABLE, State.CLOSED, Trigger.CLOSE)
