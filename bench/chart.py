"""A chart of a report: SVG, written by hand."""

from html import escape

from bench.measures import Report, Row, Section, spread_of
from bench.report import heading, measured, number

WIDTH, LEFT, RIGHT = 900, 250, 170
LINE, BAR, HEAD = 22, 14, 40
"""Pixels of the height of a row, of its bar, and of the heading above the rows."""

OWN, OTHER = "#2a6fbb", "#b8bec6"
"""Colors of the product's bars, and of the others."""

PRODUCT = ("shared", "tcp", "quic")
"""Prefixes of the names of the product's own ways."""

STYLE = (
    "text{font:13px sans-serif;fill:#222}"
    ".head{font-weight:bold}.small{font-size:11px;fill:#555}"
    ".whisker{stroke:#222;stroke-width:1.5}"
)


def draw(report: Report) -> str:
    """Draw a bar for each way: the median, and a line from the slowest to the fastest.

    Each section has a scale of its own.
    """
    parts: list[str] = []
    top = 34
    for section in report.sections:
        rows = [row for row in section.rows if row.samples]
        if rows:
            parts += _section(section, rows, top)
            top += HEAD + LINE * len(rows)
    machine = report.machine
    caption = f"{machine.cores} cores ({machine.processor}), {machine.system}"
    caption += f", {report.rounds} rounds, {report.began}"
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" '
            f'height="{top + 30}" viewBox="0 0 {WIDTH} {top + 30}">',
            f"<style>{STYLE}</style>",
            f'<rect width="{WIDTH}" height="{top + 30}" fill="white"/>',
            _text(10, 22, "sleap-rtc beside other ways", "head"),
            *parts,
            _text(10, top + 18, caption, "small"),
            "</svg>\n",
        )
    )


def _section(section: Section, rows: list[Row], top: int) -> list[str]:
    spreads = [spread_of(measured(section, row)[0]) for row in rows]
    scale = (WIDTH - LEFT - RIGHT) / max(spread.high for spread in spreads)
    unit = measured(section, rows[0])[1]
    better = "more is better" if section.size else "less is better"
    parts = [_text(10, top + 26, f"{heading(section)} ({unit}, {better})", "head")]
    for index, (row, spread) in enumerate(zip(rows, spreads, strict=True)):
        base = top + HEAD + LINE * index
        middle = base + BAR / 2
        low, high = (LEFT + end * scale for end in (spread.low, spread.high))
        color = OWN if row.name.startswith(PRODUCT) else OTHER
        ends = f"{number(spread.low)}-{number(spread.high)}"
        parts += [
            _text(20, base + 12, row.name),
            f'<rect x="{LEFT}" y="{base}" width="{spread.median * scale:.1f}" '
            f'height="{BAR}" fill="{color}"/>',
            f'<line class="whisker" x1="{low:.1f}" y1="{middle:g}" '
            f'x2="{high:.1f}" y2="{middle:g}"/>',
            _text(high + 8, base + 12, f"{number(spread.median)} ({ends})", "small"),
        ]
    return parts


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    attribute = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{attribute}>{escape(text)}</text>'
