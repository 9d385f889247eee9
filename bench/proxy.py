"""A path with delay, jitter, loss and a limited rate, as a process of its own.

    python -m bench.proxy 127.0.0.1:5000 --delay 0.025 --loss 0.001

It prints its UDP port, forwards datagrams from there to the target, and the answers
back; with `--kind tcp` it is a TCP port. It ends with its standard input, and prints
the counts of all datagrams.

    python -m bench.proxy --ceiling

prints how much it can forward on this machine.

On Linux it receives and sends datagrams in trains (`UDP_GRO`, `UDP_SEGMENT`): the
kernel then handles some dozens of them at once. Each is still delayed and lost on its
own.
"""

import argparse
import heapq
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple, get_args

import msgspec

from bench.line import Conditions, Line, Totals
from bench.processes import python_module
from bench.relay import Address, TcpRelay

LOOPBACK = "127.0.0.1"
BUFFER_SIZE = 32 * 1024 * 1024
"""Bytes of the buffers of a socket; only root gets more than the system's limit."""

BATCH = 64
"""Receive calls for one socket before the others get their turn."""

IS_LINUX = sys.platform == "linux"
UDP_SEGMENT, UDP_GRO = 103, 104
SO_RCVBUFFORCE, SO_SNDBUFFORCE, SO_RXQ_OVFL = 33, 32, 40
"""Numbers from Linux' headers; Python does not name them."""

LARGEST_TRAIN = 64
LARGEST_TRAIN_SIZE = 65_000
"""Datagrams, and their bytes, that Linux sends in one call at most."""

PIPE_SIZE = 512 * 1024
"""Bytes on the way at once while the ceiling is measured."""

_LARGEST = 65_535
_ANCILLARY_SPACE = 64

Kind = Literal["udp", "tcp"]


class _Exit(NamedTuple):
    """The socket that datagrams leave by; no address if it is connected."""

    socket: socket.socket
    address: Address | None


class _Run(NamedTuple):
    """Datagrams of one size that leave together; the last may be shorter."""

    due: float
    number: int  # keeps the order of those that are due at the same time
    size: int
    datagrams: int
    data: memoryview
    exit: _Exit


