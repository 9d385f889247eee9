"""Execution of the async code of a command, and the destination of its logs."""

import logging
import os
import sys
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, ParamSpec

import structlog
import trio

P = ParamSpec("P")


def run(
    function: Callable[P, Coroutine[Any, Any, None]],
    *args: P.args,
    **kwargs: P.kwargs,
) -> None:
    """Run an async function to its end as a command that logs errors only."""
    configure_logs(level=logging.ERROR)
    run_logged(function, *args, **kwargs)


def run_logged(
    function: Callable[P, Coroutine[Any, Any, None]],
    *args: P.args,
    **kwargs: P.kwargs,
) -> None:
    """Run an async function to its end; the caller has configured the logs."""
    trio.run(
        partial(function, *args, **kwargs),
        restrict_keyboard_interrupt_to_checkpoints=True,
    )


def configure_logs(*, level: int, as_json: bool = False) -> None:
    """Send structured logs to standard error.

    Args:
        level: The lowest level that is logged, as in `logging`.
        as_json: Write JSON lines for machines instead of text for people.
    """
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if as_json
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
                fmt="iso" if as_json else "%H:%M:%S", utc=as_json
            ),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    # Libraries that use the standard logging module log nothing useful to users.
    logging.basicConfig(level=logging.CRITICAL + 1)
