"""A process that makes writers of chunks, for a test to kill.

For each line that it reads, it starts a child, which continues the file in two threads.
The child prints its process id, then ``begun <index>`` before and ``stored <index>``
after each chunk, and ``kept`` at the end. Then it waits to be killed, and its parent
prints ``gone``.
"""

import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sleap_rtc.io.storage.folder import open_owned
from sleap_rtc.io.transfer.chunk_files import ChunkReader, ChunkWriter

THREADS = 2


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def write_missing(source: Path, target: Path, chunk_size: int) -> None:
    reader = ChunkReader(open_owned(source), chunk_size=chunk_size)
    writer = ChunkWriter.open(
        target.parent, target.name, size=reader.size, chunk_size=chunk_size
    )

    def write(index: int) -> None:
        say(f"begun {index}")
        writer.write(index, *reader.read(index))
        say(f"stored {index}")

    with ThreadPoolExecutor(THREADS) as pool:
        for run in writer.chunk_map.missing():
            for written in [pool.submit(write, index) for index in run]:
                written.result()
    writer.keep()
    say("kept")


def main() -> None:
    source, target, chunk_size = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    for _ in sys.stdin:
        child = os.fork()
        if child == 0:
            say(str(os.getpid()))
            write_missing(source, target, chunk_size)
            signal.pause()
        os.waitpid(child, 0)
        say("gone")


if __name__ == "__main__":
    main()
