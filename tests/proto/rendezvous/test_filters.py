"""The filters of a discovery."""

import pytest

from sleap_rtc.proto.rendezvous.filters import matches
from sleap_rtc.proto.rendezvous.messages import (
    Comparison,
    Condition,
    Filters,
    Metadata,
    PeerInfo,
)

PEER = PeerInfo(
    "w", "worker", Metadata(("a", "b"), {"n": 5, "f": 1.5, "s": "x", "t": True})
)


@pytest.mark.parametrize(
    ("filters", "found"),
    [
        (Filters(), True),
        (Filters(role="worker"), True),
        (Filters(role="client"), False),
        (Filters(tags=("b", "c")), True),
        (Filters(tags=("c",)), False),
        (Filters(role="worker", tags=("a",), properties={"n": 5}), True),
        (Filters(role="client", tags=("a",), properties={"n": 5}), False),
    ],
)
def test_filters(filters: Filters, found: bool) -> None:
    assert matches(PEER, filters) is found


@pytest.mark.parametrize(
    ("key", "condition", "found"),
    [
        ("n", 5, True),
        ("n", 5.0, True),
        ("n", 6, False),
        ("n", "5", False),
        ("s", "x", True),
        ("t", True, True),
        ("t", 1, False),
        ("missing", None, False),
        ("missing", Comparison(), False),
        ("n", Comparison(), True),
        ("n", Comparison(at_least=5), True),
        ("n", Comparison(at_least=5.1), False),
        ("n", Comparison(at_most=5), True),
        ("n", Comparison(at_most=4), False),
        ("n", Comparison(at_least=4, at_most=6), True),
        ("n", Comparison(at_least=4, at_most=6, equal=4), False),
        ("f", Comparison(at_least=1), True),
        ("s", Comparison(equal="x"), True),
        ("s", Comparison(at_least=0), False),
        ("s", Comparison(at_most=0), False),
        ("t", Comparison(at_least=0), False),
        ("t", Comparison(equal=1), False),
    ],
)
def test_property_conditions(key: str, condition: Condition, found: bool) -> None:
    assert matches(PEER, Filters(properties={key: condition})) is found
