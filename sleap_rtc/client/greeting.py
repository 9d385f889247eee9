"""The exchange of greetings with the worker, at the start of each link."""

import trio

from sleap_rtc.io.link.link import LinkClosedError
from sleap_rtc.io.transfer.connection import Connection
from sleap_rtc.proto import messages
from sleap_rtc.proto.errors import RemoteProtocolError

GREETING_TIMEOUT = 15.0
"""Seconds for the worker to answer a greeting."""


async def exchange_greetings(
    connection: Connection[messages.WorkerMessage], greeting: messages.Greeting
) -> messages.Greeting:
    """Send the greeting of the client; return that of the worker.

    Raises:
        RemoteProtocolError: If the worker does not speak this protocol.
        LinkClosedError: If the link ended, or the worker did not greet in time.
    """
    connection.outbox.put(messages.Hello(greeting))
    with trio.move_on_after(GREETING_TIMEOUT):
        message = await connection.link.receive_message()
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
