"""Measure how fast a file reaches a worker, beside other ways to move it.

    python -m bench.compare --size 256MiB --rounds 3

Everything runs on this machine, and takes turns: the product with a real worker and a
real `send`; `cp`, `dd`, `rsync` and `shutil.copy2` on the same storage; a bare TLS
stream, `scp`, `rsync -e ssh` and magic-wormhole beside TCP; aiortc and aioquic's own
engine beside QUIC. A program that is not installed is left out, and the table reports
that. Nothing stays behind but the files of `--json` and `--svg`. docs/performance.md
explains the table.
"""

import argparse
import datetime
import shutil
import signal
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import msgspec
from rich.console import Console

from bench.chart import draw
from bench.files import MEMORY
from bench.machine import describe_machine
from bench.measures import BenchError, Report, parse_size
from bench.report import show
from bench.sections import SECTIONS, Settings
from bench.targets import judge


def main() -> int:
    """Run the command line; return the exit code."""
    arguments = _parse_arguments()
    console = Console(width=None if sys.stdout.isatty() else 132)
    # SIGTERM cleans up as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        report = _measure(arguments, Console(stderr=True))
    except (BenchError, OSError) as error:
        console.print(f"The measurement failed: {error}", style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("Interrupted; everything is cleaned up.")
        return 130
    show(report, console)
    if arguments.json is not None:
        encoded = msgspec.json.format(msgspec.json.encode(report))
        arguments.json.write_bytes(encoded + b"\n")
    if arguments.svg is not None:
        arguments.svg.write_text(draw(report), encoding="utf-8")
    return 0 if report.is_good else 1


def _measure(arguments: argparse.Namespace, console: Console) -> Report:
    began = datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes")
    with ExitStack() as stack:
        settings = Settings(
            disk=_temporary(stack, arguments.directory),
            memory=_temporary(stack, arguments.memory) if arguments.memory else None,
            size=arguments.size,
            quic_size=arguments.quic_size,
            rounds=arguments.rounds,
            peers_python=arguments.peers_python,
            wormhole=_find_wormhole(arguments.peers_python),
            say=lambda text: console.print(text, style="dim", markup=False),
        )
        sections = [SECTIONS[key](settings) for key in arguments.sections]
    return Report(
        machine=describe_machine(arguments.peers_python),
        began=began,
        rounds=arguments.rounds,
        sections=sections,
        verdicts=judge(sections),
    )


def _temporary(stack: ExitStack, parent: Path | None) -> Path:
    directory = tempfile.TemporaryDirectory(prefix="sleap-rtc-bench-", dir=parent)
    return Path(stack.enter_context(directory))


def _find_wormhole(peers_python: str | None) -> Path | None:
    beside = None if peers_python is None else str(Path(peers_python).parent)
    found = shutil.which("wormhole", path=beside) or shutil.which("wormhole")
    return None if found is None else Path(found)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure how fast a file reaches a worker, beside other ways."
    )
    parser.add_argument(
        "--size", type=parse_size, default="256MiB", help="such as 256MiB or 5GiB"
    )
    parser.add_argument(
        "--quic-size", type=parse_size, default="32MiB", help="for the slower ways"
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default: 3)")
    parser.add_argument(
        "--sections",
        type=_parse_sections,
        default=",".join(SECTIONS),
        help=f"some of {','.join(SECTIONS)} (default: all)",
    )
    parser.add_argument(
        "--directory", type=Path, help="on the storage to measure (default: temporary)"
    )
    parser.add_argument(
        "--memory",
        type=Path,
        default=MEMORY if MEMORY.is_dir() else None,
        help=f"on a file system in memory (default: {MEMORY}, where it exists)",
    )
    parser.add_argument(
        "--peers-python", metavar="PYTHON", help="a Python that has aiortc"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write all samples here"
    )
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw a chart here")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("at least one round is needed")
    return arguments


def _parse_sections(text: str) -> tuple[str, ...]:
    keys = tuple(text.split(","))
    if not set(keys) <= set(SECTIONS):
        raise argparse.ArgumentTypeError(f"the sections are {', '.join(SECTIONS)}")
    return keys


if __name__ == "__main__":
    sys.exit(main())
