"""One WebSocket (RFC 6455) over one stream, driven by trio-websocket.

It is made for signaling: texts only, and small ones. `WebSocket` takes texts without
waiting, and whatever the other end does, `WebSocket.run` ends with a reason and never
with an error. This is how it gets along with the library:

* The library stops reading, and answering pings, while nobody takes its messages. So
  one task takes them at once, and hands them on to a user who must not block.
* A cancelled write leaves half a frame, and the next one is lost in it. So the library
  writes through `_Transport`: cancellation waits for a write, and a write that takes
  too long ends the connection. Texts are sent by one task.
* The handshake waits forever if the other end leaves meanwhile, and so does a ping.
  Both have a deadline here, and the end of the stream ends the handshake.
* Its reader fails in many ways if the other end breaks the protocol. It runs in a
  nursery of its own, and what it raises is a reason to end this connection.

What the library does not offer, and `_Transport` adds:

* It does not tell of the pings that it answers. Every pong that it writes is one.
* It collects the empty parts of a message, and the page of a web server that is no
  signaling server, without a limit. What comes between two messages is limited.
* It closes the stream at once after a failure, and data that it did not read makes the
  kernel throw away what the other end did not read. So the stream closes here, last.

One thing it does not do, and neither does this: after a frame that breaks the protocol
the stream ends without a close frame. The reason is there for the log.
"""

import itertools
import ssl
from collections import deque
from collections.abc import Callable
from enum import IntEnum
from typing import Protocol
from urllib.parse import urlsplit

import trio
import trio_websocket
from trio_websocket import ConnectionClosed, ConnectionRejected, WebSocketConnection

MAX_QUEUED_BYTES = 1024 * 1024
"""Three lists of a full room. Who has more than this waiting does not read."""

MAX_UNFINISHED_BYTES = 4 * 1024 * 1024
"""Received without a whole message. The longest list of peers is far below, and the
pongs of a peer that says nothing else take three months to get there."""

WRITE_SECONDS = 5.0
"""For one write, into the buffer of the kernel in nearly all cases. A cancellation
waits for it, so that no frame is cut."""

CLOSE_SECONDS = 2.0
"""To send what is queued and to hear that the other end closes, too."""

CONNECT_SECONDS = 10.0
"""For name look-up, TCP and TLS together."""

HANDSHAKE_SECONDS = 10.0
"""For the handshake of the WebSocket, which follows."""

PONG_SECONDS = 90.0
"""For the answer to a ping: it is the duty of the other end (RFC 6455, 5.5.3)."""

_GONE = "it went away"
_DOES_NOT_READ = "it does not read what it is sent"
_RECEIVE_BYTES = 64 * 1024
_PONG = b"\x8a"
"""The first byte of a pong (RFC 6455, 5.2): a whole frame, opcode 10."""

_MAX_REASON_BYTES = 120
"""A close frame has room for 123 bytes."""


class CloseCode(IntEnum):
    """Why a WebSocket is closed, for programs (RFC 6455, 7.4.1)."""

    NORMAL = 1000
    PROTOCOL_ERROR = 1002
    UNSUPPORTED_DATA = 1003


class WebSocketUser(Protocol):
    """Who gets what comes in; the methods must not block."""

    def received_text(self, text: str) -> None:
        """A whole message came."""

    def heard(self) -> None:
        """A ping came, or the pong to one of ours."""


class WebSocketConnectError(Exception):
    """A server can't be reached.

    Args:
        message: Why, for people.
        is_refused: Whether its host said that nobody listens there.
    """

    def __init__(self, message: str, *, is_refused: bool = False) -> None:
        super().__init__(message)
        self.is_refused = is_refused


