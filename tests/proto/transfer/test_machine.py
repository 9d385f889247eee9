"""The two transfer machines together, over networks that get worse and worse."""

from collections.abc import Callable

import pytest

from sleap_rtc.proto.messages import ChunkGrant
from sleap_rtc.proto.transfer.receiver import (
    LIMITS,
    Receiver,
    ReceiverLimits,
    ReceiverState,
)
from tests.proto.transfer.world import CHUNK_SIZE, NOW, TRANSFER_ID, World

SIZES = [0, 1, CHUNK_SIZE - 1, CHUNK_SIZE, CHUNK_SIZE + 1, 5 * CHUNK_SIZE, 90_001]


def content_of(size: int) -> bytes:
    """Return bytes of which no two chunks are alike."""
    return b"".join(n.to_bytes(4, "big") for n in range(-(-size // 4)))[:size]


def check_arrived(world: World) -> None:
    assert world.done
    assert world.sender_done
    assert world.failure is None
    assert bytes(world.disk) == world.content
    assert not world.payloads


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("window", [1, 2, 3, 8, 64])
def test_a_file_of_any_size_arrives_with_any_window(size: int, window: int) -> None:
    world = World(1, content_of(size), window)
    world.run()
    check_arrived(world)
    assert world.frames_sent == -(-size // CHUNK_SIZE)


def test_grants_are_few_and_name_each_chunk_once() -> None:
    world = World(1, content_of(100 * CHUNK_SIZE))
    grants: list[ChunkGrant] = []
    while True:
        grants += [m for m in world.to_sender[-1:] if isinstance(m, ChunkGrant)]
        world.to_sender, waiting = [], world.to_sender
        for message in waiting:
            world.sender.receive_message(message, NOW)
        world.drain()
        if not world.to_sender and not world.step():
            break
    granted = [n for g in grants for n in range(g.first, g.first + g.count)]
    assert granted == list(range(100))
    assert len(grants) <= 1 + 100 // 4
    check_arrived(world)


def test_every_file_arrives_over_a_thousand_bad_networks() -> None:
    for seed in range(1000):
        world = World(seed, content_of(seed * 97 % (30 * CHUNK_SIZE)), 1 + seed % 9)
        world.duplicate_chance = world.random.choice([0, 0, 0.3])
        world.damage_chance = world.random.choice([0, 0, 0.05])
        break_chance = world.random.choice([0, 0.02, 0.1])
        breaks = [world.lose_link, world.kill_receiver]
        while not world.done and world.step():
            if world.random.random() < break_chance:
                world.random.choice(breaks)()
        world.run()
        assert world.done, seed
        assert world.failure is None, seed
        assert bytes(world.disk) == world.content, seed
        chunks = -(-len(world.content) // CHUNK_SIZE)
        again = world.frames_sent - chunks
        assert again <= world.damages + world.in_flight_when_broken, seed


Break = Callable[[World], None]
BREAKS: list[Break] = [World.lose_link, World.kill_receiver]


@pytest.mark.parametrize("happens", BREAKS)
def test_a_break_after_any_number_of_steps_costs_at_most_the_chunks_in_flight(
    happens: Break,
) -> None:
    content = content_of(12 * CHUNK_SIZE + 5)
    seen: set[ReceiverState] = set()
    for steps in range(100):
        world = World(3, content)
        for _ in range(steps):
            world.step()
        if world.done:
            break
        seen.add(world.receiver.state)
        happens(world)
        world.run()
        assert world.done
        assert bytes(world.disk) == content
        assert world.frames_sent <= 13 + world.in_flight_when_broken
    assert seen == {
        ReceiverState.RECEIVING,
        ReceiverState.VERIFYING,
        ReceiverState.PUBLISHING,
    }


def test_writes_that_were_under_way_when_the_link_was_lost_are_not_repeated() -> None:
    world = World(1, content_of(8 * CHUNK_SIZE))
    while len(world.writes) < 8:
        if world.frames:
            world.deliver_frame()
        elif world.reads:
            world.finish_read()
        else:
            world.deliver_to_sender()
        world.drain()
    world.lose_link()
    world.run()
    check_arrived(world)
    assert world.frames_sent == 8


def test_a_bad_chunk_is_asked_for_again() -> None:
    world = World(1, content_of(5 * CHUNK_SIZE))
    world.damage_chance = 1.0
    while not world.damages:
        assert world.step()
    world.damage_chance = 0.0
    world.run()
    check_arrived(world)
    assert world.frames_sent == 5 + world.damages


def test_a_chunk_that_is_bad_every_time_ends_the_transfer() -> None:
    world = World(1, content_of(1))
    world.damage_chance = 1.0
    world.run()
    assert world.damages == LIMITS.damages
    assert world.failure == "chunk 0 arrived damaged 5 times"
    assert world.sender_failure == world.failure
    assert not world.done


def test_a_source_that_changes_between_two_reads_of_a_chunk_is_noticed() -> None:
    world = World(1, content_of(3 * CHUNK_SIZE))
    world.damage_chance = 1.0
    while not world.damages:
        assert world.step()
    world.damage_chance = 0.0
    world.source = bytes(len(world.source))
    world.run()
    assert world.failure == world.sender_failure
    assert "changed while it was sent" in str(world.failure)


def test_a_source_that_changes_while_the_sender_is_away_is_noticed() -> None:
    world = World(1, content_of(9 * CHUNK_SIZE))
    while world.receiver.chunk_map.bytes_there < 4 * CHUNK_SIZE:
        assert world.step()
    world.source = bytes(len(world.source))
    world.lose_link()
    world.run()
    assert "changed while it was sent" in str(world.failure)
    assert not world.done


def test_a_restarted_sender_reads_the_hashes_of_earlier_chunks() -> None:
    content = content_of(150 * CHUNK_SIZE)
    world = World(1, content)
    while not world.receiver.chunk_map.is_complete:
        assert world.step()
    world.lose_link()
    world.run()
    check_arrived(world)
    assert world.frames_sent == 150


@pytest.mark.parametrize("side", ["receiver", "sender"])
def test_cancelling_either_side_ends_both(side: str) -> None:
    for steps in range(30):
        world = World(2, content_of(6 * CHUNK_SIZE))
        for _ in range(steps):
            world.step()
        if world.sender_done:
            break
        getattr(world, side).cancel("enough")
        world.drain()
        world.run()
        assert world.failure == "enough"
        # The sender may have verified the file before the cancellation came.
        assert world.sender_failure == "enough" or world.sender_done
    assert steps > 10


def test_a_resumed_receiver_grants_only_missing_chunks() -> None:
    world = World(1, content_of(20 * CHUNK_SIZE))
    while world.receiver.chunk_map.bytes_there < 10 * CHUNK_SIZE:
        assert world.step()
    there = world.receiver.chunk_map
    missing = [index for run in there.missing() for index in run]
    receiver = Receiver(TRANSFER_ID, there, ReceiverLimits(window=64))
    granted: list[int] = []
    while (output := receiver.next_output()) is not None:
        message = getattr(output, "message", None)
        assert isinstance(message, ChunkGrant)
        granted += range(message.first, message.first + message.count)
    assert granted == missing
