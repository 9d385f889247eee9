"""The kinds of link, and the order in which they are preferred."""

from typing import Literal

LinkKindName = Literal["quic", "tcp"]

LINK_KINDS: tuple[LinkKindName, ...] = ("tcp", "quic")
"""All kinds, the preferred one first: in Python a TLS stream moves several times what a
QUIC connection does. QUIC is there for peers that TCP cannot reach."""
