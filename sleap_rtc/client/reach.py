"""How a client gets to a worker of its room, and back to it."""

import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec
import structlog
import trio

from sleap_rtc.errors import NoWorkerError, RefusedError
from sleap_rtc.io.connect.dial import dial
from sleap_rtc.io.link.link import DialError, Link
from sleap_rtc.io.nursery import open_background_nursery
from sleap_rtc.io.signaling.client import (
    RegistrationRefusedError,
    RoomConnection,
    open_room,
)
from sleap_rtc.proto.rendezvous.invite import Invite, RoomKeys
from sleap_rtc.proto.rendezvous.messages import Metadata
from sleap_rtc.proto.rendezvous.workers import (
    Candidate,
    Choice,
    NoChoice,
    choose_worker,
    read_card,
)
from sleap_rtc.proto.route.routes import (
    GiveUp,
    RoutePreference,
    asked_kinds,
    choose_kinds,
)
from sleap_rtc.rendezvous.introductions import Introduction, ask_worker

FIND_TIMEOUT = 15.0
"""Seconds to find a worker: a signaling server that restarts is back by then."""

RETURN_TIMEOUT = 15.0
"""Seconds for workers to come back to a signaling server that has restarted."""

RETURN_INTERVAL = 0.5
"""Seconds between two looks at who has come back."""

ANSWER_TIMEOUT = 10.0
"""Seconds for the worker to answer an offer."""


class WorkerChosen(msgspec.Struct, frozen=True):
    """Event: which worker the job goes to, and why."""

    worker: Candidate
    reason: str


class LinkOpened(msgspec.Struct, frozen=True):
    """Event: the connection to the worker stands, and why it is this one."""

    kind: str
    address: str
    reason: str


class WorkerGoneError(NoWorkerError):
    """There is evidence that the process of the worker is not there."""


class Reach:
    """The way to one worker: found once, and gone again whenever the link is lost.

    Args:
        invite: The room.
        preference: The route that the user asked for.
        wanted: Id, name or host name of the worker; None chooses one.
        on_event: Is told who was chosen, and which link stands.
        because: Why it is the wanted one, if not because the user said so.
    """

    def __init__(
        self,
        invite: Invite,
        preference: RoutePreference,
        wanted: str | None,
        on_event: Callable[[WorkerChosen | LinkOpened], None],
        because: str = "",
    ) -> None:
        self.worker_id = ""
        self._invite = invite
        self._keys = RoomKeys.from_secret(invite.secret)
        self._preference = preference
        self._wanted = wanted
        self._tell = on_event
        self._because = because

    @asynccontextmanager
    async def open_first(self) -> AsyncIterator[Link]:
        """Choose a worker, and open a link to it.

        Raises:
            NoWorkerError: If none was found or reached.
            RefusedError: If the server or the worker refused.
        """
        introduction = await self._meet()
        async with self._dial(introduction) as link:
            yield link

    @asynccontextmanager
    async def open_again(self) -> AsyncIterator[Link]:
        """Open another link to the same worker; one attempt.

        Raises:
            WorkerGoneError: If it is not there.
            NoWorkerError: If it was not reached.
            RefusedError: If the server or the worker refused.
        """
        introduction = await self._meet_again()
        async with self._dial(introduction) as link:
            yield link

    async def _meet(self) -> Introduction:
        """Find a worker in the room, and be introduced to it."""
        async with enter_room(self._invite, self._keys, FIND_TIMEOUT) as room:
            choice = await self._choose_worker(room)
            if isinstance(choice, NoChoice):
                raise NoWorkerError(
                    f"Can't send the job: {choice.reason}.",
                    "Start a worker with `sleap-rtc daemon --role worker` on the GPU "
                    "machine; `sleap-rtc workers` lists who is there.",
                )
            self.worker_id = choice.worker.peer_id
            self._tell(WorkerChosen(choice.worker, self._because or choice.reason))
            return await self._be_introduced(room, choice.worker)

    async def _meet_again(self) -> Introduction:
        async with _open_room(self._invite, self._keys) as room:
            with trio.move_on_after(FIND_TIMEOUT):
                await _first_attempt(room, self._invite)
                for worker in await discover(room):
                    if worker.peer_id == self.worker_id:
                        return await self._be_introduced(room, worker)
                raise WorkerGoneError(f"The worker {self.worker_id} is not there.")
            raise NoWorkerError(f"{self._invite.url} does not answer.")

    async def _be_introduced(
        self, room: RoomConnection, worker: Candidate
    ) -> Introduction:
        with trio.move_on_after(ANSWER_TIMEOUT):
            kinds = asked_kinds(self._preference)
            return await ask_worker(room, self._keys, worker, kinds)
        raise NoWorkerError(
            f"The worker {worker.peer_id} did not answer for {ANSWER_TIMEOUT:.0f} s.",
            "Its log says whether the offer was refused: both sides need the same "
            "invite, and clocks that differ by less than two minutes.",
        )

    async def _choose_worker(self, room: RoomConnection) -> Choice | NoChoice:
        """Choose a worker; behind a server that was away, wait for one to come back."""
        choice = choose_worker(await discover(room), self._wanted)
        if room.trouble:
            with trio.move_on_after(RETURN_TIMEOUT):
                while isinstance(choice, NoChoice):
                    await trio.sleep(RETURN_INTERVAL)
                    choice = choose_worker(await discover(room), self._wanted)
        return choice

    @asynccontextmanager
    async def _dial(self, introduction: Introduction) -> AsyncIterator[Link]:
        """Open the link, and tell why it is this one."""
        answer = introduction.answer
        choice = choose_kinds(self._preference, answer.kinds)
        if isinstance(choice, GiveUp):
            raise NoWorkerError(
                f"The worker can't be reached: {choice.reason}.",
                "Send the package without --route.",
            )
        addresses = [(address.host, address.port) for address in answer.addresses]
        try:
            async with dial(
                addresses,
                certificate_der=answer.certificate,
                auth=introduction.auth,
                kinds=choice.kinds,
            ) as (link, reason):
                opened = link.statistics()
                self._tell(
                    LinkOpened(opened.kind, opened.address, choice.reason or reason)
                )
                yield link
        except DialError as error:
            raise NoWorkerError(
                f"The worker can't be reached: {error}.",
                "Its port, TCP or UDP, must be open to this machine: see the "
                "troubleshooting guide, or use a shared network or VPN.",
            ) from None


