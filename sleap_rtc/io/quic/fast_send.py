"""Fast path for sending: packets with one frame of the bulk stream, sealed in batches.

aioquic writes, seals and registers one packet at a time. Here the header protection of
all packets of a turn is one call, and the bytes of a frame are copied only where the
cipher needs it. Packet numbers, windows and timers are those of aioquic, which tracks
the packets that arrive and sends everything else.
"""

from aioquic.quic.packet import QuicPacketType
from aioquic.quic.packet_builder import QuicDeliveryState, QuicSentPacket
from aioquic.tls import Epoch

from sleap_rtc.io.quic.bulk import BulkSender, Payload, Piece
from sleap_rtc.io.quic.connection import AioquicConnection, Datagram
from sleap_rtc.io.quic.packets import (
    NUMBER_SIZE,
    STREAM_FRAME,
    TAG_SIZE,
    WITH_OFFSET,
    PacketKeys,
)
from sleap_rtc.proto.quic.congestion import CongestionControl, Pacer

MAX_PACKETS_PER_TURN = 64
MAX_BYTES_PER_TURN = 512 * 1024
"""Packets and bytes that are sent in one turn: a millisecond or two, after which other
connections and tasks run."""

_OFFSET_SIZE = 8
_OFFSET_MARK = 0b11 << 62
"""The bits that mark an integer of eight bytes (RFC 9000, 16)."""


class FastSender:
    """The sending half of the bulk stream of a connection.

    Args:
        connection: The connection, after its handshake.
        control: Decides how much may be in flight.
        pacer: Decides when it may be sent.
        stream_id: The stream; an id up to 63, which takes one byte.
    """

    def __init__(
        self,
        connection: AioquicConnection,
        control: CongestionControl,
        pacer: Pacer,
        stream_id: int,
    ) -> None:
        self.stream_id = stream_id
        self._connection = connection
        self._control = control
        self._pacer = pacer
        self._stream = connection.open_stream(stream_id)
        self._bulk = BulkSender()
        self._keys = PacketKeys(connection.sealing_context)
        self._frame_head = bytes((STREAM_FRAME | WITH_OFFSET, stream_id))

    @property
    def unacknowledged(self) -> int:
        """Bytes that were queued and are not acknowledged."""
        return self._bulk.unacknowledged

    @property
    def unsent(self) -> int:
        """Bytes that were queued and never sent."""
        return self._bulk.unsent

    def queue(self, data: Payload) -> None:
        """Queue bytes. They are not copied, so the caller must not change them."""
        self._bulk.queue(data)

    def datagrams_to_send(self, now: float) -> list[Datagram]:
        """Return the packets of this turn, and schedule the next if more is queued."""
        if self._stream.is_blocked:
            return []
        connection = self._connection
        pieces, has_more = self._take_pieces(now)
        datagrams = self._seal(pieces, now) if pieces else []
        if has_more:
            connection.resume_at(self._pacer.next_send_time(now) or now)
        return datagrams

    def _take_pieces(self, now: float) -> tuple[list[Piece], bool]:
        """Return the pieces of this turn, and True if more could be sent later.

        If the window is full, an acknowledgement starts the next turn, so the answer is
        False.
        """
        connection, control, bulk = self._connection, self._control, self._bulk
        size = connection.datagram_size
        overhead = self._header_size + len(self._frame_head) + _OFFSET_SIZE + TAG_SIZE
        in_flight = control.bytes_in_flight
        window = control.congestion_window - in_flight
        budget = self._pacer.budget(now)
        most = min(MAX_PACKETS_PER_TURN, MAX_BYTES_PER_TURN // size)
        pieces: list[Piece] = []
        # Datagrams may grow beyond a small window. With nothing in flight, no
        # acknowledgement would ever widen it, so one packet is sent in any case.
        while window >= size or (not in_flight and not pieces):
            limit = min(
                bulk.sent + connection.send_credit, self._stream.max_stream_data_remote
            )
            if not bulk.has_more(limit):
                break
            if budget <= 0 or len(pieces) == most:
                return pieces, True
            before = bulk.sent
            piece = bulk.take(size - overhead, limit)
            connection.use_send_credit(bulk.sent - before)
            pieces.append(piece)
            sent = piece.stop - piece.start + overhead
            window -= sent
            budget -= sent
        return pieces, False

    @property
    def _header_size(self) -> int:
        return 1 + len(self._connection.peer_connection_id) + NUMBER_SIZE

    def _seal(self, pieces: list[Piece], now: float) -> list[Datagram]:
        connection = self._connection
        self._keys.follow(connection.sealing_context)
        first = connection.packet_number
        # They live until the end of the turn: freed before the packets are made, they
        # would let the heap shrink and grow again in each turn.
        frames = [self._frame(piece) for piece in pieces]
        sealed = self._keys.seal(frames, first, connection.peer_connection_id)
        on_delivery = self._on_delivery
        packets = [
            QuicSentPacket(
                epoch=Epoch.ONE_RTT,
                in_flight=True,
                is_ack_eliciting=True,
                is_crypto_packet=False,
                packet_number=number,
                packet_type=QuicPacketType.ONE_RTT,
                sent_time=now,
                sent_bytes=len(data),
                delivery_handlers=[(on_delivery, (piece.start, piece.stop))],
            )
            for number, (piece, data) in enumerate(
                zip(pieces, sealed, strict=True), first
            )
        ]
        connection.register_sent(packets, now)
        address = connection.peer_address
        return [(data, address) for data in sealed]

    def _frame(self, piece: Piece) -> bytes:
        """Return a frame that ends with its packet (RFC 9000, 19.8)."""
        offset = (_OFFSET_MARK | piece.start).to_bytes(_OFFSET_SIZE)
        return b"".join((self._frame_head, offset, *piece.views))

    def _on_delivery(self, delivery: QuicDeliveryState, start: int, stop: int) -> None:
        if delivery is QuicDeliveryState.ACKED:
            self._bulk.piece_acknowledged(start, stop)
        else:
            self._bulk.piece_lost(start, stop)
