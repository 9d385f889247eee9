"""Which route a package takes, over which link, and what follows when one fails.

A policy only: it is asked, and answers with what to do and why. The reasons are shown
to the user, who finds them again in the troubleshooting guide.
"""

from collections import deque
from collections.abc import Sequence
from typing import Literal

import msgspec

from sleap_rtc.proto.route.kinds import LINK_KINDS, LinkKindName

RoutePreference = Literal["auto", "shared", "channel", "tcp", "quic"]
"""What a user may ask for; a kind of link means the channel over that kind."""


class TryShared(msgspec.Struct, frozen=True):
    """Find out whether both sides see the same storage, then use it."""

    reason: str


class UseChannel(msgspec.Struct, frozen=True):
    """Send the package in chunks."""

    reason: str


class GiveUp(msgspec.Struct, frozen=True):
    """No route that the user allows works."""

    reason: str


def first_route(
    preference: RoutePreference, *, client_root: bool, worker_root: bool
) -> TryShared | UseChannel | GiveUp:
    """Decide before anything is copied.

    Args:
        preference: What the user asked for.
        client_root: Whether a shared storage root is configured here.
        worker_root: Whether the worker says that it has one.
    """
    match preference, client_root, worker_root:
        case "channel", _, _:
            return UseChannel("the channel route was asked for")
        case "tcp" | "quic", _, _:
            return UseChannel(f"the channel over {preference.upper()} was asked for")
        case _, True, True:
            return TryShared("both sides have shared storage configured")
        case "shared", False, _:
            return GiveUp(
                "Shared storage not configured here, but the shared route was asked "
                "for: set SHARED_STORAGE_ROOT or --shared-storage-root"
            )
        case "shared", True, False:
            return GiveUp(
                "Shared storage not configured on the worker, but the shared route "
                "was asked for"
            )
        case _, True, False:
            return UseChannel(
                "Shared storage not configured on the worker, will use RTC transfer"
            )
        case _:
            return UseChannel("Shared storage not configured, will use RTC transfer")


def after_shared_failure(
    preference: RoutePreference, reason: str
) -> UseChannel | GiveUp:
    """Decide when the shared route turned out not to work.

    Args:
        preference: What the user asked for.
        reason: What went wrong, a sentence without its full stop.
    """
    if preference == "shared":
        return GiveUp(
            f"{reason} (the shared route was asked for, so no other is tried)"
        )
    return UseChannel(f"{reason}; falling back to RTC transfer")


# --------------------------------------------------------------------------- links

STAGGER = 0.25
"""Seconds between the starts of two attempts (RFC 8305, 5)."""

GRACE = 0.3
"""Seconds that the preferred kind gets once another one stands: a handshake over TCP
takes one round trip more than one over QUIC."""


class TryLinks(msgspec.Struct, frozen=True):
    """Dial with these kinds of link.

    Args:
        kinds: The preferred one first.
        reason: Why it is not all of them; empty if it is.
    """

    kinds: tuple[LinkKindName, ...]
    reason: str


def asked_kinds(preference: RoutePreference) -> tuple[LinkKindName, ...]:
    """Say which kinds of link the user allows."""
    match preference:
        case "tcp" | "quic":
            return (preference,)
        case _:
            return LINK_KINDS


def choose_kinds(
    preference: RoutePreference, offered: Sequence[LinkKindName]
) -> TryLinks | GiveUp:
    """Decide before anything is dialed.

    Args:
        preference: What the user asked for.
        offered: What the worker listens for.
    """
    asked = asked_kinds(preference)
    kinds = tuple(kind for kind in asked if kind in offered)
    names = " and ".join(kind.upper() for kind in kinds)
    if not kinds:
        wanted = " or ".join(kind.upper() for kind in asked)
        return GiveUp(f"the worker does not listen for links over {wanted}")
    if len(asked) < len(LINK_KINDS):
        return TryLinks(kinds, "it was asked for")
    if len(kinds) < len(LINK_KINDS):
        return TryLinks(kinds, f"the worker listens for {names} only")
    return TryLinks(kinds, "")


class Attempt(msgspec.Struct, frozen=True):
    """One kind of link to one address."""

    kind: LinkKindName
    host: str
    port: int


class StartAttempt(msgspec.Struct, frozen=True):
    """Begin to dial."""

    attempt: Attempt


class KeepLink(msgspec.Struct, frozen=True):
    """The race is won: keep this link, and end all other attempts."""

    attempt: Attempt
    reason: str


