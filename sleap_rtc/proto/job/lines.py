"""The output of a program, as numbered lines that are safe to show.

A program that writes to a terminal redraws lines: a bare carriage return starts
its line again, and ``ESC [ A`` goes back up to one that it drew before (nested progress
bars do). `LineAssembler` follows these moves, so that a redraw gives a new text for the
number of the line that it redraws. All other terminal control is removed.
"""

import codecs
import re
from collections.abc import Iterator

import msgspec

from sleap_rtc.proto.terminal import TOKEN, UNFINISHED, without_marks

MAX_LINE_BYTES = 16 * 1024
"""UTF-8 bytes of the longest line; a message would fit four times as many."""

CUT_MARK = " [line cut]"

REDRAW_INTERVAL = 0.1
"""Seconds between two redraws of a line: people do not read ten a second."""

REACH = 16
"""Number of lines that can be redrawn; progress bars nest two or three deep."""

_UPWARDS = re.compile(r"(?:\x1b\[|\x9b)([0-9]{0,4})A")
_ERASE_LINE = re.compile(r"(?:\x1b\[|\x9b)([0-2]?)K")


class LineEvent(msgspec.Struct, frozen=True):
    """The text of a line, for the first time or again.

    Args:
        line: Its number; a number that came before is a redraw of that line.
        text: Printable text without trailing spaces, at most `MAX_LINE_BYTES` bytes
            and `CUT_MARK`.
    """

    line: int
    text: str


class _Row:
    """A line that may change."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.due: float | None = None
        self.ended = False
        self._pieces: list[str] = []
        self._room = MAX_LINE_BYTES
        self._cut = False
        self._shown: str | None = None

    @property
    def shown(self) -> str | None:
        """The text that was delivered last; None if none was."""
        return self._shown

    @property
    def is_blank(self) -> bool:
        """True if this line never had any text that a reader could have seen."""
        return self._shown is None and not "".join(self._pieces).strip(" ")

    def write(self, text: str, now: float) -> None:
        """Append text to the line."""
        if self._cut or not text:
            return
        data = text.encode()
        if len(data) > self._room:
            self._cut = True
            text = data[: self._room].decode(errors="ignore") + CUT_MARK
        self._room -= len(data)
        self._pieces.append(text)
        self._touch(now)

    def erase(self, now: float) -> None:
        """Remove all text from the line."""
        if not self._pieces:
            return
        self._pieces.clear()
        self._room = MAX_LINE_BYTES
        self._cut = False
        self._touch(now)

    def take(self) -> LineEvent | None:
        """Return the event for the line; None if its text was delivered before."""
        self.due = None
        text = "".join(self._pieces)
        self._pieces = [text] if text else []
        text = text.rstrip(" ")
        if text == self._shown or (self.is_blank and not self.ended):
            return None
        self._shown = text
        return LineEvent(self.number, text)

    def _touch(self, now: float) -> None:
        if self.due is None:
            self.due = now + REDRAW_INTERVAL


class LineAssembler:
    """Cut the output of a program into numbered lines.

    Call `receive_data` with any bytes that were read, `handle_timeout` at `deadline`,
    and `finish` at the end of the output. Each returns the lines to deliver, in order.

    A finished line is delivered at once. A line that is being drawn or redrawn is
    delivered `REDRAW_INTERVAL` after it changed, with the text that it has then, so
    that its last text is always delivered. That text does not depend on where the bytes
    were cut.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self._rows = [_Row(1)]
        self._cursor = 0
        self._fresh = False
        """True if the next text replaces the line instead of extending it."""
        self._final: list[str] = []

    @property
    def next_line(self) -> int:
        """The number after the last line that has any text or was ended."""
        last = self._rows[-1]
        return last.number if last.is_blank else last.number + 1

    def deadline(self) -> float | None:
        """Return when `handle_timeout` has something to deliver; None if never."""
        return min((row.due for row in self._rows if row.due is not None), default=None)

    def receive_data(self, data: bytes, now: float) -> list[LineEvent]:
        """Return the lines that are complete or due after this output.

        Args:
            data: Any number of bytes, cut anywhere. A byte that is not UTF-8 becomes
                U+FFFD.
            now: Seconds on the clock of the caller.
        """
        events = list(self._feed(self._decoder.decode(data), now))
        return events + self.handle_timeout(now)

    def handle_timeout(self, now: float) -> list[LineEvent]:
        """Return the lines that are due."""
        return [
            event
            for row in self._rows
            if row.due is not None and now >= row.due and (event := row.take())
        ]

    def finish(self, now: float) -> list[LineEvent]:
        """Return all lines that were not delivered; later output starts a new line."""
        events = list(self._feed(self._decoder.decode(b"", final=True), now))
        self._held = ""
        following = self.next_line
        events += [
            event for row in self._rows if row.due is not None and (event := row.take())
        ]
        self._decoder.reset()
        self._final += [row.shown for row in self._rows if row.shown is not None]
        self._rows = [_Row(following)]
        self._cursor = 0
        self._fresh = False
        return events

    def take_final(self) -> list[str]:
        """Remove and return the lines that can no longer be redrawn, in order."""
        final, self._final = self._final, []
        return final

    def _feed(self, text: str, now: float) -> Iterator[LineEvent]:
        text = self._held + text
        self._held = ""
        for token in TOKEN.finditer(text):
            # Only the last sequence can be unfinished, and only if it has no text.
            if token["text"]:
                self._write(token[0], now)
            elif UNFINISHED.match(text, token.start()):
                self._held = text[token.start() :]
                return
            elif token[0] == "\n":
                yield from self._end_line()
            elif token[0] == "\r":
                self._fresh = True
            elif token["csi"]:
                self._control(token[0], now)

    def _write(self, text: str, now: float) -> None:
        row = self._rows[self._cursor]
        if self._fresh:
            row.erase(now)
            self._fresh = False
        row.write(without_marks(text), now)

    def _control(self, sequence: str, now: float) -> None:
        """Follow a control sequence that moves up or erases a line."""
        if match := _UPWARDS.fullmatch(sequence):
            self._cursor = max(0, self._cursor - max(1, int(match[1] or 1)))
            self._fresh = True
            return
        # At the end of its text, erasing the rest of the line removes nothing.
        match = _ERASE_LINE.fullmatch(sequence)
        if match and (self._fresh or match[1] == "2"):
            self._rows[self._cursor].erase(now)

    def _end_line(self) -> Iterator[LineEvent]:
        """Move down one line; deliver a line that ends for the first time."""
        row = self._rows[self._cursor]
        if not row.ended:
            row.ended = True
            if event := row.take():
                yield event
        self._cursor += 1
        self._fresh = self._cursor < len(self._rows)
        if not self._fresh:
            self._rows.append(_Row(row.number + 1))
            yield from self._retire()

    def _retire(self) -> Iterator[LineEvent]:
        """Drop the line that is out of reach, and deliver its last text."""
        if len(self._rows) > REACH:
            row = self._rows.pop(0)
            self._cursor -= 1
            if row.due is not None and (event := row.take()):
                yield event
            if row.shown is not None:
                self._final.append(row.shown)
