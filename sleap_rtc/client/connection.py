"""One link to the worker, with the messages and transfers on their way over it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from sleap_rtc.io.link.link import Link, LinkClosedError
from sleap_rtc.io.link.outbox import Outbox
from sleap_rtc.io.nursery import open_background_nursery
from sleap_rtc.io.transfer.transfers import Transfers
from sleap_rtc.proto import messages
from sleap_rtc.proto.errors import RemoteProtocolError

GREETING_TIMEOUT = 15.0
"""Seconds for the worker to answer a greeting."""


class Connection:
    """A link in use; `open_connection` makes it.

    Attributes:
        link: The link.
        outbox: The messages that wait to be sent.
        transfers: The files that are being sent or received.
    """

    def __init__(self, link: Link[messages.WorkerMessage]) -> None:
        self.link = link
        self.outbox = Outbox(link)
        self.transfers = Transfers(link)

    async def greet(self, greeting: messages.Greeting) -> messages.Greeting:
        """Exchange greetings; return that of the worker.

        Raises:
            RemoteProtocolError: If the worker does not speak this protocol.
            LinkClosedError: If the link ended, or the worker did not greet in time.
        """
        self.outbox.put(messages.Hello(greeting))
        with trio.move_on_after(GREETING_TIMEOUT):
            message = await self.link.receive_message()
            if isinstance(message, messages.Error):
                raise RemoteProtocolError(message.reason)
            if not isinstance(message, messages.Hello):
                raise RemoteProtocolError("its first message was not HELLO")
            if message.greeting.protocol != messages.PROTOCOL_VERSION:
                raise RemoteProtocolError(
                    f"it speaks protocol {message.greeting.protocol}, this side "
                    f"{messages.PROTOCOL_VERSION}: update the older one"
                )
            return message.greeting
        raise LinkClosedError("the worker did not greet in time")


@asynccontextmanager
async def open_connection(
    link: Link[messages.WorkerMessage],
) -> AsyncIterator[Connection]:
    """Serve a link for as long as the body runs; its owner closes it."""
    connection = Connection(link)
    async with open_background_nursery() as nursery:
        nursery.start_soon(connection.outbox.run)
        nursery.start_soon(connection.transfers.run)
        yield connection
