"""The search for the largest datagram."""

import pytest

from sleap_rtc.proto.quic.mtu import (
    BLACK_HOLE_LOSSES,
    MAX_BLACK_HOLES,
    MAX_PROBES,
    PROBED_SIZES,
    SMALLEST_DATAGRAM,
    MtuSearch,
)

LARGEST_DATAGRAM = PROBED_SIZES[-1]


def search_path(search: MtuSearch, mtu: int) -> list[int]:
    """Answer all probes as a path of that MTU would; return their sizes."""
    probed: list[int] = []
    while (size := search.next_probe()) is not None:
        probed.append(size)
        if size <= mtu:
            search.probe_acknowledged(size)
        else:
            search.probe_lost()
    return probed


@pytest.mark.parametrize(
    ("mtu", "found"),
    [(1200, 1200), (1398, 1350), (1452, 1452), (8999, 8952), (65_535, 16_383)],
)
def test_the_largest_size_that_arrives_is_found(mtu: int, found: int) -> None:
    search = MtuSearch(SMALLEST_DATAGRAM, LARGEST_DATAGRAM)
    probed = search_path(search, mtu)
    assert search.size == found
    assert search.next_probe() is None
    assert len([size for size in probed if size > mtu]) in (0, MAX_PROBES)


@pytest.mark.parametrize("largest", [1350, 1400, 8900, 16_383])
def test_the_search_ends_at_the_largest_size_that_is_allowed(largest: int) -> None:
    search = MtuSearch(SMALLEST_DATAGRAM, largest)
    assert max(search_path(search, 65_535)) == search.size == largest


def test_nothing_is_probed_where_datagrams_may_not_grow() -> None:
    assert MtuSearch(1350, 1350).next_probe() is None


def test_only_one_probe_is_in_flight() -> None:
    search = MtuSearch(SMALLEST_DATAGRAM, LARGEST_DATAGRAM)
    assert search.next_probe() == PROBED_SIZES[0]
    assert search.next_probe() is None
    search.probe_lost()
    assert search.next_probe() == PROBED_SIZES[0]


def test_a_size_whose_probe_was_lost_may_still_arrive() -> None:
    search = MtuSearch(SMALLEST_DATAGRAM, LARGEST_DATAGRAM)
    for _ in range(MAX_PROBES - 1):
        search.next_probe()
        search.probe_lost()
    assert search_path(search, 65_535)[-1] == search.size == LARGEST_DATAGRAM


def test_a_late_acknowledgement_of_an_old_probe_adopts_no_size() -> None:
    search = MtuSearch(SMALLEST_DATAGRAM, 1350)
    for _ in range(MAX_PROBES):
        search.next_probe()
        search.probe_lost()
    search.probe_acknowledged(1350)
    assert search.size == SMALLEST_DATAGRAM


def test_a_black_hole_is_noticed() -> None:
    search = MtuSearch(SMALLEST_DATAGRAM, LARGEST_DATAGRAM)
    search_path(search, 65_535)
    for _ in range(BLACK_HOLE_LOSSES):
        assert search.size == LARGEST_DATAGRAM
        search.packet_lost(16_000)
    assert search.size == SMALLEST_DATAGRAM
    # The path may be another one now, so it is measured again.
    search_path(search, 1452)
    assert search.size == 1452


def test_losses_from_before_a_black_hole_was_noticed_do_not_count_again() -> None:
    search = MtuSearch(SMALLEST_DATAGRAM, LARGEST_DATAGRAM)
    search_path(search, 65_535)
    for _ in range(10 * MAX_BLACK_HOLES * BLACK_HOLE_LOSSES):
        search.packet_lost(16_000)
    search_path(search, 1452)
    search.packet_lost(1452)
    assert search.size == 1452


def test_each_black_hole_takes_as_many_losses() -> None:
    search = MtuSearch(SMALLEST_DATAGRAM, LARGEST_DATAGRAM)
    for _ in range(MAX_BLACK_HOLES):
        search_path(search, 65_535)
        for _ in range(BLACK_HOLE_LOSSES):
            assert search.size == LARGEST_DATAGRAM
            search.packet_lost(16_000)


def test_losses_between_arrivals_are_not_a_black_hole() -> None:
    search = MtuSearch(SMALLEST_DATAGRAM, LARGEST_DATAGRAM)
    search_path(search, 65_535)
    for _ in range(10):
        for _ in range(BLACK_HOLE_LOSSES - 1):
            search.packet_lost(16_000)
        search.packet_acknowledged(500)
        search.packet_acknowledged(16_000)
    assert search.size == LARGEST_DATAGRAM


def test_arrivals_of_small_packets_do_not_hide_a_black_hole() -> None:
    search = MtuSearch(SMALLEST_DATAGRAM, LARGEST_DATAGRAM)
    search_path(search, 65_535)
    for _ in range(BLACK_HOLE_LOSSES):
        search.packet_acknowledged(SMALLEST_DATAGRAM)
        search.packet_lost(16_000)
    assert search.size == SMALLEST_DATAGRAM


def test_losses_of_small_packets_are_not_a_black_hole() -> None:
    search = MtuSearch(SMALLEST_DATAGRAM, LARGEST_DATAGRAM)
    search_path(search, 65_535)
    for _ in range(2 * BLACK_HOLE_LOSSES):
        search.packet_lost(SMALLEST_DATAGRAM)
    assert search.size == LARGEST_DATAGRAM


def test_a_path_with_many_black_holes_is_no_longer_measured() -> None:
    search = MtuSearch(SMALLEST_DATAGRAM, LARGEST_DATAGRAM)
    for _ in range(MAX_BLACK_HOLES + 1):
        assert search_path(search, 65_535)
        for _ in range(BLACK_HOLE_LOSSES):
            search.packet_lost(16_000)
    assert search.size == SMALLEST_DATAGRAM
    assert search.next_probe() is None
