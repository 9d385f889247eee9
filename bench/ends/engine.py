"""Both ends of aioquic's own engine in one process: no socket, no file, no event loop.

    python -m bench.ends.engine SIZE DATAGRAM_SIZE

The engine is unchanged, with windows that never stop it. Each end's datagrams are
delivered to the other end at once.
"""

import ssl
import sys

from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import QuicEvent, StreamDataReceived
from cryptography import x509

from bench.ends.usage import Stopwatch
from sleap_rtc.io.link.certificates import (
    SERVER_NAME,
    certificate_pem_untrusted,
    make_certificate,
)

PIECE = 64 * 1024
"""Bytes that the sender queues at once."""

AHEAD = 256 * 1024
"""Bytes that the sender queues before they are taken; more makes it slower."""

WINDOW = 64 * 1024 * 1024
"""Bytes that either end may have on the way."""

TURN = 0.001
"""Seconds that the clock moves on in a turn: enough for the pacer's largest burst."""

ADDRESS = ("192.0.2.1", 1)
STREAM = 0


class Pump:
    """Two connections whose datagrams go from one to the other."""

    def __init__(self, datagram_size: int) -> None:
        certificate = make_certificate()
        common = {
            "alpn_protocols": ["bench"],
            "max_data": WINDOW,
            "max_stream_data": WINDOW,
            "max_datagram_size": datagram_size,
        }
        self._now = 0.0
        self.client = QuicConnection(
            configuration=QuicConfiguration(
                is_client=True,
                cadata=certificate_pem_untrusted(certificate.certificate_der),
                server_name=SERVER_NAME,
                verify_mode=ssl.CERT_REQUIRED,
                **common,  # type: ignore[arg-type]
            )
        )
        self.server = QuicConnection(
            configuration=QuicConfiguration(
                is_client=False,
                certificate=x509.load_der_x509_certificate(certificate.certificate_der),
                private_key=certificate.private_key,
                **common,  # type: ignore[arg-type]
            ),
            original_destination_connection_id=(
                self.client.original_destination_connection_id
            ),
        )
        self.client.connect(ADDRESS, now=self._now)

    def turn(self) -> list[QuicEvent]:
        """Deliver the datagrams of both ends; return the events of the server."""
        self._move(self.client, self.server)
        events = _events(self.server)
        self._move(self.server, self.client)
        _events(self.client)
        self._now += TURN
        for end in (self.client, self.server):
            timer = end.get_timer()
            if timer is not None and timer <= self._now:
                end.handle_timer(self._now)
        return events

    def _move(self, source: QuicConnection, target: QuicConnection) -> None:
        for data, _ in source.datagrams_to_send(self._now):
            target.receive_datagram(data, ADDRESS, self._now)


def _events(end: QuicConnection) -> list[QuicEvent]:
    events = []
    while (event := end.next_event()) is not None:
        events.append(event)
    return events


def main() -> None:
    """Move bytes from one end to the other."""
    size, datagram_size = int(sys.argv[1]), int(sys.argv[2])
    pump = Pump(datagram_size)
    piece = bytes(PIECE)
    received = sent = 0
    stopwatch = Stopwatch()
    while received < size:
        while sent < size and sent - received < AHEAD:
            pump.client.send_stream_data(STREAM, piece[: size - sent])
            sent += min(PIECE, size - sent)
        for event in pump.turn():
            if isinstance(event, StreamDataReceived):
                received += len(event.data)
    stopwatch.tell()


if __name__ == "__main__":
    main()
