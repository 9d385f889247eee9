"""One direction of a path that delays, loses and narrows what goes through it."""

import math
from random import Random

import msgspec


class Conditions(msgspec.Struct, frozen=True):
    """The effect of a path on the datagrams that cross it, the same both ways.

    Args:
        delay: Seconds from one end to the other, half of a round trip.
        jitter: Up to this many seconds are added at random.
        loss: The share of datagrams that never come out, from 0 up to less than 1.
        rate: Bytes per second that pass; None for no limit.
        queue: Bytes that may wait if the rate is limited; a datagram that finds them
            waiting is dropped.
        may_reorder: True if the jitter may let a datagram overtake another one.
        seed: Seed of the losses and of the jitter.
    """

    delay: float = 0.0
    jitter: float = 0.0
    loss: float = 0.0
    rate: float | None = None
    queue: int = 1024 * 1024
    may_reorder: bool = False
    seed: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.loss < 1:
            raise ValueError(f"a loss of {self.loss} is not from 0 up to less than 1")
        if min(self.delay, self.jitter, self.queue) < 0:
            raise ValueError("a delay, a jitter or a queue is negative")
        if self.rate is not None and self.rate <= 0:
            raise ValueError(f"nothing would pass at {self.rate} bytes per second")


class LineCounts(msgspec.Struct):
    """Counts of the datagrams that entered a line.

    Args:
        entered: All of them.
        lost: Those that were lost at random.
        overflowed: Those that found the queue full.
    """

    entered: int = 0
    lost: int = 0
    overflowed: int = 0


class Totals(msgspec.Struct):
    """Counts of all datagrams of a proxy.

    Args:
        up: On the way to the target.
        down: On the way back.
        dropped: Datagrams that the operating system dropped because a buffer was full;
            if there are any, the proxy was too slow.
    """

    up: LineCounts
    down: LineCounts
    dropped: int


class Line:
    """Computes when a datagram comes out, if it does; time is an argument.

    Args:
        conditions: Delay, losses and limits.
        direction: Its name; the two directions lose different datagrams.

    Attributes:
        counts: The datagrams so far.
    """

    def __init__(self, conditions: Conditions, direction: str) -> None:
        self.counts = LineCounts()
        self._conditions = conditions
        self._random = Random(f"{conditions.seed} {direction}")
        self._free_at = 0.0
        self._latest = 0.0
        self._before_loss = self._draw_before_loss()

    def enter(self, size: int, now: float) -> float | None:
        """Add a datagram, and return when it leaves the line.

        Args:
            size: Its bytes.
            now: The time in seconds, which must never go back.

        Returns:
            The time, or None if the datagram is lost.
        """
        conditions, counts = self._conditions, self.counts
        counts.entered += 1
        if self._before_loss == 0:
            self._before_loss = self._draw_before_loss()
            counts.lost += 1
            return None
        self._before_loss -= 1
        due = now
        if conditions.rate is not None:
            starts = max(now, self._free_at)
            if (starts - now) * conditions.rate + size > conditions.queue:
                counts.overflowed += 1
                return None
            due = self._free_at = starts + size / conditions.rate
        due += conditions.delay
        if conditions.jitter:
            due += self._random.uniform(0, conditions.jitter)
        if not conditions.may_reorder:
            due = self._latest = max(due, self._latest)
        return due

    def _draw_before_loss(self) -> float:
        """Draw the number of datagrams that pass before the next one is lost.

        Each is lost with the same probability, so the number is geometric; one draw for
        each loss costs less than one for each datagram.
        """
        if self._conditions.loss == 0:
            return math.inf
        chance = 1 - self._random.random()  # never 0, which has no logarithm
        return math.floor(math.log(chance) / math.log1p(-self._conditions.loss))
