"""Dialing a peer at all of its addresses, over every kind of link, and keeping one."""

import math
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import assert_never

import trio

from sleap_rtc.io.link.addresses import describe_address
from sleap_rtc.io.link.link import DialError, Link, LinkKind
from sleap_rtc.io.nursery import open_background_nursery
from sleap_rtc.io.quic.driver import connect_quic
from sleap_rtc.io.tcp.driver import connect_tcp
from sleap_rtc.proto.messages import Auth
from sleap_rtc.proto.route.kinds import LINK_KINDS
from sleap_rtc.proto.route.routes import (
    Attempt,
    KeepLink,
    LinkRace,
    NoLink,
    StartAttempt,
)


class _Dialing:
    """Carries out what the race decides.

    The winner keeps its link open until `released`, the others close theirs at once.
    """

    def __init__(
        self, race: LinkRace, certificate_der: bytes, nursery: trio.Nursery
    ) -> None:
        self.settled = trio.Event()
        self.released = trio.Event()
        self.closed = trio.Event()
        self.link: Link | None = None
        self.reason = ""
        self.failures: list[tuple[str, str]] = []
        self._race = race
        self._certificate_der = certificate_der
        self._nursery = nursery
        self._links: dict[Attempt, Link] = {}
        self._scopes: dict[Attempt, trio.CancelScope] = {}
        self._alarm = trio.CancelScope()

    async def run(self) -> None:
        """Serve the race until it is settled."""
        self._pump()
        while not self.settled.is_set():
            with trio.CancelScope(deadline=self._alarm_time()) as self._alarm:
                await self.settled.wait()
            self._race.handle_timeout(trio.current_time())
            self._pump()

    def _alarm_time(self) -> float:
        deadline = self._race.deadline()
        return math.inf if deadline is None else deadline

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
        self._alarm.deadline = self._alarm_time()

    async def _try(self, attempt: Attempt) -> None:
        with trio.CancelScope() as self._scopes[attempt]:
            try:
                async with self._connect(attempt) as link:
                    self._links[attempt] = link
                    self._race.attempt_opened(attempt, trio.current_time())
                    self._pump()
                    await self.released.wait()
                self.closed.set()
            except DialError as error:
                where = describe_address((attempt.host, attempt.port))
                reason = "; ".join(why for _, why in error.failures)
                reason = reason.removeprefix(f"{where}: ")
                self.failures.append((f"{attempt.kind} to {where}", reason))
                self._race.attempt_failed(attempt, reason, trio.current_time())
                self._pump()

    def _connect(self, attempt: Attempt) -> AbstractAsyncContextManager[Link]:
        """Reach the peer once, without a proof yet."""
        connect = connect_tcp if attempt.kind == "tcp" else connect_quic
        return connect(
            attempt.host, attempt.port, certificate_der=self._certificate_der
        )


@asynccontextmanager
async def dial(
    addresses: Sequence[tuple[str, int]],
    *,
    certificate_der: bytes,
    auth: Auth,
    kinds: Sequence[LinkKind] = LINK_KINDS,
) -> AsyncIterator[tuple[Link, str]]:
    """Open a link to a peer, of whichever kind and at whichever address is best.

    The proof is sent over the link that is kept and no other. It is closed after the
    body.

    Args:
        addresses: Each host and port, the best first.
        certificate_der: The only certificate that the peer may show.
        auth: The proof, which can be used once.
        kinds: The kinds of link to try, the preferred one first.

    Yields:
        The link, and why it is this one.

    Raises:
        DialError: If all attempts failed; it says why, for each.
    """
    async with open_background_nursery() as nursery:
        race = LinkRace(addresses, kinds, trio.current_time())
        dialing = _Dialing(race, certificate_der, nursery)
        nursery.start_soon(dialing.run)
        await dialing.settled.wait()
        if dialing.link is None:
            raise DialError(dialing.failures)
        await dialing.link.send_message(auth)
        yield dialing.link, dialing.reason
        dialing.released.set()
        await dialing.closed.wait()
