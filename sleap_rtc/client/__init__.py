"""Submit a job and follow it: the public Python API.

``python -m sleap_rtc.client PACKAGE ...`` is ``sleap-rtc send PACKAGE ...``.

Example:
    >>> import trio
    >>> from pathlib import Path
    >>> from sleap_rtc import client
    >>> request = client.JobRequest(package=Path("job.zip"))
    >>> result = trio.run(client.submit, request, print)
"""

from sleap_rtc.client.events import (
    Event,
    JobResumed,
    LinkLost,
    LinkOpened,
    NoteTrouble,
    PackageChanged,
    PackageCopied,
    ResultsChosen,
    ResultsStored,
    TransferProgress,
    WorkerChosen,
)
from sleap_rtc.client.request import JobRequest, JobResult
from sleap_rtc.client.submit import list_workers, submit
from sleap_rtc.proto.job.client_outputs import RouteChosen
from sleap_rtc.proto.job.reports import LinePrinted, StageComplete, StateChanged
from sleap_rtc.proto.route.reconnection import PATIENCE

__all__ = [
    "PATIENCE",
    "Event",
    "JobRequest",
    "JobResult",
    "JobResumed",
    "LinePrinted",
    "LinkLost",
    "LinkOpened",
    "NoteTrouble",
    "PackageChanged",
    "PackageCopied",
    "ResultsChosen",
    "ResultsStored",
    "RouteChosen",
    "StageComplete",
    "StateChanged",
    "TransferProgress",
    "WorkerChosen",
    "list_workers",
    "submit",
]
