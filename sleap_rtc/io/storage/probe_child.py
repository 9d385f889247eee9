"""The child process of `probe`: touches storage and prints the answer.

Run by path, with the directory as the only argument. Standard library only.
"""

import json
import os
import shutil
import sys
import time

_BYTES = 4096


def main(path: str) -> None:
    """Check a directory, write a small file there, and print the answer as JSON."""
    try:
        usage = shutil.disk_usage(path)
        seconds = _time_write(
            os.path.join(path, f".probe-{os.getpid()}-{os.urandom(4).hex()}")
        )
    except OSError as error:
        print(json.dumps({"ok": False, "reason": f"{path}: {error.strerror}"}))
        return
    answer = {
        "ok": True,
        "free_bytes": usage.free,
        "total_bytes": usage.total,
        "write_seconds": seconds,
    }
    print(json.dumps(answer))


def _time_write(path: str) -> float:
    """Write, sync and remove a new file; return the seconds that this took."""
    began = time.monotonic()
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    try:
        os.write(fd, bytes(_BYTES))
        os.fsync(fd)
    finally:
        os.close(fd)
        os.unlink(path)
    return time.monotonic() - began


if __name__ == "__main__":
    main(sys.argv[1])
