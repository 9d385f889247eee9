"""A client whose links come and go, without a worker."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio
import trio.testing

from sleap_rtc.client.session import Plan, run_job
from sleap_rtc.io.link.link import Link
from sleap_rtc.proto import messages as m
from tests.io.link.memory import MemoryLink

PATIENCE = 60.0


def plan_in(folder: Path) -> Plan:
    return Plan(
        job_id="job_0123abcd",
        package=folder / "job.zip",
        size=100,
        preference="auto",
        shared_root=None,
        output=None,
        default_output=folder / "results",
        patience=PATIENCE,
    )


async def test_a_worker_that_never_greets_is_tried_with_pauses_and_given_up(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    opened: list[float] = []

    @asynccontextmanager
    async def open_again() -> AsyncIterator[Link]:
        opened.append(trio.current_time())
        assert len(opened) < 1000, "there are no pauses"
        mine, its = MemoryLink.pair()
        its.cut("it closed the connection")
        yield mine

    first, its = MemoryLink.pair()
    its.cut("it closed the connection")
    began = trio.current_time()
    ending = await run_job(
        plan_in(tmp_path),
        first,
        open_again,
        greeting=m.Greeting(m.PROTOCOL_VERSION, "1.0", "client"),
        on_event=lambda event: None,
        cancel_asked=trio.Event(),
    )
    assert ending.outcome == "lost"
    assert "could not be reached again for 60 s" in ending.reason
    assert trio.current_time() - began == PATIENCE
    assert len(opened) < 20
