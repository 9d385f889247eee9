"""Fast path for receiving: packets with one frame of a stream, opened in batches.

A packet is accepted here if it is the next one, on the known path, sealed with the
current keys, and holds nothing but data of an open stream. Each other packet is left,
untouched, to aioquic. Packet numbers, windows and timers are those of aioquic, which
writes the acknowledgements.
"""

from collections.abc import Sequence
from typing import cast

from aioquic.quic.packet import QuicStreamFrame
from aioquic.quic.recovery import MAX_ACK_RANGES
from aioquic.quic.stream import FinalSizeError

from sleap_rtc.io.quic.connection import Address, AioquicConnection, Datagram
from sleap_rtc.io.quic.packets import (
    CONNECTION_ID_LENGTH,
    MASK_SIZE,
    STREAM_FRAME,
    WITH_LENGTH,
    WITH_OFFSET,
    PacketKeys,
)

PACKETS_PER_ACK = 32
ACK_DELAY = 0.001
"""Packets, and seconds, after which an acknowledgement is due: a batch gets one,
instead of one for every two packets (RFC 9000, 13.2.2)."""

_LARGEST_STREAM_ID = 63
"""The largest id of a stream that takes one byte."""

_MIN_FRAME_SIZE = 2 + 2 * 8
"""Bytes of a frame whose integers have their largest size."""


class FastReceiver:
    """The receiving half of the streams of a connection.

    Args:
        connection: The connection.
    """

    def __init__(self, connection: AioquicConnection) -> None:
        self._connection = connection
        self._keys: PacketKeys | None = None
        self._unregistered = 0
        self._unacknowledged = 0

    def receive_datagrams(self, datagrams: Sequence[Datagram], now: float) -> None:
        """Receive a batch of datagrams; garbage among them is ignored."""
        connection, keys = self._connection, self._current_keys()
        masks = b"" if keys is None else keys.masks([data for data, _ in datagrams])
        at = 0
        for data, address in datagrams:
            mask = masks[at : at + MASK_SIZE]
            at += MASK_SIZE
            if keys is not None and self._accept_untrusted(data, address, keys, mask):
                continue
            self._register(now)
            connection.receive_datagram(data, address, now)
            if self._current_keys() is not keys:
                keys = None
        self._register(now)

    def _current_keys(self) -> PacketKeys | None:
        """Return the keys of 1-RTT packets; None unless they are in use."""
        if not self._connection.is_established:
            return None
        context = self._connection.opening_context
        if self._keys is None:
            self._keys = PacketKeys(context)
        self._keys.follow(context)
        return self._keys

    def _accept_untrusted(
        self, data: bytes, address: Address, keys: PacketKeys, mask: bytes
    ) -> bool:
        """Accept the next packet of a stream; return False to leave it to aioquic."""
        connection = self._connection
        if (
            address != connection.peer_address
            or data[1 : 1 + CONNECTION_ID_LENGTH] != connection.host_cid
        ):
            return False
        space = connection.packet_space
        opened = keys.open_untrusted(data, mask, space.expected_packet_number)
        if opened is None:
            return False
        number, payload = opened
        if number != space.largest_received_packet + 1:
            # An earlier packet is missing, or this one is late or a duplicate.
            return False
        if not self._accept_frame_untrusted(payload):
            return False
        space.expected_packet_number = number + 1
        space.largest_received_packet = number
        space.received_packets.add(number)
        self._unregistered += 1
        return True

    def _accept_frame_untrusted(self, payload: bytes) -> bool:
        """Accept the only frame of a packet if it is data of an open stream."""
        if len(payload) < _MIN_FRAME_SIZE:
            return False
        connection = self._connection
        kind, stream_id = payload[0], payload[1]
        stream = connection.streams.get(stream_id)
        if (
            kind & ~WITH_LENGTH != STREAM_FRAME | WITH_OFFSET
            or stream is None
            or stream_id > _LARGEST_STREAM_ID
        ):
            return False
        offset, at = _read_integer(payload, 2)
        length = len(payload) - at
        if kind & WITH_LENGTH:
            length, at = _read_integer(payload, at)
        end = offset + length
        window, receiver = connection.receive_window, stream.receiver
        fresh = max(0, end - receiver.highest_offset)
        if (
            length < 1
            or at + length != len(payload)
            or end > stream.max_stream_data_local
            or fresh > window.value - window.used
            or receiver.is_finished
        ):
            return False
        frame = QuicStreamFrame(cast(bytes, memoryview(payload)[at:]), offset=offset)
        try:
            event = receiver.handle_frame(frame)
        except FinalSizeError:
            return False
        window.used += fresh
        if event is not None:
            connection.queue_event(event)
        return True

    def _register(self, now: float) -> None:
        """Account for the packets that were accepted since the last call."""
        if not self._unregistered:
            return
        connection = self._connection
        space = connection.packet_space
        stop = space.largest_received_packet + 1
        space.largest_received_time = now
        space.ack_queue.add(stop - self._unregistered, stop)
        if len(space.ack_queue) > MAX_ACK_RANGES:
            space.ack_queue.shift()
        if space.ack_at is None:
            space.ack_at = now + ACK_DELAY
            self._unacknowledged = 0
        self._unacknowledged += self._unregistered
        if self._unacknowledged >= PACKETS_PER_ACK:
            space.ack_at = now
        self._unregistered = 0
        connection.restart_idle_timer(now)


def _read_integer(data: bytes, at: int) -> tuple[int, int]:
    """Return an integer of variable length, and where it ends (RFC 9000, 16)."""
    size = 1 << (data[at] >> 6)
    value = int.from_bytes(data[at : at + size])
    return value & (1 << 8 * size - 2) - 1, at + size