class WebSocket:
    """One end of a connection. Nothing happens until `run` runs.

    Args:
        stream: The TCP or TLS stream; `run` closes it.
        max_message: Characters of the longest message to accept.
        url: The address that a client asks for; a server has none.
    """

    def __init__(
        self, stream: trio.abc.Stream, max_message: int, url: str | None = None
    ) -> None:
        self._stream = stream
        self._url = url
        self._max_message = max_message
        self._transport = _Transport(stream, self._abort)
        self._queue: deque[str] = deque()
        self._queued_bytes = 0
        self._wake = trio.Event()
        self._ping_wanted = trio.Event()
        self._scope = trio.CancelScope()
        self._reason: str | None = None
        self._code = CloseCode.NORMAL

    # ------------------------------------------------------------------ synchronous

    def send_text(self, text: str) -> None:
        """Queue a message; before the handshake is complete it waits for it."""
        if self._reason is not None:
            return
        self._queue.append(text)
        self._queued_bytes += len(text.encode())
        self._wake.set()
        if self._queued_bytes > MAX_QUEUED_BYTES:
            self._abort(_DOES_NOT_READ)

    def send_ping(self) -> None:
        """Send a ping soon; `WebSocketUser.heard` tells when the pong has come."""
        self._ping_wanted.set()

    def close(self, reason: str, code: CloseCode = CloseCode.NORMAL) -> None:
        """End after what is queued, and tell the other end why."""
        if self._reason is not None:
            return
        self._code = code
        self._finish(reason)
        self._transport.opening.cancel(reason="closed before it was open")

    def _finish(self, reason: str) -> None:
        """Let `run` end as soon as everything is written, and soon in any case."""
        if self._reason is None:
            self._reason = reason
            self._scope.deadline = trio.current_time() + CLOSE_SECONDS
            self._wake.set()

    def _fail(self, reason: str) -> None:
        """Let `run` end now, after the write that is on its way."""
        self._finish(reason)
        self._scope.cancel(reason="the WebSocket has failed")

    def _abort(self, reason: str) -> None:
        """Let `run` end at once: nothing more gets through."""
        self._fail(reason)
        self._transport.cut()

    # ----------------------------------------------------------------- asynchronous

    async def run(self, user: WebSocketUser) -> str:
        """Read and write until the connection ends, and close the stream.

        Args:
            user: Gets everything that comes in.

        Returns:
            Why it ended: what was given to `close`, or what happened.
        """
        self._transport.heard = user.heard
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._hold_library, nursery, user)
            await self._linger()
        finally:
            await trio.aclose_forcefully(self._stream)
        return self._reason or _GONE

    async def _hold_library(self, nursery: trio.Nursery, user: WebSocketUser) -> None:
        """Let the library work; what it raises ends this connection and no more.

        Only tasks of the library run in its nursery, so only its errors end here. They
        come from three packages, and are no promise of any of them.
        """
        try:
            async with trio.open_nursery() as library:
                connection = await self._shake_hands(library)
                if connection is None:
                    self._fail("it did not open a WebSocket")
                else:
                    nursery.start_soon(self._write, connection)
                    nursery.start_soon(self._read, connection, user)
                    nursery.start_soon(self._keep_alive, connection, user)
        except* Exception as group:
            error = _innermost(group)
            if isinstance(error, ConnectionRejected):
                status = error.status_code
                self._fail(f"it answered HTTP {status}: no signaling server is there")
            else:
                self._fail(f"it does not speak WebSocket ({type(error).__name__})")

    async def _shake_hands(self, library: trio.Nursery) -> WebSocketConnection | None:
        """Open the WebSocket; None if the other end leaves or is too slow."""
        with self._transport.opening as scope:
            scope.deadline = trio.current_time() + HANDSHAKE_SECONDS
            if self._url is None:
                request = await trio_websocket.wrap_server_stream(
                    library, self._transport, max_message_size=self._max_message
                )
                return await request.accept()
            parts = urlsplit(self._url)
            return await trio_websocket.wrap_client_stream(
                library,
                self._transport,  # type: ignore[arg-type]  # any stream will do
                parts.netloc,
                (parts.path or "/") + (f"?{parts.query}" if parts.query else ""),
                max_message_size=self._max_message,
            )
        return None

    async def _write(self, connection: WebSocketConnection) -> None:
        """Send what is queued, in order, then close."""
        try:
            while self._queue or self._reason is None:
                if self._queue:
                    text = self._queue.popleft()
                    self._queued_bytes -= len(text.encode())
                    await connection.send_message(text)
                else:
                    self._wake = trio.Event()
                    await self._wake.wait()
            short = (self._reason or "").encode()[:_MAX_REASON_BYTES]
            await connection.aclose(self._code, short.decode(errors="ignore"))
        except ConnectionClosed as closed:
            self._finish(_explain(closed))
        self._scope.cancel(reason="the WebSocket is closed")

    async def _read(self, connection: WebSocketConnection, user: WebSocketUser) -> None:
        """Take in everything until either end closes."""
        while True:
            try:
                message = await connection.get_message()
            except ConnectionClosed as closed:
                self._finish(_explain(closed))
                return
            self._transport.unfinished_bytes = 0
            if self._reason is not None:
                continue
            if isinstance(message, str):
                user.received_text(message)
            else:
                self.close("only texts, please", CloseCode.UNSUPPORTED_DATA)

    async def _keep_alive(
        self, connection: WebSocketConnection, user: WebSocketUser
    ) -> None:
        """Send the pings that are asked for, without waiting for their pongs."""
        async with trio.open_nursery() as nursery:
            for number in itertools.count():
                await self._ping_wanted.wait()
                self._ping_wanted = trio.Event()
                nursery.start_soon(self._ping, connection, user, number)

    async def _ping(
        self, connection: WebSocketConnection, user: WebSocketUser, number: int
    ) -> None:
        with trio.move_on_after(PONG_SECONDS) as scope:
            try:
                await connection.ping(str(number).encode())
            except ConnectionClosed:
                return
            user.heard()
        if scope.cancelled_caught:
            self._abort("it does not answer pings")

    async def _linger(self) -> None:
        """Leave the other end the time to read what was sent last."""
        if self._transport.is_cut:
            return
        with trio.CancelScope(deadline=self._scope.deadline):
            try:
                if isinstance(self._stream, trio.abc.HalfCloseableStream):
                    await self._stream.send_eof()
                while await self._stream.receive_some(_RECEIVE_BYTES):
                    pass
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass


