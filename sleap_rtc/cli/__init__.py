"""The command line: it parses, calls and prints; all decisions are made elsewhere."""

import sys
from collections.abc import Sequence

import typer

from sleap_rtc.cli import commands
from sleap_rtc.cli.failures import reported_errors

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
app.command()(commands.send)
app.command()(commands.daemon)
app.command()(commands.invite)
app.command()(commands.join)
app.command()(commands.workers)
app.command()(commands.doctor)
app.add_typer(commands.config, name="config")
app.command()(commands.version)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and end the process with its exit code.

    Args:
        arguments: The words after the program's name; by default those of `sys.argv`.
    """
    with reported_errors():
        app(args=None if arguments is None else list(arguments), prog_name="sleap-rtc")
    sys.exit(0)
