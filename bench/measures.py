"""What is measured: values, and nothing that measures."""

import argparse
import re
import statistics
from collections.abc import Callable
from pathlib import Path

import msgspec

KIBIBYTE, MEBIBYTE, GIBIBYTE = 1024, 1024**2, 1024**3


_UNITS = {"KiB": KIBIBYTE, "MiB": MEBIBYTE, "GiB": GIBIBYTE}


class BenchError(Exception):
    """A measurement can't be made; the text is for people."""


def parse_size(text: str) -> int:
    """Read a number of bytes such as ``256MiB``, for a command line.

    Raises:
        ArgumentTypeError: If it is none.
    """
    found = re.fullmatch(r"([1-9]\d*)([KMG]iB)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text} is no size such as 256MiB or 5GiB")
    return int(found[1]) * _UNITS[found[2]]


def without_connecting(seconds: float, connecting: float) -> float:
    """Take off what a program needs to connect, which is not moving.

    Raises:
        BenchError: If nothing is left: the file is too small to tell.
    """
    if seconds <= connecting:
        raise BenchError("it took no longer than to connect; name a larger --size")
    return round(seconds - connecting, 4)


class Usage(msgspec.Struct, frozen=True):
    """What one side has used.

    Args:
        cpu_seconds: Time on any core, its children included.
        peak_bytes: The most that was resident, ever; None where nobody could tell.
    """

    cpu_seconds: float
    peak_bytes: int | None = None


class Sample(msgspec.Struct, frozen=True):
    """One way, once.

    Args:
        seconds: How long it took.
        is_intact: False if other bytes arrived than were sent.
        sender: What the side that has the file used; None if nobody looked.
        receiver: The same of the other side, if there is one.
        note: How it was done, where the way itself chooses.
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
        name: What it is called in the table.
        measure: Does it once; raises `BenchError` if it fails.
        warms_memory: True if it warms the memory itself, once its processes run.
    """

    name: str
    measure: Callable[[], Sample]
    warms_memory: bool = False


class Absent(msgspec.Struct, frozen=True):
    """A way that can't be measured here, and why."""

    name: str
    reason: str


class Row(msgspec.Struct):
    """One way, and what was measured of it.

    Args:
        name: What it is called.
        samples: One for each round.
        absent: Why there are no samples.
        failure: What went wrong in a round; the way was left out from then on.
    """

    name: str
    samples: list[Sample] = []
    absent: str = ""
    failure: str = ""

    def seconds(self) -> list[float]:
        """List how long each round took."""
        return [sample.seconds for sample in self.samples]


class Section(msgspec.Struct):
    """Ways that took turns.

    Args:
        key: A short name.
        title: What they have in common.
        place: The file system.
        size: Bytes that are moved; None where only the time counts.
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
    """Whether one goal was reached.

    Args:
        goal: What is compared, for people.
        wanted: The bound, such as ``>= 0.85``.
        unit: What the numbers are; empty for ratios.
        values: The measured ones, one for each round.
        is_met: Whether their median keeps the bound; None if it was not measured.
        reason: Why it was not measured.
    """

    goal: str
    wanted: str
    unit: str = ""
    values: list[float] = []
    is_met: bool | None = None
    reason: str = ""


class Spread(msgspec.Struct, frozen=True):
    """The middle of some samples, and their ends."""

    median: float
    low: float
    high: float


def spread_of(values: list[float]) -> Spread:
    """Sum up samples, of which there is at least one."""
    return Spread(statistics.median(values), min(values), max(values))


class Machine(msgspec.Struct, frozen=True):
    """What the numbers were measured on.

    Args:
        system: Kernel and architecture.
        processor: Its model, where the system tells.
        cores: How many there are.
        memory_bytes: How much there is.
        versions: Of the programs and libraries that took part.
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
        path: Where it is.
        size: Its bytes.
        hashed: How many of its last bytes are checked: all, but for reserved ones.
        digest: Their BLAKE3 hash.
        arrived: Where the receiving side is to leave it.
    """

    path: Path
    size: int
    hashed: int
    digest: str
    arrived: Path
