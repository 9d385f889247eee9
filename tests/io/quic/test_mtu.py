"""The search for the largest datagram, alone."""

import pytest

from sleap_rtc.io.quic.mtu import (
    LARGE_LOST,
    LARGEST_DATAGRAM,
    MAX_FALLS,
    SIZES,
    SMALLEST_DATAGRAM,
    TRIES,
    MtuSearch,
)


def search_path(search: MtuSearch, mtu: int) -> list[int]:
    """Answer all probes as a path would; returns their sizes."""
    asked: list[int] = []
    while (size := search.next_probe()) is not None:
        asked.append(size)
        if size <= mtu:
            search.probe_arrived(size)
        else:
            search.probe_lost()
    return asked


@pytest.mark.parametrize(
    ("mtu", "found"),
    [(1200, 1200), (1398, 1350), (1452, 1452), (8999, 8952), (65_535, 16_383)],
)
def test_the_largest_size_that_arrives_is_found(mtu: int, found: int) -> None:
    search = MtuSearch(SMALLEST_DATAGRAM, LARGEST_DATAGRAM)
    asked = search_path(search, mtu)
    assert search.size == found
    assert search.next_probe() is None
    assert len([size for size in asked if size > mtu]) in (0, TRIES)


@pytest.mark.parametrize("largest", [1350, 1400, 8900, 16_383])
def test_the_search_ends_at_the_largest_size_that_is_allowed(largest: int) -> None:
    search = MtuSearch(SMALLEST_DATAGRAM, largest)
    assert max(search_path(search, 65_535)) == search.size == largest


def test_where_nothing_may_grow_nothing_is_asked() -> None:
    assert MtuSearch(1350, 1350).next_probe() is None


def test_only_one_probe_is_on_its_way() -> None:
    search = MtuSearch(SMALLEST_DATAGRAM, LARGEST_DATAGRAM)
    assert search.next_probe() == SIZES[0]
    assert search.next_probe() is None
    search.probe_lost()
    assert search.next_probe() == SIZES[0]


def test_a_size_that_got_lost_once_may_still_arrive() -> None:
    search = MtuSearch(SMALLEST_DATAGRAM, LARGEST_DATAGRAM)
    for _ in range(TRIES - 1):
        search.next_probe()
        search.probe_lost()
    assert search_path(search, 65_535)[-1] == search.size == LARGEST_DATAGRAM


def test_the_limit_of_the_peer_is_kept() -> None:
    search = MtuSearch(SMALLEST_DATAGRAM, LARGEST_DATAGRAM)
    search.limit(1452)
    search_path(search, 65_535)
    assert search.size == 1452


def test_a_peer_cannot_push_it_below_what_it_has() -> None:
    search = MtuSearch(SMALLEST_DATAGRAM, LARGEST_DATAGRAM)
    search.limit(0)
    assert search.next_probe() is None
    assert search.size == SMALLEST_DATAGRAM


def test_a_path_that_swallows_large_packets_is_noticed() -> None:
    search = MtuSearch(SMALLEST_DATAGRAM, LARGEST_DATAGRAM)
    search_path(search, 65_535)
    for _ in range(LARGE_LOST):
        assert search.size == LARGEST_DATAGRAM
        search.packet_lost(16_000)
    assert search.size == SMALLEST_DATAGRAM
    # It may be another path now, so it is measured again.
    search_path(search, 1452)
    assert search.size == 1452


def test_losses_with_arrivals_between_them_are_no_reason_to_fall_back() -> None:
    search = MtuSearch(SMALLEST_DATAGRAM, LARGEST_DATAGRAM)
    search_path(search, 65_535)
    for _ in range(10):
        for _ in range(LARGE_LOST - 1):
            search.packet_lost(16_000)
        search.packet_arrived(500)
        search.packet_arrived(16_000)
    assert search.size == LARGEST_DATAGRAM


def test_losses_of_small_packets_say_nothing_about_the_size() -> None:
    search = MtuSearch(SMALLEST_DATAGRAM, LARGEST_DATAGRAM)
    search_path(search, 65_535)
    for _ in range(2 * LARGE_LOST):
        search.packet_lost(1000)
    assert search.size == LARGEST_DATAGRAM


def test_a_path_that_keeps_swallowing_is_not_measured_for_ever() -> None:
    search = MtuSearch(SMALLEST_DATAGRAM, LARGEST_DATAGRAM)
    for _ in range(MAX_FALLS + 1):
        assert search_path(search, 65_535)
        for _ in range(LARGE_LOST):
            search.packet_lost(16_000)
    assert search.size == SMALLEST_DATAGRAM
    assert search.next_probe() is None
