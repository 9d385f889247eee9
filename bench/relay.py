"""A TCP path with delay and a limited rate; `proxy.py` runs it.

A relay terminates the connection of each side, so it can delay bytes
but not lose a packet: TCP's own answer to loss does not show. Nor does its slow start,
because each side sees the short way to the relay. The rate shows how the programs at
both ends handle the delay.
"""

import select
import socket
import time
from collections import deque

from msgspec.structs import replace

from bench.line import Conditions, Line, Totals

WINDOW = 64 * 1024 * 1024
"""Bytes on the way at most in one direction of a connection without a rate."""

BUFFER = 256 * 1024
"""Bytes that are read at once."""

Address = tuple[str, int]


class TcpRelay:
    """Forwards connections to one target.

    Args:
        target: The address that they go to.
        conditions: The path of each direction.

    Attributes:
        address: The address that clients connect to.
    """

    def __init__(self, target: Address, conditions: Conditions) -> None:
        if conditions.loss or conditions.may_reorder:
            raise ValueError("a relay of TCP can neither lose nor reorder anything")
        self._target = target
        self._window = WINDOW
        if conditions.rate is not None:
            in_flight = conditions.rate * (conditions.delay + conditions.jitter)
            self._window = conditions.queue + int(in_flight)
        # Here a full queue makes the sender wait, because nothing more is read.
        self._conditions = replace(conditions, queue=self._window + BUFFER)
        self._up = Line(self._conditions, "up")
        self._down = Line(self._conditions, "down")
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: Address = self._listener.getsockname()
        self._pipes: dict[socket.socket, _Pipe] = {}

    def totals(self) -> Totals:
        """Return the counts; a piece that was read at once counts as one."""
        return Totals(self._up.counts, self._down.counts, dropped=0)

    def close(self) -> None:
        """Close all connections."""
        self._listener.close()
        for source in self._pipes:
            source.close()

    def run(self, end: socket.socket) -> None:
        """Forward until something can be read from a socket."""
        while True:
            pipes = self._pipes.values()
            readable, writable, _ = select.select(
                [end, self._listener, *(p.source for p in pipes if p.has_room)],
                [p.sink for p in pipes if p.is_blocked],
                (),
                self._patience(),
            )
            if end in readable:
                return
            if self._listener in readable:
                self._accept()
            for source in readable:
                if source in self._pipes:
                    self._pipes[source].receive()
            for pipe in tuple(self._pipes.values()):
                if not pipe.is_blocked or pipe.sink in writable:
                    pipe.send_due()
            self._forget_the_broken()

    def _patience(self) -> float | None:
        dues = [
            pipe.waiting[0][0]
            for pipe in self._pipes.values()
            if pipe.waiting and not pipe.is_blocked
        ]
        return max(0.0, min(dues) - time.monotonic()) if dues else None

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        try:
            target = socket.create_connection(self._target)
        except OSError:
            client.close()  # as if it had been refused
            return
        for one in (client, target):
            one.setblocking(False)
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._pipes[client] = _Pipe(client, target, self._up, self._window)
        self._pipes[target] = _Pipe(target, client, self._down, self._window)

    def _forget_the_broken(self) -> None:
        """Close a connection that is over in both directions, or broken in one."""
        for source, pipe in tuple(self._pipes.items()):
            back = self._pipes.get(pipe.sink)
            if back and (pipe.is_broken or (pipe.has_ended and back.has_ended)):
                for one in (source, pipe.sink):
                    del self._pipes[one]
                    one.close()


class _Pipe:
    """One direction of a connection."""

    def __init__(
        self, source: socket.socket, sink: socket.socket, line: Line, window: int
    ) -> None:
        self.source = source
        self.sink = sink
        self.waiting: deque[tuple[float, memoryview]] = deque()
        self.is_blocked = False
        self.has_ended = False
        self.is_broken = False
        self._line = line
        self._window = window
        self._size = 0
        self._is_open = True

    @property
    def has_room(self) -> bool:
        """True while more may be read."""
        return self._is_open and self._size < self._window

    def receive(self) -> None:
        """Read once; an empty piece marks the end."""
        try:
            data = self.source.recv(BUFFER)
        except OSError:
            self.is_broken = True
            return
        due = self._line.enter(len(data), time.monotonic())
        if due is not None:
            self.waiting.append((due, memoryview(data)))
            self._size += len(data)
        self._is_open = bool(data)

    def send_due(self) -> None:
        """Write the pieces that are due, as far as the sink accepts them."""
        self.is_blocked = False
        now = time.monotonic()
        try:
            while self.waiting and self.waiting[0][0] <= now:
                due, data = self.waiting.popleft()
                if not data:
                    self.has_ended = True
                    self.sink.shutdown(socket.SHUT_WR)
                    return
                sent = self.sink.send(data)
                self._size -= sent
                if sent < len(data):
                    self.waiting.appendleft((due, data[sent:]))
        except BlockingIOError:
            self.waiting.appendleft((due, data))
            self.is_blocked = True
        except OSError:
            self.is_broken = True
