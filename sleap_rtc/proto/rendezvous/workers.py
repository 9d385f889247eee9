"""The description of a worker in its room, and the choice of one for a job."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

FIND_TIMEOUT = 15.0
"""Seconds to find a worker. A signaling server that restarts is back by then."""

WorkerStatus = Literal["available", "busy"]

_Word = Annotated[str, Meta(max_length=128)]
_Number = Annotated[int, Meta(ge=0, le=2**53)]


class WorkerCard(msgspec.Struct, frozen=True):
    """The metadata properties of a worker.

    The first four have the names that other SLEAP peers read. A signaling server could
    alter them all, so they may be shown and may guide a choice, but they never decide
    about trust.
    """

    hostname: _Word = ""
    gpu_model: _Word = "CPU"
    gpu_memory_mb: _Number = 0
    status: WorkerStatus = "available"
    name: _Word = ""
    sleap_nn_version: _Word = ""
    version: _Word = ""
    slots: _Number = 1
    slots_free: _Number = 0
    queued: _Number = 0
    disk_free: _Number = 0
    shared_storage: bool = False
    nonce: Annotated[str, Meta(max_length=64)] = ""


def read_card(properties: Mapping[str, object]) -> WorkerCard:
    """Parse the properties of a worker; a malformed one keeps its default."""
    card = WorkerCard()
    for name in WorkerCard.__struct_fields__:
        if name in properties:
            try:
                changed = msgspec.convert({name: properties[name]}, WorkerCard)
            except (ValueError, RecursionError):
                continue
            card = msgspec.structs.replace(card, **{name: getattr(changed, name)})
    return card


class Candidate(msgspec.Struct, frozen=True):
    """A worker that could run a job."""

    peer_id: str
    card: WorkerCard


class Choice(msgspec.Struct, frozen=True):
    """The worker that runs a job; the reason is for people."""

    worker: Candidate
    reason: str


class NoChoice(msgspec.Struct, frozen=True):
    """No worker fits; the reason is for people."""

    reason: str


def choose_worker(
    candidates: Iterable[Candidate], wanted: str | None = None
) -> Choice | NoChoice:
    """Choose a worker: one with a free slot, then the one with the largest GPU.

    Args:
        candidates: The workers of the room.
        wanted: The peer id, the name or the host name that the user asked for, or the
            beginning of a peer id.
    """
    known = sorted(candidates, key=lambda candidate: candidate.peer_id)
    if wanted is not None:
        return _wanted_worker(known, wanted)
    if not known:
        return NoChoice("no worker is in the room")
    best = min(known, key=_preference)
    if len(known) == 1:
        return Choice(best, "it is the only worker in the room")
    if best.card.slots_free:
        return Choice(best, "it has a free slot" + _largest(best, known))
    return Choice(best, f"all workers are busy; {best.card.queued} jobs wait there")


def _preference(candidate: Candidate) -> tuple[bool, int, int, str]:
    card = candidate.card
    return (
        card.slots_free == 0,
        card.queued if card.slots_free == 0 else 0,
        -card.gpu_memory_mb,
        candidate.peer_id,
    )


def _largest(best: Candidate, known: list[Candidate]) -> str:
    others = [c for c in known if c.card.slots_free and c is not best]
    if any(c.card.gpu_memory_mb < best.card.gpu_memory_mb for c in others):
        return " and the largest GPU of those"
    return ""


def _wanted_worker(known: list[Candidate], wanted: str) -> Choice | NoChoice:
    matches = [c for c in known if wanted == c.peer_id]
    matches = matches or [
        c
        for c in known
        if wanted in (c.card.name, c.card.hostname) or c.peer_id.startswith(wanted)
    ]
    if not matches:
        names = ", ".join(c.peer_id for c in known) or "none"
        return NoChoice(f"no worker '{wanted}' is in the room (there: {names})")
    if len(matches) > 1:
        names = ", ".join(c.peer_id for c in matches)
        return NoChoice(f"'{wanted}' could be any of {names}")
    return Choice(matches[0], "you asked for it")
