"""Which size of datagram a path lets pass (RFC 8899): a search that decides only.

It begins with what every path of QUIC carries, and asks for one larger size after the
other: a packet of that size, which holds nothing of worth, is sent and arrives or not.
"""

SMALLEST_DATAGRAM = 1200
"""UDP payload in bytes that every path of QUIC carries (RFC 9000, 14)."""

SIZES = (1350, 1452, 8848, 8952, 16_383)
"""Worth trying: most tunnels; Ethernet with IPv6; the large frames of some clouds, and
those of Ethernet; loopback, as far as the length field of aioquic goes."""

LARGEST_DATAGRAM = SIZES[-1]

TRIES = 3
"""Probes of a size that may get lost before it is too large (RFC 8899, 5.1.2)."""

LARGE_LOST = 16
"""Large packets lost one after the other that mean that no more of them get through."""

MAX_FALLS = 3
"""Falls back to the smallest size after which it is left at that."""


class MtuSearch:
    """A search for the largest datagram that arrives.

    Ask `next_probe` when there is a chance to send, and tell what became of the probe.

    Args:
        size: What is sent without having asked.
        largest: What is sent at most; as much as `size` means that nothing is asked.

    Attributes:
        size: The largest payload that is known to arrive, in bytes.
    """

    def __init__(self, size: int, largest: int) -> None:
        self.size = size
        self._smallest = min(size, SMALLEST_DATAGRAM)
        self._largest = largest
        self._falls = 0
        self._lost_in_a_row = 0
        self._begin()

    def _begin(self) -> None:
        worth = {size for size in SIZES if size < self._largest} | {self._largest}
        self._sizes = sorted(size for size in worth if size > self.size)
        self._tries = 0
        self._is_asking = False

    def limit(self, largest: int) -> None:
        """Take the peer's limit."""
        self._largest = max(self.size, min(self._largest, largest))
        self._begin()

    def next_probe(self) -> int | None:
        """Return the size of a probe to send now, if there is one to send."""
        if self._is_asking or not self._sizes:
            return None
        self._is_asking = True
        self._tries += 1
        return self._sizes[0]

    def probe_arrived(self, size: int) -> None:
        """Note that a probe arrived."""
        if size in self._sizes:
            self.size = size
            self._sizes.remove(size)
            self._tries = 0
        self._is_asking = False

    def probe_lost(self) -> None:
        """Note that a probe did not arrive, or was too large to be sent."""
        self._is_asking = False
        if self._tries >= TRIES:
            self._sizes.clear()

    def packet_arrived(self, size: int) -> None:
        """Note what became of a packet with content."""
        if size > self._smallest:
            self._lost_in_a_row = 0

    def packet_lost(self, size: int) -> None:
        """Note what became of a packet with content; falls back if it has to."""
        if size <= self._smallest:
            return
        self._lost_in_a_row += 1
        if self._lost_in_a_row >= LARGE_LOST and self.size > self._smallest:
            self.size = self._smallest
            self._lost_in_a_row = 0
            self._falls += 1
            self._begin()
            if self._falls > MAX_FALLS:
                self._sizes.clear()
