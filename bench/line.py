"""One direction of a path that delays, loses and narrows what goes through it."""

import math
from random import Random

import msgspec


class Conditions(msgspec.Struct, frozen=True):
    """What a path does to whatever crosses it, the same in both directions.

    Args:
        delay: Seconds from one end to the other, half of a round trip.
        jitter: Up to this many seconds are added at random.
        loss: The share of datagrams that never come out, from 0 up to less than 1.
        rate: Bytes per second that pass; None means as many as come.
        queue: Bytes that may wait for their turn where there is a rate; what comes
            on top of them is dropped.
        may_reorder: True if the jitter may let a datagram overtake another one.
        seed: Decides which datagrams are lost, and the jitter.
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
            raise ValueError("a delay, a jitter or a queue is less than nothing")
        if self.rate is not None and self.rate <= 0:
            raise ValueError(f"nothing would pass at {self.rate} bytes per second")


class LineCounts(msgspec.Struct):
    """What has become of the datagrams that entered a line.

    Args:
        entered: All of them.
        lost: Those that were lost at random.
        overflowed: Those that found the queue full.
    """

    entered: int = 0
    lost: int = 0
    overflowed: int = 0


class Totals(msgspec.Struct):
    """What has become of all datagrams.

    Args:
        up: On the way to the target.
        down: On the way back.
        dropped: What the operating system dropped for want of room in a buffer; if it
            is more than nothing, the proxy was too slow.
    """

    up: LineCounts
    down: LineCounts
    dropped: int


class Line:
    """Decides when a datagram comes out, if it does; time is an argument.

    Args:
        conditions: What happens on the way.
        direction: Its name; the two directions lose different datagrams.

    Attributes:
        counts: What has happened so far.
    """

    def __init__(self, conditions: Conditions, direction: str) -> None:
        self.counts = LineCounts()
        self._conditions = conditions
        self._random = Random(f"{conditions.seed} {direction}")
        self._free_at = 0.0
        self._latest = 0.0
        self._before_loss = self._draw_before_loss()

    def enter(self, size: int, now: float) -> float | None:
        """Let a datagram in.

        Args:
            size: Its bytes.
            now: The time in seconds, which must never go back.

        Returns:
            When it comes out, or None if it never does.
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
        """Draw how many datagrams pass before the next one is lost.

        Each is lost with the same probability, so the number is geometric; one draw for
        each loss costs less than one for each datagram.
        """
        if self._conditions.loss == 0:
            return math.inf
        chance = 1 - self._random.random()  # never 0, whose logarithm there is not
        return math.floor(math.log(chance) / math.log1p(-self._conditions.loss))
