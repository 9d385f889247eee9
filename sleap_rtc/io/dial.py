"""Dialing a peer at all of its addresses, and keeping the first that answers."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import trio

from sleap_rtc.io.link import DialError, Link
from sleap_rtc.io.nursery import open_background_nursery
from sleap_rtc.io.quic import connect_quic
from sleap_rtc.proto.messages import Auth

STAGGER = 0.25
"""Seconds between the starts of two attempts (RFC 8305, 5)."""


class _Race:
    """The attempts to reach one peer.

    The winner keeps its link open, the others close theirs.
    """

    def __init__(
        self, addresses: Sequence[tuple[str, int]], certificate_der: bytes
    ) -> None:
        self.settled = trio.Event()
        self.winner: Link | None = None
        self.failures: list[tuple[str, str]] = []
        self._addresses = addresses
        self._certificate_der = certificate_der
        self._scopes: list[trio.CancelScope] = []

    async def run(self) -> None:
        """Start the attempts one after another, the next at once after a failure."""
        async with trio.open_nursery() as nursery:
            for host, port in self._addresses:
                failed = trio.Event()
                nursery.start_soon(self._attempt, host, port, failed)
                with trio.move_on_after(STAGGER):
                    await failed.wait()
                if self.winner is not None:
                    return
        self.settled.set()

    async def _attempt(self, host: str, port: int, failed: trio.Event) -> None:
        with trio.CancelScope() as scope:
            self._scopes.append(scope)
            try:
                async with connect_quic(
                    host, port, certificate_der=self._certificate_der
                ) as link:
                    self._win(link, scope)
                    await trio.sleep_forever()
            except DialError as error:
                self.failures += error.failures
                failed.set()

    def _win(self, link: Link, winning: trio.CancelScope) -> None:
        if self.winner is not None:
            return
        self.winner = link
        self.settled.set()
        for scope in self._scopes:
            if scope is not winning:
                scope.cancel(reason="another address answered first")


@asynccontextmanager
async def dial(
    addresses: Sequence[tuple[str, int]], *, certificate_der: bytes, auth: Auth
) -> AsyncIterator[Link]:
    """Open a link to a peer at whichever of its addresses answers first.

    The attempts start a quarter of a second apart. The proof is sent only to the one
    that completed its handshake first; the link is closed after the body.

    Args:
        addresses: Each host and port, the best first.
        certificate_der: The only certificate that the peer may show.
        auth: The proof, which can be used once.

    Raises:
        DialError: If all attempts failed; it says why, for each.
    """
    async with open_background_nursery() as nursery:
        race = _Race(addresses, certificate_der)
        nursery.start_soon(race.run)
        await race.settled.wait()
        if race.winner is None:
            raise DialError(race.failures)
        link = race.winner
        await link.send_message(auth)
        yield link
        await link.aclose()
