"""The common part of all sessions; their behaviour is tested with each kind."""

import pytest

from sleap_rtc.io.link.session import TRANSITIONS, Ended, Phase, ProofShown, Step
from sleap_rtc.io.quic.session import Output, QuicSession
from sleap_rtc.io.tcp.session import TcpSession
from sleap_rtc.proto.errors import LocalProtocolError
from sleap_rtc.proto.machine import TimedPolicy, Trigger, move
from sleap_rtc.proto.messages import Auth, Message


def check_types(tcp: TcpSession[Message], quic: QuicSession[Message]) -> None:
    """Check the sessions against the verbs of all machines, in mypy."""
    _tcp: TimedPolicy[ProofShown] = tcp
    _quic: TimedPolicy[Output] = quic


def test_every_phase_is_in_the_table_and_none_leads_back() -> None:
    order: list[Phase | type[Ended]] = [*Phase, Ended]
    assert list(TRANSITIONS) == order
    for phase, row in TRANSITIONS.items():
        assert all(order.index(then) > order.index(phase) for then in row.values())
    assert {p for row in TRANSITIONS.values() for p in row.values()} == set(order[1:])


def test_every_phase_may_end_and_the_end_stays() -> None:
    assert all(TRANSITIONS[phase][Step.ENDED] is Ended for phase in Phase)
    assert not TRANSITIONS[Ended]


@pytest.mark.parametrize("phase", [*Phase, Ended])
@pytest.mark.parametrize("trigger", [Auth, *Step])
def test_a_trigger_outside_the_table_is_a_mistake(
    phase: Phase | type[Ended], trigger: Trigger
) -> None:
    if trigger in TRANSITIONS[phase]:
        assert move(TRANSITIONS, phase, trigger) is TRANSITIONS[phase][trigger]
        return
    with pytest.raises(LocalProtocolError):
        move(TRANSITIONS, phase, trigger)


@pytest.mark.parametrize(
    ("ended", "text"),
    [
        (Ended("no answer for 10 s", is_fault=True), "host:1: no answer for 10 s"),
        (Ended("enough for today"), "enough for today"),
    ],
)
def test_a_fault_names_the_address_of_the_peer(ended: Ended, text: str) -> None:
    assert ended.describe("host:1") == text
