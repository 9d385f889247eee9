"""One WebSocket (RFC 6455) over one stream, driven by wsproto.

It is made for signaling: texts only, and small ones. Reading never waits for whoever
uses the messages, so pings are always answered; one task writes, from a queue that is
bounded in bytes; and whatever the other end does, `WebSocket.run` ends with a reason
and never with an error.
"""

import ssl
from collections import deque
from typing import Protocol
from urllib.parse import urlsplit

import trio
from wsproto import ConnectionType, WSConnection
from wsproto.connection import ConnectionState
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Event,
    Ping,
    Pong,
    RejectConnection,
    Request,
    TextMessage,
)
from wsproto.frame_protocol import CloseReason
from wsproto.utilities import RemoteProtocolError as WebSocketError

MAX_QUEUED_BYTES = 1024 * 1024
"""Three lists of a full room. Who has more than this waiting does not read."""

WRITE_SECONDS = 5.0
"""For one write, into the buffer of the kernel in nearly all cases. A cancellation
waits for it, so that no frame is cut."""

CLOSE_SECONDS = 2.0
"""To send what is queued and to hear that the other end closes, too."""

CONNECT_SECONDS = 10.0
"""For name look-up, TCP and TLS together."""

_RECEIVE_BYTES = 64 * 1024
_GONE = "it went away"
_MAX_REASON_BYTES = 120
"""A close frame has room for 123 bytes."""


class WebSocketUser(Protocol):
    """Who gets what comes in; the methods must not block."""

    def received_text(self, text: str) -> None:
        """A whole message came."""

    def heard(self) -> None:
        """A ping or a pong came."""


class WebSocketConnectError(Exception):
    """A server can't be reached; the message says why, for people."""


class WebSocket:
    """One end of a connection. Nothing happens until `run` runs.

    Args:
        stream: The TCP or TLS stream; `run` closes it.
        protocol: A fresh wsproto machine, of a client or of a server.
        max_message: Characters of the longest message to accept.
    """

    def __init__(
        self, stream: trio.abc.Stream, protocol: WSConnection, max_message: int
    ) -> None:
        self._stream = stream
        self._protocol = protocol
        self._max_message = max_message
        self._parts: list[str] = []
        self._parts_length = 0
        self._early: list[str] = []
        self._queue: deque[bytes] = deque()
        self._queued_bytes = 0
        self._wake = trio.Event()
        self._scope = trio.CancelScope()
        self._write_scope = trio.CancelScope()
        self._reason: str | None = None

    @classmethod
    def of_client(
        cls, stream: trio.abc.Stream, url: str, max_message: int
    ) -> "WebSocket":
        """Make the end that asks for the WebSocket at this address."""
        parts = urlsplit(url)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        socket = cls(stream, WSConnection(ConnectionType.CLIENT), max_message)
        socket._send(Request(host=parts.netloc, target=target))
        return socket

    @classmethod
    def of_server(cls, stream: trio.abc.Stream, max_message: int) -> "WebSocket":
        """Make the end that waits to be asked."""
        return cls(stream, WSConnection(ConnectionType.SERVER), max_message)

    # ------------------------------------------------------------------ synchronous

    def send_text(self, text: str) -> None:
        """Queue a message; before the handshake is complete it waits for it."""
        if self._reason is not None:
            return
        if self._protocol.state is ConnectionState.CONNECTING:
            self._early.append(text)
        else:
            self._send(TextMessage(data=text))

    def send_ping(self) -> None:
        """Queue a ping; `WebSocketUser.heard` tells when the pong has come."""
        if self._reason is None and self._protocol.state is ConnectionState.OPEN:
            self._send(Ping())

    def close(
        self, reason: str, code: CloseReason = CloseReason.NORMAL_CLOSURE
    ) -> None:
        """End after what is queued, and tell the other end why."""
        if self._reason is not None:
            return
        if self._protocol.state is ConnectionState.CONNECTING:
            self._abort(reason)
            return
        short = reason.encode()[:_MAX_REASON_BYTES].decode(errors="ignore")
        self._send(CloseConnection(code=code, reason=short))
        self._finish(reason)

    def _finish(self, reason: str) -> None:
        """Let `run` end as soon as everything is written, and soon in any case."""
        if self._reason is None:
            self._reason = reason
            self._scope.deadline = trio.current_time() + CLOSE_SECONDS
            self._wake.set()

    def _abort(self, reason: str) -> None:
        """Let `run` end at once: nothing more gets through."""
        self._finish(reason)
        self._write_scope.cancel()
        self._scope.cancel()

    def _send(self, event: Event) -> None:
        data = self._protocol.send(event)
        self._queue.append(data)
        self._queued_bytes += len(data)
        self._wake.set()
        if self._queued_bytes > MAX_QUEUED_BYTES:
            self._abort("it does not read what it is sent")

    # ----------------------------------------------------------------- asynchronous

    async def run(self, user: WebSocketUser) -> str:
        """Read and write until the connection ends, and close the stream.

        Args:
            user: Gets everything that comes in.

        Returns:
            Why it ended: what was given to `close`, or what happened.
        """
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write)
                    await self._read(user)
        finally:
            await trio.aclose_forcefully(self._stream)
        return self._reason or _GONE

    async def _write(self) -> None:
        """Send what is queued, in order. No other task writes."""
        while self._queue or self._reason is None:
            await self._wake.wait()
            self._wake = trio.Event()
            data = b"".join(self._queue)
            self._queue.clear()
            self._queued_bytes = 0
            with trio.CancelScope(shield=True) as self._write_scope:
                self._write_scope.deadline = trio.current_time() + WRITE_SECONDS
                try:
                    await self._stream.send_all(data)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    self._abort(_GONE)
            if self._write_scope.cancelled_caught:
                self._abort("it does not read what it is sent")
            await trio.lowlevel.checkpoint_if_cancelled()
        if isinstance(self._stream, trio.SocketStream):
            try:
                await self._stream.send_eof()
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                self._abort(_GONE)

    async def _read(self, user: WebSocketUser) -> None:
        """Take in everything until the other end closes."""
        while True:
            try:
                data = await self._stream.receive_some(_RECEIVE_BYTES)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                data = b""
            if not data:
                self._abort(_GONE)
                return
            for event in self._events_untrusted(bytes(data)):
                if isinstance(event, CloseConnection):
                    self._answer_close(event)
                    return
                if self._reason is None:
                    self._handle(event, user)

    def _events_untrusted(self, data: bytes) -> list[Event]:
        """Give what came to the protocol; what is no WebSocket ends the connection."""
        closing = self._protocol.state is ConnectionState.LOCAL_CLOSING
        if self._reason is not None and not closing:
            return []
        try:
            self._protocol.receive_data(data)
            return list(self._protocol.events())
        except WebSocketError as error:
            # Only a server may answer: the hint is a response to an HTTP request.
            if error.event_hint is not None and not self._protocol.client:
                self._send(error.event_hint)
        except ValueError:
            # wsproto decodes some headers of the request without care.
            pass
        self._finish("it does not speak WebSocket")
        return []

    def _handle(self, event: Event, user: WebSocketUser) -> None:
        match event:
            case Request():
                self._send(AcceptConnection())
                self._open()
            case AcceptConnection():
                self._open()
            case RejectConnection(status_code=status):
                self._abort(f"it answered HTTP {status}: no signaling server is there")
            case TextMessage():
                self._take_part(event, user)
            case BytesMessage():
                self.close("only texts, please", CloseReason.UNSUPPORTED_DATA)
            case Ping():
                self._send(event.response())
                user.heard()
            case Pong():
                user.heard()
            case _:
                # The body of a rejection, which nobody needs.
                pass

    def _open(self) -> None:
        early, self._early = self._early, []
        for text in early:
            self.send_text(text)

    def _take_part(self, event: TextMessage, user: WebSocketUser) -> None:
        """Put a message together; it may come in any number of parts."""
        if event.data:
            self._parts.append(event.data)
            self._parts_length += len(event.data)
        if self._parts_length > self._max_message:
            self.close("this message is too long", CloseReason.MESSAGE_TOO_BIG)
        elif event.message_finished:
            text = "".join(self._parts)
            self._parts.clear()
            self._parts_length = 0
            user.received_text(text)

    def _answer_close(self, event: CloseConnection) -> None:
        """Complete the closing handshake, or start it if what came was broken."""
        if self._protocol.state is not ConnectionState.CLOSED:
            self._send(event.response())
        said = "".join(c for c in event.reason or "" if c.isprintable())
        self._finish(f"it closed the connection: {said}" if said else _GONE)


