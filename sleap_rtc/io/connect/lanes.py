"""Links of several connections: the first one, and lanes beside it.

The first connection is the link. It carries all messages, and bulk like any other; when
it ends, the link has ended. The client asks over it for lanes when there is enough to
transfer, and the worker answers with tickets (see `sleap_rtc.proto.transfer.lanes`).
"""

import secrets
from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from itertools import count

import trio

from sleap_rtc.io.connect.lane_process import listen_in_process, processes_pay
from sleap_rtc.io.link.certificates import Certificate
from sleap_rtc.io.link.link import (
    DialError,
    Lanes,
    Link,
    LinkClosedError,
    LinkStatistics,
)
from sleap_rtc.proto.errors import RemoteProtocolError
from sleap_rtc.proto.messages import (
    MAX_LANES,
    Auth,
    LaneRequest,
    LaneTicket,
    Message,
)
from sleap_rtc.proto.transfer.frames import Frame
from sleap_rtc.proto.transfer.lanes import TicketBook

MAX_REQUESTS = MAX_LANES
"""LANE_REQUESTs of a link that are answered: for any port, then for each lane that
could not be had there."""

MAX_PROCESSES = 16
"""Lane processes of a worker, each of some 50 MiB; further lanes stay in its own."""

_LANE = "lane:"
"""How the names of lanes begin; no peer id holds a colon."""

ConnectLane = Callable[[int], AbstractAsyncContextManager[Link]]
"""Reaches the worker once more, without a proof yet, at this port; 0 for the link's."""


class LanedLink(Link):
    """A link that may have lanes; the two sides differ in how they come about.

    Args:
        first: Its first connection.
    """

    def __init__(self, first: Link) -> None:
        self.peer = first.peer
        self.lanes: Lanes = Lanes()
        self._first = first

    async def send_message(self, message: Message) -> None:
        """Send a control message, whole or not at all."""
        await self._first.send_message(message)

    async def receive_message(self) -> Message:
        """Wait for the next control message that is not about lanes."""
        try:
            while self._take(message := await self._first.receive_message()):
                pass
        except LinkClosedError as error:
            self._ended(error.reason)
            raise
        return message

    async def send_frame(self, frame: Frame) -> None:
        """Send a bulk frame over the first connection."""
        await self._first.send_frame(frame)

    async def receive_frame(self) -> Frame:
        """Wait for the next bulk frame of the first connection."""
        return await self._first.receive_frame()

    def statistics(self) -> LinkStatistics:
        """Say what the link has done so far, lanes that live included."""
        first = self._first.statistics()
        lanes = [lane.statistics() for lane in self.lanes.alive]
        return LinkStatistics(
            kind=first.kind,
            address=first.address,
            rtt=first.rtt,
            bytes_sent=first.bytes_sent + sum(lane.bytes_sent for lane in lanes),
            bytes_received=first.bytes_received
            + sum(lane.bytes_received for lane in lanes),
            packets_lost=first.packets_lost + sum(lane.packets_lost for lane in lanes),
            ignored_messages=first.ignored_messages,
        )

    async def aclose(self, reason: str = "") -> None:
        """Send what was accepted for sending, tell the peer the reason, and end."""
        try:
            await self._first.aclose(reason)
        finally:
            self._ended(reason)

    def close_now(self, reason: str = "") -> None:
        """End it without waiting for what is on its way."""
        self._first.close_now(reason)
        self._ended(reason)

    @abstractmethod
    def _take(self, message: Message) -> bool:
        """Take a message if it is about lanes."""

    def _ended(self, reason: str) -> None:
        """End what belongs to the link."""
        self.lanes.drop_all(reason)


# ------------------------------------------------------------------- the client's side


class DialedLink(LanedLink):
    """The client's side: it asks for lanes once they are wanted, and opens them.

    The owner starts `open_lanes` in a nursery, which ends with the link.

    Args:
        first: Its first connection.
        connections: How many it shall have, the first one included.
        connect: Reaches the worker once more.
    """

    def __init__(self, first: Link, connections: int, connect: ConnectLane) -> None:
        super().__init__(first)
        self._requested = False
        self._missing = min(connections, MAX_LANES) - 1
        self._connect = connect
        self._tickets, self._received = trio.open_memory_channel[LaneTicket](
            MAX_REQUESTS * (MAX_LANES - 1)
        )

    async def open_lanes(self) -> None:
        """Open lanes when they are wanted, and keep them until they end."""
        if self._missing <= 0:
            return
        await self.lanes.wait_wanted()
        self._requested = True
        try:
            await self._first.send_message(LaneRequest(self._missing, "any"))
        except LinkClosedError:
            return  # whoever receives from the link notices, too
        async with trio.open_nursery() as nursery:
            async for ticket in self._received:
                nursery.start_soon(self._open, ticket)

    async def _open(self, ticket: LaneTicket) -> None:
        try:
            async with self._connect(ticket.port) as lane:
                await lane.send_message(Auth(ticket.session, ticket.proof))
                self.lanes.add(lane)
                await self.lanes.wait_dropped(lane)
        except DialError:
            if ticket.port:
                await self._ask_for_the_same_port()
        except LinkClosedError:
            pass  # the link does without it

    async def _ask_for_the_same_port(self) -> None:
        """Ask again for a lane that could not be had at a port of its own."""
        self._missing += 1
        try:
            await self._first.send_message(LaneRequest(1, "same"))
        except LinkClosedError:
            pass  # whoever receives from the link notices, too

    def _take(self, message: Message) -> bool:
        if not isinstance(message, LaneTicket):
            return False
        if self._requested and self._missing > 0:
            self._missing -= 1
            self._tickets.send_nowait(message)
        return True


