"""The signaling server, over real sockets.

`sleap_rtc.proto.rendezvous.server` decides what happens; this module moves texts and
time.
"""

import itertools
import secrets
from collections.abc import Iterable
from typing import assert_never

import trio
from structlog.typing import FilteringBoundLogger

from sleap_rtc.io.alarm import Alarm
from sleap_rtc.io.signaling.websocket import WebSocket, WebSocketLimits
from sleap_rtc.proto.errors import RemoteProtocolError
from sleap_rtc.proto.rendezvous.envelope import NONCE_BYTES
from sleap_rtc.proto.rendezvous.messages import (
    MAX_SIGNAL_BYTES,
    decode_peer_signal_untrusted,
)
from sleap_rtc.proto.rendezvous.server import (
    Deliver,
    Drop,
    PeerJoined,
    PeerLeft,
    Ping,
    Refused,
    RoomServer,
    ServerOutput,
)


async def serve_signaling(
    listeners: Iterable[trio.abc.Listener[trio.SocketStream]],
    *,
    log: FilteringBoundLogger,
) -> None:
    """Run a signaling server until cancelled.

    Args:
        listeners: Sources of connections, as `trio.open_tcp_listeners` returns them.
            They are closed at the end.
        log: Log of registrations, departures and refusals.
    """
    server = _Server(log)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve_deadlines)
        await trio.serve_listeners(server.serve_connection, list(listeners))


class _Server:
    """Drives one `RoomServer` for all connections."""

    def __init__(self, log: FilteringBoundLogger) -> None:
        self._log = log
        self._machine = RoomServer()
        self._sockets: dict[int, WebSocket] = {}
        self._numbers = itertools.count()
        self._alarm = Alarm()

    async def serve_connection(self, stream: trio.SocketStream) -> None:
        """Serve one connection from its first byte to its last."""
        number = next(self._numbers)
        socket = WebSocket(stream, WebSocketLimits(MAX_SIGNAL_BYTES))
        self._sockets[number] = socket
        reason = "the server ends"
        try:
            nonce = secrets.token_bytes(NONCE_BYTES)
            self._machine.connection_opened(number, nonce, trio.current_time())
            self._drain()
            reason = await socket.run(_ServerEnd(self, number))
        finally:
            self._machine.connection_lost(number, reason)
            self._drain()
            del self._sockets[number]

    async def serve_deadlines(self) -> None:
        """Call the machine at its deadlines, until cancelled."""
        while True:
            await self._alarm.wait()
            self._machine.handle_timeout(trio.current_time())
            self._drain()

    def received_text(self, number: int, text: str) -> None:
        """Decode a message and pass it to the machine."""
        now = trio.current_time()
        try:
            signal = decode_peer_signal_untrusted(text)
        except RemoteProtocolError as error:
            self._machine.reject_message(number, error.reason, now)
        else:
            self._machine.receive_message(number, signal, now)
        self._drain()

    def heard(self, number: int) -> None:
        """Record a sign of life."""
        self._machine.heard_from(number, trio.current_time())
        self._drain()

    def _drain(self) -> None:
        """Run all outputs of the machine, without waiting."""
        while (output := self._machine.next_output()) is not None:
            self._run_output(output)
        self._alarm.set(self._machine.deadline())

    def _run_output(self, output: ServerOutput) -> None:
        match output:
            case Deliver(connection=number, text=text):
                self._sockets[number].send_text(text)
            case Ping(connection=number):
                self._sockets[number].send_ping()
            case Drop(connection=number, reason=reason):
                self._sockets[number].close(reason)
            case PeerJoined(room_id=room, peer_id=peer, role=role):
                self._log.info("peer joined", peer=peer, role=role, room=room)
            case PeerLeft(room_id=room, peer_id=peer, reason=reason):
                self._log.info("peer left", peer=peer, reason=reason, room=room)
            case Refused(connection=number, code=code, reason=reason):
                self._log.warning(
                    "refused", connection=number, code=str(code), reason=reason
                )
            case _:
                assert_never(output)


class _ServerEnd:
    """The user of one WebSocket: it adds the number of the connection."""

    def __init__(self, server: _Server, number: int) -> None:
        self._server = server
        self._number = number

    def received_text(self, text: str) -> None:
        self._server.received_text(self._number, text)

    def heard(self) -> None:
        self._server.heard(self._number)
