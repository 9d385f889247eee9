"""A peer of a room, over real sockets.

`sleap_rtc.proto.rendezvous.member` decides what happens; this module moves texts and
time.
"""

import random
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import assert_never

import trio
from msgspec import UNSET
from structlog.typing import FilteringBoundLogger

from sleap_rtc.io.alarm import Alarm
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
from sleap_rtc.proto.rendezvous.member import (
    LIMITS,
    MemberLimits,
    MemberState,
    RoomMember,
)
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
    Filters,
    Metadata,
    PeerInfo,
    Property,
    decode_server_signal_untrusted,
)

MAX_WAITING_OFFERS = 64
"""Offers that wait until the worker reads them; a further one is dropped, and its
client asks again."""


class RegistrationRefusedError(Exception):
    """The signaling server refused the registration of this peer.

    Args:
        reason: The reason that the server sent.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class PeerUnreachableError(Exception):
    """A peer of the room did not get an offer, or its answer got lost.

    Args:
        target: The peer.
        reason: Why it cannot be reached.
    """

    def __init__(self, target: str, reason: str) -> None:
        super().__init__(f"Cannot reach {target}: {reason}")
        self.target = target
        self.reason = reason


class RoomConnection:
    """The connection of a peer to its room, which reconnects by itself.

    Made by `open_room`. A method that waits has no time limit of its own: the caller
    sets one, and a call that is cancelled leaves nothing behind.

    Attributes:
        peer_id: The name of this peer.
        offers: A channel of the sealed offers that arrive, as pairs of sender and text.
            It ends if the server refuses the registration.
        trouble: Why the last connection failed or ended; empty if none did.
        is_refused: True if the host of the server refused the last connection.
        failed: Set once a connection has failed or ended.
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
        self._alarm = Alarm()
        self._connect_wanted = trio.Event()
        self._socket: WebSocket | None = None
        self._registered = trio.Event()
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
            RegistrationRefusedError: If the server refuses the registration.
        """
        while self._member.state is not MemberState.REGISTERED:
            if self._member.state is MemberState.ENDED:
                raise RegistrationRefusedError(self._member.refusal)
            await self._registered.wait()

    async def discover(self, role: str | None = None) -> list[PeerInfo]:
        """Return the other peers of the room; ask again if the connection is lost.

        Args:
            role: Only peers of this role; None for all peers.

        Raises:
            RegistrationRefusedError: If the server refuses the registration.
        """
        filters = Filters(UNSET if role is None else role)
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
        """Send a sealed offer and return its sealed answer.

        Args:
            target: The peer to ask.
            sealed: The offer; it must not be used again, whatever happens.

        Raises:
            PeerUnreachableError: If the peer is not in the room, or the connection was
                lost before its answer came.
            RegistrationRefusedError: If the server refuses the registration.
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
        """Send a sealed answer as soon as this peer is in its room.

        Raises:
            RegistrationRefusedError: If the server refuses the registration.
        """
        await self.wait_registered()
        self._member.send_answer(target, sealed)
        self._drain()

    async def update_metadata(self, properties: Mapping[str, Property]) -> None:
        """Change the metadata of this peer, now and after every reconnection.

        Args:
            properties: The changed properties; the others stay.

        Raises:
            LocalProtocolError: If they are too large.
        """
        await trio.lowlevel.checkpoint()
        self._member.update_metadata(properties)
        self._drain()

    # ------------------------------------------------------------ input of the socket

    def received_text(self, text: str) -> None:
        """Handle a message of the server (for the socket)."""
        try:
            signal = decode_server_signal_untrusted(text)
            self._member.receive_message(signal, trio.current_time())
        except RemoteProtocolError as error:
            if self._socket is not None:
                self._socket.close(error.reason, CloseCode.PROTOCOL_ERROR)
        self._drain()

    def heard(self) -> None:
        """Record a sign of life of the server (for the socket)."""
        self._member.heard_from(trio.current_time())
        self._drain()

    # --------------------------------------------------------------------- the driver

    async def run(self) -> None:
        """Connect whenever the machine asks for it, until cancelled or refused."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._serve_deadlines)
            self._drain()
            while self._member.state is not MemberState.ENDED:
                await self._connect_wanted.wait()
                self._connect_wanted = trio.Event()
                await self._connect()
            nursery.cancel_scope.cancel(reason="the registration was refused")

    async def _connect(self) -> None:
        """Connect once, and serve the connection until it ends."""
        try:
            socket = await connect_websocket(self._url, MAX_LIST_BYTES)
        except WebSocketConnectError as error:
            self.is_refused = error.is_refused
            self._member.connect_failed(str(error), trio.current_time())
            self._drain()
            return
        self._socket, self.is_refused = socket, False
        self._member.connected(trio.current_time())
        self._drain()
        reason = await socket.run(self)
        self._socket = None
        if self._member.is_connected:
            self._member.connection_lost(reason, trio.current_time())
        self._drain()

    async def _serve_deadlines(self) -> None:
        while True:
            await self._alarm.wait()
            self._member.handle_timeout(trio.current_time())
            self._drain()

    def _drain(self) -> None:
        """Run all outputs of the machine, without waiting."""
        while (output := self._member.next_output()) is not None:
            self._run_output(output)
        self._alarm.set(self._member.deadline())

    def _run_output(self, output: MemberOutput) -> None:
        match output:
            case Connect():
                self._connect_wanted.set()
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
                if self._registered.is_set():
                    self._registered = trio.Event()
                self._end_requests()
            case RegistrationRefused(reason=reason):
                self._log.error("registration refused", reason=reason)
                self._end_requests()
                self._registered.set()
                self._offers_in.close()
            case PeersListed(request=request, peers=peers):
                if (waiting := self._lists.pop(request, None)) is not None:
                    waiting.send_nowait(peers)
            case OfferReceived(sender=sender, sealed=sealed):
                self._queue_offer(sender, sealed)
            case AnswerReceived(sender=sender, sealed=sealed):
                self._deliver_answer(sender, sealed)
            case PeerUnreachable(target=target):
                self._fail_answers(target)
            case ServerComplained(code=code, reason=reason):
                self._log.warning(
                    "the server reports an error", code=code, reason=reason
                )
            case _:
                assert_never(output)

    def _end_requests(self) -> None:
        """Wake the callers that wait for a list or an answer of this connection."""
        for lists in self._lists.values():
            lists.close()
        for answers in self._answers.values():
            answers.close()
        self._lists.clear()
        self._answers.clear()

    def _queue_offer(self, sender: str, sealed: str) -> None:
        try:
            self._offers_in.send_nowait((sender, sealed))
        except trio.WouldBlock:
            self._log.warning("offer dropped: too many at once", peer=sender)

    def _deliver_answer(self, sender: str, sealed: str) -> None:
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
    limits: MemberLimits = LIMITS,
) -> AsyncIterator[RoomConnection]:
    """Enter a room, and stay in it whatever happens to the connection.

    This does not wait for the registration: see `RoomConnection.wait_registered`.

    Args:
        url: The signaling server of the invite.
        keys: The keys of the invite.
        peer_id: A name that no other peer of the room uses.
        role: The role of this peer, such as ``worker`` or ``client``.
        metadata: Metadata that the other peers of the room can read.
        log: Log of connections and reconnections.
        limits: Time limits.

    Raises:
        LocalProtocolError: If the metadata is too large.
    """
    member = RoomMember(keys, peer_id, role, metadata, random.SystemRandom(), limits)
    room = RoomConnection(url, member, peer_id, log)
    async with open_background_nursery() as nursery:
        nursery.start_soon(room.run)
        yield room
