"""The choice of a route, and of the kinds of link."""

from typing import get_args

import pytest

from sleap_rtc.proto.route.kinds import LINK_KINDS, LinkKindName
from sleap_rtc.proto.route.routes import (
    GiveUp,
    RoutePreference,
    TryLinks,
    TryShared,
    UseChannel,
    after_shared_failure,
    asked_kinds,
    choose_kinds,
    first_route,
)

# preference, root here, root at the worker, decision, words of the reason
FIRST: list[tuple[RoutePreference, bool, bool, type, str]] = [
    ("auto", True, True, TryShared, "both sides have shared storage"),
    ("auto", True, False, UseChannel, "not configured on the worker, will use RTC"),
    ("auto", False, True, UseChannel, "Shared storage not configured, will use RTC"),
    ("auto", False, False, UseChannel, "Shared storage not configured, will use RTC"),
    ("shared", True, True, TryShared, "both sides have shared storage"),
    ("shared", True, False, GiveUp, "not configured on the worker"),
    ("shared", False, True, GiveUp, "set SHARED_STORAGE_ROOT"),
    ("shared", False, False, GiveUp, "--shared-storage-root"),
    ("channel", True, True, UseChannel, "was asked for"),
    ("channel", True, False, UseChannel, "was asked for"),
    ("channel", False, True, UseChannel, "was asked for"),
    ("channel", False, False, UseChannel, "was asked for"),
    ("tcp", True, True, UseChannel, "the channel over TCP was asked for"),
    ("quic", False, True, UseChannel, "the channel over QUIC was asked for"),
]


@pytest.mark.parametrize(("preference", "here", "there", "kind", "words"), FIRST)
def test_the_first_route_follows_the_preference_and_the_roots(
    preference: RoutePreference, here: bool, there: bool, kind: type, words: str
) -> None:
    decision = first_route(preference, client_root=here, worker_root=there)
    assert type(decision) is kind
    assert words in decision.reason


def test_a_failed_shared_route_falls_back_with_the_reason() -> None:
    decision = after_shared_failure("auto", "The disk is full")
    assert decision == UseChannel("The disk is full; falling back to RTC transfer")


def test_a_failed_shared_route_that_was_asked_for_is_the_end() -> None:
    decision = after_shared_failure("shared", "The disk is full")
    assert isinstance(decision, GiveUp)
    assert decision.reason.startswith("The disk is full (")


# ------------------------------------------------------------------- kinds of link

# preference, kinds that the worker offers, kinds or None, words of the reason
KINDS: list[
    tuple[
        RoutePreference,
        tuple[LinkKindName, ...],
        tuple[LinkKindName, ...] | None,
        str,
    ]
] = [
    ("auto", ("tcp", "quic"), ("tcp", "quic"), ""),
    ("auto", ("quic", "tcp"), ("tcp", "quic"), ""),
    ("shared", ("tcp", "quic"), ("tcp", "quic"), ""),
    ("channel", ("tcp", "quic"), ("tcp", "quic"), ""),
    ("channel", ("tcp",), ("tcp",), "the worker listens for TCP only"),
    ("auto", ("quic",), ("quic",), "the worker listens for QUIC only"),
    ("tcp", ("tcp", "quic"), ("tcp",), "it was asked for"),
    ("quic", ("tcp", "quic"), ("quic",), "it was asked for"),
    ("quic", ("quic",), ("quic",), "it was asked for"),
    ("tcp", ("quic",), None, "does not listen for links over TCP"),
    ("quic", ("tcp",), None, "does not listen for links over QUIC"),
    ("auto", (), None, "does not listen for links over TCP or QUIC"),
]


@pytest.mark.parametrize(("preference", "offered", "kinds", "words"), KINDS)
def test_the_kinds_of_link_are_those_of_both_sides(
    preference: RoutePreference,
    offered: tuple[LinkKindName, ...],
    kinds: tuple[LinkKindName, ...] | None,
    words: str,
) -> None:
    decision = choose_kinds(preference, offered)
    if kinds is None:
        assert isinstance(decision, GiveUp)
        assert words in decision.reason
    else:
        assert decision == TryLinks(kinds, words)


def test_a_worker_may_offer_kinds_that_do_not_exist_here() -> None:
    decision = choose_kinds("auto", ("pigeon", "quic"))
    assert decision == TryLinks(("quic",), "the worker listens for QUIC only")


def test_each_kind_of_link_can_be_asked_for() -> None:
    for kind in LINK_KINDS:
        decision = first_route(kind, client_root=True, worker_root=True)
        assert decision == UseChannel(f"the channel over {kind.upper()} was asked for")
        assert asked_kinds(kind) == (kind,)
    assert set(get_args(RoutePreference)) == {"auto", "shared", "channel", *LINK_KINDS}
