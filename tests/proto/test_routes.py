import pytest

from sleap_rtc.proto.routes import (
    GiveUp,
    RoutePreference,
    TryShared,
    UseChannel,
    after_shared_failure,
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
]


@pytest.mark.parametrize(("preference", "here", "there", "kind", "words"), FIRST)
def test_the_first_route_follows_the_preference_and_the_roots(
    preference: RoutePreference, here: bool, there: bool, kind: type, words: str
) -> None:
    decision = first_route(preference, client_root=here, worker_root=there)
    assert type(decision) is kind
    assert words in decision.reason


def test_a_failed_shared_route_falls_back_and_says_why() -> None:
    decision = after_shared_failure("auto", "The disk is full")
    assert decision == UseChannel("The disk is full; falling back to RTC transfer")


def test_a_failed_shared_route_that_was_asked_for_is_the_end() -> None:
    decision = after_shared_failure("shared", "The disk is full")
    assert isinstance(decision, GiveUp)
    assert decision.reason.startswith("The disk is full (")
