"""Who a worker is: the peer id that it takes back when it starts again."""

import os
import secrets
import sys
from pathlib import Path
from typing import Annotated

import msgspec
import structlog
from filelock import FileLock, Timeout
from msgspec import Meta

from sleap_rtc.config import STATE_VARIABLE, ConfigError
from sleap_rtc.io.closing import Closing

_TAG_BYTES = 3
"""Enough to tell apart the workers of a name in one room."""


class _Stored(msgspec.Struct, frozen=True):
    """What the file of an identity holds, as JSON."""

    tag: Annotated[str, Meta(pattern=r"\A[0-9a-f]{6}\Z")]


class Identity(Closing):
    """A peer id that no other worker of this user has until it is closed.

    The kernel gives it back, too, when the process dies. Made by `take_identity`.

    Args:
        peer_id: The id.
        lock: Held as long as the id is in use.
    """

    def __init__(self, peer_id: str, lock: FileLock) -> None:
        self.peer_id = peer_id
        self._lock = lock

    def close(self) -> None:
        """Let another worker have it; safe to call again."""
        self._lock.release()


def take_identity(state_directory: Path, slug: str) -> Identity:
    """Take the first peer id of a name that no running worker has.

    Ids lie in ``workers/<slug>-<n>.json``, with n = 1, 2, ... Each name counts for
    itself, so workers with several names, or on several machines with one home, get
    theirs back in whatever order they start.

    Args:
        state_directory: Where the ids are kept; it is made if it is not there.
        slug: The name, of lower-case letters, digits and hyphens.

    Raises:
        ConfigError: If the files can't be read, written or locked.
    """
    folder = state_directory / "workers"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = _first_free_lock(folder, slug)
        try:
            tag = _tag(Path(lock.lock_file).with_suffix(".json"))
        except BaseException:
            lock.release()
            raise
    except OSError as error:
        raise ConfigError(
            f"The worker's id can't be kept in {folder}: {error.strerror}. "
            f"Set {STATE_VARIABLE} to a directory that you can write."
        ) from None
    return Identity(f"worker-{slug}-{tag}", lock)


def _first_free_lock(folder: Path, slug: str) -> FileLock:
    number = 1
    while True:
        # Whichever thread closes it: a lock that belongs to a thread would stay.
        lock = FileLock(
            folder / f"{slug}-{number}.lock", mode=0o600, thread_local=False
        )
        try:
            lock.acquire(blocking=False)
        except Timeout:
            number += 1  # another worker has this one
        else:
            return lock


def _tag(path: Path) -> str:
    """Read what makes an id unique, or make it and keep it."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Stored).tag
    except FileNotFoundError:
        pass
    except (ValueError, RecursionError) as error:
        structlog.get_logger().warning(
            "the worker's id is lost, and a new one is made",
            file=str(path),
            reason=str(error),
        )
    tag = secrets.token_hex(_TAG_BYTES)
    _write_private(path, msgspec.json.encode(_Stored(tag)))
    return tag


def _write_private(path: Path, content: bytes) -> None:
    """Write a file for its owner only, whole or not at all, to outlive a power cut."""
    # One name is enough: whoever writes holds the lock.
    fresh = path.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    if sys.platform != "win32":  # which can't sync a directory
        fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
