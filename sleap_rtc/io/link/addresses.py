"""The addresses that this machine binds to, and those that other machines reach."""

import errno
import ipaddress
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ifaddr

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

Bind = Callable[[socket.AddressFamily, str, int], socket.socket]
"""Opens a socket of a family, bound to a literal address and a port."""


def bind_any(host: str, port: int, bind: Bind) -> socket.socket:
    """Open the socket of a listener.

    Args:
        host: A literal address; an empty one means all of this machine, over IPv6 and
            IPv4 where the system has both.
        port: The port; 0 takes any.
        bind: Opens the socket.

    Raises:
        OSError: If the address cannot be bound, or the host is not an address.
    """
    if host in ("", "::"):
        try:
            return bind(socket.AF_INET6, "::", port)
        except OSError as error:
            if host or error.errno == errno.EADDRINUSE:
                raise
            # A machine without IPv6.
            return bind(socket.AF_INET, "0.0.0.0", port)
    found = socket.getaddrinfo(host, port, flags=socket.AI_NUMERICHOST)
    family, _, _, _, address = found[0]
    return bind(family, str(address[0]), port)


@contextmanager
def opened_socket(
    family: socket.AddressFamily, kind: socket.SocketKind, host: str
) -> Iterator[socket.socket]:
    """Open a non-blocking socket, which the body binds; close it if that fails.

    Args:
        family: The address family of the host.
        kind: A stream or datagrams.
        host: The literal address that it will be bound to; ``::`` includes IPv4.
    """
    opened = socket.socket(family, kind)
    try:
        opened.setblocking(False)
        if family == socket.AF_INET6:
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, host != "::")
        yield opened
    except OSError:
        opened.close()
        raise


def reachable_addresses(bound: socket.socket) -> tuple[tuple[str, int], ...]:
    """Return the addresses under which a bound socket may be reached."""
    host, port = bound.getsockname()[:2]
    if host not in ("0.0.0.0", "::"):
        return ((host, port),)
    ipv6 = bound.family == socket.AF_INET6
    ipv4 = not (ipv6 and bound.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY))
    return tuple((host, port) for host in reachable_hosts(ipv4=ipv4, ipv6=ipv6))


def reachable_hosts(*, ipv4: bool, ipv6: bool) -> tuple[str, ...]:
    """Return the addresses of this machine's interfaces, in the system's order.

    Link-local addresses are left out: they are useless without their interface.
    Loopback is included only where nothing else exists.

    Args:
        ipv4: Whether to include IPv4 addresses.
        ipv6: Whether to include IPv6 addresses.
    """
    found = [
        ipaddress.ip_address(ip.ip if isinstance(ip.ip, str) else ip.ip[0])
        for adapter in ifaddr.get_adapters()
        for ip in adapter.ips
    ]
    return choose_hosts(found, ipv4=ipv4, ipv6=ipv6)


def choose_hosts(found: list[IPAddress], *, ipv4: bool, ipv6: bool) -> tuple[str, ...]:
    """Return those addresses of interfaces that other machines may reach.

    See `reachable_hosts`.
    """
    wanted = [
        address
        for address in dict.fromkeys(found)
        if (ipv4 if address.version == 4 else ipv6) and not address.is_link_local
    ]
    public = [address for address in wanted if not address.is_loopback]
    return tuple(str(address) for address in public or wanted)


def is_loopback(host: str) -> bool:
    """Return True if a literal address leads back to this machine."""
    return ipaddress.ip_address(host).is_loopback


def describe_address(address: tuple[Any, ...]) -> str:
    """Format a socket address for people, as `host_and_port` does."""
    return host_and_port(str(address[0]).removeprefix("::ffff:"), address[1])


def host_and_port(host: str, port: int) -> str:
    """Format an address as ``host:port``, or ``[host]:port`` for IPv6."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
