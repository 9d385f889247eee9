"""The values of a measurement, without the code that measures."""

import argparse
import re
import statistics
from collections.abc import Callable
from pathlib import Path

import msgspec

KIBIBYTE, MEBIBYTE, GIBIBYTE = 1024, 1024**2, 1024**3


_UNITS = {"KiB": KIBIBYTE, "MiB": MEBIBYTE, "GiB": GIBIBYTE}


class BenchError(Exception):
    """A measurement is not possible; the text is for people."""


def parse_size(text: str) -> int:
    """Read a number of bytes such as ``256MiB``, for a command line.

    Raises:
        ArgumentTypeError: If the text is not a size.
    """
    found = re.fullmatch(r"([1-9]\d*)([KMG]iB)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text} is not a size such as 256MiB or 5GiB")
    return int(found[1]) * _UNITS[found[2]]


def without_connecting(seconds: float, connecting: float) -> float:
    """Subtract the seconds that a program needs to connect: that is not moving.

    Raises:
        BenchError: If nothing is left: the file is too small to tell.
    """
    if seconds <= connecting:
        raise BenchError("it took no longer than to connect; name a larger --size")
    return round(seconds - connecting, 4)


class Usage(msgspec.Struct, frozen=True):
    """The resources that one side has used.

    Args:
        cpu_seconds: Time on any core, its children included.
        peak_bytes: The most that was ever resident; None if the system hides it.
    """

    cpu_seconds: float
    peak_bytes: int | None = None


class Sample(msgspec.Struct, frozen=True):
    """One measurement of one way.

    Args:
        seconds: Its duration.
        is_intact: False if other bytes arrived than were sent.
        sender: Resources used by the side that has the file; None if not measured.
        receiver: The same of the other side, if there is one.
        note: The means, where the way itself chooses.
        parts: Seconds of steps that were timed on their own; they get their own rows.
    """

    seconds: float
    is_intact: bool = True
    sender: Usage | None = None
    receiver: Usage | None = None
    note: str = ""
    parts: dict[str, float] = {}


class Contestant(msgspec.Struct, frozen=True):
    """A way that can be measured.

    Args:
        name: Its name in the table.
        measure: Does it once; raises `BenchError` if it fails.
        warms_memory: True if it warms the memory itself, once its processes run.
    """

    name: str
    measure: Callable[[], Sample]
    warms_memory: bool = False


class Absent(msgspec.Struct, frozen=True):
    """A way that cannot be measured here, and the reason."""

    name: str
    reason: str


class Row(msgspec.Struct):
    """One way, and its measurements.

    Args:
        name: Its name in the table.
        samples: One for each round.
        absent: The reason why there are no samples.
        failure: The error of a round; the way was left out from then on.
    """

    name: str
    samples: list[Sample] = []
    absent: str = ""
    failure: str = ""

    def seconds(self) -> list[float]:
        """List the seconds of each round."""
        return [sample.seconds for sample in self.samples]


class Section(msgspec.Struct):
    """Ways that took turns.

    Args:
        key: A short name.
        title: The heading in the table.
        place: The file system.
        size: Bytes that are moved; None if only the time counts.
        rows: The ways.
    """

    key: str
    title: str
    place: str
    size: int | None
    rows: list[Row] = []

    def find(self, name: str) -> Row | None:
        """Return the row of a way that has samples."""
        found = (row for row in self.rows if row.name == name and row.samples)
        return next(found, None)


class Verdict(msgspec.Struct, frozen=True):
    """The result of one goal.

    Args:
        goal: The compared ways, for people.
        wanted: The bound, such as ``>= 0.85``.
        unit: The unit of the numbers; empty for ratios.
        values: The measured numbers, one for each round.
        is_met: True if their median keeps the bound; None if it was not measured.
        reason: The reason why it was not measured.
    """

    goal: str
    wanted: str
    unit: str = ""
    values: list[float] = []
    is_met: bool | None = None
    reason: str = ""


class Spread(msgspec.Struct, frozen=True):
    """The median of some samples, and their extremes."""

    median: float
    low: float
    high: float


def spread_of(values: list[float]) -> Spread:
    """Return the spread of samples; at least one is needed."""
    return Spread(statistics.median(values), min(values), max(values))


class Machine(msgspec.Struct, frozen=True):
    """The machine on which the numbers were measured.

    Args:
        system: Kernel and architecture.
        processor: Its model, if the system names it.
        cores: Number of cores.
        memory_bytes: Bytes of memory.
        versions: Versions of the programs and libraries that took part.
    """

    system: str
    processor: str
    cores: int
    memory_bytes: int
    versions: dict[str, str]


class Report(msgspec.Struct):
    """Everything that was measured."""

    machine: Machine
    began: str
    rounds: int
    sections: list[Section]
    verdicts: list[Verdict]

    @property
    def is_good(self) -> bool:
        """True if nothing failed, and every byte arrived as it was sent."""
        rows = [row for section in self.sections for row in section.rows]
        intact = all(sample.is_intact for row in rows for sample in row.samples)
        return intact and not any(row.failure for row in rows)


class Load(msgspec.Struct, frozen=True):
    """The file that is moved.

    Args:
        path: Its path.
        size: Its bytes.
        hashed: Number of its last bytes that are checked: all but reserved ones.
        digest: Their BLAKE3 hash.
        arrived: The path that the receiving side gives it.
    """

    path: Path
    size: int
    hashed: int
    digest: str
    arrived: Path
