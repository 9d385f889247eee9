"""The race of the links that a client dials: the choice of the one to keep."""

from collections import deque
from collections.abc import Sequence

import msgspec

from sleap_rtc.proto.route.kinds import LinkKindName

STAGGER_INTERVAL = 0.25
"""Seconds between the starts of two attempts (RFC 8305, 5)."""

GRACE_TIMEOUT = 0.3
"""Seconds that better kinds have to open a link once the first one is open: a handshake
over TCP takes one round trip more than a handshake over QUIC."""


class Attempt(msgspec.Struct, frozen=True):
    """One kind of link to one address."""

    kind: LinkKindName
    host: str
    port: int


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


class LinkRace:
    """Decides when to dial which address over which kind, and which link to keep.

    Each kind tries the addresses one after another, `STAGGER_INTERVAL` apart, and
    begins that much later than the kind before it. A failure starts the next attempt of
    its kind at once, or, if its kind has none left, that of the best kind that has one.
    An open link wins when no better kind can open one, or when `GRACE_TIMEOUT` has
    passed since the first link opened.

    A driver drains `next_output` at the start and after each of `attempt_opened`,
    `attempt_failed` and `handle_timeout`, and sets a timer for `deadline`. Nothing
    follows `KeepLink` or `NoLink`.

    Args:
        addresses: Each host and port, the best first.
        kinds: The kinds to try, the preferred ones first.
        now: The time in seconds.
    """

    def __init__(
        self,
        addresses: Sequence[tuple[str, int]],
        kinds: Sequence[LinkKindName],
        now: float,
    ) -> None:
        unique = dict.fromkeys(addresses)
        self._began = now
        self._kinds = tuple(kinds)
        self._waiting = {
            kind: deque(Attempt(kind, host, port) for host, port in unique)
            for kind in kinds
        }
        self._next_at = {
            kind: now + rank * STAGGER_INTERVAL for rank, kind in enumerate(kinds)
        }
        self._running: set[Attempt] = set()
        self._failures: list[tuple[Attempt, str]] = []
        self._opened: list[Attempt] = []
        self._grace_until = now
        self._settled = False
        self._outputs: deque[RaceOutput] = deque()
        self._advance(now)

    # ---------------------------------------------------------------------- inputs

    def attempt_opened(self, attempt: Attempt, now: float) -> None:
        """Handle a link that has opened."""
        self._running.discard(attempt)
        if not self._opened:
            self._grace_until = now + GRACE_TIMEOUT
        self._opened.append(attempt)
        self._advance(now)

    def attempt_failed(self, attempt: Attempt, reason: str, now: float) -> None:
        """Handle the failure of an attempt; the reason is for people."""
        self._running.discard(attempt)
        self._failures.append((attempt, reason))
        self._start_next_at_once(attempt.kind, now)
        self._advance(now)

    def handle_timeout(self, now: float) -> None:
        """Handle everything due at `now`; nothing happens before `deadline`."""
        self._advance(now)

    # --------------------------------------------------------------------- outputs

    def deadline(self) -> float | None:
        """Return when `handle_timeout` has something to do; None if never."""
        if self._settled:
            return None
        times = [self._next_at[kind] for kind, left in self._waiting.items() if left]
        if self._opened:
            times.append(self._grace_until)
        return min(times, default=None)

    def next_output(self) -> RaceOutput | None:
        """Remove and return the oldest output; None if none is left."""
        return self._outputs.popleft() if self._outputs else None

    # ------------------------------------------------------------------- decisions

    def _advance(self, now: float) -> None:
        """Settle the race or start attempts; the last step of every input."""
        if self._settled:
            return
        if self._opened:
            best = min(self._opened, key=lambda link: self._kinds.index(link.kind))
            better = self._better_kinds(best.kind)
            if now >= self._grace_until or not any(map(self._may_open, better)):
                self._settle(KeepLink(best, self._why(best, now)))
                return
        elif not any(map(self._may_open, self._kinds)):
            self._settle(NoLink())
            return
        self._start_due(now)

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

    def _settle(self, outcome: KeepLink | NoLink) -> None:
        self._settled = True
        self._outputs.append(outcome)

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
