"""Expected failures for people, each with an exit code of the command line."""

from enum import IntEnum


class ExitCode(IntEnum):
    """The exit codes of `sleap-rtc`. These numbers do not change."""

    DONE = 0
    UNEXPECTED = 1
    """The exit code of a bug, and of `doctor` if a check failed."""

    USAGE = 2
    NO_WORKER = 3
    TRANSFER_FAILED = 4
    JOB_FAILED = 5
    REFUSED = 6
    CONNECTION_LOST = 7
    TIMEOUT = 8
    INTERRUPTED = 130
    """The exit code of shells for Ctrl-C: 128 plus the number of the signal."""


class UserError(Exception):
    """A failure that is not a bug.

    Args:
        message: The failure, the file or peer concerned, and the reason.
        hint: The next step for the user.
    """

    exit_code = ExitCode.UNEXPECTED

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(UserError):
    """The command cannot be carried out as it was typed or configured."""

    exit_code = ExitCode.USAGE


class NoWorkerError(UserError):
    """No worker could be found or reached."""

    exit_code = ExitCode.NO_WORKER


class TransferFailedError(UserError):
    """The package or the results could not be transferred."""

    exit_code = ExitCode.TRANSFER_FAILED


class JobFailedError(UserError):
    """The job failed while it ran, or could not start."""

    exit_code = ExitCode.JOB_FAILED


class RefusedError(UserError):
    """The signaling server or the worker refused this peer or this job."""

    exit_code = ExitCode.REFUSED


class ConnectionLostError(UserError):
    """The link to the worker was lost and could not be opened again."""

    exit_code = ExitCode.CONNECTION_LOST


class JobTimeoutError(UserError):
    """The time that the user set ran out."""

    exit_code = ExitCode.TIMEOUT


class InterruptedJobError(UserError):
    """The user cancelled the job."""

    exit_code = ExitCode.INTERRUPTED
