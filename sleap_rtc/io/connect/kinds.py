"""The kinds of link, one row each.

Another kind needs its own folder, its name in `sleap_rtc.proto.route.kinds`, a row
here, and its targets in `Answer.targets`. docs/development.md lists every place.
"""

import socket
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from sleap_rtc.io.link.certificates import Certificate
from sleap_rtc.io.link.endpoint import Acceptor, LinkServer, ServedLink
from sleap_rtc.io.link.limits import LinkLimits
from sleap_rtc.io.link.link import Link
from sleap_rtc.io.quic.driver import QuicKind
from sleap_rtc.io.tcp.driver import TcpKind
from sleap_rtc.proto.messages import WorkerMessage
from sleap_rtc.proto.route.kinds import LinkKindName


class LinkKind(Protocol):
    """One kind of link: how to listen for it, and how to dial.

    Attributes:
        name: Its name in offers, answers and options.
        transport: The owner of its port numbers, ``TCP`` or ``UDP``, for people.
    """

    name: LinkKindName
    transport: str

    def bind(self, host: str, port: int) -> socket.socket:
        """Open the socket of a listener.

        Args:
            host: The literal address; an empty one means all of this machine.
            port: The port; 0 takes any.

        Raises:
            OSError: If the address cannot be bound.
        """

    def serve(
        self,
        bound: socket.socket,
        certificate: Certificate,
        acceptor: Acceptor,
        limits: LinkLimits,
    ) -> AbstractAsyncContextManager[LinkServer[ServedLink]]:
        """Accept links during the body.

        Args:
            bound: A socket of `bind`; the caller closes it.
            certificate: Shown to clients.
            acceptor: Receives the proofs of the clients.
            limits: The limits of each link.
        """

    def connect(
        self, target: Any, certificate_der: bytes, limits: LinkLimits
    ) -> AbstractAsyncContextManager[Link[WorkerMessage]]:
        """Open a link without a proof, whose first message must be `Auth`.

        Args:
            target: The listener, in the form of this kind (see `Answer.targets`).
            certificate_der: The only certificate that it may show.
            limits: The limits of the link.

        Raises:
            DialError: If it cannot be reached, or shows another certificate.
        """


_ROWS: tuple[LinkKind, ...] = (TcpKind(), QuicKind())

KINDS: Mapping[LinkKindName, LinkKind] = {kind.name: kind for kind in _ROWS}
"""Every kind of link by its name."""
