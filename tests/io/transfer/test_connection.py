"""A link in use: its messages, its transfers, and its end."""

import pytest
import trio
import trio.testing

from sleap_rtc.io.transfer.connection import open_connection
from sleap_rtc.proto import messages
from tests.io.link.memory import MemoryLink


async def test_queued_messages_are_sent_while_the_connection_is_open() -> None:
    mine, its = MemoryLink.pair()
    with trio.fail_after(60):
        async with open_connection(mine) as connection:
            connection.outbox.put(messages.JobCancel("job_0123abcd"))
            message = await its.receive_message()
    assert message == messages.JobCancel("job_0123abcd")


async def test_an_error_leaves_a_connection_unwrapped_and_the_link_open() -> None:
    mine, _ = MemoryLink.pair()
    with pytest.raises(ValueError, match="stop"):
        async with open_connection(mine):
            raise ValueError("stop")
    assert not mine.is_cut


async def test_nothing_is_sent_after_the_end_of_a_connection() -> None:
    mine, its = MemoryLink.pair()
    async with open_connection(mine) as connection:
        pass
    connection.outbox.put(messages.JobCancel("job_0123abcd"))
    await trio.testing.wait_all_tasks_blocked()
    await mine.send_message(messages.ResultsReceived("job_0123abcd"))
    with trio.fail_after(60):
        message = await its.receive_message()
    assert message == messages.ResultsReceived("job_0123abcd")