async def discover(room: RoomConnection) -> list[Candidate]:
    """List the workers of a room."""
    peers = await room.discover(role="worker")
    return [
        Candidate(peer.peer_id, read_card(peer.metadata.properties)) for peer in peers
    ]


@asynccontextmanager
async def enter_room(
    invite: Invite, keys: RoomKeys, timeout: float
) -> AsyncIterator[RoomConnection]:
    """Be in the room for as long as the body runs.

    Raises:
        NoWorkerError: If the signaling server can't be reached in time.
        RefusedError: If it does not let this machine in.
    """
    async with _open_room(invite, keys) as room:
        with trio.move_on_after(timeout) as scope:
            await _registered(room, invite)
        if scope.cancelled_caught:
            raise NoWorkerError(
                f"The signaling server at {invite.url} can't be reached: "
                f"{room.trouble or 'it does not answer'}.",
                "Check that the worker, or its signaling server, runs and that this "
                "machine can reach it; `sleap-rtc doctor` tests it.",
            )
        yield room


@asynccontextmanager
async def _open_room(invite: Invite, keys: RoomKeys) -> AsyncIterator[RoomConnection]:
    async with open_room(
        invite.url,
        keys,
        peer_id=f"client-{secrets.token_hex(6)}",
        role="client",
        metadata=Metadata(tags=("sleap-rtc", "training-client")),
        log=structlog.get_logger(),
    ) as room:
        yield room


async def _registered(room: RoomConnection, invite: Invite) -> None:
    try:
        await room.wait_registered()
    except RegistrationRefusedError as error:
        raise RefusedError(
            f"The signaling server at {invite.url} refused this machine: "
            f"{error.reason}.",
            "Join again with a fresh invite: `sleap-rtc invite` on the worker.",
        ) from None


async def _first_attempt(room: RoomConnection, invite: Invite) -> None:
    """Wait until the room is entered, or could not be at the first attempt.

    Raises:
        WorkerGoneError: If nobody listens there: a worker without a signaling server
            is not to be found, and it may be the worker who runs it.
        NoWorkerError: If the server was not reached.
        RefusedError: If it does not let this machine in.
    """
    async with open_background_nursery() as nursery:

        async def stop_when_failed() -> None:
            await room.failed.wait()
            nursery.cancel_scope.cancel(reason=room.trouble)

        nursery.start_soon(stop_when_failed)
        await _registered(room, invite)
    if room.failed.is_set():
        kind = WorkerGoneError if room.is_refused else NoWorkerError
        raise kind(f"{invite.url} can't be reached: {room.trouble}.")