class _Transport(trio.abc.Stream):
    """What the library reads and writes; see the module.

    Args:
        stream: What the bytes really go through; it is never closed here.
        drop: Called with a reason when the connection is of no use any more.

    Attributes:
        opening: Wraps the handshake; cancelled when no handshake can follow.
        heard: Called for each ping that is answered.
        unfinished_bytes: Received since the last whole message; its reader resets it.
        is_cut: True if a write may have been left half done.
    """

    def __init__(self, stream: trio.abc.Stream, drop: Callable[[str], None]) -> None:
        self.opening = trio.CancelScope()
        self.heard: Callable[[], None] = lambda: None
        self.unfinished_bytes = 0
        self.is_cut = False
        self._stream = stream
        self._drop = drop
        self._write_scope = trio.CancelScope()

    def cut(self) -> None:
        """End the write that is on its way; the owner cancels all that follow."""
        self.is_cut = True
        self._write_scope.cancel(reason="the connection is given up")

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Write all of it, also if this task is cancelled meanwhile."""
        with trio.move_on_after(WRITE_SECONDS, shield=True) as self._write_scope:
            try:
                await self._stream.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                # After a write that fails the library reads no more, and waits.
                self.opening.cancel(reason="the stream ended")
                raise
        if self._write_scope.cancelled_caught:
            self._drop(_DOES_NOT_READ)
            raise trio.BrokenResourceError(_DOES_NOT_READ)
        if data[:1] == _PONG:
            self.heard()

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until there is room for a write."""
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """Read some bytes; whatever ends the stream looks like its end."""
        try:
            data = await self._stream.receive_some(max_bytes)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            data = b""
        self.unfinished_bytes += len(data)
        if self.unfinished_bytes > MAX_UNFINISHED_BYTES:
            self._drop("it sends no whole message")
            data = b""
        if not data:
            self.opening.cancel(reason="the stream ended")
        return data

    async def aclose(self) -> None:
        """Note that the library gives up; the stream closes later."""
        self.opening.cancel(reason="the library gave up")
        await trio.lowlevel.checkpoint()


def _explain(closed: ConnectionClosed) -> str:
    """Say why either end, or the library, closed the connection."""
    said = closed.reason.reason if closed.reason is not None else None
    printable = "".join(c for c in said or "" if c.isprintable())
    return f"the connection was closed: {printable}" if printable else _GONE


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
            f"can't connect to {where}: {_cause(error)}",
            is_refused=isinstance(_innermost(error), ConnectionRefusedError),
        ) from error
    return WebSocket(stream, max_message, url)


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


def _innermost(error: BaseException) -> BaseException:
    """Find what really happened, inside of what the libraries wrapped it in."""
    while True:
        if isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        elif error.__cause__ is not None:
            error = error.__cause__
        else:
            return error


def _cause(error: BaseException) -> str:
    """Say what really happened."""
    error = _innermost(error)
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
