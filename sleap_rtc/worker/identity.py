"""The peer id of a worker, which it gets back after a restart."""

import secrets
from pathlib import Path
from typing import Annotated

import msgspec
import structlog
from filelock import FileLock, Timeout
from msgspec import Meta

from sleap_rtc.config import STATE_VARIABLE, ConfigError
from sleap_rtc.io.storage.private import write_private

_TAG_BYTES = 3
"""Bytes of the tag in a peer id: enough for the workers of one name in a room."""


class _Stored(msgspec.Struct, frozen=True):
    """Content of the file of an identity, as JSON."""

    tag: Annotated[str, Meta(pattern=r"\A[0-9a-f]{6}\Z")]


class Identity:
    """A peer id that no other worker of this user has until it is closed.

    The kernel releases it when the process dies. Made by `take_identity`.

    Args:
        peer_id: The id.
        lock: The lock on the id.
    """

    def __init__(self, peer_id: str, lock: FileLock) -> None:
        self.peer_id = peer_id
        self._lock = lock

    def close(self) -> None:
        """Release the id for another worker; safe to call again."""
        self._lock.release()


def take_identity(state_directory: Path, slug: str) -> Identity:
    """Lock the first peer id of a name that no running worker has.

    The files are ``workers/<slug>-<n>.json``, with n = 1, 2, ... Each name has its own
    numbers, so workers with several names, or on several machines with one home, get
    their ids back in whatever order they start.

    Args:
        state_directory: The directory for the ids; it is created if it does not exist.
        slug: The name, of lower-case letters, digits and hyphens.

    Raises:
        ConfigError: If the files cannot be read, written or locked.
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
            f"Cannot keep the worker's id in {folder}: {error.strerror}. "
            f"Set {STATE_VARIABLE} to a directory that you can write."
        ) from None
    return Identity(f"worker-{slug}-{tag}", lock)


def _first_free_lock(folder: Path, slug: str) -> FileLock:
    number = 1
    while True:
        # A lock of one thread could not be released by another.
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
    """Read the unique part of an id, or create and store it."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Stored).tag
    except FileNotFoundError:
        pass
    except (ValueError, RecursionError) as error:
        structlog.get_logger().warning(
            "worker id not readable, a new one is made",
            file=str(path),
            reason=str(error),
        )
    tag = secrets.token_hex(_TAG_BYTES)
    write_private(path, msgspec.json.encode(_Stored(tag)))
    return tag
