"""Tickets for lanes: how a worker knows that a new connection belongs to a link.

The proof of a session is good for one connection, so each lane needs a proof of its
own. The worker draws it by lot and tells it to the client over the link, which is
encrypted and authenticated. Whoever shows it within `TICKET_SECONDS` is that client.
"""

import hmac

import msgspec

from sleap_rtc.proto.errors import LocalProtocolError, RemoteProtocolError
from sleap_rtc.proto.messages import MAX_LANES

TICKET_SECONDS = 20.0
"""Twice what a connection may take for its handshake and its proof."""

_NO_PROOF = "0" * 64


class _Ticket(msgspec.Struct, frozen=True):
    link: int
    proof: str
    expires: float


class TicketBook:
    """The tickets that a worker has handed out, each good for one connection.

    Links are numbers of the owner's choice. A link has at most ``MAX_LANES - 1``
    tickets at a time; `withdraw` takes back those that nobody has used.
    """

    def __init__(self) -> None:
        self._tickets: dict[str, _Ticket] = {}

    def issue(self, link: int, session: str, proof: str, now: float) -> None:
        """Note a ticket that is about to be handed out.

        Args:
            link: To whose client it goes.
            session: 16 random bytes as hexadecimal digits, to find it by.
            proof: 32 random bytes as hexadecimal digits, which nobody can guess.
            now: The time in seconds.

        Raises:
            LocalProtocolError: If the link has as many as it may have, or the session
                is not new.
        """
        if self.held(link) >= MAX_LANES - 1 or session in self._tickets:
            raise LocalProtocolError(f"one ticket too many for link {link}")
        self._tickets[session] = _Ticket(link, proof, now + TICKET_SECONDS)

    def redeem_untrusted(self, session: str, proof: str, now: float) -> int:
        """Take what a new connection shows; whatever it is, it can't be shown again.

        Args:
            session: As in `Auth`.
            proof: As in `Auth`.
            now: The time in seconds.

        Returns:
            The link that the connection is a lane of.

        Raises:
            RemoteProtocolError: If it is no ticket, an old one, or a wrong proof, after
                the same time whatever it is.
        """
        ticket = self._tickets.pop(session, None)
        expected = _NO_PROOF if ticket is None else ticket.proof
        is_right = hmac.compare_digest(expected.encode(), proof.encode())
        if ticket is None or now >= ticket.expires or not is_right:
            raise RemoteProtocolError("that is no ticket")
        return ticket.link

    def held(self, link: int) -> int:
        """Count the tickets of a link that nobody has used."""
        return sum(ticket.link == link for ticket in self._tickets.values())

    def withdraw(self, link: int) -> None:
        """Void the tickets of a link that are not used yet."""
        self._tickets = {
            session: ticket
            for session, ticket in self._tickets.items()
            if ticket.link != link
        }
