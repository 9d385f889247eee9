"""The table of a machine, and the verbs that all machines share."""

import importlib
import pkgutil
from enum import Enum, auto
from types import ModuleType

import pytest

from sleap_rtc import proto
from sleap_rtc.proto import machine
from sleap_rtc.proto.errors import LocalProtocolError, RemoteProtocolError
from sleap_rtc.proto.machine import (
    Accepted,
    Table,
    accept_untrusted,
    move,
    move_untrusted,
)

MODULES = [
    importlib.import_module(each.name)
    for each in pkgutil.walk_packages(proto.__path__, f"{proto.__name__}.")
]

# ------------------------------------------------------------------------- verbs


def test_every_machine_is_a_subclass_of_the_protocols_that_it_follows() -> None:
    machines = {
        each
        for module in MODULES
        for each in vars(module).values()
        if isinstance(each, type) and hasattr(each, "next_output")
        if each.__module__ == module.__name__ != machine.__name__
    }
    assert len(machines) >= 9
    for each in machines:
        assert machine.__name__ in {base.__module__ for base in each.__mro__}


# --------------------------------------------------------------------------- tables


@pytest.mark.parametrize(
    "module",
    [each for each in MODULES if hasattr(each, "TRANSITIONS")],
    ids=lambda each: each.__name__,
)
def test_every_state_of_a_table_has_a_row_and_a_way_to_it(module: ModuleType) -> None:
    table: Table[Enum] = module.TRANSITIONS
    first, *others = type(next(iter(table)))
    reachable, found = {first}, [first]
    while found:
        new = set(table[found.pop()].values()) - reachable
        reachable |= new
        found += new
    assert set(table) == reachable == {first, *others}


def test_every_state_of_a_machine_is_in_a_table() -> None:
    in_tables = {
        type(next(iter(module.TRANSITIONS)))
        for module in MODULES
        if hasattr(module, "TRANSITIONS")
    }
    states = {
        each
        for module in MODULES
        for each in vars(module).values()
        if isinstance(each, type) and issubclass(each, Enum)
        if each.__name__.endswith(("State", "Phase"))
    }
    assert states == in_tables


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


class Greeting:
    pass


ACCEPTED: Accepted[State] = {
    State.OPEN: frozenset({Greeting}),
    State.CLOSED: frozenset(),
}


def test_an_accepted_message_does_not_change_the_state() -> None:
    assert accept_untrusted(TABLE, ACCEPTED, State.OPEN, Greeting) is State.OPEN
    assert accept_untrusted(TABLE, ACCEPTED, State.OPEN, Goodbye) is State.CLOSED
    with pytest.raises(RemoteProtocolError, match="Greeting is not expected in"):
        accept_untrusted(TABLE, ACCEPTED, State.CLOSED, Greeting)


def test_any_other_trigger_is_a_fault_of_the_responsible_side() -> None:
    with pytest.raises(LocalProtocolError, match="CLOSE is not expected in"):
        move(TABLE, State.CLOSED, Trigger.CLOSE)
    with pytest.raises(RemoteProtocolError, match="CLOSE is not expected in"):
        move_untrusted(TABLE, State.CLOSED, Trigger.CLOSE)
