"""The addresses under which this machine may be reached."""

import ipaddress
from typing import Any

import ifaddr

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


def reachable_hosts(*, ipv4: bool, ipv6: bool) -> tuple[str, ...]:
    """List the addresses of this machine's interfaces, in the system's order.

    Link-local addresses are left out: they say nothing without their interface.
    Loopback is listed only where there is nothing else.

    Args:
        ipv4: Whether IPv4 addresses are wanted.
        ipv6: Whether IPv6 addresses are wanted.
    """
    found = [
        ipaddress.ip_address(ip.ip if isinstance(ip.ip, str) else ip.ip[0])
        for adapter in ifaddr.get_adapters()
        for ip in adapter.ips
    ]
    wanted = [
        address
        for address in dict.fromkeys(found)
        if (ipv4 if address.version == 4 else ipv6) and not address.is_link_local
    ]
    public = [address for address in wanted if not address.is_loopback]
    return tuple(str(address) for address in public or wanted)


def is_loopback(host: str) -> bool:
    """Tell whether a literal address leads back to this machine."""
    return ipaddress.ip_address(host).is_loopback


def describe_address(address: tuple[Any, ...]) -> str:
    """Write a socket address for people, as ``host:port`` or ``[host]:port``."""
    host = str(address[0]).removeprefix("::ffff:")
    return f"[{host}]:{address[1]}" if ":" in host else f"{host}:{address[1]}"
