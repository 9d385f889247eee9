"""An alarm wakes its task at the deadline that was set last."""

import trio
import trio.testing
from trio.testing import MockClock

from sleap_rtc.io.alarm import Alarm


async def test_an_alarm_wakes_at_the_deadline(autojump_clock: MockClock) -> None:
    alarm = Alarm()
    alarm.set(3.0)
    await alarm.wait()
    assert trio.current_time() == 3.0


async def test_a_deadline_that_is_over_wakes_at_once(autojump_clock: MockClock) -> None:
    await trio.sleep(5.0)
    alarm = Alarm()
    alarm.set(3.0)
    await alarm.wait()
    assert trio.current_time() == 5.0


async def test_the_deadline_may_change_while_the_task_waits(
    autojump_clock: MockClock,
) -> None:
    alarm = Alarm()
    woken: list[float] = []

    async def serve() -> None:
        await alarm.wait()
        woken.append(trio.current_time())
        alarm.set(9.0)
        await alarm.wait()
        woken.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        await trio.testing.wait_all_tasks_blocked()
        alarm.set(100.0)
        await trio.sleep(1.0)
        alarm.set(None)
        await trio.sleep(1.0)
        alarm.set(4.0)
    assert woken == [4.0, 9.0]


async def test_an_alarm_that_is_not_set_never_wakes(autojump_clock: MockClock) -> None:
    alarm = Alarm()
    with trio.move_on_after(1000.0) as scope:
        await alarm.wait()
    assert scope.cancelled_caught
