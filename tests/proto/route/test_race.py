"""The race of links: the attempts that are made, and the link that is kept."""

import pytest

from sleap_rtc.proto.errors import LocalProtocolError
from sleap_rtc.proto.route.kinds import LINK_KINDS
from sleap_rtc.proto.route.race import (
    Attempt,
    KeepLink,
    LinkRace,
    NoLink,
    StartAttempt,
)

A, B = ("a", 1), ("b", 2)
TCP_A, TCP_B = Attempt("tcp", A), Attempt("tcp", B)
QUIC_A, QUIC_B = Attempt("quic", A), Attempt("quic", B)

THREE = ("tcp", "quic", "relay")
"""A third kind, which the race does not name."""

RELAY_A = Attempt("relay", "the peer")  # type: ignore[arg-type]
RELAY_B = Attempt("relay", "its twin")  # type: ignore[arg-type]

TARGETS = {"tcp": (A, B), "quic": (A, B), "relay": ("the peer", "its twin")}

# At a time, in seconds: an attempt opens, or fails for a reason, or the time passes.
Input = tuple[float, Attempt | None, str]
# At a time: an attempt starts, or is kept for a reason; or (None, "lost").
Outcome = tuple[float, Attempt | None, str]

RACES: dict[str, tuple[tuple[str, ...], list[Input], list[Outcome]]] = {
    "the first link of the preferred kind wins at once": (
        LINK_KINDS,
        [(0.1, TCP_A, "")],
        [(0, TCP_A, "start"), (0.1, TCP_A, "it answered first")],
    ),
    "every kind goes through the addresses, staggered": (
        LINK_KINDS,
        [(9, None, "")],
        [
            (0, TCP_A, "start"),
            (0.25, TCP_B, "start"),
            (0.25, QUIC_A, "start"),
            (0.5, QUIC_B, "start"),
        ],
    ),
    "the next address does not wait after a failure": (
        LINK_KINDS,
        [(0.1, TCP_A, "no route"), (0.2, TCP_B, "")],
        [
            (0, TCP_A, "start"),
            (0.1, TCP_B, "start"),
            (0.2, TCP_B, "it answered first"),
        ],
    ),
    "the preferred kind has a grace after the other kind answered": (
        LINK_KINDS,
        [(0.3, QUIC_A, ""), (0.45, TCP_B, "")],
        [
            (0, TCP_A, "start"),
            (0.25, TCP_B, "start"),
            (0.25, QUIC_A, "start"),
            (0.45, TCP_B, "TCP is faster than QUIC, which answered first"),
        ],
    ),
    "after the grace the other kind wins": (
        LINK_KINDS,
        [(0.3, QUIC_A, ""), (0.55, QUIC_B, ""), (9, TCP_A, "")],
        [
            (0, TCP_A, "start"),
            (0.25, TCP_B, "start"),
            (0.25, QUIC_A, "start"),
            (0.5, QUIC_B, "start"),
            (0.6, QUIC_A, "TCP did not answer within 0.6 s"),
        ],
    ),
    "the other kind starts and wins at once when nothing else is left": (
        LINK_KINDS,
        [(0.1, TCP_A, "refused"), (0.1, TCP_B, "refused"), (0.2, QUIC_A, "")],
        [
            (0, TCP_A, "start"),
            (0.1, TCP_B, "start"),
            (0.1, QUIC_A, "start"),
            (0.2, QUIC_A, "TCP was not reachable: refused"),
        ],
    ),
    "a grace ends when the last attempt of the preferred kind fails": (
        LINK_KINDS,
        [(0.3, QUIC_A, ""), (0.4, TCP_A, "refused"), (0.45, TCP_B, "no route")],
        [
            (0, TCP_A, "start"),
            (0.25, TCP_B, "start"),
            (0.25, QUIC_A, "start"),
            (0.45, QUIC_A, "TCP was not reachable: refused, no route"),
        ],
    ),
    "a race of one kind has no grace": (
        ("quic",),
        [(0.1, QUIC_A, "")],
        [(0, QUIC_A, "start"), (0.1, QUIC_A, "it answered first")],
    ),
    "a race is lost when every attempt has failed": (
        LINK_KINDS,
        [
            (0.3, TCP_A, "no"),
            (0.3, TCP_B, "no"),
            (0.4, QUIC_A, "no"),
            (0.4, QUIC_B, "no"),
        ],
        [
            (0, TCP_A, "start"),
            (0.25, TCP_B, "start"),
            (0.25, QUIC_A, "start"),
            (0.3, QUIC_B, "start"),
            (0.4, None, "lost"),
        ],
    ),
    "three kinds begin in their order": (
        THREE,
        [(9, None, "")],
        [
            (0, TCP_A, "start"),
            (0.25, TCP_B, "start"),
            (0.25, QUIC_A, "start"),
            (0.5, QUIC_B, "start"),
            (0.5, RELAY_A, "start"),
            (0.75, RELAY_B, "start"),
        ],
    ),
    "the best link within the grace is kept": (
        THREE,
        [(0.6, RELAY_A, ""), (0.7, QUIC_A, ""), (9, None, "")],
        [
            (0, TCP_A, "start"),
            (0.25, TCP_B, "start"),
            (0.25, QUIC_A, "start"),
            (0.5, QUIC_B, "start"),
            (0.5, RELAY_A, "start"),
            (0.75, RELAY_B, "start"),
            (0.9, QUIC_A, "TCP did not answer within 0.9 s"),
        ],
    ),
    "a link waits for no kind that has failed": (
        THREE,
        [
            (0.3, TCP_A, "refused"),
            (0.3, TCP_B, "refused"),
            (0.6, RELAY_A, ""),
            (0.7, QUIC_A, ""),
        ],
        [
            (0, TCP_A, "start"),
            (0.25, TCP_B, "start"),
            (0.25, QUIC_A, "start"),
            (0.3, QUIC_B, "start"),
            (0.5, RELAY_A, "start"),
            (0.7, QUIC_A, "TCP was not reachable: refused"),
        ],
    ),
    "each better kind has its reason": (
        THREE,
        [
            (0.3, TCP_A, "refused"),
            (0.3, TCP_B, "refused"),
            (0.6, RELAY_A, ""),
            (9, None, ""),
        ],
        [
            (0, TCP_A, "start"),
            (0.25, TCP_B, "start"),
            (0.25, QUIC_A, "start"),
            (0.3, QUIC_B, "start"),
            (0.5, RELAY_A, "start"),
            (0.75, RELAY_B, "start"),
            (
                0.9,
                RELAY_A,
                "TCP was not reachable: refused; QUIC did not answer within 0.9 s",
            ),
        ],
    ),
    "the first of three kinds wins at once": (
        THREE,
        [(0.6, RELAY_A, ""), (0.65, QUIC_A, ""), (0.7, TCP_A, "")],
        [
            (0, TCP_A, "start"),
            (0.25, TCP_B, "start"),
            (0.25, QUIC_A, "start"),
            (0.5, QUIC_B, "start"),
            (0.5, RELAY_A, "start"),
            (0.7, TCP_A, "TCP is faster than RELAY, which answered first"),
        ],
    ),
}


