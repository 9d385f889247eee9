"""One WebSocket (RFC 6455) over one stream, driven by trio-websocket.

It is made for signaling: texts only, and small ones. `WebSocket` queues texts without
waiting. `WebSocket.run` returns a reason and raises no error, even if the peer breaks
the protocol. This is how it copes with the library:

* The library stops reading and answering pings until its messages are read. So one
  task reads them at once, and passes them to a user that must not block.
* A cancelled write leaves half a frame, and the next frame is lost in it. So the
  library writes through `_Transport`: cancellation waits for a write, and a write that
  takes too long ends the connection. Texts are sent by one task.
* The handshake waits forever if the peer leaves meanwhile, and so does a ping. Both
  have a deadline here, and the end of the stream ends the handshake.
* Its reader fails in many ways if the peer breaks the protocol. It runs in a nursery of
  its own, and an exception there is a reason to end this connection.

`_Transport` adds what the library lacks:

* The library does not report the pings that it answers. Each pong that it writes
  stands for one.
* It collects the empty parts of a message, and the page of a web server that is not a
  signaling server, without a limit. Here the bytes between two messages are limited.
* It closes the stream at once after a failure. If received data is then unread, the
  kernel discards the data that the peer has not read yet. So the stream closes here,
  last.

Neither the library nor this module sends a close frame after a frame that breaks the
protocol: the stream ends. The reason is in the log.
"""

import itertools
import ssl
from collections import deque
from collections.abc import Callable
from enum import IntEnum
from typing import Protocol
from urllib.parse import urlsplit

import msgspec
import trio
import trio_websocket
from trio_websocket import ConnectionClosed, ConnectionRejected, WebSocketConnection
from typing_extensions import override

from sleap_rtc.io.causes import innermost
from sleap_rtc.proto.terminal import printable

CONNECT_TIMEOUT = 10.0
"""Seconds for name look-up, TCP and TLS together."""


class WebSocketLimits(msgspec.Struct, frozen=True):
    """Limits of one `WebSocket`; times are in seconds.

    Args:
        max_message: Characters of the longest message to accept.
        max_queued: Bytes that wait to be sent, three lists of a full room. A peer that
            lets more of them wait does not read.
        max_unfinished: Bytes received without a whole message. The longest list of
            peers is far below this limit. The pongs of a silent peer take three months
            to reach it.
        write_timeout: Time for one write, which nearly always goes into the kernel's
            buffer. A cancellation waits for it, so that no frame is cut.
        close_timeout: Time to send all queued messages and to receive the peer's close.
        handshake_timeout: Time for the handshake of the WebSocket, after those of TCP
            and TLS.
        pong_timeout: Time for the reply to a ping, which RFC 6455 requires (5.5.3).
    """

    max_message: int
    max_queued: int = 1024 * 1024
    max_unfinished: int = 4 * 1024 * 1024
    write_timeout: float = 5.0
    close_timeout: float = 2.0
    handshake_timeout: float = 10.0
    pong_timeout: float = 90.0


_GONE = "it went away"
_DOES_NOT_READ = "it does not read what it is sent"
_RECEIVE_BYTES = 64 * 1024
_PONG = b"\x8a"
"""The first byte of a pong (RFC 6455, 5.2): a whole frame, opcode 10."""

_MAX_REASON_BYTES = 120
"""Bytes of the reason in a close frame, which has room for 123."""


class CloseCode(IntEnum):
    """Status codes of a close frame (RFC 6455, 7.4.1)."""

    NORMAL = 1000
    PROTOCOL_ERROR = 1002
    UNSUPPORTED_DATA = 1003


class WebSocketUser(Protocol):
    """The receiver of messages and pings; its methods must not block."""

    def received_text(self, text: str) -> None:
        """Handle a whole message."""

    def heard(self) -> None:
        """Handle a ping, or the pong to a ping of ours."""


class WebSocketConnectError(Exception):
    """A server cannot be reached.

    Args:
        message: Why, for people.
        is_refused: True if its host refused the connection.
    """

    def __init__(self, message: str, *, is_refused: bool = False) -> None:
        super().__init__(message)
        self.is_refused = is_refused


