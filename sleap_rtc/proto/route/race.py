"""The race of the links that a client dials: the choice of the one to keep."""

from collections import deque
from collections.abc import Mapping, Sequence
from enum import Enum, auto
from typing import assert_never

import msgspec
from typing_extensions import override

from sleap_rtc.proto.machine import Table, TimedPolicy, move
from sleap_rtc.proto.route.kinds import LinkKindName, Target

STAGGER_INTERVAL = 0.25
"""Seconds between the starts of two attempts (RFC 8305, 5)."""

GRACE_TIMEOUT = 0.3
"""Seconds that better kinds have to open a link once the first one is open: a handshake
over TCP takes one round trip more than a handshake over QUIC."""


class Attempt(msgspec.Struct, frozen=True):
    """One kind of link to one target, whose form only this kind knows."""

    kind: LinkKindName
    target: Target


class StartAttempt(msgspec.Struct, frozen=True):
    """Start to dial."""

    attempt: Attempt


class KeepLink(msgspec.Struct, frozen=True):
    """The race is won: keep this link, and end all other attempts."""

    attempt: Attempt
    reason: str


class NoLink(msgspec.Struct, frozen=True):
    """The race is lost: every attempt has failed."""


RaceOutput = StartAttempt | KeepLink | NoLink


# -------------------------------------------------------------- states, transitions


class RaceState(Enum):
    """State of a race."""

    DIALING = auto()
    """No link is open yet."""

    GRACE = auto()
    """A link is open, and a better kind may still open one."""

    WON = auto()
    """A link was chosen: nothing more happens."""

    LOST = auto()
    """Every attempt has failed: nothing more happens."""


class RaceTrigger(Enum):
    """Triggers of a race."""

    LINK_OPENED = auto()
    LINK_CHOSEN = auto()
    """No better kind can open a link, or `GRACE_TIMEOUT` has passed."""

    ALL_FAILED = auto()


_S, _T = RaceState, RaceTrigger

TRANSITIONS: Table[RaceState] = {
    _S.DIALING: {
        _T.LINK_OPENED: _S.GRACE,
        _T.ALL_FAILED: _S.LOST,
    },
    _S.GRACE: {
        _T.LINK_OPENED: _S.GRACE,
        _T.LINK_CHOSEN: _S.WON,
    },
    # A link that opens late is ended by the driver.
    _S.WON: {
        _T.LINK_OPENED: _S.WON,
    },
    _S.LOST: {},
}
"""The transitions of `LinkRace`."""


