"""The addresses of this machine."""

import ipaddress
import socket
from contextlib import closing

import pytest

from sleap_rtc.io.link.addresses import (
    bind_any,
    choose_hosts,
    describe_address,
    is_loopback,
    reachable_addresses,
    reachable_hosts,
)
from sleap_rtc.io.quic.socket import bind_udp

LINK_LOCAL = ["169.254.1.2", "fe80::1"]
LOOPBACK = ["127.0.0.1", "::1"]


@pytest.mark.parametrize(
    ("found", "ipv4", "ipv6", "chosen"),
    [
        (["10.0.0.1", "fd00::1"], True, True, ["10.0.0.1", "fd00::1"]),
        (["10.0.0.1", "fd00::1"], True, False, ["10.0.0.1"]),
        (["10.0.0.1", "fd00::1"], False, True, ["fd00::1"]),
        (["10.0.0.1", "fd00::1"], False, False, []),
        (["10.0.0.2", "10.0.0.1", "10.0.0.2"], True, True, ["10.0.0.2", "10.0.0.1"]),
        ([*LOOPBACK, "10.0.0.1"], True, True, ["10.0.0.1"]),
        ([*LOOPBACK, "10.0.0.1"], False, True, ["::1"]),
        ([*LOOPBACK, *LINK_LOCAL], True, True, LOOPBACK),
        (LINK_LOCAL, True, True, []),
    ],
)
def test_only_addresses_that_can_be_reached_are_listed(
    found: list[str], ipv4: bool, ipv6: bool, chosen: list[str]
) -> None:
    addresses = [ipaddress.ip_address(host) for host in found]
    assert choose_hosts(addresses, ipv4=ipv4, ipv6=ipv6) == tuple(chosen)


def test_the_addresses_are_those_of_this_machine() -> None:
    hosts = reachable_hosts(ipv4=True, ipv6=False)
    assert hosts
    for host in hosts:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((host, 0))


def test_a_socket_for_all_of_the_machine_is_reached_at_each_address() -> None:
    with closing(bind_any("", 0, bind_udp)) as bound:
        port = bound.getsockname()[1]
        ipv6 = bound.family == socket.AF_INET6
        hosts = reachable_hosts(ipv4=True, ipv6=ipv6)
        assert reachable_addresses(bound) == tuple((host, port) for host in hosts)


def test_a_socket_with_an_address_is_reached_there_only() -> None:
    with closing(bind_any("127.0.0.1", 0, bind_udp)) as bound:
        assert reachable_addresses(bound) == (bound.getsockname(),)


def test_a_machine_without_ipv6_binds_to_ipv4() -> None:
    def bind(family: socket.AddressFamily, host: str, port: int) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(97, "Address family not supported by protocol")
        return bind_udp(family, host, port)

    with closing(bind_any("", 0, bind)) as bound:
        assert bound.getsockname()[0] == "0.0.0.0"
    with pytest.raises(OSError, match="not supported"):
        bind_any("::", 0, bind)


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("10.0.0.1", False)],
)
def test_loopback_is_recognized(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


@pytest.mark.parametrize(
    ("address", "text"),
    [
        (("10.0.0.1", 5), "10.0.0.1:5"),
        (("::ffff:10.0.0.1", 5, 0, 0), "10.0.0.1:5"),
        (("fd00::1", 5, 0, 0), "[fd00::1]:5"),
    ],
)
def test_addresses_are_formatted_for_people(
    address: tuple[object, ...], text: str
) -> None:
    assert describe_address(address) == text