# ------------------------------------------------------------------- the worker's side


class LaneDesk:
    """Where a worker hands tickets out, and finds the link of a lane that arrives.

    Args:
        host: The address that links are accepted at.
        certificate: What lanes in processes of their own show.
        authenticate: The judge of proofs that are no tickets.
        nursery: Where tickets are sent from, and lane processes are owned.
    """

    def __init__(
        self,
        host: str,
        certificate: Certificate,
        authenticate: Callable[[Auth], str],
        nursery: trio.Nursery,
    ) -> None:
        self._host = host
        self._certificate = certificate
        self._nursery = nursery
        self._authenticate = authenticate
        self._book = TicketBook()
        self._numbers = count()
        self._links: dict[int, AcceptedLink] = {}
        self._arriving: dict[str, int] = {}
        self._processes = 0

    def authenticate(self, auth: Auth) -> str:
        """Judge the proof of a new connection, be it a link or a lane.

        Returns:
            The name of the client; that of a lane can't be the name of a peer.

        Raises:
            RemoteProtocolError: If it proves nothing.
        """
        now = trio.current_time()
        try:
            number = self._book.redeem_untrusted(auth.session, auth.proof, now)
        except RemoteProtocolError:
            return self._authenticate(auth)
        name = _LANE + auth.session
        self._arriving[name] = number
        return name

    def admit(self, connection: Link) -> Link | None:
        """Take a connection that has proved itself.

        Returns:
            A new link, or None if it became a lane of one.
        """
        if connection.peer.startswith(_LANE):
            owner = self._links.get(self._arriving.pop(connection.peer, -1))
            if owner is None:
                connection.close_now("its link has ended")
            else:
                owner.lanes.add(connection)
            return None
        number = next(self._numbers)
        self._links[number] = link = AcceptedLink(connection, number, self)
        return link

    def hand_out(self, link: "AcceptedLink", request: LaneRequest) -> None:
        """Send as many tickets as a link may have, in the background.

        Lanes over QUIC are in processes of their own, each at a port of its own, where
        there are cores for it.
        """
        room = MAX_LANES - 1 - len(link.lanes.alive) - self._book.held(link.number)
        may_be_elsewhere = (
            request.port == "any"
            and link.statistics().kind == "quic"
            and processes_pay()
        )
        for _ in range(min(request.count, room)):
            if may_be_elsewhere and self._processes < MAX_PROCESSES:
                self._processes += 1
                self._nursery.start_soon(self._serve_process, link)
            else:
                self._issue(link)

    def _issue(self, link: "AcceptedLink") -> None:
        session, proof = _draw_ticket()
        self._book.issue(link.number, session, proof, trio.current_time())
        self._nursery.start_soon(link.send_ticket, LaneTicket(session, proof, 0))

    async def _serve_process(self, link: "AcceptedLink") -> None:
        session, proof = _draw_ticket()
        try:
            async with listen_in_process(
                self._host, self._certificate, session, proof
            ) as listener:
                await link.send_ticket(LaneTicket(session, proof, listener.port))
                async with listener.accept() as lane:
                    if link.number in self._links:
                        link.lanes.add(lane)
                        await link.lanes.wait_dropped(lane)
        except OSError:
            pass  # the link does without it
        finally:
            self._processes -= 1

    def forget(self, number: int) -> None:
        """Note that a link has ended."""
        self._links.pop(number, None)
        self._book.withdraw(number)
        for name, owner in tuple(self._arriving.items()):
            if owner == number:
                del self._arriving[name]


class AcceptedLink(LanedLink):
    """The worker's side: it hands out tickets when it is asked for them.

    Args:
        first: Its first connection.
        number: Its number at the desk.
        desk: Where the tickets come from.
    """

    def __init__(self, first: Link, number: int, desk: LaneDesk) -> None:
        super().__init__(first)
        self.number = number
        self._desk = desk
        self._requests = 0

    def _take(self, message: Message) -> bool:
        if not isinstance(message, LaneRequest):
            return False
        self._requests += 1
        # A child is started for each lane at another port, so that is asked for once.
        is_first = self._requests == 1
        if is_first or (message.port == "same" and self._requests <= MAX_REQUESTS):
            self._desk.hand_out(self, message)
        return True

    async def send_ticket(self, ticket: LaneTicket) -> None:
        """Let the client open one lane."""
        try:
            await self._first.send_message(ticket)
        except LinkClosedError:
            pass  # whoever receives from the link notices, too

    def _ended(self, reason: str) -> None:
        super()._ended(reason)
        self._desk.forget(self.number)


def _draw_ticket() -> tuple[str, str]:
    """Draw a session and a proof by lot."""
    return secrets.token_hex(16), secrets.token_hex(32)