class UdpProxy:
    """Forwards datagrams between any number of clients and one target.

    Args:
        target: The address that they go to.
        conditions: The path of each direction.

    Attributes:
        address: The address that clients send to.
    """

    def __init__(self, target: Address, conditions: Conditions) -> None:
        self._target = target
        self._up = Line(conditions, "up")
        self._down = Line(conditions, "down")
        self._front = _open_socket()
        self.address: Address = self._front.getsockname()
        self._back_of: dict[Address, _Exit] = {}
        self._client_of: dict[socket.socket, _Exit] = {}
        self._on_the_way: list[_Run] = []
        self._number = 0
        self._lost_in_sockets: dict[socket.socket, int] = {}
        self._unsendable = 0

    def totals(self) -> Totals:
        """Return the counts of both directions."""
        dropped = self._unsendable + sum(self._lost_in_sockets.values())
        return Totals(self._up.counts, self._down.counts, dropped)

    def close(self) -> None:
        """Close all sockets."""
        for one in (self._front, *self._client_of):
            one.close()

    def run(self, end: socket.socket) -> None:
        """Forward until something can be read from a socket."""
        while True:
            readable, _, _ = select.select(
                [end, self._front, *self._client_of], (), (), self._patience()
            )
            if end in readable:
                return
            for one in readable:
                self._receive(one)
            self._send_due()

    def _patience(self) -> float | None:
        if not self._on_the_way:
            return None
        return max(0.0, self._on_the_way[0].due - time.monotonic())

    def _receive(self, source: socket.socket) -> None:
        line = self._up if source is self._front else self._down
        for _ in range(BATCH):
            try:
                data, ancillary, _, sender = source.recvmsg(_LARGEST, _ANCILLARY_SPACE)
            except BlockingIOError:
                return
            except ConnectionError:
                continue  # the target did not receive an earlier datagram
            size = len(data)
            for level, kind, value in ancillary:
                number = int.from_bytes(value[:4], sys.byteorder)
                if (level, kind) == (socket.IPPROTO_UDP, UDP_GRO):
                    size = number
                elif (level, kind) == (socket.SOL_SOCKET, SO_RXQ_OVFL):
                    self._lost_in_sockets[source] = number
            way_out = (
                self._back(sender) if source is self._front else self._client_of[source]
            )
            self._enter(line, memoryview(data), size, way_out)

    def _back(self, client: Address) -> _Exit:
        """Return the socket that represents a client at the target."""
        found = self._back_of.get(client)
        if found is None:
            opened = _open_socket()
            opened.connect(self._target)
            found = self._back_of[client] = _Exit(opened, None)
            self._client_of[opened] = _Exit(self._front, client)
        return found

    def _enter(self, line: Line, train: memoryview, size: int, way_out: _Exit) -> None:
        """Queue the datagrams of a train; neighbours that pass stay together."""
        now = time.monotonic()
        begin = end = count = 0
        due = now
        for start in range(0, len(train), size or 1):
            stop = min(start + size, len(train))
            comes_out = line.enter(stop - start, now)
            if comes_out is None or (count and comes_out != due):
                self._depart(due, size, count, train[begin:end], way_out)
                begin, count = start, 0
            if comes_out is None:
                begin = stop
            else:
                due, end, count = comes_out, stop, count + 1
        self._depart(due, size, count, train[begin:end], way_out)

    def _depart(
        self, due: float, size: int, count: int, data: memoryview, way_out: _Exit
    ) -> None:
        if count:
            self._number += 1
            run = _Run(due, self._number, size, count, data, way_out)
            heapq.heappush(self._on_the_way, run)

    def _send_due(self) -> None:
        """Send the datagrams that are due, in as few trains as possible."""
        waiting, now = self._on_the_way, time.monotonic()
        train: list[memoryview] = []
        first: _Run | None = None
        count = total = 0
        while waiting and waiting[0].due <= now:
            run = heapq.heappop(waiting)
            if (
                first is None
                or run.exit is not first.exit
                or run.size > first.size
                or (run.size < first.size and run.datagrams > 1)
                or total % first.size
                or count + run.datagrams > LARGEST_TRAIN
                or total + len(run.data) > LARGEST_TRAIN_SIZE
                or not IS_LINUX
            ):
                if first is not None:
                    self._send(first, train, count)
                first, train, count, total = run, [], 0, 0
            train.append(run.data)
            count += run.datagrams
            total += len(run.data)
        if first is not None:
            self._send(first, train, count)

    def _send(self, first: _Run, train: Sequence[memoryview], count: int) -> None:
        way_out = first.exit
        size = first.size.to_bytes(2, sys.byteorder)
        ancillary = [(socket.IPPROTO_UDP, UDP_SEGMENT, size)] if count > 1 else []
        try:
            way_out.socket.sendmsg(train, ancillary, 0, way_out.address)
        except ConnectionError:
            pass  # the receiver has gone, which a path does not report either
        except OSError:
            self._unsendable += count


def _open_socket() -> socket.socket:
    opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    opened.setblocking(False)
    opened.bind((LOOPBACK, 0))
    if not IS_LINUX:
        return opened
    for forced, asked in (
        (SO_RCVBUFFORCE, socket.SO_RCVBUF),
        (SO_SNDBUFFORCE, socket.SO_SNDBUF),
    ):
        try:
            opened.setsockopt(socket.SOL_SOCKET, forced, BUFFER_SIZE)
        except PermissionError:
            opened.setsockopt(socket.SOL_SOCKET, asked, BUFFER_SIZE)
    opened.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
    opened.setsockopt(socket.SOL_SOCKET, SO_RXQ_OVFL, 1)
    return opened


class ProxyProcess:
    """A proxy that runs in another process.

    Args:
        address: The address that clients send to.

    Attributes:
        totals: Counts of all datagrams; None until it has ended.
    """

    def __init__(self, address: Address) -> None:
        self.address = address
        self.totals: Totals | None = None


