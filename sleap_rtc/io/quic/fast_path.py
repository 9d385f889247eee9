"""A QUIC connection whose bulk takes a short way.

What makes a transfer, packets that carry one frame of one stream in order, is sealed,
opened and accounted for here, in batches. Everything else, and each packet that is the
least unusual, is left to aioquic. Both ways share its numbers, windows and timers.
Those are private attributes of its connection: the bounds of its version in
`pyproject.toml` follow from this module.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

from aioquic.buffer import Buffer  # type: ignore[attr-defined] # no __all__
from aioquic.quic.connection import QuicConnection, QuicConnectionState
from aioquic.quic.packet import (
    QuicPacketType,
    QuicStreamFrame,
    pull_quic_transport_parameters,
)
from aioquic.quic.packet_builder import QuicDeliveryState, QuicSentPacket
from aioquic.quic.recovery import MAX_ACK_RANGES
from aioquic.quic.stream import FinalSizeError, QuicStream
from aioquic.tls import Epoch

from sleap_rtc.io.quic.bulk import BulkSender, Payload, Piece
from sleap_rtc.io.quic.congestion import Congestion, Pacer
from sleap_rtc.io.quic.mtu import MtuSearch
from sleap_rtc.io.quic.packets import (
    CONNECTION_ID_LENGTH,
    MASK_SIZE,
    NUMBER_SIZE,
    TAG_SIZE,
    PacketKeys,
)

Address = tuple[Any, ...]
"""A socket address, as the operating system gives it."""

Datagram = tuple[bytes, Address]

PACKETS_PER_TURN = 64
BYTES_PER_TURN = 512 * 1024
"""Sent at most before anything else gets its turn: a millisecond or two."""

PACKETS_PER_ACK = 32
"""That arrived are acknowledged at once; fewer wait for a millisecond, so that a batch
costs one acknowledgement and not one for each pair of packets (RFC 9000, 13.2.2)."""

PACKETS_PER_KEY = 4_000_000
"""Sent before the keys are renewed: AES-GCM allows 2^23 (RFC 9001, 6.6)."""

_STREAM, _WITH_OFFSET, _WITH_LENGTH = 0x08, 0x04, 0x02
"""The kind of a frame, and its flags (RFC 9000, 19.8)."""

_LARGEST_ID = 63
"""Ids of streams up to it take one byte."""

_OFFSET_SIZE = 8
_OFFSET_MARK = 0b11 << 62
"""An integer that takes eight bytes (RFC 9000, 16)."""

_SHORTEST_FRAME = 2 + 2 * 8
"""Bytes in which all integers of a frame have room."""


_PING, _PADDING = b"\x01", b"\x00"


class _Draft(NamedTuple):
    """A packet that is about to be made.

    Args:
        payload: Its frames.
        on_delivery: Called with what became of it.
        arguments: Of that call, too.
        counts: False if it is not part of what congestion control knows.
    """

    payload: bytes
    on_delivery: Callable[..., None]
    arguments: tuple[int, ...]
    counts: bool = True


class BulkConnection(QuicConnection):
    """A QUIC connection that is quick with one stream for bulk each way.

    Args:
        largest_datagram: What the size of datagrams may grow to where the path allows.
        options: Those of `QuicConnection`.
    """

    def __init__(self, *, largest_datagram: int, **options: Any) -> None:
        super().__init__(**options)
        self._mtu = MtuSearch(self._max_datagram_size, largest_datagram)
        # What the configuration names is only reached as a part of the recovery.
        self.congestion = cast(Congestion, self._loss._cc)
        self.pacer = Pacer(self.congestion)
        self._loss._pacer = self.pacer
        self._bulk: QuicStream | None = None
        self._bulk_sender = BulkSender()
        self._bulk_head = b""
        self._opening_keys: PacketKeys | None = None
        self._sealing_keys: PacketKeys | None = None
        self._sealed_with_key = 0
        self._unnoted = 0
        self._unanswered = 0

    # -------------------------------------------------------------------- sending

    def send_bulk(self, stream_id: int, data: Payload) -> None:
        """Queue bytes of the stream for bulk, of which there is only one.

        They are not copied, so they must not change any more.
        """
        if self._bulk is None:
            self._bulk = self._get_or_create_stream_for_send(stream_id)
            self._bulk_head = bytes((_STREAM | _WITH_OFFSET, stream_id))
        self._bulk_sender.queue(data)

    def datagrams_to_send(self, now: float) -> list[Datagram]:
        """Return what to send now: first what aioquic has, then bulk."""
        before = self.congestion.bytes_in_flight
        datagrams = super().datagrams_to_send(now)
        self.pacer.correct(self.congestion.bytes_in_flight - before)
        if self._is_plain() and self._network_paths[0].is_validated:
            if self._bulk is not None and not self._bulk.is_blocked:
                datagrams += self._bulk_to_send(self._bulk, now)
            if (size := self._mtu.next_probe()) is not None:
                datagrams += self._seal([self._probe_of(size)], now)
        return datagrams

    def _is_plain(self) -> bool:
        """True between the handshake and the end."""
        return self._handshake_confirmed and not (
            self._close_pending or self._state is not QuicConnectionState.CONNECTED
        )

    def _bulk_to_send(self, stream: QuicStream, now: float) -> list[Datagram]:
        pieces = self._pieces_to_send(stream, now)
        on_delivery = self._on_bulk_delivery
        return self._seal(
            [
                _Draft(self._frame_of(piece), on_delivery, (piece.start, piece.stop))
                for piece in pieces
            ],
            now,
        )

    def _seal(self, drafts: Sequence[_Draft], now: float) -> list[Datagram]:
        """Make packets, and account for them."""
        if not drafts:
            return []
        context = self._cryptos[Epoch.ONE_RTT].send
        if self._sealing_keys is None:
            self._sealing_keys = PacketKeys(context)
        self._sealing_keys.follow(context)
        first, space = self._packet_number, self._spaces[Epoch.ONE_RTT]
        sealed = self._sealing_keys.seal(
            [draft.payload for draft in drafts], first, self._peer_cid.cid
        )
        self._packet_number += len(sealed)
        for number, (draft, data) in enumerate(zip(drafts, sealed, strict=True), first):
            packet = QuicSentPacket(
                epoch=Epoch.ONE_RTT,
                in_flight=draft.counts,
                is_ack_eliciting=True,
                is_crypto_packet=False,
                packet_number=number,
                packet_type=QuicPacketType.ONE_RTT,
                sent_time=now,
                sent_bytes=len(data),
                delivery_handlers=[(draft.on_delivery, draft.arguments)],
            )
            self._loss.on_packet_sent(packet=packet, space=space)
        self._loss._time_of_last_sent_ack_eliciting_packet = now
        path = self._network_paths[0]
        path.bytes_sent += sum(map(len, sealed))
        if not self._ack_eliciting_sent_since_receipt:
            # RFC 9000, 10.1: the idle time begins again with the first of them.
            self._close_at = now + self._idle_timeout()
            self._ack_eliciting_sent_since_receipt = True
        self._renew_keys(len(sealed))
        return [(data, path.addr) for data in sealed]

    def _probe_of(self, size: int) -> _Draft:
        """Make a packet that says nothing, whose loss is no sign of congestion."""
        header = 1 + len(self._peer_cid.cid) + NUMBER_SIZE
        payload = _PING.ljust(size - header - TAG_SIZE, _PADDING)
        return _Draft(payload, self._on_probe_delivery, (size,), counts=False)

    def _on_probe_delivery(self, delivery: QuicDeliveryState, size: int) -> None:
        if delivery is QuicDeliveryState.ACKED:
            self._mtu.probe_arrived(size)
            self._resize()
        else:
            self._mtu.probe_lost()

    def _on_bulk_delivery(
        self, delivery: QuicDeliveryState, start: int, stop: int
    ) -> None:
        self._bulk_sender.on_delivery(delivery, start, stop)
        if delivery is QuicDeliveryState.ACKED:
            self._mtu.packet_arrived(stop - start)
        else:
            self._mtu.packet_lost(stop - start)
            self._resize()

    def _resize(self) -> None:
        self._max_datagram_size = self._mtu.size
        self.congestion.max_datagram_size = self._mtu.size

    def _parse_transport_parameters(
        self, data: bytes, from_session_ticket: bool = False
    ) -> None:
        super()._parse_transport_parameters(data, from_session_ticket)
        largest = pull_quic_transport_parameters(Buffer(data=data)).max_udp_payload_size
        if largest is not None:
            self._mtu.limit(largest)

    def _pieces_to_send(self, stream: QuicStream, now: float) -> list[Piece]:
        """Take what may be sent in this turn, and see to it that there is a next."""
        sender = self._bulk_sender
        header = 1 + len(self._peer_cid.cid) + NUMBER_SIZE + len(self._bulk_head)
        room = self._max_datagram_size - header - _OFFSET_SIZE - TAG_SIZE
        window = self._loss.congestion_window - self._loss.bytes_in_flight
        pieces: list[Piece] = []
        most = min(PACKETS_PER_TURN, BYTES_PER_TURN // self._max_datagram_size)
        # Datagrams may grow beyond a small window; with nothing in flight, no
        # acknowledgement would ever widen it.
        is_stuck = self._loss.bytes_in_flight == 0
        while window >= self._max_datagram_size or (is_stuck and not pieces):
            allowed = self._remote_max_data - self._remote_max_data_used
            limit = min(sender.sent + allowed, stream.max_stream_data_remote)
            if not sender.has_more(limit):
                self.congestion.note_idle()
                break
            self._pacing_at = self.pacer.next_send_time(now)
            if self._pacing_at is not None:
                break
            if len(pieces) == most:
                self._pacing_at = now  # at the next turn
                break
            before = sender.sent
            piece = sender.take(room, limit)
            self._remote_max_data_used += sender.sent - before
            pieces.append(piece)
            size = piece.stop - piece.start + self._max_datagram_size - room
            window -= size
            self.pacer.spend(size, now)
        return pieces

    def _frame_of(self, piece: Piece) -> bytes:
        """Write a frame that goes on to the end of its packet (RFC 9000, 19.8)."""
        offset = (_OFFSET_MARK | piece.start).to_bytes(_OFFSET_SIZE)
        return b"".join((self._bulk_head, offset, *piece.views))

    def _renew_keys(self, sent: int) -> None:
        self._sealed_with_key += sent
        if self._sealed_with_key >= PACKETS_PER_KEY:
            self._sealed_with_key = 0
            # The next packet of aioquic's own making uses the new keys.
            self.request_key_update()
            self._send_probe()

    # ------------------------------------------------------------------ receiving

    def receive_datagrams(self, datagrams: Sequence[Datagram], now: float) -> None:
        """Take a batch of datagrams; garbage among them is ignored."""
        keys = self._keys_to_open()
        masks = b"" if keys is None else keys.masks([data for data, _ in datagrams])
        at = 0
        for data, address in datagrams:
            mask = masks[at : at + MASK_SIZE]
            at += MASK_SIZE
            if keys is not None and self._take_untrusted(data, address, keys, mask):
                continue
            self._note_arrived(now)
            self.receive_datagram(data, address, now)
            if self._keys_to_open() is not keys:
                keys = None
        self._note_arrived(now)

    def _keys_to_open(self) -> PacketKeys | None:
        """Return the keys of bulk; None while there is none."""
        if not self._is_plain():
            return None
        context = self._cryptos[Epoch.ONE_RTT].recv
        if self._opening_keys is None:
            self._opening_keys = PacketKeys(context)
        self._opening_keys.follow(context)
        return self._opening_keys

    def _take_untrusted(
        self, data: bytes, address: Address, keys: PacketKeys, mask: bytes
    ) -> bool:
        """Take a packet of bulk; False leaves it, untouched, to aioquic."""
        if (
            address != self._network_paths[0].addr
            or data[1 : 1 + CONNECTION_ID_LENGTH] != self.host_cid
        ):
            return False
        space = self._spaces[Epoch.ONE_RTT]
        opened = keys.open_untrusted(data, mask, space.expected_packet_number)
        if opened is None:
            return False
        number, payload = opened
        if number != space.largest_received_packet + 1:
            # One is missing, or late, or here again.
            return False
        if not self._take_frame_untrusted(payload):
            return False
        space.expected_packet_number = number + 1
        space.largest_received_packet = number
        space.received_packets.add(number)
        self._unnoted += 1
        return True

    def _take_frame_untrusted(self, payload: bytes) -> bool:
        """Take what a packet with nothing but data of a known stream holds."""
        kind, stream_id = payload[0], payload[1]
        stream = self._streams.get(stream_id)
        if (
            kind & ~_WITH_LENGTH != _STREAM | _WITH_OFFSET
            or stream is None
            or stream_id > _LARGEST_ID
            or len(payload) < _SHORTEST_FRAME
        ):
            return False
        offset, at = _read_integer(payload, 2)
        length = len(payload) - at
        if kind & _WITH_LENGTH:
            length, at = _read_integer(payload, at)
        end = offset + length
        window, receiver = self._local_max_data, stream.receiver
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
            self._events.append(event)
        return True

    def _note_arrived(self, now: float) -> None:
        """Account for the packets that were taken since the last time."""
        if not self._unnoted:
            return
        space = self._spaces[Epoch.ONE_RTT]
        stop = space.largest_received_packet + 1
        space.largest_received_time = now
        space.ack_queue.add(stop - self._unnoted, stop)
        if len(space.ack_queue) > MAX_ACK_RANGES:
            space.ack_queue.shift()
        if space.ack_at is None:
            space.ack_at = now + self._ack_delay
            self._unanswered = 0
        self._unanswered += self._unnoted
        if self._unanswered >= PACKETS_PER_ACK:
            space.ack_at = now
        self._unnoted = 0
        self._close_at = now + self._idle_timeout()
        self._ack_eliciting_sent_since_receipt = False


def _read_integer(data: bytes, at: int) -> tuple[int, int]:
    """Read an integer of variable length (RFC 9000, 16), and where it ends."""
    size = 1 << (data[at] >> 6)
    value = int.from_bytes(data[at : at + size])
    return value & (1 << 8 * size - 2) - 1, at + size
