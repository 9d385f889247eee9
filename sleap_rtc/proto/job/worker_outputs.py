"""What a worker's job asks of its owner: messages to send, and effects."""

import msgspec

from sleap_rtc.proto import messages


class SendMessage(msgspec.Struct, frozen=True):
    """Send this to the client, if it is still connected."""

    message: messages.WorkerJobMessage | messages.FileError


class ReadProbe(msgspec.Struct, frozen=True):
    """Read this small file beneath the root; `probe_read` or `probe_failed` follows."""

    path: str


class CheckInput(msgspec.Struct, frozen=True):
    """Look at the package beneath the root; `input_valid` or `path_refused` follows."""

    path: str


class MakeOutput(msgspec.Struct, frozen=True):
    """Create this directory beneath the root; `output_made` or `path_refused`."""

    path: str


class Admit(msgspec.Struct, frozen=True):
    """Decide about a package that is to come; `admitted` or `rejected` follows."""

    job_id: str
    submission: messages.Submission


class ReceivePackage(msgspec.Struct, frozen=True):
    """Receive the package; `package_received` or `package_failed` follows."""

    transfer_id: int
    file: messages.OfferedFile


class StopReceiving(msgspec.Struct, frozen=True):
    """Stop receiving the package, and keep what has arrived of it."""


class Remember(msgspec.Struct, frozen=True):
    """Note durably where the job stands: `WorkerJob.restored` goes on from there."""


class Enqueue(msgspec.Struct, frozen=True):
    """The package is here: wait for a slot, then run it.

    While it waits: `queue_moved`; then `slot_granted`, any number of `output` and
    `stage_complete`, and `run_ended`.
    """

    job_id: str
    route: messages.Route
    package: str
    """Beneath the shared root, or the name within the job directory."""


class StopRun(msgspec.Struct, frozen=True):
    """Leave the queue, or stop the commands; `run_ended` follows."""


class SendResult(msgspec.Struct, frozen=True):
    """Send this file of the job directory to the client."""

    transfer_id: int
    path: str


class Discard(msgspec.Struct, frozen=True):
    """Forget this job, and the worker's copy of it; stop what concerns it."""


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