class NoLink(msgspec.Struct, frozen=True):
    """The race is lost: every attempt has failed."""


class LinkRace:
    """Who is dialed when, and which link is kept.

    Each kind goes through the addresses one after another, a quarter of a second apart,
    the next at once after a failure; the less preferred kind begins that much later.
    The first link of the preferred kind wins. One of the other kind wins when no
    attempt of the preferred kind is left, or after a short grace.

    A driver drains `next_output` at the start and after each of `attempt_opened`,
    `attempt_failed` and `handle_timeout`, and arms a timer for `deadline`. After
    `KeepLink` or `NoLink` nothing changes any more.

    Args:
        addresses: Each host and port, the best first.
        kinds: The kinds to try, the preferred one first.
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
        self._preferred = kinds[0]
        self._waiting = {
            kind: deque(Attempt(kind, host, port) for host, port in unique)
            for kind in kinds
        }
        self._next_at = {kind: now + n * STAGGER for n, kind in enumerate(kinds)}
        self._running: set[Attempt] = set()
        self._failures: list[tuple[Attempt, str]] = []
        self._fallback: Attempt | None = None
        self._grace_until = now
        self._settled = False
        self._outputs: deque[StartAttempt | KeepLink | NoLink] = deque()
        self._advance(now)

    def attempt_opened(self, attempt: Attempt, now: float) -> None:
        """Note that a link stands."""
        self._running.discard(attempt)
        if self._settled:
            return
        if attempt.kind == self._preferred:
            self._keep(attempt, self._why_preferred())
        elif self._fallback is None:
            self._fallback = attempt
            self._grace_until = now + GRACE
        self._advance(now)

    def attempt_failed(self, attempt: Attempt, reason: str, now: float) -> None:
        """Note that an attempt came to nothing, and why."""
        self._running.discard(attempt)
        self._failures.append((attempt, reason))
        if self._is_hoped_for(attempt.kind):
            self._next_at[attempt.kind] = now
        else:
            # Nothing is left that the other kind would have to wait for.
            self._next_at = dict.fromkeys(self._next_at, now)
        self._advance(now)

    def handle_timeout(self, now: float) -> None:
        """Do what is due; nothing if nothing is."""
        self._advance(now)

    def deadline(self) -> float | None:
        """When to call `handle_timeout`."""
        if self._settled:
            return None
        times = [self._next_at[kind] for kind, left in self._waiting.items() if left]
        if self._fallback is not None:
            times.append(self._grace_until)
        return min(times, default=None)

    def next_output(self) -> StartAttempt | KeepLink | NoLink | None:
        """Take the next output, if there is one."""
        return self._outputs.popleft() if self._outputs else None

    def _advance(self, now: float) -> None:
        """Draw all conclusions; the last step of every input."""
        if not self._settled:
            hopeless = not self._is_hoped_for(self._preferred)
            if self._fallback is not None and (hopeless or now >= self._grace_until):
                self._keep(self._fallback, self._why_fallback(hopeless, now))
            elif not any(map(self._is_hoped_for, self._waiting)):
                self._settled = True
                self._outputs.append(NoLink())
            else:
                self._start_due(now)

    def _is_hoped_for(self, kind: LinkKindName) -> bool:
        """Tell whether attempts of a kind run, or are still to come."""
        running = any(attempt.kind == kind for attempt in self._running)
        return running or bool(self._waiting[kind])

    def _start_due(self, now: float) -> None:
        for kind, waiting in self._waiting.items():
            if waiting and now >= self._next_at[kind]:
                self._running.add(waiting[0])
                self._next_at[kind] = now + STAGGER
                self._outputs.append(StartAttempt(waiting.popleft()))

    def _keep(self, attempt: Attempt, reason: str) -> None:
        self._settled = True
        self._outputs.append(KeepLink(attempt, reason))

    def _why_preferred(self) -> str:
        if self._fallback is None:
            return "it answered first"
        other = self._fallback.kind.upper()
        return f"{self._preferred.upper()} is faster than {other}, which answered first"

    def _why_fallback(self, hopeless: bool, now: float) -> str:
        name = self._preferred.upper()
        if not hopeless:
            return f"{name} did not answer within {now - self._began:.1f} s"
        mine = [why for who, why in self._failures if who.kind == self._preferred]
        return f"{name} was not reachable: {', '.join(dict.fromkeys(mine))}"
