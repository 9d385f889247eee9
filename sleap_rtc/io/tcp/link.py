"""One link over TCP: when its session is pumped."""

import trio

from sleap_rtc.io.link.link import LinkClosedError
from sleap_rtc.io.link.session_link import SessionLink
from sleap_rtc.io.tcp.session import TcpSession
from sleap_rtc.io.tcp.socket import TcpSocket

BYTES_PER_TURN = 512 * 1024
"""Sent at most before anything else gets its turn: two milliseconds or so. Who reads as
fast as this writes would keep the event loop busy for as long as there is anything."""


class TcpLink(SessionLink):
    """A link over one TCP connection.

    Args:
        session: The protocol.
        tcp: The connection, which the link has for itself.
    """

    def __init__(self, session: TcpSession, tcp: TcpSocket) -> None:
        super().__init__("tcp", session)
        self._session = session
        self._tcp = tcp
        self._done = trio.Event()

    async def run(self) -> None:
        """Serve the link until its session is finished, then close the connection.

        When it is cancelled the connection stays: the link may have a last word.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._receive)
            nursery.start_soon(self._resume)
            await self.run_timer()
            nursery.cancel_scope.cancel(reason="the link is finished")
        self._tcp.close()
        self._done.set()

    def drop(self) -> None:
        """Close the connection after `run` was cancelled."""
        self._tcp.close()

    async def wait_done(self) -> None:
        """Wait until `run` has ended."""
        await self._done.wait()

    def pump(self) -> None:
        """Send what is to be sent, and wake whoever can go on.

        Sending is not a task of its own, so no cancellation can cut a record in two.
        """
        session = self._session
        enough = session.bytes_sent + BYTES_PER_TURN
        try:
            while not (session.finished or self._tcp.full):
                data = session.data_to_send()
                if not data:
                    break
                session.data_sent(self._tcp.send(data))
                # The last words can't wait: nobody may come back to send the rest.
                if session.bytes_sent >= enough and session.ended is None:
                    self._tcp.pause()
                    break
            if session.ended and session.all_sent and not session.finished:
                self._tcp.end_sending()
        except OSError as error:
            self._take_last_words()
            session.connection_lost(_explain(error))
        self._wake()

    async def _receive(self) -> None:
        session = self._session
        while True:
            try:
                await self._until(lambda: session.wants_data)
            except LinkClosedError:
                pass  # what comes now is thrown away, until the peer has closed too
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

    def _take_last_words(self) -> None:
        """Read what a peer that is gone had sent: it may have said why it left."""
        try:
            while data := self._tcp.receive_now():
                self._session.receive_data(data, trio.current_time())
        except OSError:
            pass  # the connection is lost, as we know already

    def _packets_lost(self) -> int:
        return self._tcp.retransmissions


def _explain(error: OSError) -> str:
    return f"the connection is lost ({error.strerror or error})"
