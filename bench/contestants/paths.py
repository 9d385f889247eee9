"""Links of the product on paths with delay and loss: the rate once they are warm."""

from collections.abc import Iterator

from bench import impaired
from bench.line import Conditions
from bench.measures import BenchError, Contestant, Sample

SECONDS, WARM = 6.0, 2.0
"""Seconds of sending, and seconds at its start that do not count, because congestion
control begins slowly."""

PATHS = ((0.0, 0.0), (0.05, 0.0), (0.05, 0.001))
"""Round trips in seconds, with the share of datagrams that is lost each way."""


def links(size: int) -> Iterator[Contestant]:
    """Yield a contestant for each kind of link on each path that it can take.

    Args:
        size: Bytes whose time at the measured rate is reported.
    """
    for kind in (impaired.Way("tcp"), impaired.Way("quic")):
        for rtt, loss in PATHS:
            if kind.can_take(loss):
                yield _link(kind, rtt, loss, size)


def _link(way: impaired.Way, rtt: float, loss: float, size: int) -> Contestant:
    def measure() -> Sample:
        conditions = Conditions(delay=rtt / 2, loss=loss)
        try:
            cell = impaired.measure(way, conditions, SECONDS, WARM)
        except impaired.FAILURES as error:
            raise BenchError(f"an end of the link failed: {error}") from None
        if not cell.rate:
            raise BenchError("too little arrived to tell")
        note = f"the path lost {cell.lost}" if loss else ""
        return Sample(round(size / cell.rate, 4), note=note)

    return Contestant(f"{way.name}, {rtt * 1e3:g} ms, {loss:.1%} lost", measure)
