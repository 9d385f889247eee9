"""What a client's job asks of its owner: messages to send, effects, and events."""

from typing import Literal

import msgspec

from sleap_rtc.proto import messages as m

Outcome = Literal[
    "complete", "failed", "cancelled", "rejected", "transfer_failed", "lost"
]


class SendMessage(msgspec.Struct, frozen=True):
    """Send this to the worker."""

    message: m.Message


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
    """Stop copying, and remove the job directory: nobody will use it."""

    job_id: str


class SendPackage(msgspec.Struct, frozen=True):
    """Send the package in chunks.

    The owner answers with `package_sent` or `transfer_failed`.
    """

    transfer_id: int


class StopSending(msgspec.Struct, frozen=True):
    """Stop sending the package, or fetching the results.

    Its report changes nothing any more, if it comes before the next transfer begins.
    """


class FetchResults(msgspec.Struct, frozen=True):
    """Bring these files, relative to the job directory, to where the user wants them.

    The owner answers with `results_fetched` or `transfer_failed`.
    """

    job_id: str
    route: m.Route
    files: tuple[m.ResultFile, ...]


class Reconnect(msgspec.Struct, frozen=True):
    """Open another link to the same worker: this one is gone.

    The owner answers with `link_restored` or `give_up`; `submit` and `resume` do for
    a job that has not begun.
    """

    reason: str


class RouteChosen(msgspec.Struct, frozen=True):
    """Event: how the package will travel, and why."""

    route: m.Route
    reason: str


class StateChanged(msgspec.Struct, frozen=True):
    """Event: what the worker says of the job."""

    progress: m.JobProgress


class LinePrinted(msgspec.Struct, frozen=True):
    """Event: a line of the job's output, or a new version of an earlier one."""

    line: int
    text: str


class StageComplete(msgspec.Struct, frozen=True):
    """Event: all commands of one kind have succeeded."""

    stage: Literal["training", "inference"]


class JobEnded(msgspec.Struct, frozen=True):
    """Event, the last one.

    Args:
        outcome: How it ended.
        reason: Why it ended, for people; empty if it completed. If a cancellation is
            not confirmed, why it is not.
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


Output = (
    SendMessage
    | PrepareShared
    | CopyPackage
    | DiscardShared
    | SendPackage
    | StopSending
    | FetchResults
    | Reconnect
    | RouteChosen
    | StateChanged
    | LinePrinted
    | StageComplete
    | JobEnded
)