@contextmanager
def open_proxy(
    target: Address, conditions: Conditions, kind: Kind = "udp"
) -> Iterator[ProxyProcess]:
    """Run a proxy in a process of its own for as long as the body runs.

    Args:
        target: The address that everything goes to.
        conditions: The path of each direction.
        kind: The transport that is forwarded.
    """
    with subprocess.Popen(
        [*python_module("bench.proxy"), *_as_arguments(target, conditions, kind)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        proxy = None
        try:
            said, _, port = (process.stdout or sys.stdin).readline().rpartition(":")
            proxy = ProxyProcess((said.rpartition(" ")[2], int(port)))
            yield proxy
        finally:
            out, _ = process.communicate()  # closes its input, so it ends
            if proxy is not None:
                proxy.totals = msgspec.json.decode(out, type=Totals)


def run_proxy(proxy: UdpProxy | TcpRelay) -> Totals:
    """Run a proxy here, until the standard input ends."""
    stop, stopped = socket.socketpair()
    threading.Thread(target=_wait_for_end, args=(stop,), daemon=True).start()
    host, port = proxy.address
    print(f"forwarding from {host}:{port}", flush=True)
    try:
        proxy.run(stopped)
    except KeyboardInterrupt:
        pass
    finally:
        proxy.close()
    return proxy.totals()


def _wait_for_end(stop: socket.socket) -> None:
    while sys.stdin.buffer.read(4096):
        pass
    stop.close()


class Ceiling(NamedTuple):
    """Rates through a proxy and back."""

    megabytes_per_second: float
    datagrams_per_second: float


def measure_ceiling(size: int, train: int, seconds: float) -> Ceiling:
    """Send datagrams through a proxy to this process itself.

    Args:
        size: Bytes of a datagram.
        train: Datagrams that are handed to the kernel in one call.
        seconds: Duration of the measurement.
    """
    with (
        _open_socket() as sink,
        _open_socket() as source,
        open_proxy(sink.getsockname(), Conditions()) as proxy,
    ):
        source.connect(proxy.address)
        arrived = _pour(source, sink, size, train, seconds)
    return Ceiling(arrived / seconds / 1e6, arrived / size / seconds)


def _pour(
    source: socket.socket, sink: socket.socket, size: int, train: int, seconds: float
) -> int:
    """Keep some trains on the way; return the bytes that have arrived."""
    segment = size.to_bytes(2, sys.byteorder)
    ancillary = [(socket.IPPROTO_UDP, UDP_SEGMENT, segment)] if train > 1 else []
    data = bytes(size * train)
    sent = arrived = 0
    end = time.monotonic() + seconds
    while (now := time.monotonic()) < end:
        while sent - arrived < PIPE_SIZE:
            source.sendmsg([data], ancillary)
            sent += len(data)
        readable, _, _ = select.select([sink], (), (), end - now)
        try:
            for _ in range(BATCH if readable else 0):
                arrived += len(sink.recv(_LARGEST))
        except BlockingIOError:
            pass
    return arrived


def main() -> int:
    """Run the command line; return the exit code."""
    parser = _make_parser()
    arguments = parser.parse_args()
    if arguments.ceiling:
        trains = (1, 16, 40) if IS_LINUX else (1,)
        for train in trains:
            found = measure_ceiling(arguments.size, train, seconds=3.0)
            print(
                f"{arguments.size} bytes, {train:2} at once: "
                f"{found.megabytes_per_second:.0f} MB/s, "
                f"{found.datagrams_per_second:,.0f} datagrams/s"
            )
        return 0
    if arguments.target is None:
        parser.error("name the target, such as 127.0.0.1:5000")
    make = UdpProxy if arguments.kind == "udp" else TcpRelay
    try:
        conditions = Conditions(
            **{name: getattr(arguments, name) for name in Conditions.__struct_fields__}
        )
        proxy = make(arguments.target, conditions)
    except ValueError as error:
        parser.error(str(error))
    totals = run_proxy(proxy)
    print(msgspec.json.encode(totals).decode())
    return 0


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="A path with delay and loss.")
    parser.add_argument("target", nargs="?", type=_parse_address, help="host:port")
    for name, what in (("delay", "one way"), ("jitter", "at most this much more")):
        parser.add_argument(
            f"--{name}", type=float, default=0.0, metavar="SECONDS", help=what
        )
    parser.add_argument("--loss", type=float, default=0.0, help="a share, as 0.001")
    parser.add_argument("--rate", type=float, help="bytes per second that pass")
    parser.add_argument(
        "--queue", type=int, default=Conditions().queue, help="bytes that may wait"
    )
    parser.add_argument("--kind", choices=get_args(Kind), default="udp")
    parser.add_argument("--may-reorder", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ceiling", action="store_true", help="how fast is it here?")
    parser.add_argument("--size", type=int, default=1350, help="bytes, for --ceiling")
    return parser


def _as_arguments(target: Address, conditions: Conditions, kind: Kind) -> list[str]:
    arguments = [f"--kind={kind}", f"{target[0]}:{target[1]}"]
    for name, value in msgspec.structs.asdict(conditions).items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            arguments.append(option)
        elif value is not False and value is not None:
            arguments.append(f"{option}={value}")
    return arguments


def _parse_address(text: str) -> Address:
    host, _, port = text.rpartition(":")
    return host, int(port)


if __name__ == "__main__":
    sys.exit(main())
