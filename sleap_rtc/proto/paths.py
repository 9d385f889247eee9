"""Checks of the text of a path or file name that came from a peer.

This module accesses no file system. Code that opens a checked path must still refuse
symbolic links on the way, as `sleap_rtc.io.storage.folder` does.
"""

import re
import unicodedata

from sleap_rtc.proto.errors import InvalidInput

MAX_PATH_BYTES = 4096
"""Bytes of the longest path on Linux; macOS allows less and reports ENAMETOOLONG."""

MAX_NAME_BYTES = 255
"""Bytes of the longest name on every file system in use."""

_DRIVE = re.compile(r"[A-Za-z]:")
_WINDOWS_CHARACTERS = frozenset('<>:"|?*')
_WINDOWS_DEVICES = frozenset(
    ["con", "prn", "aux", "nul", "conin$", "conout$"]
    + [port + digit for port in ("com", "lpt") for digit in "0123456789¹²³"]
)
_SHOWN = 120


def check_relative_path_untrusted(text: str) -> str:
    """Check a path that must be beneath a shared root.

    Args:
        text: A relative POSIX path, as the peer sent it.

    Returns:
        The same text: one or more names, joined by single slashes.

    Raises:
        InvalidInput: If it is anything else. The reason starts with ``Path outside
            shared storage:`` if the path would lead out of the root, and otherwise with
            ``Invalid path:``.
    """
    if not text:
        raise InvalidInput("Invalid path: it is empty")
    _check_text(text)
    if text.startswith("/") or _DRIVE.match(text):
        raise _outside(text, "is absolute")
    names = text.split("/")
    if ".." in names:
        raise _outside(text, "contains '..'")
    if "" in names or "." in names:
        raise _invalid(text, "has an empty name or '.' in it")
    if any(len(name.encode()) > MAX_NAME_BYTES for name in names):
        raise _invalid(text, f"has a name of more than {MAX_NAME_BYTES} bytes")
    return text


def check_portable_path_untrusted(text: str) -> str:
    """Check a relative path that Linux, macOS and Windows must all be able to store.

    It is for files whose names a peer chose. Hidden files are refused as well, so that
    no file such as ``.bashrc`` appears unseen in a directory of the user.

    Args:
        text: A relative POSIX path, as the peer sent it.

    Returns:
        The same text.

    Raises:
        InvalidInput: If it is not a relative path, or not a portable one.
    """
    for name in check_relative_path_untrusted(text).split("/"):
        _check_portable_name(text, name)
    return text


def check_file_name_untrusted(text: str) -> str:
    """Check the name of one file, which must not be a path.

    Args:
        text: The name, as the peer sent it.

    Returns:
        The same text: one name that every system can store and that is not hidden.

    Raises:
        InvalidInput: If it is anything else.
    """
    check_portable_path_untrusted(text)
    if "/" in text:
        raise InvalidInput(f"Invalid file name: {_quoted(text)} is a path")
    return text


def fold_path(text: str) -> str:
    """Return a key that is equal for paths which some system cannot tell apart.

    macOS and Windows ignore case, and macOS ignores how an accent is written. This is
    the canonical caseless match of the Unicode Standard (3.13, D145).
    """
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", text).casefold())


def _check_text(text: str) -> None:
    """Raise `InvalidInput` for a text that no path contains."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise _invalid(text, "is not valid Unicode") from None
    if size > MAX_PATH_BYTES:
        raise _invalid(text, f"is longer than {MAX_PATH_BYTES} bytes")
    if "\0" in text:
        raise _outside(text, "contains a NUL character")
    if "\\" in text:
        raise _outside(text, "contains a backslash")
    if any(unicodedata.category(character) == "Cc" for character in text):
        raise _invalid(text, "contains a control character")


def _check_portable_name(text: str, name: str) -> None:
    """Raise `InvalidInput` for a name that is hidden, or that Windows cannot store."""
    if name.startswith("."):
        raise _invalid(text, "has a name that starts with '.'")
    if not _WINDOWS_CHARACTERS.isdisjoint(name):
        raise _invalid(text, "has a character in it that Windows cannot store")
    if name.endswith((".", " ")):
        raise _invalid(text, "has a name that ends in '.' or a space")
    if name.partition(".")[0].rstrip(" ").casefold() in _WINDOWS_DEVICES:
        raise _invalid(text, "has a name in it that Windows reserves")


def _outside(text: str, why: str) -> InvalidInput:
    return InvalidInput(f"Path outside shared storage: {_quoted(text)} {why}")


def _invalid(text: str, why: str) -> InvalidInput:
    return InvalidInput(f"Invalid path: {_quoted(text)} {why}")


def _quoted(text: str) -> str:
    """Return a hostile text escaped, and shortened if it is long."""
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")
