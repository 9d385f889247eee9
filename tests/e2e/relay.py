"""A TCP relay in front of a worker, which can cut connections and limit their rate."""

import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import inf

from tests.e2e.harness import Machine, Running

SLOW = 7e6
"""Bytes per second at which 64 MiB take nine seconds, enough to interrupt them."""

_AT_ONCE = 1 << 16
"""Bytes that are read at once."""


class Relay:
    """Forwards TCP connections to a worker.

    Args:
        rate: Bytes per second of one connection, in both directions together.

    Attributes:
        target: The port of the worker; set it before a client connects.
        rate: May be changed at any time.
    """

    def __init__(self, rate: float = inf) -> None:
        self.target = 0
        self.rate = rate
        self._ends: list[socket.socket] = []
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self.target))
                except OSError:
                    near.close()  # the worker has ended
                    continue
                with self._lock:
                    self._ends += [near, far]
                pair = (near, far)
                threading.Thread(target=self._forward, args=pair, daemon=True).start()

    def _forward(self, near: socket.socket, far: socket.socket) -> None:
        other = {near: far, far: near}
        with near, far, suppress(OSError):
            while True:
                for end in select.select([near, far], [], [])[0]:
                    data = end.recv(_AT_ONCE)
                    if not data:
                        return
                    other[end].sendall(data)
                    time.sleep(len(data) / self.rate)

    def cut(self) -> None:
        """Drop all connections, like a network that fails."""
        # A client that sees its end go may be back before the last end is shut down.
        with self._lock:
            ends, self._ends = self._ends, []
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Drop all connections, and accept no more."""
        self.cut()
        self._listener.close()


@contextmanager
def relayed_worker(
    machine: Machine, rate: float = inf
) -> Iterator[tuple[Running, Relay]]:
    """Start a worker whose first address for clients is that of a relay."""
    relay = Relay(rate)
    try:
        worker = machine.start_worker("--public-address", f"127.0.0.1:{relay.port}")
        relay.target = int(worker.wait_for(r"worker ready.* port=(\d+)")[1])
        yield worker, relay
    finally:
        relay.close()
