"""The decision to try again or to stop trying, after a link was lost.

This module only decides: its owner reports how each attempt failed and gets the next
step. Two things can be wrong. The worker is *gone* if there is evidence that its
process has ended: the signaling server answers and does not list it, or its host
refuses the connection. The worker is *away* if nothing answers at all. Then the network
itself may be missing, as on a laptop that has just woken up, and only time helps.
"""

import msgspec

from sleap_rtc.proto.backoff import Backoff
from sleap_rtc.proto.errors import LocalProtocolError

AWAY_BACKOFF = Backoff(first=0.25, longest=15.0)
"""Seconds between attempts while the worker is away. The longest delay limits how long
a network that is back stays unnoticed."""

GONE_BACKOFF = Backoff(first=0.25, longest=1.0)
"""Seconds between attempts while the worker is gone, so that a restart is noticed
quickly."""

GONE_TIMEOUT = 7.0
"""Seconds from the last sign of life until a worker that is gone is given up. A restart
of a worker takes a few seconds."""

GONE_ATTEMPTS = 2
"""Attempts in a row that must find the worker gone: it may register just after one."""

MIN_GONE_TIMEOUT = 3.0
"""Seconds after the loss of the link in which a worker is never given up as gone. A
link that was silent for long may have used up `GONE_TIMEOUT` before it was lost."""


PATIENCE = 1800.0
"""Seconds for which a client tries to reopen a lost link, unless the user chooses
otherwise: enough for a train in a long tunnel, or for a laptop carried to another
building."""


class TryAgain(msgspec.Struct, frozen=True):
    """Begin the next attempt at this time, which is never in the past."""

    at: float


class GiveUp(msgspec.Struct, frozen=True):
    """Stop trying; the reason is for people, a sentence without its full stop."""

    reason: str


class Reconnection:
    """Decides after each failed attempt to open a lost link again.

    The first attempt is made at once. After each attempt that fails the owner calls
    `attempt_failed` and follows the decision. The machine has neither outputs nor a
    timer.

    A worker counts as gone from its last sign of life. An attempt that finds it away
    is not evidence against its process, so `GONE_TIMEOUT` starts again with the next
    attempt that finds it gone.

    Args:
        lost_at: When the link was found to be lost, in seconds.
        silent_for: Seconds between the last sign of life of the worker and `lost_at`.
        patience: Seconds from `lost_at` after which it gives up whatever is wrong.
    """

    def __init__(self, *, lost_at: float, silent_for: float, patience: float) -> None:
        self._lost_at = lost_at
        self._last_heard = lost_at - silent_for
        self._give_up_at = lost_at + patience
        self._gone_since: float | None = self._last_heard
        self._gone_in_a_row = 0
        self._away = 0
        self._has_given_up = False

    def attempt_failed(
        self, is_gone: bool, jitter: float, now: float
    ) -> TryAgain | GiveUp:
        """Decide the step after a failed attempt.

        Args:
            is_gone: True if the attempt found the worker gone, False if away.
            jitter: A random number in [0, 1), see `Backoff.delay`.
            now: The time in seconds, when the attempt failed.

        Raises:
            LocalProtocolError: If the jitter is out of range, or it has given up.
        """
        if self._has_given_up:
            raise LocalProtocolError("an attempt was made after the last one")
        if is_gone:
            delay = GONE_BACKOFF.delay(self._gone_in_a_row + 1, jitter)
            self._gone_in_a_row += 1
            if self._gone_since is None:
                self._gone_since = now
        else:
            delay = AWAY_BACKOFF.delay(self._away + 1, jitter)
            self._away += 1
            self._gone_in_a_row = 0
            self._gone_since = None
        reason = self._reason_to_stop(now)
        if reason:
            self._has_given_up = True
            return GiveUp(reason)
        # The last attempt is made when patience ends, and not long before.
        return TryAgain(min(now + delay, self._give_up_at))

    def _reason_to_stop(self, now: float) -> str:
        """Return why to give up; empty to continue."""
        if (
            self._gone_since is not None
            and self._gone_in_a_row >= GONE_ATTEMPTS
            and now >= self._gone_since + GONE_TIMEOUT
            and now >= self._lost_at + MIN_GONE_TIMEOUT
        ):
            return (
                "the worker is no longer running: it was last heard of "
                f"{now - self._last_heard:.0f} s ago and has not come back"
            )
        if now >= self._give_up_at:
            waited = now - self._lost_at
            return f"the worker could not be reached again for {waited:.0f} s"
        return ""
