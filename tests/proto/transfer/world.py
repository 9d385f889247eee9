"""Two transfer machines joined in memory by a network of any quality."""

from collections.abc import Callable
from random import Random

from blake3 import blake3

from sleap_rtc.proto.transfer.chunk_map import ChunkMap
from sleap_rtc.proto.transfer.frames import ChunkHeader
from sleap_rtc.proto.transfer.machine import (
    HashMissing,
    Publish,
    ReadAndSend,
    SendMessage,
    Store,
    TransferDone,
    TransferFailed,
    TransferMessage,
)
from sleap_rtc.proto.transfer.receiver import Receiver, ReceiverLimits
from sleap_rtc.proto.transfer.sender import READ_AHEAD, Sender

CHUNK_SIZE = 4096
TRANSFER_ID = 7
NOW = 0.0


def header_of(content: bytes, index: int) -> ChunkHeader:
    """Return the header of a good chunk."""
    payload = content[index * CHUNK_SIZE : (index + 1) * CHUNK_SIZE]
    return ChunkHeader(TRANSFER_ID, index, len(payload), blake3(payload).digest())


class World:
    """A sender, a receiver, their storage, and everything that is on the way.

    `step` processes one of the events that wait, at random: control
    messages in both directions (in order), frames (in any order), reads, writes, and
    publishing.
    """

    def __init__(self, seed: int, content: bytes, window: int = 8) -> None:
        self.random = Random(seed)
        self.content = content
        self.source = content
        self.limits = ReceiverLimits(window=window)
        self.disk = bytearray(len(content))
        self.sender = Sender(TRANSFER_ID, len(content), CHUNK_SIZE)
        self.receiver = Receiver(
            TRANSFER_ID, ChunkMap(len(content), CHUNK_SIZE), self.limits
        )
        self.to_sender: list[TransferMessage] = []
        self.to_receiver: list[TransferMessage] = []
        self.frames: list[tuple[ChunkHeader, bytes]] = []
        self.reads: list[ReadAndSend | HashMissing] = []
        self.writes: list[tuple[int, bytes, bytes]] = []
        self.publishing = False
        self.duplicate_chance = 0.0
        self.damage_chance = 0.0
        self.frames_sent = 0
        self.damages = 0
        self.in_flight_when_broken = 0
        self.done = False
        self.sender_done = False
        self.failure: str | None = None
        self.sender_failure: str | None = None
        self.payloads: dict[int, bytes] = {}
        self.drain()

    # ------------------------------------------------------------- what can happen

    def step(self) -> bool:
        """Process one random event; return False if none is left."""
        choices: list[Callable[[], None]] = []
        choices += [self.deliver_to_sender] * bool(self.to_sender)
        choices += [self.deliver_to_receiver] * bool(self.to_receiver)
        choices += [self.deliver_frame] * bool(self.frames)
        choices += [self.finish_read] * bool(self.reads)
        choices += [self.finish_write] * bool(self.writes)
        choices += [self.finish_publishing] * self.publishing
        if not choices:
            return False
        self.random.choice(choices)()
        self.drain()
        return True

    def run(self, steps: int = 100_000) -> None:
        """Step until no event is left."""
        for _ in range(steps):
            if not self.step():
                return
        raise AssertionError("the transfer does not come to an end")

    def deliver_to_sender(self) -> None:
        self.sender.receive_message(self.to_sender.pop(0), NOW)

    def deliver_to_receiver(self) -> None:
        self.receiver.receive_message(self.to_receiver.pop(0), NOW)

    def deliver_frame(self) -> None:
        place = self.random.randrange(len(self.frames))
        header, payload = self.frames[place]
        if self.random.random() >= self.duplicate_chance:
            del self.frames[place]
        if self.receiver.chunk_arrived(header):
            assert header.index not in self.payloads
            self.payloads[header.index] = payload

    def finish_read(self) -> None:
        effect = self.reads.pop(self.random.randrange(len(self.reads)))
        if isinstance(effect, HashMissing):
            indexes = range(effect.first, effect.first + effect.count)
            self.sender.hashes_read([self.read(index)[1] for index in indexes])
            return
        payload, digest = self.read(effect.index)
        header = ChunkHeader(TRANSFER_ID, effect.index, len(payload), digest)
        if self.random.random() < self.damage_chance:
            payload = payload[:-1] + bytes([payload[-1] ^ 1])
        self.frames.append((header, payload))
        self.frames_sent += 1
        self.sender.chunk_sent(effect.index, digest)

    def read(self, index: int) -> tuple[bytes, bytes]:
        payload = self.source[index * CHUNK_SIZE : (index + 1) * CHUNK_SIZE]
        return payload, blake3(payload).digest()

    def finish_write(self) -> None:
        place = self.random.randrange(len(self.writes))
        index, payload, digest = self.writes.pop(place)
        if blake3(payload).digest() == digest:
            start = index * CHUNK_SIZE
            self.disk[start : start + len(payload)] = payload
            self.receiver.chunk_stored(index)
        else:
            self.damages += 1
            self.receiver.chunk_damaged(index)

    def finish_publishing(self) -> None:
        self.publishing = False
        self.receiver.published()

    # ----------------------------------------------------------------- what breaks

    def lose_link(self) -> None:
        """Lose the data on its way; arrived chunks are still written and published."""
        self._lose_what_is_on_the_way()
        while self.writes:
            self.finish_write()
        if self.publishing:
            self.finish_publishing()
        self.drain()
        if not self.done:
            self._connect_again()

    def kill_receiver(self) -> None:
        """End the receiving process; a new one has the chunk map and the disk."""
        self._lose_what_is_on_the_way()
        self.writes.clear()
        self.publishing = False
        self._connect_again()

    def _connect_again(self) -> None:
        """Make new machines from the file and the chunk map alone."""
        self.to_sender.clear()
        self.payloads.clear()
        self.sender = Sender(TRANSFER_ID, len(self.content), CHUNK_SIZE)
        self.sender_done = False
        journaled = self.receiver.chunk_map
        self.receiver = Receiver(TRANSFER_ID, journaled, self.limits)
        self.drain()

    def _lose_what_is_on_the_way(self) -> None:
        self.in_flight_when_broken += self.receiver.outstanding
        self.to_sender.clear()
        self.to_receiver.clear()
        self.frames.clear()
        self.reads.clear()

    # ---------------------------------------------------------------------- outputs

    def drain(self) -> None:
        """Run every output of both machines, and check the credits."""
        self._drain_receiver()
        self._drain_sender()
        assert self.receiver.outstanding <= self.limits.window
        assert len(self.writes) <= self.limits.window
        assert sum(isinstance(r, ReadAndSend) for r in self.reads) <= READ_AHEAD

    def _drain_receiver(self) -> None:
        while (output := self.receiver.next_output()) is not None:
            match output:
                case SendMessage(message=message):
                    self.to_sender.append(message)
                case Store(index=index, digest=digest):
                    self.writes.append((index, self.payloads.pop(index), digest))
                case Publish():
                    self.publishing = True
                case TransferDone():
                    self.done = True
                case TransferFailed(reason=reason):
                    self.failure = reason

    def _drain_sender(self) -> None:
        while (output := self.sender.next_output()) is not None:
            match output:
                case SendMessage(message=message):
                    self.to_receiver.append(message)
                case ReadAndSend() | HashMissing():
                    self.reads.append(output)
                case TransferDone():
                    self.sender_done = True
                case TransferFailed(reason=reason):
                    self.sender_failure = reason
