"""The consoles of all commands, and how text of a peer is printed on them."""

import json

from rich.console import Console
from rich.markup import escape

from sleap_rtc.proto.terminal import printable

out = Console(highlight=False, soft_wrap=True)
"""Console for the results of a command."""

err = Console(stderr=True, highlight=False, soft_wrap=True)
"""Console for everything else: progress, advice, errors."""


def plain(text: str) -> str:
    """Make text of a peer harmless: no control sequences, no markup."""
    return escape(printable(text))


def print_json(event: str, **fields: object) -> None:
    """Print one JSON object on a line of its own, at once."""
    print(json.dumps({"event": event, **fields}, default=str), flush=True)
