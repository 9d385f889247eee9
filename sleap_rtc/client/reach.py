"""Opening links to a worker: the first one, and another one after a loss."""

import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import structlog
import trio

from sleap_rtc.client.events import LinkOpened, WorkerChosen
from sleap_rtc.errors import NoWorkerError, RefusedError
from sleap_rtc.io.connect.dial import dial
from sleap_rtc.io.link.link import DialError, Link
from sleap_rtc.io.nursery import open_background_nursery
from sleap_rtc.io.signaling.client import (
    RegistrationRefusedError,
    RoomConnection,
    open_room,
)
from sleap_rtc.proto.messages import WorkerMessage
from sleap_rtc.proto.rendezvous.invite import Invite, RoomKeys
from sleap_rtc.proto.rendezvous.messages import Metadata
from sleap_rtc.proto.rendezvous.workers import (
    FIND_TIMEOUT,
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

RETURN_TIMEOUT = 15.0
"""Seconds for workers to come back to a signaling server that has restarted."""

RETURN_INTERVAL = 0.5
"""Seconds between two discoveries of workers that have come back."""

ANSWER_TIMEOUT = 10.0
"""Seconds for the worker to answer an offer."""


class WorkerGoneError(NoWorkerError):
    """There is evidence that the process of the worker no longer runs."""


class Reach:
    """Opens links to workers of one room.

    Args:
        invite: The room.
        preference: The route that the user asked for.
        on_event: Called when a worker was chosen, and when a link is open.
    """

    def __init__(
        self,
        invite: Invite,
        preference: RoutePreference,
        on_event: Callable[[WorkerChosen | LinkOpened], None],
    ) -> None:
        self._invite = invite
        self._keys = RoomKeys.from_secret(invite.secret)
        self._preference = preference
        self._on_event = on_event

    @asynccontextmanager
    async def open_first(
        self, wanted: str | None, because: str = ""
    ) -> AsyncIterator[tuple[str, Link[WorkerMessage]]]:
        """Choose a worker, and open a link to it.

        Args:
            wanted: Id, name or host name of the worker; None chooses one.
            because: Why this worker is wanted, unless the user asked for it.

        Yields:
            The peer id of the worker, and the link.

        Raises:
            NoWorkerError: If no worker was found or reached.
            RefusedError: If the server or the worker refused.
            LinkClosedError: If the link was lost while it was opened.
        """
        async with enter_room(self._invite, self._keys, FIND_TIMEOUT) as room:
            choice = await _choose_worker(room, wanted)
            if isinstance(choice, NoChoice):
                raise NoWorkerError(
                    f"Cannot send the job: {choice.reason}.",
                    "Start a worker with `sleap-rtc daemon --role worker` on the GPU "
                    "machine; `sleap-rtc workers` lists the workers of the room.",
                )
            worker = choice.worker
            self._on_event(WorkerChosen(worker, because or choice.reason))
            introduction = await self._introduce(room, worker)
        async with self._dial(introduction) as link:
            yield worker.peer_id, link

    @asynccontextmanager
    async def open_again(self, worker_id: str) -> AsyncIterator[Link[WorkerMessage]]:
        """Open another link to a worker; one attempt.

        Raises:
            WorkerGoneError: If its process no longer runs.
            NoWorkerError: If it was not reached.
            RefusedError: If the server or the worker refused.
            LinkClosedError: If the link was lost while it was opened.
        """
        introduction = await self._meet_again(worker_id)
        async with self._dial(introduction) as link:
            yield link

    async def _meet_again(self, worker_id: str) -> Introduction:
        async with _open_room(self._invite, self._keys) as room:
            with trio.move_on_after(FIND_TIMEOUT):
                await _first_attempt(room, self._invite)
                for worker in await discover(room):
                    if worker.peer_id == worker_id:
                        return await self._introduce(room, worker)
                raise WorkerGoneError(f"The worker {worker_id} is not in the room.")
            raise NoWorkerError(f"{self._invite.url} does not answer.")

    async def _introduce(self, room: RoomConnection, worker: Candidate) -> Introduction:
        """Exchange an offer and an answer with the worker."""
        with trio.move_on_after(ANSWER_TIMEOUT):
            kinds = asked_kinds(self._preference)
            return await ask_worker(room, self._keys, worker, kinds)
        raise NoWorkerError(
            f"The worker {worker.peer_id} did not answer for {ANSWER_TIMEOUT:.0f} s.",
            "Its log shows whether it refused the offer: both sides need the same "
            "invite, and clocks that differ by less than two minutes.",
        )

    @asynccontextmanager
    async def _dial(
        self, introduction: Introduction
    ) -> AsyncIterator[Link[WorkerMessage]]:
        """Open the link, and report which one it is."""
        answer = introduction.answer
        choice = choose_kinds(self._preference, answer.kinds)
        if isinstance(choice, GiveUp):
            raise NoWorkerError(
                f"Cannot reach the worker: {choice.reason}.",
                "Send the package without --route.",
            )
        try:
            async with dial(
                {kind: answer.targets(kind) for kind in choice.kinds},
                certificate_der=answer.certificate,
                auth=introduction.auth,
            ) as (link, reason):
                opened = link.statistics()
                self._on_event(
                    LinkOpened(opened.kind, opened.address, choice.reason or reason)
                )
                yield link
        except DialError as error:
            raise NoWorkerError(
                f"Cannot reach the worker: {error.reason}.",
                "Its port, TCP or UDP, must be open to this machine: see the "
                "troubleshooting guide, or use a shared network or VPN.",
            ) from None


async def _choose_worker(room: RoomConnection, wanted: str | None) -> Choice | NoChoice:
    """Choose a worker; after trouble with the server, wait for workers to return."""
    choice = choose_worker(await discover(room), wanted)
    if room.failed.is_set():
        with trio.move_on_after(RETURN_TIMEOUT):
            while isinstance(choice, NoChoice):
                await trio.sleep(RETURN_INTERVAL)
                choice = choose_worker(await discover(room), wanted)
    return choice


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
    """Stay in the room for as long as the body runs.

    Raises:
        NoWorkerError: If the signaling server cannot be reached in time.
        RefusedError: If the server refuses this machine.
    """
    async with _open_room(invite, keys) as room:
        with trio.move_on_after(timeout) as scope:
            await _registered(room, invite)
        if scope.cancelled_caught:
            raise NoWorkerError(
                f"Cannot reach the signaling server at {invite.url}: "
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
    """Wait until the first attempt to enter the room has ended.

    Raises:
        WorkerGoneError: If the connection is refused: no worker can be found without
            a signaling server, and the worker itself may run it.
        NoWorkerError: If the server was not reached.
        RefusedError: If the server refuses this machine.
    """
    async with open_background_nursery() as nursery:

        async def stop_when_failed() -> None:
            await room.failed.wait()
            nursery.cancel_scope.cancel(reason=room.trouble)

        nursery.start_soon(stop_when_failed)
        await _registered(room, invite)
    if room.failed.is_set():
        kind = WorkerGoneError if room.is_refused else NoWorkerError
        raise kind(f"Cannot reach {invite.url}: {room.trouble}.")
