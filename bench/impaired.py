"""Measure links on paths with delay and loss.

    python -m bench.impaired --kinds tcp,quic --rtt 0,20,50,100 --loss 0,0.1,1

Two processes have a link through a third one, `proxy.py`, which delays and loses. An
endless file goes over the link in verified chunks, from memory to nowhere. Congestion
control begins slowly, so the rate counts once the link is warm: between the
first chunk that arrives after `--warm` seconds and the last one.

Every kind of link is also measured through the proxy without delay or loss; the rates
on worse paths are given as shares of that. `proxy.py --ceiling` prints the limits of
the proxy itself.
"""

import argparse
import itertools
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table

from bench.line import Conditions
from bench.link_end import LOOPBACK, Received, Sent, Span, Task, Where
from bench.processes import python_module
from bench.proxy import Kind, open_proxy
from sleap_rtc.proto.route.kinds import LinkKindName

START_TIMEOUT = 30.0
"""Seconds that both ends may take to start and to end."""

CHUNK_SIZE = 1024 * 1024
"""Bytes of a chunk, as in any transfer."""

SMALL_CHUNK_SIZE = 256 * 1024
"""Bytes of a chunk for the classic congestion controls. With loss they are so slow that
few large chunks would arrive in the time."""

FAILURES = (OSError, subprocess.SubprocessError, msgspec.DecodeError)
"""Exceptions that `measure` raises."""

LINK_END = python_module("bench.link_end")

console = Console(highlight=False)


class Way(msgspec.Struct, frozen=True):
    """A kind of link.

    Args:
        kind: Its transport.
        congestion: A congestion control instead of the product's own.
    """

    kind: LinkKindName
    congestion: str = ""

    @property
    def name(self) -> str:
        """Its name in the table."""
        return f"{self.kind} {self.congestion}".strip()

    def can_take(self, loss: float) -> bool:
        """Return whether the proxy can apply this loss; it cannot lose TCP data."""
        return self.kind != "tcp" or not loss


class Cell(msgspec.Struct, frozen=True):
    """One link on one path, once.

    Args:
        way: The kind of link.
        rtt: Seconds to the other end and back.
        loss: The share of datagrams that is lost, in each direction.
        rate: Bytes per second once the link was warm.
        first: Seconds until the first MiB had arrived; None if it never did.
        lost: Datagrams that the path lost.
        packets_lost: Packets that the sender declared lost.
        dropped: Datagrams that the system dropped because the proxy was too slow.
        sender_cpu: Seconds of processor time.
        receiver_cpu: The same of the receiver.
    """

    way: Way
    rtt: float
    loss: float
    rate: float
    first: float | None
    lost: int
    packets_lost: int
    dropped: int
    sender_cpu: float
    receiver_cpu: float


def main() -> int:
    """Run the command line; return the exit code."""
    arguments = _parse_arguments()
    # All ways take turns on each path, because the machine changes with time.
    paths = list(itertools.product(arguments.rtt, arguments.loss))
    if (0.0, 0.0) not in paths:
        paths.insert(0, (0.0, 0.0))
    cells = []
    for (rtt, loss), number, way in itertools.product(
        paths, range(arguments.rounds), arguments.ways
    ):
        if not way.can_take(loss):
            continue
        console.print(f"[dim]{rtt * 1e3:g} ms, {loss:.2%}, {way.name}[/]")
        conditions = Conditions(delay=rtt / 2, loss=loss, seed=arguments.seed + number)
        try:
            cells.append(measure(way, conditions, arguments.seconds, arguments.warm))
        except FAILURES as error:
            console.print(f"{way.name} failed: {error}", style="red", markup=False)
            return 1
    show(cells)
    if arguments.json is not None:
        arguments.json.write_bytes(
            msgspec.json.format(msgspec.json.encode(cells)) + b"\n"
        )
    return 0


def measure(way: Way, conditions: Conditions, seconds: float, warm: float) -> Cell:
    """Measure a link on a path.

    Args:
        way: The kind of link.
        conditions: The path.
        seconds: How long to send, at least.
        warm: Seconds at the beginning that do not count.

    Raises:
        OSError: If an end cannot be started.
        subprocess.SubprocessError: If an end fails, or does not end.
        msgspec.DecodeError: If an end fails before it reports.
    """
    carrier: Kind = "udp" if way.kind == "quic" else "tcp"
    span = msgspec.json.encode(Span(seconds, warm)).decode()
    with _started(*LINK_END, "receive", span) as receiver:
        where = msgspec.json.decode(_output(receiver).readline(), type=Where)
        with open_proxy((LOOPBACK, where.port), conditions, carrier) as proxy:
            task = Task(
                proxy.address,
                where.certificate,
                way.kind,
                way.congestion,
                SMALL_CHUNK_SIZE if way.congestion else CHUNK_SIZE,
            )
            done = subprocess.run(
                [*LINK_END, "send", msgspec.json.encode(task).decode()],
                stdout=subprocess.PIPE,
                timeout=seconds + START_TIMEOUT,
                check=True,
            )
            sent = msgspec.json.decode(done.stdout, type=Sent)
            said, _ = receiver.communicate(timeout=START_TIMEOUT)
    received = msgspec.json.decode(said, type=Received)
    totals = proxy.totals
    return Cell(
        way=way,
        rtt=conditions.delay * 2,
        loss=conditions.loss,
        rate=warm_rate(received.arrivals, warm),
        first=next((at for at, size in received.arrivals if size >= 2**20), None),
        lost=totals.up.lost + totals.down.lost if totals else 0,
        packets_lost=sent.statistics.packets_lost,
        dropped=totals.dropped if totals else 0,
        sender_cpu=sent.cpu_seconds,
        receiver_cpu=received.cpu_seconds,
    )


