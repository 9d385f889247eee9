"""A program that jobs of the end-to-end tests run: `act WHAT ARGUMENTS`."""

import os
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path


def say(*words: str) -> None:
    print(*words)


def fail(code: str) -> None:
    print("something went wrong")
    raise SystemExit(int(code))


def wait(fifo: str) -> None:
    """Print "waiting", then wait for a writer of a FIFO."""
    # Where output cannot be redrawn, a line is shown once the next one has begun.
    print("waiting", "for the fifo", sep="\n", flush=True)
    with open(fifo, "rb") as file:
        file.read()
    print("released")


def mark(log: str, text: str) -> None:
    """Add a line to a file that several jobs share."""
    with open(log, "a") as file:
        file.write(text + "\n")


def copy(source: str, target: str) -> None:
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def files(folder: str, count: str) -> None:
    """Make many small files in folders of a hundred."""
    for number in range(int(count)):
        path = Path(folder, str(number // 100), f"{number}.txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"file {number}\n")


def big(path: str, megabytes: str) -> None:
    """Make a big file that does not compress."""
    with open(path, "wb") as file:
        for _ in range(int(megabytes)):
            file.write(os.urandom(1024 * 1024))


def fill(folder: str) -> None:
    """Fill a disk."""
    print("filling")
    with open(Path(folder, "filling"), "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return


def empty(path: str) -> None:
    Path(path).touch()


def lines(count: str) -> None:
    print("\n".join(f"line {number}" for number in range(int(count))))


def control() -> None:
    """Print control sequences that could take over a terminal."""
    print("\x1b[2J\x1b]0;title\x07red \x1b[31malert\x1b[0m \x08\x9b5A bell\x07")


def install(folder: Path) -> None:
    """Write a program named act that runs this file."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "act"
    # Isolated and without site packages: it starts in a fraction of the time.
    command = [sys.executable, "-I", "-S", str(Path(__file__).resolve())]
    program.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
    program.chmod(0o755)


if __name__ == "__main__":
    actions: dict[str, Callable[..., None]] = {
        function.__name__: function
        for function in (
            *(say, fail, wait, mark, copy, files, big, fill, empty, lines, control),
        )
    }
    actions[sys.argv[1]](*sys.argv[2:])
