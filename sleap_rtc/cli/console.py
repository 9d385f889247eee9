"""What every command shares: consoles, logs, errors for people, exit codes."""

import json
import logging
import os
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from enum import IntEnum, StrEnum
from functools import partial
from typing import Any, ParamSpec

import structlog
import trio
from rich.console import Console
from rich.markup import escape

from sleap_rtc.errors import ExitCode, UserError
from sleap_rtc.proto.terminal import printable

P = ParamSpec("P")

out = Console(highlight=False, soft_wrap=True)
"""What a command was asked for."""

err = Console(stderr=True, highlight=False, soft_wrap=True)
"""Everything else: progress, advice, errors."""


class LogFormat(StrEnum):
    """How log lines look."""

    text = "text"
    json = "json"


class LogLevel(IntEnum):
    """How much is logged."""

    verbose = logging.DEBUG
    normal = logging.INFO
    quiet = logging.ERROR


def plain(text: str) -> str:
    """Make text of a peer harmless: no control sequences, no markup."""
    return escape(printable(text))


def print_json(event: str, **fields: object) -> None:
    """Print one JSON object on a line of its own, at once."""
    print(json.dumps({"event": event, **fields}, default=str), flush=True)


def configure_logs(format: LogFormat, level: LogLevel) -> None:
    """Send structured logs to standard error.

    Args:
        format: For people, or for machines.
        level: How much is logged.
    """
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if format is LogFormat.json
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty() and "NO_COLOR" not in os.environ,
            pad_event_to=0,
        )
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(
                fmt="iso" if format is LogFormat.json else "%H:%M:%S",
                utc=format is LogFormat.json,
            ),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    # Libraries that log in the standard way have nothing to say to a user.
    logging.basicConfig(level=logging.CRITICAL + 1)


def run(
    function: Callable[P, Coroutine[Any, Any, None]],
    *args: P.args,
    **kwargs: P.kwargs,
) -> None:
    """Run an async function to its end, as the whole of a command."""
    trio.run(
        partial(function, *args, **kwargs),
        restrict_keyboard_interrupt_to_checkpoints=True,
    )


@contextmanager
def reported_errors(*, as_json: bool = False) -> Iterator[None]:
    """End the process with a message and an exit code for every expected failure.

    Args:
        as_json: Print the failure as a JSON line on standard output.
    """
    try:
        yield
    except UserError as error:
        _report(error, as_json)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        err.print("Interrupted.")
        sys.exit(ExitCode.INTERRUPTED)
    except BrokenPipeError:
        # Whoever read our output has gone (`| head`); there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(ExitCode.UNEXPECTED)
    except BaseExceptionGroup as group:
        match _only_expected(group):
            case UserError() as expected:
                _report(expected, as_json)
                sys.exit(expected.exit_code)
            case KeyboardInterrupt():
                err.print("Interrupted.")
                sys.exit(ExitCode.INTERRUPTED)
            case None:
                raise


def _only_expected(
    group: BaseExceptionGroup[BaseException],
) -> UserError | KeyboardInterrupt | None:
    """Find the one expected failure in what several tasks raised together."""
    expected, rest = group.split((UserError, KeyboardInterrupt))
    if expected is None or rest is not None:
        return None
    first: BaseException = expected
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    return first if isinstance(first, (UserError, KeyboardInterrupt)) else None


def _report(error: UserError, as_json: bool) -> None:
    if as_json:
        print_json(
            "error",
            kind=type(error).__name__,
            message=printable(error.message),
            hint=error.hint,
            exit_code=int(error.exit_code),
        )
        return
    err.print(f"[bold red]Error:[/] {plain(error.message)}")
    if error.hint:
        err.print(f"[dim]What to do:[/] {plain(error.hint)}")
