"""When to try again after a link was lost, and when to stop trying.

A policy only: it is told how each attempt failed, and answers with what to do next. Two
things can be wrong. The worker is *gone* if there is evidence that its process is not
there: the signaling server answers and does not list it, or its host refuses the
connection. It is *away* if nothing answers at all: then it may be the network that is
missing, as in a laptop that has just woken up, and only patience helps.
"""

import msgspec

from sleap_rtc.proto.errors import LocalProtocolError

FIRST_PAUSE = 0.25
"""Seconds after the first failure; the pause doubles with each one that follows."""

LONGEST_PAUSE = 15.0
"""Seconds between two attempts at most: a network that is back is noticed by then."""

LONGEST_PAUSE_GONE = 1.0
"""The same while the worker is gone: one that is started again is found quickly."""

GONE_GRACE = 7.0
"""Seconds that a worker may be gone. One that is started again needs a few of them."""

GONE_ATTEMPTS = 2
"""Attempts in a row that have to agree: a worker may register just after the first."""

GONE_SECONDS = 3.0
"""Seconds after the loss of the link that are waited through in any case. A link that
was silent for a long time has used up the grace before anybody could look."""

PATIENCE = 1800.0
"""Seconds for which a client tries to reopen a lost link, unless the user chooses
otherwise: a train passes a long tunnel, a laptop is carried to another building."""

_DOUBLINGS = 32
"""More than any pause needs; a greater power of two would overflow one day."""


class TryAgain(msgspec.Struct, frozen=True):
    """Begin the next attempt at this time, which is never in the past."""

    at: float


class GiveUp(msgspec.Struct, frozen=True):
    """Stop trying; the reason is for people, a sentence without its full stop."""

    reason: str


class Reconnection:
    """Decides after each failed attempt to open a lost link again.

    The first attempt is made at once. After each one that fails the owner calls
    `attempt_failed`, and does what it says; after one that succeeds it lets go of this
    object. There is nothing to drain and no timer.

    Gone counts from when the worker was last heard of. Once an attempt found it away,
    nobody knows since when it has been gone, so the grace starts again with the next
    attempt that finds it gone.

    Args:
        lost_at: When the link was found to be lost, in seconds.
        silent_for: For how many seconds nothing had come from the worker by then.
        patience: Seconds after the loss at which it gives up whatever is wrong.
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
        self, now: float, is_gone: bool, jitter: float
    ) -> TryAgain | GiveUp:
        """Decide what follows a failed attempt.

        Args:
            now: The time in seconds, when the attempt failed.
            is_gone: Whether it found that the worker's process is not there.
            jitter: A random number in [0, 1). It spreads the clients of a worker over
                the upper half of the pause.

        Raises:
            LocalProtocolError: If the jitter is out of range, or it has given up.
        """
        if not 0 <= jitter < 1:
            raise LocalProtocolError(f"the jitter {jitter} is not in [0, 1)")
        if self._has_given_up:
            raise LocalProtocolError("an attempt was made after the last one")
        pause = self._note_gone(now) if is_gone else self._note_away()
        reason = self._reason_to_stop(now)
        if reason:
            self._has_given_up = True
            return GiveUp(reason)
        # The last attempt comes when patience ends, and not long before.
        return TryAgain(min(now + pause * (0.5 + jitter / 2), self._give_up_at))

    def _note_gone(self, now: float) -> float:
        """Count an attempt, and say how long to wait at most."""
        self._gone_in_a_row += 1
        if self._gone_since is None:
            self._gone_since = now
        return _pause(self._gone_in_a_row, LONGEST_PAUSE_GONE)

    def _note_away(self) -> float:
        """Count an attempt, and say how long to wait at most."""
        self._away += 1
        self._gone_in_a_row = 0
        self._gone_since = None
        return _pause(self._away, LONGEST_PAUSE)

    def _reason_to_stop(self, now: float) -> str:
        """Say why to give up; empty if there is no reason to."""
        if (
            self._gone_since is not None
            and self._gone_in_a_row >= GONE_ATTEMPTS
            and now >= self._gone_since + GONE_GRACE
            and now >= self._lost_at + GONE_SECONDS
        ):
            return (
                "the worker is not running any more: it was last heard of "
                f"{now - self._last_heard:.0f} s ago, and has not come back"
            )
        if now >= self._give_up_at:
            waited = now - self._lost_at
            return f"the worker could not be reached again for {waited:.0f} s"
        return ""


def _pause(failures: int, longest: float) -> float:
    return min(longest, FIRST_PAUSE * 2.0 ** min(failures - 1, _DOUBLINGS))
