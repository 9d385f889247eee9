"""The goals for the speed of the product, and their verdicts.

A goal is a ratio wherever possible: the rate of one machine predicts little about
another. Both sides of a ratio come from the same round.
"""

import statistics
from typing import assert_never

import msgspec

from bench.measures import MEBIBYTE, Row, Section, Verdict

PEAK = 150
"""MiB that a side may have resident, however long the file is."""


class Ratio(msgspec.Struct, frozen=True):
    """A way has to be at least n times as fast as a second one.

    Args:
        section: The section of both.
        way: The row of the way.
        other: The row of the second way.
        at_least: The factor n.
    """

    section: str
    way: str
    other: str
    at_least: float


class Seconds(msgspec.Struct, frozen=True):
    """A way has to take less than a number of seconds."""

    section: str
    way: str
    at_most: float


class Peak(msgspec.Struct, frozen=True):
    """A way has to need less than a number of MiB on either side."""

    section: str
    way: str
    at_most: float


Target = Ratio | Seconds | Peak

TARGETS: tuple[Target, ...] = (
    Ratio("disk", "shared: the copy", "cp + fsync", 0.95),
    Ratio("memory", "shared: the copy", "cp + fsync", 0.95),
    Ratio("tcp", "tcp", "a bare TLS stream (Trio)", 0.85),
    Ratio("tcp", "tcp", "scp", 2.0),
    Ratio("quic", "quic, 1350 B", "aioquic in memory, 1350 B", 1.0),
    Ratio("quic", "quic, 1350 B", "aiortc data channel", 3.0),
    Ratio("quic", "quic, 8900 B", "quic, 1350 B", 4.0),
    Ratio("path", "quic, 50 ms, 0.1% lost", "quic, 0 ms, 0.0% lost", 0.5),
    Seconds("reflink", "shared (xfs)", 0.2),
    Seconds("reflink", "shared (btrfs)", 0.2),
    Peak("disk", "shared", PEAK),
    Peak("tcp", "tcp", PEAK),
    Peak("long", "quic, its own choice", PEAK),
)


def judge(sections: list[Section]) -> list[Verdict]:
    """Compare the measured values with every target."""
    places = {section.key: section for section in sections}
    return [_judge(target, places.get(target.section)) for target in TARGETS]


def _judge(target: Target, section: Section | None) -> Verdict:
    place = f", {section.place}" if section and section.place else ""
    match target:
        case Ratio(way=way, other=other, at_least=bound):
            goal, wanted, unit = f"{way} / {other}{place}", f">= {bound:g}", ""
        case Seconds(way=way, at_most=bound):
            goal, wanted, unit = f"{way}{place}", f"<= {bound:g}", "s"
        case Peak(way=way, at_most=bound):
            goal, wanted, unit = f"memory of {way}{place}", f"<= {bound:g}", "MiB"
        case _:
            assert_never(target)
    names = [target.way, target.other] if isinstance(target, Ratio) else [target.way]
    rows = [row for name in names if section and (row := section.find(name))]
    if len(rows) < len(names):
        return Verdict(goal, wanted, unit, reason=_why_absent(section, names))
    values = _values(target, rows)
    if not values:
        return Verdict(goal, wanted, unit, reason="the system does not report it")
    median = statistics.median(values)
    is_met = median >= bound if isinstance(target, Ratio) else median <= bound
    return Verdict(goal, wanted, unit, [round(value, 3) for value in values], is_met)


def _values(target: Target, rows: list[Row]) -> list[float]:
    """Return the number of every round that counts."""
    match target:
        case Ratio():
            pairs = zip(rows[0].seconds(), rows[1].seconds(), strict=False)
            return [other / own for own, other in pairs]
        case Seconds():
            return rows[0].seconds()
        case Peak():
            sides = [(one.sender, one.receiver) for one in rows[0].samples]
            peaks = [[side.peak_bytes or 0 for side in two if side] for two in sides]
            return [max(two) / MEBIBYTE for two in peaks if any(two)]
        case _:
            assert_never(target)


def _why_absent(section: Section | None, names: list[str]) -> str:
    if section is None:
        return "left out"
    reasons = {
        row.name: "it failed" if row.failure else row.absent for row in section.rows
    }
    found = [f"{name}: {reasons[name]}" for name in names if reasons.get(name)]
    return "; ".join(found) or "not measured"
