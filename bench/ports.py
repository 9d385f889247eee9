"""Ports for servers that do not report which port they chose."""

import random
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

LOOPBACK = "127.0.0.1"

NOT_CHOSEN = (20_000, 32_000)
"""Range of ports that no operating system gives to programs by itself."""


@contextmanager
def reserved_port() -> Iterator[int]:
    """Reserve a TCP port of the loopback address for as long as the body runs.

    Linux gives it to no other program, because a socket here is bound to it; a server
    that sets SO_REUSEADDR can still listen on it, and again when it restarts.
    Elsewhere it is a port that was free, and that the system does not choose by itself.
    """
    if sys.platform == "linux":
        with socket.socket() as holder:
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.bind((LOOPBACK, 0))
            yield holder.getsockname()[1]
    else:
        yield _free_port()


def _free_port() -> int:
    while True:
        port = random.randrange(*NOT_CHOSEN)
        with socket.socket() as probe:
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue  # another program has it
        return port
