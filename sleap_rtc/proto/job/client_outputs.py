"""Outputs of a client's job: messages to send, effects to run, and events."""

from typing import Literal

import msgspec

from sleap_rtc.proto import messages
from sleap_rtc.proto.job.reports import ReportEvent

Outcome = Literal[
    "complete", "failed", "cancelled", "rejected", "transfer_failed", "lost"
]


class SendMessage(msgspec.Struct, frozen=True):
    """Send this to the worker."""

    message: messages.ClientJobMessage


class PrepareShared(msgspec.Struct, frozen=True):
    """Make the job directory and a probe file in it.

    The owner answers with `probe_written` or `shared_failed`.
    """

    job_id: str


class CopyPackage(msgspec.Struct, frozen=True):
    """Copy the package to this path beneath the root.

    The owner answers with `package_copied` or `shared_failed`.
    """

    path: str


class DiscardShared(msgspec.Struct, frozen=True):
    """Stop copying, and remove the job directory, which no job will use."""

    job_id: str


class SendPackage(msgspec.Struct, frozen=True):
    """Send the package in chunks.

    The owner answers with `package_sent` or `transfer_failed`.
    """

    transfer_id: int


class StopTransfer(msgspec.Struct, frozen=True):
    """Stop sending the package, or fetching the results.

    A report of the stopped effect changes nothing. It may come late, but not after the
    next transfer has begun.
    """


class FetchResults(msgspec.Struct, frozen=True):
    """Deliver these files of the job directory to the place that the user asked for.

    The owner answers with `results_fetched` or `transfer_failed`.
    """

    job_id: str
    route: messages.Route
    files: tuple[messages.ResultFile, ...]


class Reconnect(msgspec.Struct, frozen=True):
    """Open another link to the same worker, because the last one is lost.

    The owner answers with `connection_restored` or `give_up`. A job that has not begun
    is answered with `submit` or `resume` instead.
    """

    reason: str


class RouteChosen(msgspec.Struct, frozen=True):
    """Event: the route of the package was chosen, for this reason."""

    route: messages.Route
    reason: str


class JobEnded(msgspec.Struct, frozen=True):
    """Event: the job has ended; it is the last output.

    Args:
        outcome: How it ended.
        reason: Why it ended, for people; empty if it completed. For a cancellation
            without confirmation, the reason why that is missing.
        path: Where the worker put the models, beneath the shared root or the job
            directory; empty if the job did not complete.
        confirmed: False if the worker may go on with a job that was cancelled.
    """

    outcome: Outcome
    reason: str = ""
    path: str = ""
    confirmed: bool = True

    @property
    def can_be_resumed(self) -> bool:
        """True if a later process may find the job at the worker, and resume it."""
        return not self.confirmed or self.outcome in ("lost", "transfer_failed")


JobEvent = RouteChosen | ReportEvent
"""Events for the user; `JobEnded` follows them."""

Output = (
    SendMessage
    | PrepareShared
    | CopyPackage
    | DiscardShared
    | SendPackage
    | StopTransfer
    | FetchResults
    | Reconnect
    | JobEvent
    | JobEnded
)