def play(
    race: LinkRace, inputs: list[Input], begin: float = 1000.0
) -> list[tuple[float, Attempt | None, str]]:
    """Run a race as a driver does, and return its outputs with their times."""
    found: list[tuple[float, Attempt | None, str]] = []

    def drain(now: float) -> None:
        while (output := race.next_output()) is not None:
            match output:
                case StartAttempt(attempt):
                    found.append((now, attempt, "start"))
                case KeepLink(attempt, reason):
                    found.append((now, attempt, reason))
                case NoLink():
                    found.append((now, None, "lost"))

    drain(begin)
    for after, attempt, failure in inputs:
        now = begin + after
        while (due := race.deadline()) is not None and due < now:
            race.handle_timeout(due)
            drain(due)
        if attempt is None:
            race.handle_timeout(now)
        elif failure:
            race.attempt_failed(attempt, failure, now)
        else:
            race.attempt_opened(attempt, now)
        drain(now)
    return found


@pytest.mark.parametrize("title", RACES)
def test_a_race_between_links(title: str) -> None:
    kinds, inputs, expected = RACES[title]
    race = LinkRace({kind: TARGETS[kind] for kind in kinds}, 1000.0)  # type: ignore[misc]
    found = play(race, inputs)
    assert [(round(now - 1000.0, 6), *what) for now, *what in found] == expected


def test_a_race_without_addresses_is_lost() -> None:
    race = LinkRace(dict.fromkeys(LINK_KINDS, ()), 0.0)
    assert race.next_output() == NoLink()
    assert race.deadline() is None


def test_an_address_that_is_named_twice_is_tried_once() -> None:
    race = LinkRace({"tcp": [A, A, A]}, 0.0)
    assert play(race, [(9, None, "")], 0.0) == [(0.0, TCP_A, "start")]


def test_a_settled_race_no_longer_changes() -> None:
    race = LinkRace(dict.fromkeys(LINK_KINDS, (A, B)), 0.0)
    assert race.next_output() == StartAttempt(TCP_A)
    race.attempt_opened(TCP_A, 0.1)
    assert race.next_output() == KeepLink(TCP_A, "it answered first")
    race.attempt_opened(QUIC_A, 0.2)
    race.attempt_failed(TCP_B, "cancelled", 0.3)
    race.handle_timeout(9.0)
    assert race.next_output() is None
    assert race.deadline() is None


def test_an_early_timeout_changes_nothing() -> None:
    race = LinkRace(dict.fromkeys(LINK_KINDS, (A, B)), 0.0)
    assert race.next_output() == StartAttempt(TCP_A)
    race.handle_timeout(0.2)
    assert race.next_output() is None
    assert race.deadline() == 0.25


def test_a_link_cannot_open_after_every_attempt_has_failed() -> None:
    race = LinkRace({"tcp": [A]}, 0.0)
    race.attempt_failed(TCP_A, "refused", 0.1)
    with pytest.raises(LocalProtocolError, match="LINK_OPENED"):
        race.attempt_opened(TCP_A, 0.2)
