"""Check that a test closes every file that it, or the code under test, opened."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

CLOSE_TIMEOUT = 10.0
"""Seconds that threads of a test have to close their files after it."""

_LISTS = (Path("/proc/self/fd"), Path("/dev/fd"))


def open_descriptors() -> dict[str, str]:
    """Return the open file descriptors of this process, with the file of each."""
    listing = next((path for path in _LISTS if path.is_dir()), None)
    if listing is None:
        pytest.skip("NOT TESTED: this system does not list file descriptors")
    found: dict[str, str] = {}
    for name in os.listdir(listing):
        try:
            found[name] = os.readlink(listing / name)
        except OSError:
            continue  # the descriptor of the listing itself, or macOS
    return found


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    """Fail a test that leaves a file open."""
    before = open_descriptors()
    yield
    # A thread that was left behind in hanging storage may be just about to close.
    deadline = time.monotonic() + CLOSE_TIMEOUT
    while left := _opened_since(before):
        assert time.monotonic() < deadline, f"left open: {left}"
        time.sleep(0.01)


def _opened_since(before: dict[str, str]) -> dict[str, str]:
    now = open_descriptors()
    return {fd: now[fd] for fd in now.keys() - before.keys()}
