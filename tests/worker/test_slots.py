"""The queue of a worker, without waiting."""

import pytest
import trio
import trio.testing

from sleap_rtc.worker.slots import SlotQueue


class Job:
    """A job that waits for a slot, and records its positions."""

    def __init__(self, queue: SlotQueue) -> None:
        self.positions: list[int] = []
        self.gpus: tuple[int, ...] | None = None
        self.runs = False
        self.done = trio.Event()
        self.scope = trio.CancelScope()
        self._queue = queue

    async def run(self) -> None:
        with self.scope:
            async with self._queue.slot(self.positions.append) as self.gpus:
                self.runs = True
                await self.done.wait()
        self.runs = False


async def start(nursery: trio.Nursery, queue: SlotQueue, count: int) -> list[Job]:
    jobs = [Job(queue) for _ in range(count)]
    for job in jobs:
        nursery.start_soon(job.run)
        await trio.testing.wait_all_tasks_blocked()
    return jobs


async def finish(job: Job) -> None:
    job.done.set()
    await trio.testing.wait_all_tasks_blocked()


async def test_jobs_run_in_the_order_in_which_they_came() -> None:
    queue = SlotQueue(2)
    async with trio.open_nursery() as nursery:
        jobs = await start(nursery, queue, 5)
        assert [job.runs for job in jobs] == [True, True, False, False, False]
        assert (queue.free, queue.waiting) == (0, 3)
        await finish(jobs[1])
        assert [job.runs for job in jobs] == [True, False, True, False, False]
        await finish(jobs[0])
        assert [job.runs for job in jobs] == [False, False, True, True, False]
        for job in jobs[2:]:
            await finish(job)
    assert (queue.free, queue.waiting) == (2, 0)


async def test_each_job_gets_the_number_of_jobs_ahead() -> None:
    queue = SlotQueue(1)
    async with trio.open_nursery() as nursery:
        jobs = await start(nursery, queue, 4)
        for job in jobs:
            await finish(job)
    assert jobs[0].positions == []
    assert [list(dict.fromkeys(job.positions)) for job in jobs[1:]] == [
        [0],
        [1, 0],
        [2, 1, 0],
    ]


async def test_a_cancelled_job_leaves_the_queue() -> None:
    queue = SlotQueue(1)
    async with trio.open_nursery() as nursery:
        first, second, third = await start(nursery, queue, 3)
        second.scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert queue.waiting == 1
        assert third.positions[-1] == 0
        first.scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert third.runs
        assert not second.runs
        await finish(third)
    assert (queue.free, queue.waiting) == (1, 0)


async def test_a_job_that_fails_gives_its_slot_back() -> None:
    queue = SlotQueue(1)

    async def fail() -> None:
        async with queue.slot(lambda position: None):
            assert queue.free == 0
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        await fail()
    assert queue.free == 1


@pytest.mark.parametrize(
    ("slots", "gpus", "expected"),
    [
        (2, [], [None, None]),
        (1, [0], [(0,)]),
        (2, [0, 1], [(0,), (1,)]),
        (2, [3, 5, 7, 9], [(3, 7), (5, 9)]),
        (1, [0, 1, 2], [(0, 1, 2)]),
        (4, [0, 1], [(0,), (1,), (0,), (1,)]),
    ],
)
async def test_gpus_are_shared_out_among_the_slots(
    slots: int, gpus: list[int], expected: list[tuple[int, ...] | None]
) -> None:
    queue = SlotQueue(slots, gpus)
    async with trio.open_nursery() as nursery:
        jobs = await start(nursery, queue, slots)
        assert [job.gpus for job in jobs] == expected
        # A slot keeps its GPUs for the next job.
        await finish(jobs[-1])
        (late,) = await start(nursery, queue, 1)
        assert late.gpus == expected[-1]
        nursery.cancel_scope.cancel()
