"""Recognition and removal of terminal control in text from other programs and peers.

The patterns follow ECMA-48: control sequences (CSI), control strings (OSC, DCS, SOS,
PM, APC), other escape sequences, and single control characters.
"""

import re

_STRING_LIMIT = 4096
"""Characters of the longest control string, such as a window title."""

_TEXT = r"[^\x00-\x08\x0a-\x1f\x7f-\x9f]+"
_CSI_START = r"(?:\x1b\[|\x9b)[0-?]{0,64}[ -/]{0,8}"
_STRING_START = (
    r"(?:\x1b[\]PX^_]|[\x90\x98\x9d\x9e\x9f])"
    rf"[^\x07\x1b\x9c\r\n]{{0,{_STRING_LIMIT}}}"
)

TOKEN = re.compile(
    rf"(?P<text>{_TEXT})"
    rf"|(?P<csi>{_CSI_START}[@-~])"
    rf"|(?P<string>{_STRING_START}(?:\x07|\x9c|\x1b\\)?)"
    r"|(?P<escape>\x1b[ -/]{0,8}[0-~]?)"
    r"|(?P<control>.)",
    re.DOTALL,
)
"""Text or one piece of terminal control; a tab counts as text."""

UNFINISHED = re.compile(rf"(?:\x1b[ -/]{{0,8}}|{_CSI_START}|{_STRING_START}\x1b?)\Z")
"""The beginning of a sequence whose end may follow."""

_BREAKS = re.compile(r"[\n\v\f\r\x85\u2028\u2029]+")
_REORDERING = re.compile(r"[\u202a-\u202e\u2066-\u2069]")
_SURROGATES = re.compile(r"[\ud800-\udfff]")


def printable(text: str) -> str:
    """Return a text as one line that is safe to print on a terminal.

    Args:
        text: Any text of another program or a peer.

    Returns:
        The text without control sequences, control characters other than tabs, and
        marks that reorder text. Line breaks become spaces.
    """
    text = _BREAKS.sub(" ", text)
    return without_marks("".join(m[0] for m in TOKEN.finditer(text) if m["text"]))


def without_marks(text: str) -> str:
    """Remove the marks that reorder text, and replace surrogates."""
    return _SURROGATES.sub("\ufffd", _REORDERING.sub("", text))
