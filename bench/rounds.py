"""Ways take turns.

The speed of a disk and of a shared machine changes from minute to minute. So each way
is measured once in each round, and each round begins with another way.
"""

from collections.abc import Callable, Sequence

from bench.files import warm_memory
from bench.measures import Absent, BenchError, Contestant, Row, Sample, Section


def take_turns(
    section: Section,
    contestants: Sequence[Contestant | Absent],
    rounds: int,
    say: Callable[[str], object],
) -> Section:
    """Measure ways in turn.

    Args:
        section: The section that gets a row for each of them.
        contestants: The ways.
        rounds: Measurements of each way.
        say: Shows the current step.

    Returns:
        The section.
    """
    section.rows = [
        Row(one.name, absent=one.reason if isinstance(one, Absent) else "")
        for one in contestants
    ]
    turns = [
        (row, one)
        for row, one in zip(section.rows, contestants, strict=True)
        if isinstance(one, Contestant)
    ]
    for number in range(rounds):
        shift = number % max(len(turns), 1)
        for row, one in turns[shift:] + turns[:shift]:
            if row.failure:
                continue
            say(f"{section.title}, round {number + 1} of {rounds}: {row.name}")
            if not one.warms_memory:
                warm_memory(section.size or 0)
            try:
                row.samples.append(one.measure())
            except BenchError as error:
                row.failure = str(error)
    section.rows = [part for row in section.rows for part in (row, *_parts_of(row))]
    return section


def _parts_of(row: Row) -> list[Row]:
    """Make rows of the steps that were timed on their own."""
    names = dict.fromkeys(name for sample in row.samples for name in sample.parts)
    return [
        Row(
            f"{row.name}: {name}",
            [
                Sample(sample.parts[name], note=sample.note)
                for sample in row.samples
                if name in sample.parts
            ],
        )
        for name in names
    ]