class LinkRace(TimedPolicy[RaceOutput]):
    """Decides when to dial which target over which kind, and which link to keep.

    Each kind tries its targets one after another, `STAGGER_INTERVAL` apart, and
    begins that much later than the kind before it. A failure starts the next attempt of
    its kind at once, or, if its kind has none left, that of the best kind that has one.
    An open link wins when no better kind can open one, or when `GRACE_TIMEOUT` has
    passed since the first link opened.

    A driver drains `next_output` at the start and after each of `attempt_opened`,
    `attempt_failed` and `handle_timeout`, and sets a timer for `deadline`. Nothing
    follows `KeepLink` or `NoLink`.

    Args:
        targets: The targets of each kind, the best first; the preferred kinds first.
        now: The time in seconds.
    """

    def __init__(
        self,
        targets: Mapping[LinkKindName, Sequence[Target]],
        now: float,
    ) -> None:
        self._began = now
        self._kinds = tuple(targets)
        self._waiting = {
            kind: deque(Attempt(kind, target) for target in dict.fromkeys(each))
            for kind, each in targets.items()
        }
        self._next_at = {
            kind: now + rank * STAGGER_INTERVAL for rank, kind in enumerate(targets)
        }
        self._running: set[Attempt] = set()
        self._failures: list[tuple[Attempt, str]] = []
        self._opened: list[Attempt] = []
        self._grace_until = now
        self._state = RaceState.DIALING
        self._outputs: deque[RaceOutput] = deque()
        self._advance(now)

    # ---------------------------------------------------------------------- inputs

    def attempt_opened(self, attempt: Attempt, now: float) -> None:
        """Handle a link that has opened.

        Raises:
            LocalProtocolError: If every attempt has failed already.
        """
        if self._state is RaceState.DIALING:
            self._grace_until = now + GRACE_TIMEOUT
        self._move(_T.LINK_OPENED)
        self._running.discard(attempt)
        self._opened.append(attempt)
        self._advance(now)

    def attempt_failed(self, attempt: Attempt, reason: str, now: float) -> None:
        """Handle the failure of an attempt; the reason is for people."""
        self._running.discard(attempt)
        self._failures.append((attempt, reason))
        self._start_next_at_once(attempt.kind, now)
        self._advance(now)

    @override
    def handle_timeout(self, now: float) -> None:
        self._advance(now)

    # --------------------------------------------------------------------- outputs

    @override
    def deadline(self) -> float | None:
        times = [self._next_at[kind] for kind, left in self._waiting.items() if left]
        match self._state:
            case RaceState.DIALING:
                return min(times, default=None)
            case RaceState.GRACE:
                return min([*times, self._grace_until])
            case RaceState.WON | RaceState.LOST:
                return None
            case _:
                assert_never(self._state)

    @override
    def next_output(self) -> RaceOutput | None:
        return self._outputs.popleft() if self._outputs else None

    # ------------------------------------------------------------------- decisions

    def _advance(self, now: float) -> None:
        """Settle the race or start attempts; the last step of every input."""
        match self._state:
            case RaceState.DIALING:
                if any(map(self._may_open, self._kinds)):
                    self._start_due(now)
                else:
                    self._move(_T.ALL_FAILED)
                    self._outputs.append(NoLink())
            case RaceState.GRACE:
                best = min(self._opened, key=lambda link: self._kinds.index(link.kind))
                better = self._better_kinds(best.kind)
                if now < self._grace_until and any(map(self._may_open, better)):
                    self._start_due(now)
                else:
                    self._move(_T.LINK_CHOSEN)
                    self._outputs.append(KeepLink(best, self._why(best, now)))
            case RaceState.WON | RaceState.LOST:
                pass
            case _:
                assert_never(self._state)

    def _move(self, trigger: RaceTrigger) -> None:
        self._state = move(TRANSITIONS, self._state, trigger)

    def _start_due(self, now: float) -> None:
        for kind, waiting in self._waiting.items():
            if waiting and now >= self._next_at[kind]:
                self._running.add(waiting[0])
                self._next_at[kind] = now + STAGGER_INTERVAL
                self._outputs.append(StartAttempt(waiting.popleft()))

    def _start_next_at_once(self, failed: LinkKindName, now: float) -> None:
        """Bring forward the attempt that follows a failure."""
        for kind in (failed,) if self._may_open(failed) else self._kinds:
            if self._waiting[kind]:
                self._next_at[kind] = now
                return

    def _may_open(self, kind: LinkKindName) -> bool:
        """Return whether attempts of a kind are running or still to come."""
        running = any(attempt.kind == kind for attempt in self._running)
        return running or bool(self._waiting[kind])

    def _better_kinds(self, kind: LinkKindName) -> tuple[LinkKindName, ...]:
        return self._kinds[: self._kinds.index(kind)]

    # --------------------------------------------------------------------- reasons

    def _why(self, kept: Attempt, now: float) -> str:
        """Return why a link is kept, for people."""
        better = self._better_kinds(kept.kind)
        first = self._opened[0].kind
        if better:
            return "; ".join(self._why_not(kind, now) for kind in better)
        if first != kept.kind:
            name, other = kept.kind.upper(), first.upper()
            return f"{name} is faster than {other}, which answered first"
        return "it answered first"

    def _why_not(self, kind: LinkKindName, now: float) -> str:
        """Return why no link of a kind is kept, for people."""
        name = kind.upper()
        if self._may_open(kind):
            return f"{name} did not answer within {now - self._began:.1f} s"
        reasons = (why for attempt, why in self._failures if attempt.kind == kind)
        return f"{name} was not reachable: {', '.join(dict.fromkeys(reasons))}"
