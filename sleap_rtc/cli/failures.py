"""Expected failures of a command: a message for people and an exit code."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from sleap_rtc.errors import ExitCode, UserError


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
        _report_interrupt()
        sys.exit(ExitCode.INTERRUPTED)
    except BrokenPipeError:
        # The reader of standard output has exited (`| head`).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(ExitCode.UNEXPECTED)
    except BaseExceptionGroup as group:
        match _only_expected(group):
            case UserError() as expected:
                _report(expected, as_json)
                sys.exit(expected.exit_code)
            case KeyboardInterrupt():
                _report_interrupt()
                sys.exit(ExitCode.INTERRUPTED)
            case None:
                raise


def _only_expected(
    group: BaseExceptionGroup[BaseException],
) -> UserError | KeyboardInterrupt | None:
    """Return the first failure of a group in which all failures are expected."""
    expected, rest = group.split((UserError, KeyboardInterrupt))
    if expected is None or rest is not None:
        return None
    first: BaseException = expected
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    return first if isinstance(first, (UserError, KeyboardInterrupt)) else None


def _report(error: UserError, as_json: bool) -> None:
    from sleap_rtc.cli.console import err, plain, print_json
    from sleap_rtc.proto.terminal import printable

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


def _report_interrupt() -> None:
    from sleap_rtc.cli.console import err

    err.print("Interrupted.")
