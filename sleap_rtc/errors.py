"""Failures that a user can expect, each with the exit code of the command line."""

from enum import IntEnum


class ExitCode(IntEnum):
    """What `sleap-rtc` returns to the shell. These numbers do not change."""

    DONE = 0
    UNEXPECTED = 1
    """A bug, or a check of `doctor` that failed."""

    USAGE = 2
    NO_WORKER = 3
    TRANSFER_FAILED = 4
    JOB_FAILED = 5
    REFUSED = 6
    CONNECTION_LOST = 7
    TIMEOUT = 8
    INTERRUPTED = 130
    """As shells do for a program that Ctrl-C ended: 128 and the signal's number."""


class UserError(Exception):
    """A failure that is no bug.

    Args:
        message: What happened, to which file or peer, and why.
        hint: What to do next.
    """

    exit_code = ExitCode.UNEXPECTED

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(UserError):
    """The command can't be carried out as it was typed or configured."""

    exit_code = ExitCode.USAGE


class NoWorkerError(UserError):
    """No worker could be found or reached."""

    exit_code = ExitCode.NO_WORKER


class TransferFailedError(UserError):
    """The package or the results could not be brought to the other side."""

    exit_code = ExitCode.TRANSFER_FAILED


class JobFailedError(UserError):
    """The job ran, or was about to, and failed."""

    exit_code = ExitCode.JOB_FAILED


class RefusedError(UserError):
    """The signaling server or the worker refused this peer or this job."""

    exit_code = ExitCode.REFUSED


class ConnectionLostError(UserError):
    """The worker went away while something was under way."""

    exit_code = ExitCode.CONNECTION_LOST


class JobTimeoutError(UserError):
    """The time that the user set ran out."""

    exit_code = ExitCode.TIMEOUT


class InterruptedJobError(UserError):
    """The user cancelled the job."""

    exit_code = ExitCode.INTERRUPTED
