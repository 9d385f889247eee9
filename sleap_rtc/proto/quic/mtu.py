"""Search for the largest datagram that a path lets pass (RFC 8899).

The search begins with a size that every path carries and probes one larger size after
the other: a padding-only packet of that size is sent and is either acknowledged or
lost. Losses of large packets in a row mean that the path has become a black hole for
them (RFC 8899, 4.3); then the search falls back and begins again.
"""

SMALLEST_DATAGRAM = 1200
"""UDP payload in bytes that every path of QUIC carries (RFC 9000, 14)."""

PROBED_SIZES = (1350, 1452, 8848, 8952, 16_383)
"""UDP payloads in bytes that are worth a probe: most tunnels; Ethernet with IPv6; the
jumbo frames of some clouds, and those of Ethernet; loopback, up to the largest length
that QUIC writes in two bytes (RFC 9000, 16)."""

MAX_PROBES = 3
"""Probes of one size that may be lost before it is too large (RFC 8899, 5.1.2)."""

BLACK_HOLE_LOSSES = 16
"""Large packets that must be lost in a row before the path counts as a black hole."""

MAX_BLACK_HOLES = 3
"""Black holes of one connection after which no larger size is probed."""


class MtuSearch:
    """A search for the largest datagram that arrives.

    The driver asks `next_probe` whenever it may send, and reports the result of that
    probe and of each other packet. Only one probe is in flight at a time.

    Args:
        size: The UDP payload to begin with, in bytes.
        largest: The largest payload to probe; `size` means that nothing is probed.

    Attributes:
        size: The largest payload that is known to arrive, in bytes.
    """

    def __init__(self, size: int, largest: int) -> None:
        self.size = size
        self._smallest = min(size, SMALLEST_DATAGRAM)
        self._largest = largest
        self._black_holes = 0
        self._lost_in_a_row = 0
        self._start()

    def _start(self) -> None:
        sizes = {size for size in PROBED_SIZES if size < self._largest}
        self._sizes = sorted(
            size for size in sizes | {self._largest} if size > self.size
        )
        self._probes = 0
        self._is_probing = False

    def next_probe(self) -> int | None:
        """Return the size of the probe to send now; None if there is none to send."""
        if self._is_probing or not self._sizes:
            return None
        self._is_probing = True
        self._probes += 1
        return self._sizes[0]

    def probe_acknowledged(self, size: int) -> None:
        """Adopt the size of a probe that arrived."""
        if size in self._sizes:
            self.size = size
            self._sizes.remove(size)
            self._probes = 0
            self._lost_in_a_row = 0
        self._is_probing = False

    def probe_lost(self) -> None:
        """End the search if the size was probed often enough."""
        self._is_probing = False
        if self._probes >= MAX_PROBES:
            self._sizes.clear()

    def packet_acknowledged(self, size: int) -> None:
        """Record a packet with content that arrived.

        Args:
            size: Its bytes.
        """
        if size > self._smallest:
            self._lost_in_a_row = 0

    def packet_lost(self, size: int) -> None:
        """Record a packet with content that was lost; fall back at a black hole.

        Args:
            size: Its bytes.
        """
        if size <= self._smallest:
            return
        self._lost_in_a_row += 1
        if self._lost_in_a_row >= BLACK_HOLE_LOSSES and self.size > self._smallest:
            self.size = self._smallest
            self._lost_in_a_row = 0
            self._black_holes += 1
            self._start()
            if self._black_holes > MAX_BLACK_HOLES:
                self._sizes.clear()
