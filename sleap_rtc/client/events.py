"""The events that `submit` reports while a job is on its way."""

from pathlib import Path

import msgspec

from sleap_rtc.proto.job.client_outputs import JobEvent
from sleap_rtc.proto.rendezvous.workers import Candidate


class WorkerChosen(msgspec.Struct, frozen=True):
    """Event: a worker was chosen for the job.

    Args:
        worker: The worker.
        reason: Why this worker was chosen, for people.
    """

    worker: Candidate
    reason: str


class LinkOpened(msgspec.Struct, frozen=True):
    """Event: the link to the worker is open.

    Args:
        kind: The transport.
        address: The worker's ``host:port``.
        reason: Why this link was chosen, for people.
    """

    kind: str
    address: str
    reason: str


class LinkLost(msgspec.Struct, frozen=True):
    """Event: the link was lost, and another one is being opened."""

    reason: str


class JobResumed(msgspec.Struct, frozen=True):
    """Event: a job that an earlier process submitted is continued."""

    job_id: str


class NoteTrouble(msgspec.Struct, frozen=True):
    """Event: the job could not be recorded, so after a crash it would start over."""

    reason: str


class PackageChanged(msgspec.Struct, frozen=True):
    """Event: the package has changed since an earlier job was submitted with it.

    Args:
        job_id: The earlier job.
    """

    job_id: str


class TransferProgress(msgspec.Struct, frozen=True):
    """Event: bytes of the package or of the results have moved.

    Args:
        what: The transfer, for people.
        done: Bytes so far.
        total: Bytes in all.
    """

    what: str
    done: int
    total: int


class PackageCopied(msgspec.Struct, frozen=True):
    """Event: the package is on the shared storage.

    Args:
        method: How it was copied, such as ``reflink`` or ``copy_file_range``.
        size: Its bytes.
        seconds: Seconds until the copy was safe on the disk.
    """

    method: str
    size: int
    seconds: float


class ResultsChosen(msgspec.Struct, frozen=True):
    """Event: the directory for the results was chosen."""

    directory: Path


class ResultsStored(msgspec.Struct, frozen=True):
    """Event: all results are in their directory.

    Args:
        directory: The directory.
        files: Number of files.
        size: Their bytes.
    """

    directory: Path
    files: int
    size: int


SessionEvent = (
    JobEvent
    | LinkLost
    | JobResumed
    | TransferProgress
    | PackageCopied
    | ResultsChosen
    | ResultsStored
)
"""The events of one job."""

Event = WorkerChosen | LinkOpened | NoteTrouble | PackageChanged | SessionEvent
"""All events of `submit`."""
