"""The filters of a discovery, which select peers of a room."""

from msgspec import UNSET

from sleap_rtc.proto.rendezvous.messages import (
    Comparison,
    Condition,
    Filters,
    PeerInfo,
    Property,
)


def matches(peer: PeerInfo, filters: Filters) -> bool:
    """Return whether a peer meets all the filters."""
    if filters.role is not UNSET and peer.role != filters.role:
        return False
    if filters.tags and not set(filters.tags) & set(peer.metadata.tags):
        return False
    properties = peer.metadata.properties
    return all(
        key in properties and _meets(properties[key], condition)
        for key, condition in filters.properties.items()
    )


def _meets(value: Property, condition: Condition) -> bool:
    if not isinstance(condition, Comparison):
        return _equal(value, condition)
    return (
        (condition.equal is UNSET or _equal(value, condition.equal))
        and (condition.at_least is UNSET or _number(value) >= condition.at_least)
        and (condition.at_most is UNSET or _number(value) <= condition.at_most)
    )


def _equal(value: Property, wanted: Property) -> bool:
    # In JSON, unlike in Python, true is not 1.
    return value == wanted and isinstance(value, bool) == isinstance(wanted, bool)


def _number(value: Property) -> float:
    """Return a value to compare; other types become NaN, which meets no comparison."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return float("nan")
    return value
