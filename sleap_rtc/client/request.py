"""The argument and the result of `submit`."""

from pathlib import Path

import msgspec

from sleap_rtc.proto.route.reconnection import PATIENCE
from sleap_rtc.proto.route.routes import RoutePreference


class JobRequest(msgspec.Struct, frozen=True):
    """A package to run, and how to run it.

    Args:
        package: A package as SLEAP exports it: a zip file, or a directory.
        worker: Id, name or host name of the worker; None chooses one.
        route: How the package travels, and over which kind of link.
        output: Directory for the results. None means beside the caller, or, on the
            shared route, where they are.
        timeout: Seconds after which the job is cancelled.
        shared_storage_root: Where this machine mounts the shared storage; None takes
            it from the settings.
        patience: Seconds to keep trying to reopen a lost link. A worker whose process
            has evidently ended is given up after a few seconds.
        fresh: Start a new job even if an earlier process submitted this package.
    """

    package: Path
    worker: str | None = None
    route: RoutePreference = "auto"
    output: Path | None = None
    timeout: float | None = None
    shared_storage_root: Path | None = None
    patience: float = PATIENCE
    fresh: bool = False


class JobResult(msgspec.Struct, frozen=True):
    """A job that completed.

    Args:
        job_id: Its id.
        output: The directory with the results; None if the job made none.
        seconds: Seconds that each phase took, by its name.
    """

    job_id: str
    output: Path | None
    seconds: dict[str, float]
