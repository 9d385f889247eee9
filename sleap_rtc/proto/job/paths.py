"""Paths of the files of a job beneath a shared root."""

import msgspec

JOBS = "jobs"
"""Name of the folder of all job directories, beneath a shared root and in the state
directory of a worker."""

MODELS = "models"
"""Name of the folder for the models in a job directory."""

_PROBE = "mount-probe"


class JobPaths(msgspec.Struct, frozen=True):
    """Paths of one job, relative to the shared root.

    Args:
        job_id: The id of the job.
    """

    job_id: str

    @property
    def directory(self) -> str:
        """The job directory."""
        return f"{JOBS}/{self.job_id}"

    @property
    def probe(self) -> str:
        """The small file that shows whether both sides see the same storage."""
        return self.file(_PROBE)

    @property
    def models(self) -> str:
        """The folder for the models."""
        return self.file(MODELS)

    def file(self, path: str) -> str:
        """Return the path of a file in the job directory, such as the package."""
        return f"{self.directory}/{path}"
