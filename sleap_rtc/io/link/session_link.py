"""A link over a session: the calls of its users, and the events that wake them."""

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar, Generic, TypeVar

import trio
from typing_extensions import override

from sleap_rtc.io.alarm import Alarm
from sleap_rtc.io.link.limits import LinkLimits
from sleap_rtc.io.link.link import Link, LinkClosedError, LinkStatistics, ReceivedT_co
from sleap_rtc.io.link.session import Phase, ProofShown, Session
from sleap_rtc.proto.messages import Message
from sleap_rtc.proto.route.kinds import LinkKindName
from sleap_rtc.proto.transfer.frames import Frame

OutputT_co = TypeVar("OutputT_co", covariant=True)


def ignore_output(_output: object) -> None:
    """Ignore the output of a client, which gets no proof and shares no socket."""


class SessionLink(Link[ReceivedT_co], Generic[ReceivedT_co, OutputT_co]):
    """A link whose protocol is a session; the kinds differ in how its bytes travel.

    A waiting call registers an event and its condition. `pump` is synchronous: it sends
    waiting data, runs the outputs of the session, and sets the event of every call
    whose condition is true.

    Args:
        session: The protocol.
        limits: The limits of the link.
        on_output: Called with each output of the session.

    Attributes:
        kind: The transport.
        session: As above.
    """

    kind: ClassVar[LinkKindName]

    def __init__(
        self,
        session: Session[ReceivedT_co, OutputT_co],
        limits: LinkLimits,
        on_output: Callable[[ProofShown | OutputT_co], None] = ignore_output,
    ) -> None:
        self.session = session
        self._limits = limits
        self._on_output = on_output
        self._waiting: dict[trio.Event, Callable[[], bool]] = {}
        self._alarm = Alarm()

    # ------------------------------------------------------------- for its users

    @property
    @override
    def peer(self) -> str:
        return self.session.peer

    @override
    async def send_message(self, message: Message) -> None:
        session = self.session
        await trio.lowlevel.checkpoint()
        await self._until(lambda: session.has_room_for_message)
        session.send_message(message)
        self.pump()

    @override
    async def receive_message(self) -> ReceivedT_co:
        session = self.session
        await trio.lowlevel.checkpoint()
        while (message := session.next_message()) is None:
            await self._until_arrived(lambda: session.has_message)
        if session.has_news:
            self.pump()
        return message

    @override
    async def send_frame(self, frame: Frame) -> None:
        session = self.session
        await trio.lowlevel.checkpoint()
        await self._until(lambda: session.has_room_for_frame)
        session.send_frame(frame)
        self.pump()

    @override
    async def receive_frame(self) -> Frame:
        session = self.session
        await trio.lowlevel.checkpoint()
        while (frame := session.next_frame()) is None:
            await self._until_arrived(lambda: session.has_frame)
        if session.has_news:
            self.pump()
        return frame

    @override
    def statistics(self) -> LinkStatistics:
        return LinkStatistics(
            kind=self.kind,
            address=self.session.address,
            rtt=self.session.rtt,
            bytes_sent=self.session.bytes_sent,
            bytes_received=self.session.bytes_received,
            packets_lost=self._packets_lost(),
            ignored_messages=self.session.ignored_messages,
        )

    @override
    async def aclose(self, reason: str = "") -> None:
        session = self.session
        try:
            with trio.move_on_after(self._limits.flush_timeout):
                await self._until(lambda: session.all_sent)
        except LinkClosedError:
            pass
        finally:
            self.close_now(reason)

    @override
    def close_now(self, reason: str = "") -> None:
        self.session.close(reason, trio.current_time())
        self.pump()

    # --------------------------------------------------------- for its endpoint

    @abstractmethod
    async def run(self) -> None:
        """Serve a link that owns its socket until its session is finished.

        When cancelled, the socket stays open: `close_now` can still send a reason.
        """

    @abstractmethod
    async def linger(self) -> None:
        """Wait, after a close, until its reason can no longer get lost."""

    def drop(self) -> None:
        """Close a socket that the link owns, after its tasks have ended."""

    def pump(self) -> None:
        """Send waiting data, run the outputs, and wake the waiting calls.

        Sending is not a task of its own, so no cancellation can cut a record in two.
        """
        self._send()
        while self._handle_outputs():
            self._send()
        self._wake()

    async def wait_ready(self) -> None:
        """Wait until the handshake, and on a server the proof, are done.

        Raises:
            LinkClosedError: If they fail.
        """
        await self._until(lambda: self.session.state is Phase.READY)

    async def run_timer(self) -> None:
        """Serve the deadlines of the session until it is finished."""
        self._set_alarm()
        while not self.session.finished:
            await self._alarm.wait()
            self.session.handle_timeout(trio.current_time())
            self.pump()

    # --------------------------------------------------------------------- inside

    @abstractmethod
    def _send(self) -> None:
        """Send as much data of the session as the socket takes."""

    @abstractmethod
    def _packets_lost(self) -> int:
        """Count the packets that had to be sent again."""

    def _handle_outputs(self) -> bool:
        """Carry out the outputs of the session; return False if there were none."""
        found = False
        while (output := self.session.next_output()) is not None:
            self._on_output(output)
            found = True
        return found

    def _wake(self) -> None:
        """Wake the calls that can continue, and set the alarm; the end of `pump`."""
        for event, condition in self._waiting.items():
            if self.session.ended is not None or condition():
                event.set()
        self._set_alarm()

    def _set_alarm(self) -> None:
        self._alarm.set(-math.inf if self.session.finished else self._deadline())

    def _deadline(self) -> float | None:
        return self.session.deadline()

    async def _until_arrived(self, condition: Callable[[], bool]) -> None:
        """Wait for data, which may have arrived together with the end.

        Raises:
            LinkClosedError: If the session has ended, and no data is left.
        """
        try:
            await self._until(condition)
        except LinkClosedError:
            if not condition():
                raise

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Wait until the session is open and the condition is true.

        No other task runs between the check and the return, so the caller may rely on
        it.

        Raises:
            LinkClosedError: If the session has ended.
        """
        while (ended := self.session.ended) is None and not condition():
            event = trio.Event()
            self._waiting[event] = condition
            try:
                await event.wait()
            finally:
                del self._waiting[event]
        if ended is not None:
            reason = ended.describe(self.session.address)
            raise LinkClosedError(reason, silent_for=ended.silent_for)
