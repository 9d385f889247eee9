"""Exponential backoff with jitter."""

import msgspec

from sleap_rtc.proto.errors import LocalProtocolError

_MAX_DOUBLINGS = 32
"""Doublings of the first delay, more than any limit needs: 2.0 ** 1024 overflows."""


class Backoff(msgspec.Struct, frozen=True):
    """Delays between attempts, in seconds.

    Args:
        first: The delay after the first failure. It doubles with each failure after it.
        longest: The limit of the delay.
    """

    first: float
    longest: float

    def delay(self, failures: int, jitter: float) -> float:
        """Return how long to wait before the next attempt.

        Args:
            failures: Failures in a row, from 1.
            jitter: A random number in [0, 1). It spreads the peers that lost the same
                server over the upper half of the delay.

        Raises:
            LocalProtocolError: If an argument is out of range.
        """
        if failures < 1:
            raise LocalProtocolError(f"{failures} failures need no delay")
        if not 0 <= jitter < 1:
            raise LocalProtocolError(f"the jitter {jitter} is not in [0, 1)")
        doublings = min(failures - 1, _MAX_DOUBLINGS)
        return min(self.longest, self.first * 2.0**doublings) * (0.5 + jitter / 2)
