"""The addresses of this machine."""

import ipaddress
import socket

import pytest

from sleap_rtc.io.link.addresses import is_loopback, reachable_hosts


@pytest.mark.parametrize(("ipv4", "ipv6"), [(True, False), (False, True), (True, True)])
def test_only_addresses_that_can_be_reached_are_listed(ipv4: bool, ipv6: bool) -> None:
    found = [
        ipaddress.ip_address(host) for host in reachable_hosts(ipv4=ipv4, ipv6=ipv6)
    ]
    versions = {version for version, wanted in ((4, ipv4), (6, ipv6)) if wanted}
    assert {address.version for address in found} <= versions
    assert not any(address.is_link_local for address in found)
    assert len({address.is_loopback for address in found}) <= 1
    assert len(set(found)) == len(found)


def test_the_addresses_are_those_of_this_machine() -> None:
    for host in reachable_hosts(ipv4=True, ipv6=False):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((host, 0))


def test_no_family_means_no_address() -> None:
    assert reachable_hosts(ipv4=False, ipv6=False) == ()


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("10.0.0.1", False)],
)
def test_loopback_is_known(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected
