"""The description of a worker, and the choice of one for a job."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sleap_rtc.proto.rendezvous.workers import (
    Candidate,
    Choice,
    NoChoice,
    WorkerCard,
    choose_worker,
    read_card,
)


def candidate(
    peer_id: str, *, free: int = 1, queued: int = 0, memory: int = 0, name: str = ""
) -> Candidate:
    card = WorkerCard(
        slots_free=free, queued=queued, gpu_memory_mb=memory, name=name, hostname="vm"
    )
    return Candidate(peer_id, card)


IDLE = candidate("worker-a-1", name="desk")
LARGE = candidate("worker-b-2", memory=24_000)
SMALL = candidate("worker-c-3", memory=8_000)
BUSY = candidate("worker-d-4", free=0, queued=3, memory=80_000)
BUSIER = candidate("worker-e-5", free=0, queued=5, memory=80_000)


@pytest.mark.parametrize(
    ("there", "chosen", "why"),
    [
        ([IDLE], IDLE, "the only worker"),
        ([BUSY], BUSY, "the only worker"),
        ([IDLE, BUSY], IDLE, "free slot"),
        ([SMALL, LARGE, IDLE], LARGE, "the largest GPU"),
        ([BUSIER, BUSY], BUSY, "all workers are busy; 3 jobs wait there"),
    ],
)
def test_a_free_slot_comes_first_then_the_largest_gpu(
    there: list[Candidate], chosen: Candidate, why: str
) -> None:
    for order in (there, there[::-1]):
        choice = choose_worker(order)
        assert isinstance(choice, Choice)
        assert choice.worker is chosen
        assert why in choice.reason


def test_an_empty_room_has_no_choice() -> None:
    assert choose_worker([]) == NoChoice("no worker is in the room")


@pytest.mark.parametrize("wanted", ["worker-a-1", "desk", "worker-a"])
def test_a_worker_can_be_asked_for(wanted: str) -> None:
    choice = choose_worker([BUSY, IDLE, LARGE], wanted)
    assert isinstance(choice, Choice)
    assert choice.worker is IDLE
    assert choice.reason == "you asked for it"


def test_a_busy_worker_that_was_asked_for_is_chosen() -> None:
    choice = choose_worker([BUSY, IDLE], "worker-d-4")
    assert isinstance(choice, Choice)
    assert choice.worker is BUSY


def test_the_refusal_of_a_name_lists_the_workers() -> None:
    unknown = choose_worker([IDLE, LARGE], "other")
    assert isinstance(unknown, NoChoice)
    assert "worker-a-1, worker-b-2" in unknown.reason
    unclear = choose_worker([IDLE, LARGE], "vm")
    assert isinstance(unclear, NoChoice)
    assert "could be any of worker-a-1, worker-b-2" in unclear.reason


def test_a_malformed_property_keeps_its_default() -> None:
    card = read_card({"slots": 4, "slots_free": "many", "name": "desk", "other": 1})
    assert card == WorkerCard(slots=4, name="desk")


def test_a_card_survives_the_room() -> None:
    card = LARGE.card
    properties = {name: getattr(card, name) for name in card.__struct_fields__}
    assert read_card(properties) == card


@given(
    st.dictionaries(
        st.sampled_from(WorkerCard.__struct_fields__),
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(max_size=5)
        | st.text(min_size=300, max_size=301)
        | st.lists(st.integers()),
    )
)
def test_no_card_of_a_stranger_can_break_the_choice(
    properties: dict[str, object],
) -> None:
    stranger = Candidate("worker-x", read_card(properties))
    assert isinstance(choose_worker([IDLE, stranger]), Choice)
