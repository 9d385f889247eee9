"""The command line: it parses, calls and prints; what happens is decided elsewhere."""

import sys
from collections.abc import Sequence

import typer

from sleap_rtc.cli import config, daemon, doctor, rooms, send
from sleap_rtc.cli.console import (
    LogFormat,
    LogLevel,
    configure_logs,
    reported_errors,
)

app = typer.Typer(
    name="sleap-rtc",
    help="Run SLEAP training and inference on a GPU machine elsewhere.",
    epilog=(
        "Exit codes: 0 done, 1 unexpected or a failed check, 2 usage, 3 no worker, "
        "4 transfer failed, 5 job failed, 6 refused, 7 connection lost, 8 timeout, "
        "130 interrupted."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _configure() -> None:
    # Only a daemon logs what it does; the other commands print what they were asked.
    configure_logs(LogFormat.text, LogLevel.quiet)


app.command()(send.send)
app.command()(daemon.daemon)
app.command()(rooms.invite)
app.command()(rooms.join)
app.command()(rooms.workers)
app.command()(doctor.doctor)
app.add_typer(config.app, name="config")
app.command()(config.version)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and end the process with its exit code.

    Args:
        arguments: What was typed after the program's name; by default `sys.argv`.
    """
    with reported_errors():
        app(args=None if arguments is None else list(arguments), prog_name="sleap-rtc")
    sys.exit(0)