def warm_rate(arrivals: list[tuple[float, int]], warm: float) -> float:
    """Return the bytes per second between the first late arrival and the last one.

    Args:
        arrivals: Seconds, and the bytes that had arrived by then.
        warm: The seconds after which an arrival is late.
    """
    late = [arrival for arrival in arrivals if arrival[0] >= warm]
    if len(late) < 2 or late[-1][0] == late[0][0]:
        return 0.0
    (begin, before), (end, after) = late[0], late[-1]
    return (after - before) / (end - begin)


def show(cells: list[Cell]) -> None:
    """Print a table: the median of all rounds, and its share of the perfect path."""
    ways = list(dict.fromkeys(cell.way for cell in cells))
    table = Table(
        box=box.SIMPLE,
        show_edge=False,
        title="MB/s once warm (share of the same without delay or loss)",
    )
    table.add_column("rtt", justify="right")
    table.add_column("loss", justify="right")
    for way in ways:
        table.add_column(way.name, justify="right", no_wrap=True)
    for rtt, loss in dict.fromkeys((cell.rtt, cell.loss) for cell in cells):
        row = [f"{rtt * 1e3:g} ms", f"{loss:.1%}"]
        for way in ways:
            rate = _rate_of(cells, way, rtt, loss)
            best = _rate_of(cells, way, 0, 0)
            share = f" ({rate / best:.2f})" if rate is not None and best else ""
            row.append("" if rate is None else f"{rate / 1e6:.1f}{share}")
        table.add_row(*row)
    console.print(table)
    dropped = sum(cell.dropped for cell in cells)
    if dropped:
        console.print(f"The proxy was too slow for {dropped} datagrams.", style="red")


def _rate_of(cells: list[Cell], way: Way, rtt: float, loss: float) -> float | None:
    """Return the median of all rounds."""
    rates = sorted(
        cell.rate
        for cell in cells
        if (cell.way, cell.rtt, cell.loss) == (way, rtt, loss)
    )
    return rates[len(rates) // 2] if rates else None


@contextmanager
def _started(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def _output(process: subprocess.Popen[bytes]) -> IO[bytes]:
    if process.stdout is None:
        raise ValueError("its output goes elsewhere")
    return process.stdout


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure links on paths with delay and loss."
    )
    parser.add_argument(
        "--kinds",
        dest="ways",
        type=_parse_ways,
        default="tcp,quic",
        help="of tcp, quic, quic:reno, quic:cubic (default: tcp,quic)",
    )
    parser.add_argument(
        "--rtt",
        type=lambda text: [float(part) / 1e3 for part in text.split(",")],
        default="0,20,50,100",
        help="milliseconds (default: 0,20,50,100)",
    )
    parser.add_argument(
        "--loss",
        type=lambda text: [float(part) / 1e2 for part in text.split(",")],
        default="0,0.1,1",
        help="per cent of the datagrams (default: 0,0.1,1)",
    )
    for name, default, what in (
        ("seconds", 12.0, "how long each link sends"),
        ("warm", 4.0, "seconds at the beginning that do not count"),
    ):
        parser.add_argument(
            f"--{name}", type=float, default=default, help=f"{what} ({default:g})"
        )
    parser.add_argument("--rounds", type=int, default=1, help="rounds (1)")
    parser.add_argument("--seed", type=int, default=1, help="of the losses (1)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write all cells here"
    )
    return parser.parse_args()


def _parse_ways(text: str) -> list[Way]:
    ways = []
    for part in text.split(","):
        kind, _, control = part.partition(":")
        if kind == "quic" and control in ("", "reno", "cubic"):
            ways.append(Way("quic", control))
        elif part == "tcp":
            ways.append(Way("tcp"))
        else:
            raise argparse.ArgumentTypeError(f"{part} is not a kind of link")
    return ways


if __name__ == "__main__":
    sys.exit(main())
