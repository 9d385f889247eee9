"""Records and open stores for the tests of the store."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from sleap_rtc.worker.job_store import (
    LIMITS,
    JobRecord,
    JobStore,
    StoreLimits,
    open_store,
)

ME = "worker-here-0123ab"


def record(number: int, **changes: Any) -> JobRecord:
    made = JobRecord(
        job_id=f"job_{number:08x}",
        worker_id=ME,
        route="channel",
        directory="/state/jobs/1",
        package="training.zip",
        size=1234,
        state="QUEUED",
        detail="",
        output_path="models",
        results={},
        updated=1.5 + number,
    )
    return msgspec.structs.replace(made, **changes)


@contextmanager
def opened(path: Path, limits: StoreLimits = LIMITS) -> Iterator[JobStore]:
    store = open_store(path, limits)
    try:
        yield store
    finally:
        store.close()
