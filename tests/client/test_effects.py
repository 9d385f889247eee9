"""Effects run one at a time, can be stopped, and never wait forever."""

import trio
import trio.testing

from sleap_rtc.client.effects import STOP_TIMEOUT, Effects


class World:
    """Effects that record their calls."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.story: list[str] = []
        self.release = trio.Event()
        self.effects = Effects(nursery, lambda: self.story.append("done"))

    async def wait(self, name: str) -> None:
        self.story.append(name)
        await self.release.wait()
        self.story.append(f"{name} released")

    async def hang(self) -> None:
        """Ignore cancellation, as a thread inside a hung mount does."""
        with trio.CancelScope(shield=True):
            await self.release.wait()

    async def clean(self) -> None:
        self.story.append("clean")


async def test_effects_run_one_after_the_other() -> None:
    async with trio.open_nursery() as nursery:
        world = World(nursery)
        world.effects.start(world.wait, "first")
        world.effects.start(world.wait, "second")
        await trio.testing.wait_all_tasks_blocked()
        assert world.story == ["first"]
        world.release.set()
    assert world.story == [
        "first",
        "first released",
        "done",
        "second",
        "second released",
        "done",
    ]


async def test_a_stopped_effect_makes_way_for_the_next_one() -> None:
    async with trio.open_nursery() as nursery:
        world = World(nursery)
        world.effects.start(world.wait, "copy")
        await trio.testing.wait_all_tasks_blocked()
        world.effects.stop()
        world.effects.start(world.clean)
    assert world.story == ["copy", "done", "clean", "done"]


async def test_an_effect_that_does_not_stop_is_left_behind(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with trio.open_nursery() as nursery:
        world = World(nursery)
        world.effects.start(world.hang)
        await trio.testing.wait_all_tasks_blocked()
        world.effects.stop()
        world.effects.start(world.clean)
        began = trio.current_time()
        await trio.sleep(STOP_TIMEOUT + 1)
        assert world.story == ["clean", "done"]
        assert trio.current_time() - began == STOP_TIMEOUT + 1
        world.release.set()


async def test_a_cancelled_client_does_not_wait_for_an_effect_that_hangs(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with trio.open_nursery() as outer:
        hanging = World(outer)
        hanging.effects.start(hanging.hang)
        async with trio.open_nursery() as nursery:
            effects = Effects(nursery, lambda: None)
            effects.start(hanging.wait, "other")
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        hanging.release.set()
    assert hanging.story == ["other", "done"]
