"""One end of a link that carries a file from memory to nowhere.

    python -m bench.link_end receive '{"seconds": 6, "warm": 2}'
    python -m bench.link_end send '{"address": ...}'

`impaired.py` starts both. Each prints one line of JSON at its end; the receiver prints
`Where` first. The file goes in verified chunks, as every file does; no disk takes part.
"""

import hashlib
import sys
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import msgspec
import trio
from aioquic.quic.congestion.base import create_congestion_control
from aioquic.quic.packet_builder import QuicSentPacket
from blake3 import blake3
from typing_extensions import override

from sleap_rtc.io.connect.dial import dial
from sleap_rtc.io.connect.listener import open_listener
from sleap_rtc.io.link.certificates import make_certificate
from sleap_rtc.io.link.link import Link, LinkClosedError, LinkStatistics
from sleap_rtc.io.nursery import open_background_nursery
from sleap_rtc.io.quic import engine
from sleap_rtc.io.quic.congestion import AioquicCongestion
from sleap_rtc.io.storage.files import Buffer
from sleap_rtc.io.transfer.transfers import TransferError, Transfers
from sleap_rtc.proto.errors import RemoteProtocolError
from sleap_rtc.proto.messages import Auth, FileOffer, Message, OfferedFile
from sleap_rtc.proto.quic.congestion import WINDOW_PACING_GAIN, CongestionControl, Pacer
from sleap_rtc.proto.quic.mtu import MtuSearch
from sleap_rtc.proto.route.kinds import LinkKindName
from sleap_rtc.proto.transfer.chunk_map import ChunkMap
from sleap_rtc.proto.transfer.machine import TransferMessage

LOOPBACK = "127.0.0.1"
ENDLESS = 2**36
"""Bytes of the file; the receiver stops long before its end."""

AUTH = Auth(session="5" * 32, proof=hashlib.sha256(b"bench").hexdigest())


class Where(msgspec.Struct, frozen=True):
    """The address of a receiver, and its certificate."""

    port: int
    certificate: bytes


class Task(msgspec.Struct, frozen=True):
    """The task of a sender.

    Args:
        address: The address of the receiver.
        certificate: The certificate of the receiver.
        kind: The link.
        congestion: The congestion control of QUIC; an empty one is the product's own.
        chunk_size: Bytes of a chunk. A fixed number of them is on the way at most.
    """

    address: tuple[str, int]
    certificate: bytes
    kind: LinkKindName
    congestion: str
    chunk_size: int


class Span(msgspec.Struct, frozen=True):
    """Duration of the receiving: it lasts longer if too little has arrived for a rate.

    Args:
        seconds: Seconds from the offer on.
        warm: Seconds at the beginning that do not count.
    """

    seconds: float
    warm: float

    def is_over(self, arrivals: list[tuple[float, int]]) -> bool:
        """Return whether the receiver has seen enough.

        Args:
            arrivals: Seconds, and the bytes that had arrived by then.
        """
        late = arrivals[-2:]
        return (
            len(late) == 2
            and late[1][0] >= self.seconds
            and self.warm <= late[0][0] < late[1][0]
        )


class Sent(msgspec.Struct, frozen=True):
    """Findings of a sender."""

    statistics: LinkStatistics
    cpu_seconds: float


class Received(msgspec.Struct, frozen=True):
    """Findings of a receiver.

    Args:
        arrivals: Seconds since the offer, and the bytes that were stored until then,
            after each chunk.
        cpu_seconds: Processor time that it used.
    """

    arrivals: list[tuple[float, int]]
    cpu_seconds: float


class _Nowhere:
    """A file that checks the hashes of its chunks and discards them."""

    def __init__(self, chunk_size: int) -> None:
        self.chunk_map = ChunkMap(ENDLESS, chunk_size)

    def write(self, _index: int, payload: Buffer, digest: bytes) -> bool:
        return blake3(payload).digest() == digest

    def publish(self) -> Path:
        return Path()

    def keep(self) -> None: ...

    def abandon(self) -> None: ...


class _Memory:
    """An endless file of the same chunk."""

    def __init__(self, chunk_size: int) -> None:
        self._chunk = hashlib.shake_256(b"bench").digest(chunk_size)
        self._digest = blake3(self._chunk).digest()

    def read(self, _index: int) -> tuple[Buffer, bytes]:
        return self._chunk, self._digest

    def check_unchanged(self) -> bool:
        return True


