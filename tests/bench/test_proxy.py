"""The proxy that simulates a long path, as a process with real sockets."""

import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from random import Random

import msgspec
import pytest

from bench.line import Conditions, Line, LineCounts, Totals
from bench.processes import python_module
from bench.proxy import IS_LINUX, UDP_SEGMENT, ProxyProcess, open_proxy

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="Windows has no recvmsg(2)"
)

DEADLINE = 60.0
COMMAND = python_module("bench.proxy")


@contextmanager
def open_socket() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as opened:
        opened.bind(("127.0.0.1", 0))
        opened.settimeout(DEADLINE)
        yield opened


@contextmanager
def path(
    conditions: Conditions,
) -> Iterator[tuple[socket.socket, socket.socket, ProxyProcess]]:
    """A client that is connected to a proxy, and the proxy's target."""
    with (
        open_socket() as client,
        open_socket() as target,
        open_proxy(target.getsockname(), conditions) as proxy,
    ):
        client.connect(proxy.address)
        yield client, target, proxy


def totals(proxy: ProxyProcess) -> Totals:
    assert proxy.totals is not None
    assert proxy.totals.dropped == 0
    return proxy.totals


def test_datagrams_travel_both_ways() -> None:
    with path(Conditions()) as (client, target, proxy), open_socket() as other:
        other.connect(proxy.address)
        for sender in (client, other):
            sender.send(b"ping")
            data, address = target.recvfrom(100)
            assert data == b"ping"
            target.sendto(b"pong", address)
            assert sender.recv(100) == b"pong"
    assert totals(proxy).up.entered == totals(proxy).down.entered == 2


def test_delay_applies_in_both_directions() -> None:
    with path(Conditions(delay=0.05)) as (client, target, _):
        began = time.monotonic()
        client.send(b"ping")
        _, address = target.recvfrom(100)
        there = time.monotonic() - began
        target.sendto(b"pong", address)
        client.recv(100)
        there_and_back = time.monotonic() - began
    # A busy machine may take longer, but the proxy must not take less.
    assert there >= 0.05
    assert there_and_back >= 0.10


def survivors(conditions: Conditions, count: int) -> list[int]:
    line = Line(conditions, "up")
    return [number for number in range(count) if line.enter(1, 0.0) is not None]


def test_the_seed_decides_which_datagrams_arrive() -> None:
    conditions = Conditions(loss=0.2, seed=7)
    expected = survivors(conditions, 200)
    with path(conditions) as (client, target, proxy):
        for number in range(200):
            client.send(bytes([number]))
        assert [target.recv(100)[0] for _ in expected] == expected
    assert totals(proxy).up == LineCounts(200, 200 - len(expected), 0)


@pytest.mark.skipif(not IS_LINUX, reason="only Linux sends trains")
def test_a_train_loses_single_datagrams() -> None:
    sizes = [1000] * 39 + [500]
    content = b"".join(bytes([n]) * size for n, size in enumerate(sizes))
    option = [(socket.IPPROTO_UDP, UDP_SEGMENT, (1000).to_bytes(2, sys.byteorder))]
    conditions = Conditions(loss=0.2, seed=7)
    expected = survivors(conditions, 40)
    assert 20 < len(expected) < 40
    with path(conditions) as (client, target, proxy):
        client.sendmsg([content], option)
        found = [target.recv(2000) for _ in expected]
    assert found == [bytes([number]) * sizes[number] for number in expected]
    assert totals(proxy).up == LineCounts(40, 40 - len(expected), 0)


def test_a_rate_narrows_the_path() -> None:
    with path(Conditions(rate=100_000)) as (client, target, _):
        began = time.monotonic()
        for _ in range(20):
            client.send(bytes(1000))
        for _ in range(20):
            target.recv(2000)
        assert time.monotonic() - began >= 0.18


def test_a_full_queue_drops_and_counts() -> None:
    # Sent in less than two seconds, even on a slow machine.
    with path(Conditions(rate=1e5, queue=5000)) as (client, target, proxy):
        for _ in range(200):
            client.send(bytes(1000))
        for _ in range(5):
            target.recv(2000)
    assert totals(proxy).up.overflowed > 0


def test_the_proxy_ends_when_its_owner_fails() -> None:
    seen: list[ProxyProcess] = []

    def fail() -> None:
        with path(Conditions()) as (_, _, proxy):
            seen.append(proxy)
            raise RuntimeError("the owner failed")

    with pytest.raises(RuntimeError, match="the owner failed"):
        fail()
    assert totals(seen[0]).up.entered == 0


def test_the_command_prints_its_address_and_its_counts() -> None:
    command = [*COMMAND, "127.0.0.1:9", "--delay", "0.01"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("forwarding from 127.0.0.1:")
        out, _ = process.communicate(timeout=DEADLINE)
    assert msgspec.json.decode(out, type=Totals).up.entered == 0
    assert process.returncode == 0


@contextmanager
def connection(
    conditions: Conditions,
) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A client that is connected through a proxy, and its end at the target."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        open_proxy(listener.getsockname(), conditions, "tcp") as proxy,
        socket.create_connection(proxy.address, DEADLINE) as client,
    ):
        listener.settimeout(DEADLINE)
        target, _ = listener.accept()
        with target:
            target.settimeout(DEADLINE)
            yield client, target


def receive_all(source: socket.socket) -> bytes:
    return b"".join(iter(lambda: source.recv(100_000), b""))


@pytest.mark.parametrize(
    "conditions",
    [
        Conditions(),
        Conditions(delay=0.02, jitter=0.01),
        Conditions(rate=2e7, queue=100_000),
    ],
)
def test_a_tcp_connection_carries_every_byte_both_ways(conditions: Conditions) -> None:
    content = Random(1).randbytes(3_000_000)
    with connection(conditions) as (client, target), ThreadPoolExecutor() as pool:
        for sender, receiver in ((client, target), (target, client)):
            received = pool.submit(receive_all, receiver)
            sender.sendall(content)
            sender.shutdown(socket.SHUT_WR)
            assert received.result(DEADLINE) == content


def test_a_tcp_connection_is_delayed() -> None:
    with connection(Conditions(delay=0.05)) as (client, target):
        began = time.monotonic()
        client.send(b"ping")
        target.recv(100)
        assert time.monotonic() - began >= 0.05


def test_a_tcp_connection_is_as_fast_as_the_rate() -> None:
    with connection(Conditions(rate=1e6, queue=50_000)) as (client, target):
        began = time.monotonic()
        with ThreadPoolExecutor() as pool:
            received = pool.submit(receive_all, target)
            client.sendall(bytes(300_000))
            client.shutdown(socket.SHUT_WR)
            assert len(received.result(DEADLINE)) == 300_000
        assert time.monotonic() - began >= 0.25


def test_a_client_that_breaks_off_ends_the_connection_of_the_target() -> None:
    with connection(Conditions()) as (client, target):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        assert target.recv(100) == b""


@pytest.mark.parametrize("option", [["--loss=0.1"], ["--may-reorder"]])
def test_a_relay_of_tcp_loses_nothing(option: list[str]) -> None:
    command = [*COMMAND, "127.0.0.1:9", "--kind=tcp", *option]
    found = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
    assert found.returncode == 2
    assert "can neither lose nor reorder" in found.stderr


def test_the_command_refuses_impossible_conditions() -> None:
    command = [*COMMAND, "127.0.0.1:9", "--loss", "2"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
    assert found.returncode == 2
    assert "a loss of 2.0" in found.stderr
