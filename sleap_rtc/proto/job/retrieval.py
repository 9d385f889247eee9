"""The way of the results of a job to the client, and the end of the job after it."""

from sleap_rtc.proto import messages
from sleap_rtc.proto.errors import LocalProtocolError, RemoteProtocolError
from sleap_rtc.proto.job.client_outputs import FetchResults, JobEnded


class Retrieval:
    """The results that the worker listed, within limits, and the end after them.

    Args:
        job_id: The id of the job.
    """

    def __init__(self, job_id: str) -> None:
        self._job_id = job_id
        self._files: list[messages.ResultFile] = []
        self._characters = 0
        self._ending: JobEnded | None = None

    @property
    def ending(self) -> JobEnded:
        """The end of the job, once it is known.

        Raises:
            LocalProtocolError: If it is not known.
        """
        if self._ending is None:
            raise LocalProtocolError("the job has not ended")
        return self._ending

    def list_again(self) -> None:
        """Forget the results: the worker lists them again over another link."""
        self._files, self._characters = [], 0

    def add_untrusted(self, page: messages.ResultPage) -> None:
        """Add a page of the worker.

        Raises:
            RemoteProtocolError: If it lists too many files; nothing was added.
        """
        if len(self._files) + len(page.files) > messages.MAX_RESULT_FILES:
            raise RemoteProtocolError(
                f"more than {messages.MAX_RESULT_FILES} result files"
            )
        characters = self._characters + sum(len(file.path) for file in page.files)
        if characters > messages.MAX_RESULT_PATHS:
            raise RemoteProtocolError("the paths of the result files are too long")
        self._files += page.files
        self._characters = characters

    def begin(
        self, ending: JobEnded, route: messages.Route | None
    ) -> FetchResults | None:
        """Return the effect that fetches the results; None if none can be fetched.

        Args:
            ending: The end of the job after it.
            route: The route that they take; None if none was chosen.
        """
        self._ending = ending
        if not self._files or route is None:
            return None
        return FetchResults(self._job_id, route, tuple(self._files))


def ending_of(
    message: messages.JobComplete | messages.JobFailed | messages.JobRejected,
    cancelled_for: str | None,
) -> JobEnded:
    """Return the end of a job that the worker has reported.

    Args:
        message: The report.
        cancelled_for: The reason of the user who asked to stop the job, or None.
    """
    if isinstance(message, messages.JobComplete):
        return JobEnded("complete", path=message.path)
    rejected = isinstance(message, messages.JobRejected)
    if cancelled_for is None:
        return JobEnded("rejected" if rejected else "failed", message.reason)
    return JobEnded("cancelled", message.reason if rejected else cancelled_for)