# ---------------------------------------------------------------------- connecting


async def connect_websocket(url: str, max_message: int) -> WebSocket:
    """Connect to a server; the handshake of the WebSocket itself follows in `run`.

    Args:
        url: ``ws://`` or ``wss://``; for the latter the certificate is verified
            against the authorities that this machine trusts.
        max_message: Characters of the longest message to accept.

    Raises:
        WebSocketConnectError: If it can't be reached within `CONNECT_SECONDS`.
    """
    parts = urlsplit(url)
    host, secure = parts.hostname or "", parts.scheme == "wss"
    port = parts.port or (443 if secure else 80)
    where = f"{host}:{port}"
    try:
        with trio.fail_after(CONNECT_SECONDS):
            stream: trio.abc.Stream = await trio.open_tcp_stream(host, port)
            if secure:
                stream = await _secured(stream, host)
    except trio.TooSlowError:
        raise WebSocketConnectError(
            f"{where} did not answer within {CONNECT_SECONDS:.0f} s"
        ) from None
    except (OSError, trio.BrokenResourceError) as error:
        raise WebSocketConnectError(
            f"can't connect to {where}: {_cause(error)}"
        ) from error
    return WebSocket.of_client(stream, url, max_message)


async def _secured(stream: trio.abc.Stream, host: str) -> trio.abc.Stream:
    """Put TLS over a stream."""
    context = await trio.to_thread.run_sync(ssl.create_default_context)
    secured = trio.SSLStream(
        stream, context, server_hostname=host, https_compatible=True
    )
    try:
        await secured.do_handshake()
    except BaseException:
        await trio.aclose_forcefully(secured)
        raise
    return secured


def _cause(error: BaseException) -> str:
    """Find what really happened, inside of what the libraries wrapped it in."""
    while True:
        if isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        elif error.__cause__ is not None:
            error = error.__cause__
        elif isinstance(error, ssl.SSLCertVerificationError):
            return f"its certificate is not trusted: {error.verify_message}"
        elif isinstance(error, OSError) and error.strerror:
            return error.strerror
        else:
            return str(error) or type(error).__name__
