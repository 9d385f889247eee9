"""Tickets for lanes: each is good once, soon, and as long as its link stands."""

import pytest

from sleap_rtc.proto.errors import LocalProtocolError, RemoteProtocolError
from sleap_rtc.proto.messages import MAX_LANES
from sleap_rtc.proto.transfer.lanes import TICKET_SECONDS, TicketBook

SESSION = "1" * 32
OTHER = "2" * 32
PROOF = "a" * 64
WRONG = "b" * 64


def book() -> TicketBook:
    made = TicketBook()
    made.issue(7, SESSION, PROOF, 100.0)
    return made


def check_refused(made: TicketBook, session: str, proof: str, now: float) -> None:
    with pytest.raises(RemoteProtocolError, match="that is no ticket"):
        made.redeem_untrusted(session, proof, now)


def test_a_ticket_names_its_link_once() -> None:
    made = book()
    assert made.redeem_untrusted(SESSION, PROOF, 101.0) == 7
    check_refused(made, SESSION, PROOF, 101.0)


def test_a_wrong_proof_uses_the_ticket_up() -> None:
    made = book()
    check_refused(made, SESSION, WRONG, 101.0)
    check_refused(made, SESSION, PROOF, 101.0)


@pytest.mark.parametrize("proof", [PROOF, WRONG, "0" * 64, "", "é"])
def test_an_unknown_session_is_no_ticket(proof: str) -> None:
    made = book()
    check_refused(made, OTHER, proof, 101.0)
    assert made.redeem_untrusted(SESSION, PROOF, 101.0) == 7


def test_a_ticket_expires() -> None:
    assert book().redeem_untrusted(SESSION, PROOF, 99.9 + TICKET_SECONDS) == 7
    check_refused(book(), SESSION, PROOF, 100.0 + TICKET_SECONDS)


def test_tickets_of_a_link_are_withdrawn_together() -> None:
    made = book()
    made.issue(8, OTHER, PROOF, 100.0)
    made.withdraw(7)
    check_refused(made, SESSION, PROOF, 101.0)
    assert made.redeem_untrusted(OTHER, PROOF, 101.0) == 8


def test_a_link_holds_few_tickets_at_a_time() -> None:
    made = TicketBook()
    for number in range(MAX_LANES - 1):
        made.issue(7, f"{number:032}", PROOF, 100.0)
    with pytest.raises(LocalProtocolError, match="too many"):
        made.issue(7, OTHER, PROOF, 100.0)
    made.issue(8, OTHER, PROOF, 100.0)


def test_a_session_is_given_once() -> None:
    made = book()
    with pytest.raises(LocalProtocolError, match="too many"):
        made.issue(8, SESSION, WRONG, 100.0)
    assert made.redeem_untrusted(SESSION, PROOF, 101.0) == 7
