"""The link of one client, as its session and its job use it."""

from collections.abc import Awaitable, Callable
from typing import TypeVarTuple

import trio

from sleap_rtc.io.link.link import Link
from sleap_rtc.io.link.outbox import Outbox
from sleap_rtc.io.transfer.transfers import Transfers
from sleap_rtc.proto import messages

Ts = TypeVarTuple("Ts")


class ClientLink:
    """Sends messages and files to a client, and runs tasks that end with its link.

    Args:
        link: An authenticated link; the caller closes it.
        nursery: The nursery of the session that serves the link.
    """

    def __init__(
        self, link: Link[messages.ClientMessage], nursery: trio.Nursery
    ) -> None:
        self.outbox = Outbox(link)
        self.transfers = Transfers(link)
        self._nursery = nursery
        self._serving = trio.CancelScope()
        self._reason = ""
        nursery.start_soon(self.outbox.run)
        nursery.start_soon(self.transfers.run)

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