class WebSocket:
    """One end of a connection. Nothing happens until `run` runs.

    Args:
        stream: The TCP or TLS stream; `run` closes it.
        limits: Sizes and timeouts.
        url: The address that a client asks for; None for a server.
    """

    def __init__(
        self, stream: trio.abc.Stream, limits: WebSocketLimits, url: str | None = None
    ) -> None:
        self._stream = stream
        self._url = url
        self._limits = limits
        self._transport = _Transport(stream, limits, self._abort)
        self._queue: deque[str] = deque()
        self._queued_bytes = 0
        self._wake = trio.Event()
        self._ping_wanted = trio.Event()
        self._scope = trio.CancelScope()
        self._reason: str | None = None
        self._code = CloseCode.NORMAL

    # ------------------------------------------------------------------ synchronous

    def send_text(self, text: str) -> None:
        """Queue a message; it is sent once the handshake is complete."""
        if self._reason is not None:
            return
        self._queue.append(text)
        self._queued_bytes += len(text.encode())
        self._wake.set()
        if self._queued_bytes > self._limits.max_queued:
            self._abort(_DOES_NOT_READ)

    def send_ping(self) -> None:
        """Send a ping soon; `WebSocketUser.heard` reports the pong."""
        self._ping_wanted.set()

    def close(self, reason: str, code: CloseCode = CloseCode.NORMAL) -> None:
        """Close once all queued messages are sent, and send the peer the reason."""
        if self._reason is not None:
            return
        self._code = code
        self._finish(reason)
        self._transport.opening.cancel(reason="closed before it was open")

    def _finish(self, reason: str) -> None:
        """End `run` once everything is written, within the close timeout."""
        if self._reason is None:
            self._reason = reason
            self._scope.deadline = trio.current_time() + self._limits.close_timeout
            self._wake.set()

    def _fail(self, reason: str) -> None:
        """End `run` after the write in progress."""
        self._finish(reason)
        self._scope.cancel(reason="the WebSocket has failed")

    def _abort(self, reason: str) -> None:
        """End `run` at once, without finishing the write in progress."""
        self._fail(reason)
        self._transport.cut()

    # ----------------------------------------------------------------- asynchronous

    async def run(self, user: WebSocketUser) -> str:
        """Read and write until the connection ends, and close the stream.

        Args:
            user: The receiver of messages and pings.

        Returns:
            Why it ended: the argument of `close`, or the failure.
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
        """Run the library; an exception of it ends this connection and nothing else.

        Only tasks of the library run in its nursery, so only its exceptions end here.
        They come from three packages, and none of these documents them.
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
            error = innermost(group)
            if isinstance(error, ConnectionRejected):
                status = error.status_code
                self._fail(f"it answered HTTP {status}: not a signaling server")
            else:
                self._fail(f"it does not speak WebSocket ({type(error).__name__})")

    async def _shake_hands(self, library: trio.Nursery) -> WebSocketConnection | None:
        """Open the WebSocket; None if the peer leaves or is too slow."""
        with self._transport.opening as scope:
            scope.deadline = trio.current_time() + self._limits.handshake_timeout
            if self._url is None:
                request = await trio_websocket.wrap_server_stream(
                    library, self._transport, max_message_size=self._limits.max_message
                )
                return await request.accept()
            parts = urlsplit(self._url)
            return await trio_websocket.wrap_client_stream(
                library,
                self._transport,  # type: ignore[arg-type]  # any stream will do
                parts.netloc,
                (parts.path or "/") + (f"?{parts.query}" if parts.query else ""),
                max_message_size=self._limits.max_message,
            )
        return None

    async def _write(self, connection: WebSocketConnection) -> None:
        """Send all queued messages in order, then close."""
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
        """Read messages until either end closes."""
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
                self.close(
                    "binary messages are not supported", CloseCode.UNSUPPORTED_DATA
                )

    async def _keep_alive(
        self, connection: WebSocketConnection, user: WebSocketUser
    ) -> None:
        """Send the requested pings, without waiting for their pongs."""
        async with trio.open_nursery() as nursery:
            for number in itertools.count():
                await self._ping_wanted.wait()
                self._ping_wanted = trio.Event()
                nursery.start_soon(self._ping, connection, user, number)

    async def _ping(
        self, connection: WebSocketConnection, user: WebSocketUser, number: int
    ) -> None:
        with trio.move_on_after(self._limits.pong_timeout) as scope:
            try:
                await connection.ping(str(number).encode())
            except ConnectionClosed:
                return
            user.heard()
        if scope.cancelled_caught:
            self._abort("it does not answer pings")

    async def _linger(self) -> None:
        """Wait until the peer has read all that was sent, or the close timeout."""
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
    """The stream that the library reads and writes; see the module.

    Args:
        stream: The real stream; it is never closed here.
        limits: Sizes and timeouts.
        drop: Called with a reason when the connection has become useless.

    Attributes:
        opening: Scope of the handshake; cancelled when no handshake can follow.
        heard: Called for each ping that is answered.
        unfinished_bytes: Bytes received since the last whole message; the reader of
            messages resets it.
        is_cut: True if a write may have been cut in the middle.
    """

    def __init__(
        self,
        stream: trio.abc.Stream,
        limits: WebSocketLimits,
        drop: Callable[[str], None],
    ) -> None:
        self.opening = trio.CancelScope()
        self.heard: Callable[[], None] = lambda: None
        self.unfinished_bytes = 0
        self.is_cut = False
        self._stream = stream
        self._limits = limits
        self._drop = drop
        self._write_scope = trio.CancelScope()

    def cut(self) -> None:
        """End the write in progress; the owner cancels all later writes."""
        self.is_cut = True
        self._write_scope.cancel(reason="the connection is given up")

    @override
    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Write all of it, even if this task is cancelled meanwhile."""
        timeout = self._limits.write_timeout
        with trio.move_on_after(timeout, shield=True) as self._write_scope:
            try:
                await self._stream.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                # The library stops reading after a failed write, and waits.
                self.opening.cancel(reason="the stream ended")
                raise
        if self._write_scope.cancelled_caught:
            self._drop(_DOES_NOT_READ)
            raise trio.BrokenResourceError(_DOES_NOT_READ)
        if data[:1] == _PONG:
            self.heard()

    @override
    async def wait_send_all_might_not_block(self) -> None:
        """Wait until a write has room in the buffer."""
        await self._stream.wait_send_all_might_not_block()

    @override
    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """Read some bytes; a broken stream looks like one that has ended."""
        try:
            data = await self._stream.receive_some(max_bytes)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            data = b""
        self.unfinished_bytes += len(data)
        if self.unfinished_bytes > self._limits.max_unfinished:
            self._drop("it sends no whole message")
            data = b""
        if not data:
            self.opening.cancel(reason="the stream ended")
        return data

    @override
    async def aclose(self) -> None:
        """End the handshake, because the library gave up; the stream closes later."""
        self.opening.cancel(reason="the library gave up")
        await trio.lowlevel.checkpoint()


def _explain(closed: ConnectionClosed) -> str:
    """Return why either end, or the library, closed the connection."""
    reason = closed.reason.reason if closed.reason is not None else None
    shown = printable(reason or "").strip()
    return f"the connection was closed: {shown}" if shown else _GONE


# ---------------------------------------------------------------------- connecting


async def connect_websocket(url: str, max_message: int) -> WebSocket:
    """Connect to a server; the handshake of the WebSocket itself follows in `run`.

    Args:
        url: ``ws://`` or ``wss://``; for the latter the certificate is verified
            against the authorities that this machine trusts.
        max_message: Characters of the longest message to accept.

    Raises:
        WebSocketConnectError: If it cannot be reached within `CONNECT_TIMEOUT`.
    """
    parts = urlsplit(url)
    host, secure = parts.hostname or "", parts.scheme == "wss"
    port = parts.port or (443 if secure else 80)
    where = f"{host}:{port}"
    try:
        with trio.fail_after(CONNECT_TIMEOUT):
            stream: trio.abc.Stream = await trio.open_tcp_stream(host, port)
            if secure:
                stream = await _secured(stream, host)
    except trio.TooSlowError:
        raise WebSocketConnectError(
            f"{where} did not answer within {CONNECT_TIMEOUT:.0f} s"
        ) from None
    except (OSError, trio.BrokenResourceError) as error:
        raise WebSocketConnectError(
            f"cannot connect to {where}: {_cause(error)}",
            is_refused=isinstance(innermost(error), ConnectionRefusedError),
        ) from error
    return WebSocket(stream, WebSocketLimits(max_message), url)


async def _secured(stream: trio.abc.Stream, host: str) -> trio.abc.Stream:
    """Wrap a stream in TLS."""
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
    """Describe the cause of a failed connection, for people."""
    error = innermost(error)
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
