"""The link of one client, as its session and its job use it."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVarTuple

import trio

from sleap_rtc.io.link.link import Link
from sleap_rtc.io.nursery import open_background_nursery
from sleap_rtc.io.transfer.connection import Connection, open_connection
from sleap_rtc.proto import messages

Ts = TypeVarTuple("Ts")


class ClientLink:
    """A connection that the worker can end, and the tasks that end with it.

    Made by `open_client_link`.

    Args:
        connection: The connection of the client.
        nursery: Runs the tasks.
    """

    def __init__(
        self, connection: Connection[messages.ClientMessage], nursery: trio.Nursery
    ) -> None:
        self.link = connection.link
        self.outbox = connection.outbox
        self.transfers = connection.transfers
        self._nursery = nursery
        self._serving = trio.CancelScope()
        self._reason = ""

    @property
    def reason(self) -> str:
        """The reason of the worker for ending the link; empty if it did not."""
        return self._reason

    @property
    def serving(self) -> trio.CancelScope:
        """Scope of the session's work; `end` cancels it."""
        return self._serving

    def start(self, effect: Callable[[*Ts], Awaitable[None]], *args: *Ts) -> None:
        """Start a task that is cancelled when the link ends."""
        self._nursery.start_soon(effect, *args)

    def end(self, reason: str) -> None:
        """Send the client an error and end the session."""
        self._reason = reason
        self.outbox.put(messages.Error(reason))
        self._serving.cancel(reason=reason)


@asynccontextmanager
async def open_client_link(
    link: Link[messages.ClientMessage],
) -> AsyncIterator[ClientLink]:
    """Serve the link of a client for as long as the body runs; its owner closes it."""
    async with (
        open_connection(link) as connection,
        open_background_nursery() as nursery,
    ):
        yield ClientLink(connection, nursery)
