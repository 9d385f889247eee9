"""Texts and lists of results of a worker that fit into messages."""

import msgspec

from sleap_rtc.proto import messages

_MAX_TEXT = messages.MAX_MESSAGE_BYTES - 4096
"""Bytes of the longest text that fits into a message beside its other fields."""

_PAGE_BYTES = messages.MAX_MESSAGE_BYTES // 2
"""Bytes of the files on one page: half a message, since JSON escapes some bytes."""


def clean_text(text: str) -> str:
    """Return a text without stray surrogates, cut to fit into a message."""
    data = text[:_MAX_TEXT].encode("utf-8", "replace")
    return data[:_MAX_TEXT].decode("utf-8", "ignore")


def end_progress(state: messages.JobStateName, detail: str) -> messages.JobProgress:
    """Return the progress of a job that has ended, with as much detail as fits.

    Args:
        state: The last state of the job.
        detail: Any text.
    """
    return messages.JobProgress(state, 0, clean_text(detail)[: messages.MAX_DETAIL])


def listed_results(results: dict[str, int]) -> dict[str, int]:
    """Return the results whose paths fit into messages, up to the limits.

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
        if 0 < len(path) <= messages.MAX_PATH and path == clean_text(path):
            listed[path] = size
    return listed


def result_pages(results: dict[str, int]) -> list[messages.ResultPage]:
    """Return pages that list these files, each short enough for a message.

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
    """Return how many of these files, at least one, fit into one message."""
    size = 0
    for count, file in enumerate(files):
        size += len(msgspec.json.encode(file)) + 1
        if count == messages.MAX_JOB_RESULTS or (count and size > _PAGE_BYTES):
            return count
    return len(files)
