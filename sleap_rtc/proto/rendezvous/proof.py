"""The proof with which a client opens a new link, and the worker's table of offers.

The client proves on the link that it received the answer to its offer. In this module
``now`` and ``expires`` are seconds since 1970 (wall clock).
"""

import hashlib
import hmac

import msgspec

from sleap_rtc.proto.errors import (
    InvalidInput,
    LocalProtocolError,
    RemoteProtocolError,
)
from sleap_rtc.proto.rendezvous.envelope import REFUSED
from sleap_rtc.proto.rendezvous.invite import RoomKeys, join_fields

MAX_OUTSTANDING_OFFERS = 1024
"""Offers in the table: three a second for the whole of `MAX_LIFETIME`. Only holders of
the secret can add one, so the limit stops a faulty client, not an attacker."""


def link_proof(
    keys: RoomKeys,
    *,
    session: str,
    answer_nonce: bytes,
    client: str,
    worker: str,
    certificate: bytes,
) -> str:
    """Return the proof that a client sends first on a new link.

    It depends on the worker's certificate, so it is worthless on any other connection.

    Args:
        keys: Keys of the room.
        session: The offer's nonce as hexadecimal digits.
        answer_nonce: The nonce of the opened answer.
        client: The client's peer id.
        worker: The worker's peer id.
        certificate: The worker's certificate, DER.

    Returns:
        64 hexadecimal digits.
    """
    return keys.authenticate(
        join_fields(
            b"sleap-rtc/1 link",
            session.encode(),
            answer_nonce,
            client.encode(),
            worker.encode(),
            hashlib.sha256(certificate).digest(),
        )
    )


class _Expected(msgspec.Struct, frozen=True):
    """A link that a client may open until it expires."""

    answer_nonce: bytes
    client: str
    expires: float


_EXPIRED = _Expected(b"", "", float("-inf"))
"""Stand-in for an unknown session: its refusal takes as much work."""


class OfferTable:
    """The offers that a worker has accepted: each only once, and for one link.

    Call `accept` for every opened offer, `expect` once it is answered, and
    `check_proof_untrusted` when a link presents its proof.

    Args:
        keys: Keys of the room.
        worker: The worker's peer id.
        certificate: The worker's certificate, DER.
    """

    def __init__(self, keys: RoomKeys, worker: str, certificate: bytes) -> None:
        self._keys = keys
        self._worker = worker
        self._certificate = certificate
        self._seen: dict[str, float] = {}
        self._expected: dict[str, _Expected] = {}

    def accept(self, nonce: bytes, expires: float, now: float) -> None:
        """Record an opened offer until it expires.

        Raises:
            InvalidInput: If the offer is recorded already, or too many are.
        """
        self._forget_expired(now)
        session = nonce.hex()
        if session in self._seen or len(self._seen) >= MAX_OUTSTANDING_OFFERS:
            raise InvalidInput(REFUSED)
        self._seen[session] = expires

    def expect(
        self, session: str, answer_nonce: bytes, client: str, expires: float
    ) -> None:
        """Allow the client of an accepted offer to open one link.

        Args:
            session: The offer's nonce as hexadecimal digits.
            answer_nonce: The nonce of the answer.
            client: The client's peer id.
            expires: When the permission ends.

        Raises:
            LocalProtocolError: If the offer was not accepted, or answered before.
        """
        if session not in self._seen or session in self._expected:
            raise LocalProtocolError("expect() follows accept(), once")
        self._expected[session] = _Expected(answer_nonce, client, expires)
        self._seen[session] = max(expires, self._seen[session])

    def check_proof_untrusted(self, session: str, proof: str, now: float) -> str:
        """Check the proof of a new link. The right proof is accepted once.

        A wrong proof does not end the session: otherwise a carrier of the offer could
        use up the session and keep the client out.

        Args:
            session: The session that the client names.
            proof: The proof that it sent, see `link_proof`.
            now: Seconds since 1970.

        Returns:
            The client's peer id.

        Raises:
            RemoteProtocolError: If anything is wrong, always for the same reason.
        """
        expected = self._expected.get(session, _EXPIRED)
        right = link_proof(
            self._keys,
            session=session,
            answer_nonce=expected.answer_nonce,
            client=expected.client,
            worker=self._worker,
            certificate=self._certificate,
        )
        matches = hmac.compare_digest(
            right.encode(), proof.encode("utf-8", "surrogatepass")
        )
        if not matches or now >= expected.expires:
            raise RemoteProtocolError(REFUSED)
        self._expected[session] = _EXPIRED
        return expected.client

    def _forget_expired(self, now: float) -> None:
        for session in [key for key, end in self._seen.items() if now >= end]:
            del self._seen[session]
            self._expected.pop(session, None)
