"""A peer in its room, over real sockets.

What happens is decided by `sleap_rtc.proto.rendezvous.member`; this module moves texts
and time.
"""

import random
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import assert_never

import trio
from msgspec import UNSET
from structlog.typing import FilteringBoundLogger

from sleap_rtc.io.nursery import open_background_nursery
from sleap_rtc.io.signaling.websocket import (
    CloseCode,
    WebSocket,
    WebSocketConnectError,
    connect_websocket,
)
from sleap_rtc.proto.errors import InvalidInput, RemoteProtocolError
from sleap_rtc.proto.rendezvous.envelope import session_untrusted
from sleap_rtc.proto.rendezvous.invite import RoomKeys
from sleap_rtc.proto.rendezvous.member import Backoff, MemberState, RoomMember
from sleap_rtc.proto.rendezvous.member_outputs import (
    AnswerReceived,
    Close,
    Connect,
    MemberOutput,
    OfferReceived,
    PeersListed,
    PeerUnreachable,
    Reconnecting,
    Registered,
    RegistrationRefused,
    SendText,
    ServerComplained,
)
from sleap_rtc.proto.rendezvous.messages import (
    MAX_LIST_BYTES,
    Condition,
    Filters,
    Metadata,
    PeerInfo,
    Property,
)

MAX_WAITING_OFFERS = 64
"""Offers that the owner of a room has not taken yet; one more is dropped, and its
client asks again."""


