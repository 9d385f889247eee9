"""One link over TCP: how its session is connected to its socket."""

from collections.abc import Callable
from typing import Never

import trio
from typing_extensions import override

from sleap_rtc.io.link.limits import LinkLimits
from sleap_rtc.io.link.link import LinkClosedError, ReceivedT_co
from sleap_rtc.io.link.session import ProofShown
from sleap_rtc.io.link.session_link import SessionLink, ignore_output
from sleap_rtc.io.tcp.session import TcpSession
from sleap_rtc.io.tcp.socket import TcpSocket


class TcpLink(SessionLink[ReceivedT_co, Never]):
    """A link over one TCP connection.

    Args:
        session: The protocol.
        tcp: The connection, owned by the link from now on.
        limits: The limits of the link.
        on_output: Called with each output of the session.
    """

    kind = "tcp"
    session: TcpSession[ReceivedT_co]

    def __init__(
        self,
        session: TcpSession[ReceivedT_co],
        tcp: TcpSocket,
        limits: LinkLimits,
        on_output: Callable[[ProofShown], None] = ignore_output,
    ) -> None:
        super().__init__(session, limits, on_output)
        self._tcp = tcp
        self._done = trio.Event()

    @override
    async def run(self) -> None:
        """Serve the link until its session is finished, then close the connection.

        When cancelled, the connection stays open: `close_now` can still send a reason.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._receive)
            nursery.start_soon(self._resume)
            await self.run_timer()
            nursery.cancel_scope.cancel(reason="the link is finished")
        self._tcp.close()
        self._done.set()

    @override
    async def linger(self) -> None:
        """Wait until `run` has closed the connection, which has a time limit."""
        await self._done.wait()

    @override
    def drop(self) -> None:
        self._tcp.close()

    @override
    def _send(self) -> None:
        session = self.session
        enough = session.bytes_sent + self._limits.bytes_per_turn
        try:
            while not (session.finished or self._tcp.full):
                data = session.data_to_send()
                if not data:
                    break
                session.data_sent(self._tcp.send(data))
                # A close is sent at once: a later turn may never come.
                if session.bytes_sent >= enough and session.ended is None:
                    self._tcp.pause()
                    break
            if session.ended and session.all_sent and not session.finished:
                self._tcp.end_sending()
        except OSError as error:
            self._read_rest()
            session.connection_lost(_explain(error))

    async def _receive(self) -> None:
        session = self.session
        while True:
            try:
                await self._until(lambda: session.wants_data)
            except LinkClosedError:
                pass  # discard further data until the peer has closed as well
            try:
                data = await self._tcp.receive()
            except OSError as error:
                session.connection_lost(_explain(error))
            else:
                if data:
                    session.receive_data(data, trio.current_time())
                else:
                    session.connection_lost("it closed the connection without a reason")
            self.pump()

    async def _resume(self) -> None:
        while True:
            await self._tcp.wait_until_writable()
            self.pump()

    def _read_rest(self) -> None:
        """Read the last data of a peer that was lost: it may contain a reason."""
        try:
            while data := self._tcp.receive_now():
                self.session.receive_data(data, trio.current_time())
                self._handle_outputs()
        except OSError:
            pass  # the loss of the connection is reported already

    @override
    def _packets_lost(self) -> int:
        return self._tcp.retransmissions


def _explain(error: OSError) -> str:
    return f"the connection is lost ({error.strerror or error})"
