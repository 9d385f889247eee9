"""The kinds of link, and the order in which they are preferred.

Another kind needs its name here, its row in `sleap_rtc.io.connect.kinds`, and its
targets in `Answer.targets`.
"""

from collections.abc import Hashable
from typing import Literal, get_args

LinkKindName = Literal["tcp", "quic"]
"""The name of a kind of link, the preferred kinds first. In Python a TLS stream moves
several times as much as a QUIC connection; QUIC is for peers that TCP cannot reach."""

LINK_KINDS: tuple[LinkKindName, ...] = get_args(LinkKindName)
"""All kinds of link, the preferred ones first."""

Target = Hashable
"""Address of a link, in the form of its kind: a host and a port for TCP and QUIC."""