class RegistrationRefusedError(Exception):
    """The signaling server does not let this peer into the room.

    Args:
        reason: What the server said.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class PeerUnreachableError(Exception):
    """A peer of the room did not get an offer, or its answer got lost.

    Args:
        target: The peer.
        reason: What happened.
    """

    def __init__(self, target: str, reason: str) -> None:
        super().__init__(f"{target} can't be reached: {reason}")
        self.target = target
        self.reason = reason


class Room:
    """A peer's place in its room; it comes back by itself when the server does.

    Made by `open_room`. Every method that waits does so until the caller's deadline.

    Attributes:
        peer_id: The name of this peer.
        offers: The sealed offers that arrive, as pairs of sender and text. It ends if
            the server refuses the registration.
        trouble: Why the last connection failed or ended; empty if none did.
        is_refused: Whether the server's host said that nobody listens there.
        failed: Is set once a connection has failed or ended.
    """

    def __init__(
        self, url: str, member: RoomMember, peer_id: str, log: FilteringBoundLogger
    ) -> None:
        self.peer_id = peer_id
        self.trouble = ""
        self.is_refused = False
        self.failed = trio.Event()
        self._url = url
        self._member = member
        self._log = log
        self._socket: WebSocket | None = None
        self._registered = trio.Event()
        self._refusal: str | None = None
        self._lists: dict[int, trio.MemorySendChannel[tuple[PeerInfo, ...]]] = {}
        self._answers: dict[
            tuple[str, str], trio.MemorySendChannel[str | PeerUnreachableError]
        ] = {}
        self._offers_in, self.offers = trio.open_memory_channel[tuple[str, str]](
            MAX_WAITING_OFFERS
        )

    async def wait_registered(self) -> None:
        """Wait until this peer is in its room.

        Raises:
            RegistrationRefusedError: If it never will be.
        """
        while self._member.state is not MemberState.REGISTERED:
            if self._refusal is not None:
                raise RegistrationRefusedError(self._refusal)
            await self._registered.wait()

    async def discover(
        self,
        *,
        role: str | None = None,
        tags: tuple[str, ...] = (),
        properties: Mapping[str, Condition] | None = None,
    ) -> list[PeerInfo]:
        """List the other peers of the room; asks again if the connection is lost.

        Args:
            role: Only peers of this role.
            tags: Only peers with any of these tags.
            properties: Only peers whose properties have these values.

        Raises:
            RegistrationRefusedError: If the server does not let this peer in.
        """
        wanted = UNSET if role is None else role
        filters = Filters(wanted, tags, dict(properties or {}))
        while True:
            await self.wait_registered()
            request = self._member.discover(filters)
            send, receive = trio.open_memory_channel[tuple[PeerInfo, ...]](1)
            self._lists[request] = send
            self._drain()
            try:
                return list(await receive.receive())
            except trio.EndOfChannel:
                continue
            finally:
                self._lists.pop(request, None)

    async def exchange(self, target: str, sealed: str) -> str:
        """Send a sealed offer and wait for its sealed answer.

        Args:
            target: The peer to ask.
            sealed: The offer; it must not be used again, whatever happens.

        Raises:
            PeerUnreachableError: If the peer is not in the room, or the connection was
                lost before its answer came.
            RegistrationRefusedError: If the server does not let this peer in.
        """
        await self.wait_registered()
        key = (target, session_untrusted(sealed))
        send, receive = trio.open_memory_channel[str | PeerUnreachableError](1)
        self._answers[key] = send
        self._member.send_offer(target, sealed)
        self._drain()
        try:
            reply = await receive.receive()
        except trio.EndOfChannel:
            raise PeerUnreachableError(
                target, "the connection to the signaling server was lost"
            ) from None
        finally:
            self._answers.pop(key, None)
        if isinstance(reply, PeerUnreachableError):
            raise reply
        return reply

    async def answer(self, target: str, sealed: str) -> None:
        """Send a sealed answer, as soon as this peer is in its room.

        Raises:
            RegistrationRefusedError: If the server does not let this peer in.
        """
        await self.wait_registered()
        self._member.send_answer(target, sealed)
        self._drain()

    async def update_metadata(self, properties: Mapping[str, Property]) -> None:
        """Change what the room knows of this peer, now and after every reconnection.

        Args:
            properties: The changed ones; the others stay.

        Raises:
            LocalProtocolError: If they are too many.
        """
        await trio.lowlevel.checkpoint()
        self._member.update_metadata(properties)
        self._drain()

    # ---------------------------------------------------------- what the socket says

    def received_text(self, text: str) -> None:
        """Pass a message of the server on (for the socket)."""
        try:
            self._member.receive_text_untrusted(text, trio.current_time())
        except RemoteProtocolError as error:
            if self._socket is not None:
                self._socket.close(error.reason, CloseCode.PROTOCOL_ERROR)
        self._drain()

    def heard(self) -> None:
        """Pass a sign of life on (for the socket)."""
        self._member.heard_from(trio.current_time())

    # --------------------------------------------------------------------- the driver

    async def run(self) -> None:
        """Keep the connection up until cancelled or refused (for `open_room`)."""
        self._drain()
        while self._member.state is not MemberState.ENDED:
            if self._member.state is MemberState.CONNECTING:
                await self._connect()
            else:
                await self._wait_for_deadline()

    async def _connect(self) -> None:
        """Serve one connection, if it can be had."""
        try:
            socket = await connect_websocket(self._url, MAX_LIST_BYTES)
        except WebSocketConnectError as error:
            self.is_refused = error.is_refused
            self._member.connect_failed(trio.current_time(), str(error))
            self._drain()
            return
        self._socket, self.is_refused = socket, False
        self._member.connected(trio.current_time())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_deadlines)
            reason = await socket.run(self)
            nursery.cancel_scope.cancel(reason="the connection has ended")
        self._socket = None
        if self._member.is_connected:
            self._member.connection_lost(trio.current_time(), reason)
        self._drain()

    async def _watch_deadlines(self) -> None:
        while self._member.is_connected:
            await self._wait_for_deadline()

    async def _wait_for_deadline(self) -> None:
        """Sleep once; while a connection lasts, its deadlines only move away."""
        deadline = self._member.deadline()
        await trio.sleep_until(float("inf") if deadline is None else deadline)
        self._member.handle_timeout(trio.current_time())
        self._drain()

    def _drain(self) -> None:
        """Do all that the machine asks for; nothing here waits."""
        while (output := self._member.next_output()) is not None:
            self._do(output)

    def _do(self, output: MemberOutput) -> None:
        match output:
            case Connect():
                # `run` connects: it sees the state.
                pass
            case SendText(text=text):
                if self._socket is not None:
                    self._socket.send_text(text)
            case Close(reason=reason):
                if self._socket is not None:
                    self._socket.close(reason)
            case Registered():
                self._log.info("registered", peer=self.peer_id)
                self._registered.set()
            case Reconnecting(delay=delay, reason=reason):
                self.trouble = reason
                self.failed.set()
                self._log.warning(
                    "no signaling server", reason=reason, retry_in=round(delay, 1)
                )
                self._leave()
            case RegistrationRefused(reason=reason):
                self._log.error("registration refused", reason=reason)
                self._refusal = reason
                self._leave()
                self._registered.set()
                self._offers_in.close()
            case PeersListed(request=request, peers=peers):
                if (waiting := self._lists.pop(request, None)) is not None:
                    waiting.send_nowait(peers)
            case OfferReceived(sender=sender, sealed=sealed):
                self._take_offer(sender, sealed)
            case AnswerReceived(sender=sender, sealed=sealed):
                self._take_answer(sender, sealed)
            case PeerUnreachable(target=target):
                self._fail_answers(target)
            case ServerComplained(code=code, reason=reason):
                self._log.warning("the server complains", code=code, reason=reason)
            case _:
                assert_never(output)

    def _leave(self) -> None:
        """Tell everybody who waits that the connection is gone."""
        if self._registered.is_set():
            self._registered = trio.Event()
        for lists in self._lists.values():
            lists.close()
        for answers in self._answers.values():
            answers.close()
        self._lists.clear()
        self._answers.clear()

    def _take_offer(self, sender: str, sealed: str) -> None:
        try:
            self._offers_in.send_nowait((sender, sealed))
        except trio.WouldBlock:
            self._log.warning("offer dropped: too many at once", peer=sender)
        except trio.BrokenResourceError:
            # Nobody listens for offers here.
            pass

    def _take_answer(self, sender: str, sealed: str) -> None:
        try:
            key = (sender, session_untrusted(sealed))
        except InvalidInput:
            self._log.warning("not an answer", peer=sender)
            return
        if (waiting := self._answers.pop(key, None)) is not None:
            waiting.send_nowait(sealed)

    def _fail_answers(self, target: str) -> None:
        for key in [key for key in self._answers if key[0] == target]:
            reason = "it is not in the room"
            self._answers.pop(key).send_nowait(PeerUnreachableError(target, reason))


@asynccontextmanager
async def open_room(
    url: str,
    keys: RoomKeys,
    peer_id: str,
    role: str,
    metadata: Metadata,
    *,
    log: FilteringBoundLogger,
    backoff: Backoff = Backoff(),  # noqa: B008 - it is frozen
) -> AsyncIterator[Room]:
    """Enter a room, and stay in it whatever happens to the connection.

    It does not wait for the registration: see `Room.wait_registered`.

    Args:
        url: The signaling server of the invite.
        keys: The keys of the invite.
        peer_id: A name that no other peer of the room uses.
        role: Such as ``worker`` or ``client``.
        metadata: What the others shall know.
        log: Where connection and reconnection are noted.
        backoff: How long to wait between attempts to connect.

    Raises:
        LocalProtocolError: If the metadata is too large.
    """
    member = RoomMember(keys, peer_id, role, metadata, random.SystemRandom(), backoff)
    room = Room(url, member, peer_id, log)
    async with open_background_nursery() as nursery:
        nursery.start_soon(room.run)
        yield room
