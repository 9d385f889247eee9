"""One end of a bare TLS stream: nothing but Trio, no file, no check.

    python -m bench.ends.tls receive CERTIFICATE SIZE
    python -m bench.ends.tls send CERTIFICATE SIZE PORT

The receiver writes its certificate, prints its port, discards the bytes and answers
with one byte. The cost of moving bytes this way is the minimum for any transfer over
TLS.
"""

import sys
from pathlib import Path

import trio

from bench.ends.usage import Stopwatch
from sleap_rtc.io.link.certificates import SERVER_NAME, make_certificate
from sleap_rtc.io.tcp.tls import client_context_untrusted, server_context

PIECE = 256 * 1024
"""Bytes in one call, the fastest number from 64 KiB to 1 MiB."""


async def receive(path: Path, size: int) -> None:
    """Receive the bytes of one sender."""
    certificate = make_certificate()
    path.write_bytes(certificate.certificate_der)
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    print(listener.socket.getsockname()[1], flush=True)
    async with listener, await listener.accept() as tcp:
        stream = trio.SSLStream(tcp, server_context(certificate), server_side=True)
        await stream.do_handshake()
        stopwatch = Stopwatch()
        while size > 0:
            got = len(await stream.receive_some(PIECE))
            if got == 0:
                raise SystemExit("the sender went away")
            size -= got
        stopwatch.tell()
        await stream.send_all(b"!")


async def send(path: Path, size: int, port: int) -> None:
    """Send bytes, and wait until the receiver has them."""
    context = client_context_untrusted(path.read_bytes())
    async with await trio.open_tcp_stream("127.0.0.1", port) as tcp:
        stream = trio.SSLStream(tcp, context, server_hostname=SERVER_NAME)
        await stream.do_handshake()
        piece = memoryview(bytes(PIECE))
        stopwatch = Stopwatch()
        for start in range(0, size, PIECE):
            await stream.send_all(piece[: size - start])
        await stream.receive_some(1)
        stopwatch.tell()


def main() -> None:
    """Run the end that the command line names."""
    role, path, size = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    if role == "receive":
        trio.run(receive, path, size)
    else:
        trio.run(send, path, size, int(sys.argv[4]))


if __name__ == "__main__":
    main()
