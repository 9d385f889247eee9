"""The report for people: one table, and the goals."""

from collections.abc import Callable

from rich import box
from rich.console import Console
from rich.table import Table

from bench.measures import (
    GIBIBYTE,
    MEBIBYTE,
    Report,
    Row,
    Section,
    Usage,
    Verdict,
    spread_of,
)

LEGEND = (
    "Medians of all rounds. 1 MB is 10^6 bytes. CPU: seconds of processor time for a "
    "GiB, and peak: MiB resident at most, both of the sending / the receiving side."
)


def show(report: Report, console: Console) -> None:
    """Print the table, the goals and the machine."""
    machine = report.machine
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("way", no_wrap=True)
    for title in ("median", "min-max", "CPU/GiB", "peak"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("")
    for section in report.sections:
        table.add_row(f"[bold]{heading(section)}[/]")
        for row in section.rows:
            table.add_row(f"  {row.name}", *_cells(section, row))
        table.add_section()
    console.print(table)
    console.print(f"\n{LEGEND}\n", highlight=False)
    for verdict in report.verdicts:
        console.print(_line(verdict), highlight=False, markup=False, soft_wrap=True)
    memory = machine.memory_bytes / GIBIBYTE
    console.print(
        f"\n{report.rounds} round(s) on {machine.cores} cores ({machine.processor}), "
        f"{memory:.0f} GiB of memory, {machine.system}, began {report.began}",
        highlight=False,
    )
    versions = ", ".join(f"{name} {text}" for name, text in machine.versions.items())
    console.print(versions, highlight=False, markup=False)


def heading(section: Section) -> str:
    """Format the heading of a section."""
    size = [] if section.size is None else [size_of(section.size)]
    return ", ".join(
        (section.title, *size, *([section.place] if section.place else []))
    )


def size_of(size: int) -> str:
    """Format a number of bytes."""
    if size >= GIBIBYTE:
        return f"{size / GIBIBYTE:.3g} GiB"
    return f"{size / MEBIBYTE:.3g} MiB"


def measured(section: Section, row: Row) -> tuple[list[float], str]:
    """Return the number of a row that is shown, for each round, and its unit."""
    if section.size is None:
        return row.seconds(), "s"
    return [section.size / seconds / 1e6 for seconds in row.seconds()], "MB/s"


def number(value: float) -> str:
    """Format a number with its significant digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _cells(section: Section, row: Row) -> tuple[str, ...]:
    if not row.samples:
        return (
            "-",
            "",
            "",
            "",
            f"FAILED: {row.failure}" if row.failure else row.absent,
        )
    values, unit = measured(section, row)
    spread = spread_of(values)
    gibibytes = (section.size or 0) / GIBIBYTE
    notes = [row.samples[-1].note] if row.samples[-1].note else []
    if not all(sample.is_intact for sample in row.samples):
        notes.insert(0, "DAMAGED")
    if row.failure:
        notes.insert(0, f"FAILED: {row.failure}")
    return (
        f"{number(spread.median)} {unit}",
        f"{number(spread.low)}-{number(spread.high)}",
        _sides(row, lambda one: one.cpu_seconds / gibibytes) if gibibytes else "",
        _sides(row, lambda one: one.peak_bytes and one.peak_bytes / MEBIBYTE),
        "; ".join(notes),
    )


def _sides(row: Row, value: Callable[[Usage], float | None]) -> str:
    """Format the medians of both sides, or of those that are known."""
    written = []
    for side in ("sender", "receiver"):
        usages = [getattr(sample, side) for sample in row.samples]
        known = [found for one in usages if one and (found := value(one)) is not None]
        if known:
            written.append(number(spread_of(known).median))
        elif any(usages):
            written.append("?")
    return " / ".join(written)


def _line(verdict: Verdict) -> str:
    if verdict.is_met is None:
        return f"  ?      {verdict.goal}, {verdict.wanted} wanted: {verdict.reason}"
    spread = spread_of(verdict.values)
    word = "met   " if verdict.is_met else "NOT MET"
    found = f"{number(spread.median)} {verdict.unit}".strip()
    ends = f"({number(spread.low)}-{number(spread.high)})"
    return f"  {word} {verdict.goal}: {found} {ends}, {verdict.wanted} wanted"
