"""Outputs of a worker's job: messages to send, and effects to run."""

import msgspec

from sleap_rtc.proto import messages


class SendMessage(msgspec.Struct, frozen=True):
    """Send this to the client, if it is still connected."""

    message: messages.WorkerJobMessage | messages.FileError


class ReadProbe(msgspec.Struct, frozen=True):
    """Read this small file beneath the root; `probe_read` or `probe_failed` follows."""

    path: str


class CheckInput(msgspec.Struct, frozen=True):
    """Check the package beneath the root; `input_valid` or `path_refused` follows."""

    path: str


class MakeOutput(msgspec.Struct, frozen=True):
    """Create this folder beneath the root; `output_made` or `path_refused` follows."""

    path: str


class Admit(msgspec.Struct, frozen=True):
    """Decide whether to take a package; `admitted` or `rejected` follows."""

    job_id: str
    submission: messages.Submission


class ReceivePackage(msgspec.Struct, frozen=True):
    """Receive the package; `package_received` or `package_failed` follows."""

    transfer_id: int
    file: messages.OfferedFile


class StopReceiving(msgspec.Struct, frozen=True):
    """Stop receiving the package, and keep the part that has arrived."""


class Remember(msgspec.Struct, frozen=True):
    """Record the state of the job durably, for `WorkerJob.restored`."""


class Enqueue(msgspec.Struct, frozen=True):
    """Wait for a slot, then run the package.

    Reports follow: `queue_moved` while it waits, then `slot_granted`, any number of
    `progressed`, and `run_ended`.
    """

    job_id: str
    route: messages.Route
    package: str
    """Path beneath the shared root, or name in the job directory."""


class StopRun(msgspec.Struct, frozen=True):
    """Leave the queue, or stop the commands; `run_ended` follows."""


class SendResult(msgspec.Struct, frozen=True):
    """Send this file of the job directory to the client."""

    transfer_id: int
    path: str


class Discard(msgspec.Struct, frozen=True):
    """Stop all effects of this job, and remove the worker's record and copy of it."""


Output = (
    SendMessage
    | ReadProbe
    | CheckInput
    | MakeOutput
    | Admit
    | ReceivePackage
    | StopReceiving
    | Remember
    | Enqueue
    | StopRun
    | SendResult
    | Discard
)
