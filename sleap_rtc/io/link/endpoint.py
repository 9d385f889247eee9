"""The two ends of a link, the same for all kinds."""

import math
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import Generic, TypeVar

import trio

from sleap_rtc.io.link.limits import LinkLimits
from sleap_rtc.io.link.link import DialError, DialFailure, Link, LinkClosedError
from sleap_rtc.io.link.session_link import SessionLink
from sleap_rtc.io.nursery import open_background_nursery
from sleap_rtc.proto.errors import InvalidInput, RemoteProtocolError
from sleap_rtc.proto.messages import Auth, ClientMessage, WorkerMessage
from sleap_rtc.proto.route.kinds import LinkKindName

Authenticate = Callable[[Auth], str]
"""Returns the name of the client that a proof belongs to, or raises
`RemoteProtocolError`. The client learns only that it is refused."""

ServedLink = SessionLink[ClientMessage, object]
"""A link of any kind that was accepted."""

DialedLink = SessionLink[WorkerMessage, object]
"""A link of any kind that was dialed."""

LinkT_co = TypeVar("LinkT_co", bound=ServedLink, covariant=True)
ServerT = TypeVar("ServerT", bound="LinkServer[ServedLink]")


class Acceptor:
    """The admission of clients to a listener; all kinds of link share it.

    Args:
        authenticate: Checks the proofs.
    """

    def __init__(self, authenticate: Authenticate) -> None:
        self._authenticate = authenticate
        # Unbounded: each link in it has used up a proof of its own.
        self._ready, self._accepted = trio.open_memory_channel[Link[ClientMessage]](
            math.inf
        )

    def judge(self, link: ServedLink, auth: Auth) -> None:
        """Check the proof that a link showed, and admit or refuse its client."""
        now = trio.current_time()
        try:
            peer = self._authenticate(auth)
        except RemoteProtocolError:
            link.session.refuse(now)
        else:
            link.session.admit(peer, now)
            self._ready.send_nowait(link)

    async def accept(self) -> Link[ClientMessage]:
        """Wait for the next client that has proved itself; `Link.peer` names it."""
        return await self._accepted.receive()


class LinkServer(ABC, Generic[LinkT_co]):
    """The links of one kind that came in on one socket.

    Args:
        nursery: The nursery of the links' tasks.
        acceptor: Receives the proofs of the clients.
        limits: The limits of each link.
    """

    def __init__(
        self, nursery: trio.Nursery, acceptor: Acceptor, limits: LinkLimits
    ) -> None:
        self._nursery = nursery
        self._acceptor = acceptor
        self._limits = limits
        self._links: set[LinkT_co] = set()

    @abstractmethod
    async def run(self) -> None:
        """Accept connections until cancelled."""

    def close_all(self, reason: str) -> None:
        """End all links at once."""
        for link in tuple(self._links):
            link.close_now(reason)

    def drop_all(self) -> None:
        """Close the sockets that the links own, after their tasks have ended."""
        for link in self._links:
            link.drop()


@asynccontextmanager
async def run_server(make: Callable[[trio.Nursery], ServerT]) -> AsyncIterator[ServerT]:
    """Run a server of links during the body, then end all of its links.

    Args:
        make: Makes the server, given the nursery of its tasks.
    """
    with ExitStack() as stack:
        async with open_background_nursery() as nursery:
            server = make(nursery)
            stack.callback(server.drop_all)
            nursery.start_soon(server.run)
            try:
                yield server
            finally:
                server.close_all("the listener was closed")


@asynccontextmanager
async def run_client(link: DialedLink) -> AsyncIterator[Link[WorkerMessage]]:
    """Run a link that was dialed: open it, and close it after the body.

    Args:
        link: The link, with a socket for itself.

    Raises:
        DialError: If it does not open.
    """
    async with open_background_nursery() as nursery:
        nursery.start_soon(link.run)
        link.pump()
        try:
            try:
                await link.wait_ready()
            except LinkClosedError as error:
                ended = link.session.ended
                reason = error.reason if ended is None else ended.reason
                failure = DialFailure(link.kind, link.session.address, reason)
                raise DialError([failure]) from None
            yield link
            await link.aclose()
            await link.linger()
        finally:
            link.close_now("the client went away")


@contextmanager
def dial_errors(kind: LinkKindName, address: str, limits: LinkLimits) -> Iterator[None]:
    """Convert the errors that occur before a link exists.

    Raises:
        DialError: Instead of `OSError`, `trio.TooSlowError`, `InvalidInput` and
            `RemoteProtocolError`.
    """
    try:
        yield
    except (InvalidInput, RemoteProtocolError) as error:
        reason = error.reason
    except trio.TooSlowError:
        reason = f"no answer for {limits.handshake_timeout:g} s"
    except OSError as error:
        reason = error.strerror or str(error)
    else:
        return
    raise DialError([DialFailure(kind, address, reason)])