async def receive(span: Span) -> Received:
    """Receive one file over one link, for the time of a span."""
    certificate = make_certificate()
    arrivals: list[tuple[float, int]] = []
    async with (
        open_listener(LOOPBACK, 0, certificate, _judge) as listener,
        open_background_nursery() as nursery,
    ):
        _say(Where(listener.port, certificate.certificate_der))
        link = await listener.accept()
        transfers = Transfers(link)
        nursery.start_soon(transfers.run)
        message = await link.receive_message()
        if not isinstance(message, FileOffer):
            raise SystemExit(f"a {type(message).__name__} came instead of a file")
        nursery.start_soon(_deliver, link, transfers)
        began = time.monotonic()

        def note(size: int) -> None:
            arrivals.append((time.monotonic() - began, size))
            if span.is_over(arrivals):
                enough.cancel()

        with trio.CancelScope() as enough:
            await transfers.receive_file(
                message.transfer_id,
                _Nowhere(message.file.chunk_size),
                on_progress=note,
            )
    return Received(arrivals, time.process_time())


async def send(task: Task) -> Sent:
    """Send until the receiver has seen enough."""
    if task.congestion:
        _replace_congestion_control(task.congestion)
    async with (
        dial(
            {task.kind: [task.address]},
            certificate_der=task.certificate,
            auth=AUTH,
        ) as (link, _),
        open_background_nursery() as nursery,
    ):
        transfers = Transfers(link)
        nursery.start_soon(transfers.run)
        nursery.start_soon(_deliver, link, transfers)
        offer = OfferedFile(name="endless", size=ENDLESS, chunk_size=task.chunk_size)
        try:
            await transfers.send_file(1, offer, _Memory(task.chunk_size))
        except (LinkClosedError, TransferError):
            pass  # the receiver has seen enough
        return Sent(link.statistics(), time.process_time())


async def _deliver(link: Link[Message], transfers: Transfers) -> None:
    try:
        while True:
            message = await link.receive_message()
            if isinstance(message, TransferMessage):
                transfers.receive_message(message)
    except LinkClosedError:
        pass


def _judge(auth: Auth) -> str:
    if auth.proof != AUTH.proof:
        raise RemoteProtocolError("the proof is wrong")
    return "the sender"


def _replace_congestion_control(name: str) -> None:
    """Replace the congestion control of this process by one of aioquic."""

    class Classic(AioquicCongestion):
        """Sets the window as aioquic does, and paces by the window."""

        def __init__(
            self, control: CongestionControl, pacer: Pacer, mtu: MtuSearch
        ) -> None:
            super().__init__(control, pacer, mtu)
            self._classic = create_congestion_control(
                name, max_datagram_size=control.max_datagram_size
            )

        @override
        def on_packet_sent(self, *, packet: QuicSentPacket) -> None:
            super().on_packet_sent(packet=packet)
            self._classic.on_packet_sent(packet=packet)

        @override
        def on_packet_acked(self, *, now: float, packet: QuicSentPacket) -> None:
            super().on_packet_acked(now=now, packet=packet)
            self._classic.on_packet_acked(now=now, packet=packet)

        @override
        def on_packets_expired(self, *, packets: Iterable[QuicSentPacket]) -> None:
            packets = list(packets)
            super().on_packets_expired(packets=packets)
            self._classic.on_packets_expired(packets=packets)

        @override
        def on_packets_lost(
            self, *, now: float, packets: Iterable[QuicSentPacket]
        ) -> None:
            packets = list(packets)
            super().on_packets_lost(now=now, packets=packets)
            self._classic.on_packets_lost(now=now, packets=packets)
            self._control.congestion_window = self._classic.congestion_window

        @override
        def on_rtt_measurement(self, *, now: float, rtt: float) -> None:
            super().on_rtt_measurement(now=now, rtt=rtt)
            self._classic.on_rtt_measurement(now=now, rtt=rtt)
            window = self._classic.congestion_window
            self._control.congestion_window = window
            self._control.pacing_rate = WINDOW_PACING_GAIN * window / max(rtt, 1e-3)

    engine.AioquicCongestion = Classic  # type: ignore[attr-defined] # not exported


def _say(said: msgspec.Struct) -> None:
    print(msgspec.json.encode(said).decode(), flush=True)


def main() -> None:
    """Run the end that the command line names."""
    if sys.argv[1] == "receive":
        _say(trio.run(receive, msgspec.json.decode(sys.argv[2], type=Span)))
    else:
        _say(trio.run(partial(send, msgspec.json.decode(sys.argv[2], type=Task))))


if __name__ == "__main__":
    main()
