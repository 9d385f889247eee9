"""Dialing a peer at all of its targets, over every kind of link, and keeping one."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import assert_never

import trio

from sleap_rtc.io.alarm import Alarm
from sleap_rtc.io.connect.kinds import KINDS
from sleap_rtc.io.link.limits import LIMITS, LinkLimits
from sleap_rtc.io.link.link import DialError, DialFailure, Link
from sleap_rtc.io.nursery import open_background_nursery
from sleap_rtc.proto.messages import Auth, WorkerMessage
from sleap_rtc.proto.route.kinds import LinkKindName, Target
from sleap_rtc.proto.route.race import (
    Attempt,
    KeepLink,
    LinkRace,
    NoLink,
    StartAttempt,
)


class _Dialing:
    """The driver of a race.

    The winner keeps its link open until `released`, the others close theirs at once.

    Args:
        race: Decides when to dial which target, and which link to keep.
        certificate_der: The only certificate that the peer may show.
        limits: The limits of each link.
        nursery: The nursery of the attempts.
    """

    def __init__(
        self,
        race: LinkRace,
        certificate_der: bytes,
        limits: LinkLimits,
        nursery: trio.Nursery,
    ) -> None:
        self.settled = trio.Event()
        self.released = trio.Event()
        self.closed = trio.Event()
        self.link: Link[WorkerMessage] | None = None
        self.reason = ""
        self.failures: list[DialFailure] = []
        self._race = race
        self._certificate_der = certificate_der
        self._limits = limits
        self._nursery = nursery
        self._links: dict[Attempt, Link[WorkerMessage]] = {}
        self._scopes: dict[Attempt, trio.CancelScope] = {}
        self._alarm = Alarm()

    async def run(self) -> None:
        """Serve the race until cancelled."""
        self._pump()
        while True:
            await self._alarm.wait()
            self._race.handle_timeout(trio.current_time())
            self._pump()

    def _pump(self) -> None:
        while (output := self._race.next_output()) is not None:
            match output:
                case StartAttempt(attempt):
                    self._nursery.start_soon(self._try, attempt)
                case KeepLink(attempt, reason):
                    self.link, self.reason = self._links[attempt], reason
                    for other, scope in self._scopes.items():
                        if other != attempt:
                            scope.cancel(reason="another attempt won")
                    self.settled.set()
                case NoLink():
                    self.settled.set()
                case _:
                    assert_never(output)
        self._alarm.set(self._race.deadline())

    async def _try(self, attempt: Attempt) -> None:
        with trio.CancelScope() as self._scopes[attempt]:
            try:
                async with KINDS[attempt.kind].connect(
                    attempt.target, self._certificate_der, self._limits
                ) as link:
                    self._links[attempt] = link
                    self._race.attempt_opened(attempt, trio.current_time())
                    self._pump()
                    await self.released.wait()
                self.closed.set()
            except DialError as error:
                self.failures += error.failures
                reason = "; ".join(failure.reason for failure in error.failures)
                self._race.attempt_failed(attempt, reason, trio.current_time())
                self._pump()


@asynccontextmanager
async def dial(
    targets: Mapping[LinkKindName, Sequence[Target]],
    *,
    certificate_der: bytes,
    auth: Auth,
    limits: LinkLimits = LIMITS,
) -> AsyncIterator[tuple[Link[WorkerMessage], str]]:
    """Open a link to a peer, of the best kind and at the best target that works.

    The proof is sent over that link only. The link is closed after the body.

    Args:
        targets: The targets of each kind, the best first; the preferred kinds first.
        certificate_der: The only certificate that the peer may show.
        auth: The proof, which can be used once.
        limits: The limits of each link.

    Yields:
        The link, and the reason for its choice.

    Raises:
        DialError: If all attempts failed; the error holds the reason of each.
    """
    async with open_background_nursery() as nursery:
        race = LinkRace(targets, trio.current_time())
        dialing = _Dialing(race, certificate_der, limits, nursery)
        nursery.start_soon(dialing.run)
        await dialing.settled.wait()
        if dialing.link is None:
            raise DialError(dialing.failures)
        await dialing.link.send_message(auth)
        yield dialing.link, dialing.reason
        dialing.released.set()
        await dialing.closed.wait()
