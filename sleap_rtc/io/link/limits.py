"""The limits of a link: times, queues and sizes, each with its reason."""

import msgspec

_MEBIBYTE = 1024 * 1024


class LinkLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of one link; the product uses `LIMITS`.

    Those of one kind are ignored by the other kinds.
    """

    handshake_timeout: float = 10.0
    """Seconds for the handshake and the proof together, ten round trips of a bad
    line."""

    idle_timeout: float = 10.0
    """Seconds without traffic after which the peer counts as gone."""

    flush_timeout: float = 3.0
    """Seconds that `Link.aclose` waits until the accepted data has been sent."""

    max_unproven: int = 64
    """Clients of one kind in their handshake at once: more than the peers of a room,
    with a few 100 KiB for each."""

    max_unsent_messages: int = _MEBIBYTE
    """Bytes of messages in the send queue: 16 of the longest."""

    max_unsent_frames: int = 4 * _MEBIBYTE
    """Bytes of frames in the send queue: 40 ms of a gigabit line, and little beside the
    150 MiB that a process may take."""

    max_unread: int = 32 * _MEBIBYTE
    """Bytes that a peer may send beyond those that were read: twice the grants of a
    receiver, so that unread bulk never blocks the messages."""

    # ------------------------------------------------------------------------- TCP only

    close_timeout: float = 2.0
    """Seconds that the closing side of a TCP link waits until its peer closes as well.
    Leaving earlier with unread data would discard data that is still on its way (RFC
    1122, 4.2.2.13)."""

    bytes_per_turn: int = 512 * 1024
    """Bytes that a TCP link sends before other tasks run, about two milliseconds. A
    peer that reads as fast as we write would otherwise keep the event loop busy until
    the queue is empty."""

    # ------------------------------------------------------------------------ QUIC only

    max_unacknowledged_frames: int = 32 * _MEBIBYTE
    """Bytes of frames on the way over QUIC, which are kept for retransmission: a
    gigabyte per second over 30 ms, or 150 MB over 200 ms."""

    largest_datagram: int = 16_383
    """Bytes of UDP payload that a QUIC datagram may grow to, if the path lets it pass:
    the largest size that the search for it probes, and that the length field of aioquic
    can express."""


LIMITS = LinkLimits()
"""The limits of the product."""
