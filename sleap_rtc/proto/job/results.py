"""Texts and lists of results that fit into messages, on both sides."""

import msgspec

from sleap_rtc.proto import messages
from sleap_rtc.proto.errors import RemoteProtocolError

_MAX_DETAIL = 1024
"""Characters of `JobProgress.detail`."""

_MAX_TEXT = 60 * 1024
"""Bytes of a text that fit into a message beside its other fields."""

_MAX_PATH = 4096
"""Characters of a `WirePath`."""

_PAGE_BYTES = messages.MAX_MESSAGE_BYTES // 2
"""Half a message: JSON may need two bytes for one of a path."""


def clean_text(text: str) -> str:
    """Make a text fit for a message: no stray surrogates, and not too long."""
    data = text[:_MAX_TEXT].encode("utf-8", "replace")
    return data[:_MAX_TEXT].decode("utf-8", "ignore")


def end_progress(state: messages.JobStateName, detail: str) -> messages.JobProgress:
    """Say how a job ended, and as much about it as fits.

    Args:
        state: Its last state.
        detail: Any text.
    """
    return messages.JobProgress(state, 0, clean_text(detail)[:_MAX_DETAIL])


def listed_results(results: dict[str, int]) -> dict[str, int]:
    """Leave out the files whose paths no message can carry, and those over a limit.

    Args:
        results: Size in bytes of each file, by its path.
    """
    listed: dict[str, int] = {}
    characters = 0
    for path, size in results.items():
        characters += len(path)
        if (
            len(listed) == messages.MAX_RESULT_FILES
            or characters > messages.MAX_RESULT_PATHS
        ):
            break
        if 0 < len(path) <= _MAX_PATH and path == clean_text(path):
            listed[path] = size
    return listed


def result_pages(results: dict[str, int]) -> list[messages.ResultPage]:
    """Give the lists that tell of these files, each as long as a message may be.

    Args:
        results: Size in bytes of each file, by its path.
    """
    files = [messages.ResultFile(path, size) for path, size in results.items()]
    pages: list[messages.ResultPage] = []
    while files:
        count = _fitting(files)
        page, files = files[:count], files[count:]
        pages.append(messages.ResultPage(tuple(page), last=not files))
    return pages


def _fitting(files: list[messages.ResultFile]) -> int:
    """Count how many of these files, one at least, fit into one message."""
    size = 0
    for count, file in enumerate(files):
        size += len(msgspec.json.encode(file)) + 1
        if count == messages.MAX_JOB_RESULTS or (count and size > _PAGE_BYTES):
            return count
    return len(files)


class ResultList:
    """Results that a worker has listed, within what a client has memory for."""

    def __init__(self) -> None:
        self._files: list[messages.ResultFile] = []
        self._characters = 0

    @property
    def files(self) -> tuple[messages.ResultFile, ...]:
        """All files so far, in the order of the worker."""
        return tuple(self._files)

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
