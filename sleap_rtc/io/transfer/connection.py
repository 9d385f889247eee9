"""A link in use: it is open, and messages and files are on their way over it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

from sleap_rtc.io.link.link import Link
from sleap_rtc.io.link.outbox import Outbox
from sleap_rtc.io.nursery import open_background_nursery
from sleap_rtc.io.transfer.transfers import Transfers
from sleap_rtc.proto.messages import Message

ReceivedT = TypeVar("ReceivedT", bound=Message)
"""The messages that the peer may send: `WorkerMessage` or `ClientMessage`."""


class Connection(Generic[ReceivedT]):
    """A link in use; `open_connection` makes it.

    Attributes:
        link: The link.
        outbox: The messages that wait to be sent.
        transfers: The files that are being sent or received.
    """

    def __init__(self, link: Link[ReceivedT]) -> None:
        self.link = link
        self.outbox = Outbox(link)
        self.transfers = Transfers(link)


@asynccontextmanager
async def open_connection(
    link: Link[ReceivedT],
) -> AsyncIterator[Connection[ReceivedT]]:
    """Serve a link for as long as the body runs; its owner closes it."""
    connection = Connection(link)
    async with open_background_nursery() as nursery:
        nursery.start_soon(connection.outbox.run)
        nursery.start_soon(connection.transfers.run)
        yield connection
