"""The verbs and the table of transitions that all machines of proto/ share.

A machine gets input from the world (`receive_message`, `handle_timeout`, the state of
its connection) and commands of its owner. After each of them the driver drains
`next_output` until it returns None, and then reads `deadline`. The protocols below
name these verbs, and every machine is a subclass of those that it follows.

The transitions of a machine are one `Table`: states down, triggers across. A
trigger is a message class or the member of an enumeration. Every cell is followed: the
machine assigns the state that `move` or `move_untrusted` returns. Two sets for each
state complete the table. `ACCEPTED` holds the messages that are not triggers: the state
does not change, or a guard in code picks the trigger (`accept_untrusted`). `IGNORED`
holds the triggers that arrive too late to matter: nothing happens. A pair that is
neither in the table nor in one of the sets is a mistake: the caller's (`move`), or the
peer's (`move_untrusted`).
"""

from collections.abc import Mapping
from enum import Enum
from typing import Protocol, TypeVar

from sleap_rtc.proto.errors import LocalProtocolError, RemoteProtocolError

StateT = TypeVar("StateT", bound=Enum | type)
"""A state: a member of an enumeration, or the class of a state that holds data."""

Trigger = Enum | type
"""The cause of a transition: a member of an enumeration, or the class of a message."""

Table = Mapping[StateT, Mapping[Trigger, StateT]]
"""The next state, for each state and each of its triggers."""

Accepted = Mapping[StateT, frozenset[Trigger]]
"""The messages that each state handles, and that are not triggers of its row."""

Ignored = Mapping[StateT, frozenset[Trigger]]
"""The triggers that arrive too late to matter in each state; nothing happens."""

MessageT = TypeVar("MessageT", contravariant=True)
OutputT = TypeVar("OutputT", covariant=True)


class Machine(Protocol[MessageT, OutputT]):
    """A machine that depends on its messages and commands, and on nothing else.

    ``now`` is a monotonic clock in seconds, the same one for all calls.
    """

    def receive_message(self, message: MessageT, now: float) -> None:
        """Handle a message of the peer.

        Raises:
            RemoteProtocolError: If the peer may not send it now. The connection that it
                came over has to end; the machine has not changed.
        """

    def next_output(self) -> OutputT | None:
        """Remove and return the oldest effect or event; None if none is left."""


class TimedPolicy(Protocol[OutputT]):
    """A machine that depends on its commands and on time, and gets no messages."""

    def handle_timeout(self, now: float) -> None:
        """Handle everything due at `now`; nothing happens before `deadline`."""

    def next_output(self) -> OutputT | None:
        """Remove and return the oldest effect or event; None if none is left."""

    def deadline(self) -> float | None:
        """Return when `handle_timeout` has something to do; None if never."""


class TimedMachine(
    Machine[MessageT, OutputT], TimedPolicy[OutputT], Protocol[MessageT, OutputT]
):
    """A machine that depends on time as well."""


class ConnectedMachine(Machine[MessageT, OutputT], Protocol[MessageT, OutputT]):
    """A machine that outlives its connection."""

    def connection_lost(self, reason: str, now: float) -> None:
        """Handle the end of the connection.

        Args:
            reason: Why it ended, for people.
            now: The time.

        Raises:
            LocalProtocolError: If there was no connection.
        """

    def connection_restored(self, now: float) -> None:
        """Handle a new connection to the same peer.

        Raises:
            LocalProtocolError: If the connection was not lost.
        """


class ReconnectingMachine(TimedMachine[MessageT, OutputT], Protocol[MessageT, OutputT]):
    """A machine that decides itself when to connect: an output asks for it."""

    def connected(self, now: float) -> None:
        """Handle the connection that the machine asked for.

        Raises:
            LocalProtocolError: If it did not ask for one.
        """

    def connect_failed(self, reason: str, now: float) -> None:
        """Handle the failure to connect; the reason is for people.

        Raises:
            LocalProtocolError: If the machine did not ask for a connection.
        """

    def connection_lost(self, reason: str, now: float) -> None:
        """Handle the end of the connection; the reason is for people.

        Raises:
            LocalProtocolError: If there was no connection.
        """


class ServerMachine(TimedPolicy[OutputT], Protocol[MessageT, OutputT]):
    """A machine that serves many connections, so each input names one of them.

    The driver numbers the connections and never uses a number twice. Input for a
    connection that the machine has dropped is ignored. A fault of a peer is an output
    and not an exception: the other connections must not notice it.
    """

    def receive_message(self, connection: int, message: MessageT, now: float) -> None:
        """Handle a message that came over this connection."""

    def connection_lost(self, connection: int, reason: str) -> None:
        """Handle the end of this connection; the reason is for people."""


def move(table: Table[StateT], state: StateT, trigger: Trigger) -> StateT:
    """Return the next state for a trigger that the caller is responsible for.

    Raises:
        LocalProtocolError: If the trigger is not in the row of the state.
    """
    target = table[state].get(trigger)
    if target is None:
        raise LocalProtocolError(_misplaced(state, trigger))
    return target


def move_untrusted(table: Table[StateT], state: StateT, trigger: Trigger) -> StateT:
    """Return the next state for a trigger that the peer is responsible for.

    Raises:
        RemoteProtocolError: If the trigger is not in the row of the state.
    """
    target = table[state].get(trigger)
    if target is None:
        raise RemoteProtocolError(_misplaced(state, trigger))
    return target


def accept_untrusted(
    table: Table[StateT], accepted: Accepted[StateT], state: StateT, trigger: Trigger
) -> StateT:
    """Return the state after a message; an accepted one does not change it.

    Raises:
        RemoteProtocolError: If the message is neither accepted nor a trigger.
    """
    if trigger in accepted[state]:
        return state
    return move_untrusted(table, state, trigger)


def _misplaced(state: Enum | type, trigger: Trigger) -> str:
    return f"{_name(trigger)} is not expected in state {_name(state)}"


def _name(each: Enum | type) -> str:
    return each.name if isinstance(each, Enum) else each.__name__
