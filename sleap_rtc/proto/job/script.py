"""The scripts of a package, parsed into commands; no shell runs them.

SLEAP exports `train-script.sh` and `inference-script.sh`; people write
`track-script.sh` for tracking. Each line is a program and its arguments, with the
quoting rules of the POSIX shell (Shell Command Language, 2.2). Everything else that a
shell would interpret is refused with the line and the reason, because here it would
silently mean something different.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Literal, NoReturn

import msgspec
from typing_extensions import override

from sleap_rtc.proto.errors import InvalidInput
from sleap_rtc.proto.terminal import printable

DEFAULT_PROGRAMS = frozenset({"sleap", "sleap-nn", "sleap-nn-train", "sleap-nn-track"})
"""Programs that a worker runs unless its owner allows more."""

ScriptKind = Literal["training", "inference"]

SCRIPT_KINDS: dict[str, ScriptKind] = {
    "train-script.sh": "training",
    "track-script.sh": "inference",
    "inference-script.sh": "inference",
}
"""File names of scripts, in the order in which they run."""

MAX_SCRIPT_LENGTH = 256 * 1024
"""Characters of the longest script: a line for each of a thousand videos fits."""

MAX_COMMANDS = 1000
"""Commands in one script."""

_SPELLINGS: tuple[tuple[tuple[str, ...], ...], ...] = (
    (("sleap-nn", "train"), ("sleap-nn-train",), ("sleap", "train")),
    (("sleap-nn", "track"), ("sleap-nn-track",), ("sleap", "track")),
    (("sleap-nn", "predict"), ("sleap", "predict")),
)
"""First words of commands that do the same, the most common ones first."""

_PROTECTED = frozenset('$`"\\\n')
"""Characters that a backslash protects within double quotes."""

_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\ud800-\udfff]")
"""Characters that no argument has: control characters and surrogates."""


class ScriptError(InvalidInput):
    """A script of a package cannot be run.

    Args:
        script: The name of the file, or "" if the fault is not in one file.
        line: The line, counted from 1, or None if the fault is not in one line.
        problem: The fault and how to mend it, for people.
    """

    def __init__(self, script: str, line: int | None, problem: str) -> None:
        place = ", ".join(
            part
            for part in (printable(script), "" if line is None else f"line {line}")
            if part
        )
        super().__init__(f"{place}: {problem}" if place else problem)
        self.script = script
        self.line = line


class Command(msgspec.Struct, frozen=True):
    """One program to run.

    Args:
        argv: The program and its arguments.
        line: The line of the script on which it begins, counted from 1.
        script: The name of the script.
    """

    argv: tuple[str, ...]
    line: int
    script: str

    @property
    def title(self) -> str:
        """The program, and its subcommand if it has one, for people."""
        words = self.argv[:1]
        if re.fullmatch(r"[a-z][a-z-]*", "".join(self.argv[1:2])):
            words = self.argv[:2]
        return printable(" ".join(words))

    @override
    def __str__(self) -> str:
        return f"'{self.title}' ({printable(self.script)}, line {self.line})"


class Script(msgspec.Struct, frozen=True):
    """The commands of one script; SLEAP exports some scripts without any."""

    name: str
    kind: ScriptKind
    commands: tuple[Command, ...]


def plan_scripts_untrusted(
    files: Mapping[str, str], allowed: frozenset[str]
) -> tuple[Script, ...]:
    """Return the scripts that a package runs, in order.

    Training comes first. SLEAP always writes both of its scripts, and leaves the one
    without work empty. An empty script is skipped, and so is an inference script that
    only repeats the commands of the tracking script.

    Args:
        files: The text of each script of the package by its file name.
        allowed: The programs that this worker runs.

    Returns:
        At least one script, each with at least one command.

    Raises:
        ScriptError: If the package has no command, or a script cannot be run.
    """
    scripts: list[Script] = []
    for name in SCRIPT_KINDS:
        if name not in files:
            continue
        script = read_script_untrusted(name, files[name], allowed)
        known = {_arguments(earlier) for earlier in scripts}
        if script.commands and _arguments(script) not in known:
            scripts.append(script)
    if scripts:
        return tuple(scripts)
    if present := [name for name in SCRIPT_KINDS if name in files]:
        raise ScriptError(
            "",
            None,
            f"nothing to run: {' and '.join(present)} of the package "
            f"{'has' if len(present) == 1 else 'have'} no command",
        )
    raise ScriptError(
        "",
        None,
        "the package has no train-script.sh, track-script.sh or inference-script.sh, "
        "neither at its top nor inside one folder: export it from SLEAP with "
        "'Export training job package'",
    )


def _arguments(script: Script) -> tuple[tuple[str, ...], ...]:
    return tuple(command.argv for command in script.commands)


def read_script_untrusted(name: str, text: str, allowed: frozenset[str]) -> Script:
    """Parse one script.

    Args:
        name: Its file name, a key of `SCRIPT_KINDS`.
        text: Its content.
        allowed: The programs that this worker runs, exactly as a script names them.

    Returns:
        The script, which may have no commands.

    Raises:
        ScriptError: If it holds anything but comments, `set` with options, and
            commands with programs that are allowed.
    """
    kind = SCRIPT_KINDS.get(name)
    if kind is None:
        raise ScriptError(
            name, None, "it is not one of the scripts that sleap-rtc runs"
        )
    if len(text) > MAX_SCRIPT_LENGTH:
        raise ScriptError(
            name, None, f"it has more than {MAX_SCRIPT_LENGTH} characters"
        )
    commands: list[Command] = []
    for line, words in _Lexer(name, text).commands():
        if words[0] == "set" and _only_options(words[1:]):
            continue
        _check_program(name, line, words[0], allowed)
        commands.append(Command(words, line, name))
        if len(commands) > MAX_COMMANDS:
            raise ScriptError(name, line, f"more than {MAX_COMMANDS} commands")
    return Script(name, kind, tuple(commands))


def equivalents(argv: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """Return other spellings of a command, for workers without its program.

    Returns:
        Commands that do the same, the most likely first; none for other programs.
    """
    for spellings in _SPELLINGS:
        for spelling in spellings:
            if argv[: len(spelling)] == spelling:
                rest = argv[len(spelling) :]
                return tuple(other + rest for other in spellings if other != spelling)
    return ()


def _only_options(words: tuple[str, ...]) -> bool:
    """Return whether these are options of the shell, like ``-euo pipefail``."""
    previous = ""
    for word in words:
        named = previous[:1] in ("-", "+") and previous.endswith("o") and word.isalpha()
        if not named and not re.fullmatch(r"[-+][A-Za-z]+", word):
            return False
        previous = word
    return bool(words)


def _check_program(name: str, line: int, program: str, allowed: frozenset[str]) -> None:
    if program in allowed:
        return
    if program == "cd":
        problem = (
            "'cd' is not possible: every command runs in the folder of the script. "
            "Remove it and write the paths from there"
        )
    elif re.match(r"[A-Za-z_][A-Za-z0-9_]*\+?=", program):
        problem = (
            "variables cannot be set, because no shell runs the script. "
            "Remove the assignment"
        )
    else:
        shown = printable(program[:60])
        problem = (
            f"this worker does not run '{shown}' (allowed: "
            f"{', '.join(sorted(allowed))}). Its owner can allow more with --allow."
        )
    raise ScriptError(name, line, problem)


class _Lexer:
    """Split a script into words, by the quoting rules of the shell."""

    def __init__(self, name: str, text: str) -> None:
        self._name = name
        self._text = text.removeprefix("\ufeff").replace("\r\n", "\n")
        self._at = 0
        self._line = 1

    def commands(self) -> Iterator[tuple[int, tuple[str, ...]]]:
        """Yield each command with the line on which it begins."""
        words: list[str] = []
        first = 0
        while char := self._peek():
            if char == "\n":
                self._advance()
                if words:
                    yield first, tuple(words)
                words = []
            elif char in " \t":
                self._advance()
            elif self._text.startswith("\\\n", self._at):
                self._advance(2)
            elif char == "#":
                self._skip_comment()
            else:
                first = first if words else self._line
                words.append(self._word())
        if words:
            yield first, tuple(words)

    def _word(self) -> str:
        if self._peek() == "~":
            self._refuse("a shell would put a home folder in place of '~'")
        parts: list[str] = []
        while (char := self._peek()) and char not in " \t\n":
            if char == "'":
                parts.append(self._single_quoted())
            elif char == '"':
                parts.append(self._double_quoted())
            elif char == "\\":
                parts.append(self._escaped())
            else:
                parts.append(self._plain(char))
        return "".join(parts)

    def _plain(self, char: str) -> str:
        """Consume a character outside quotes."""
        if char in "|&;<>()`$":
            self._refuse(f"a shell would interpret '{char}'")
        # Square brackets are allowed: hydra lists are written with them, and a shell
        # keeps them unless a file name matches.
        if char in "*?{}":
            self._refuse(f"a shell would expand '{char}'")
        return self._take(char)

    def _escaped(self) -> str:
        """Consume a backslash outside quotes and the character that it protects."""
        self._advance()
        char = self._peek()
        if not char:
            raise ScriptError(self._name, self._line, "it ends in a backslash")
        if char == "\n":
            self._advance()
            return ""
        return self._take(char)

    def _single_quoted(self) -> str:
        self._advance()
        parts: list[str] = []
        while (char := self._inside("'")) != "'":
            parts.append(self._take(char))
        self._advance()
        return "".join(parts)

    def _double_quoted(self) -> str:
        self._advance()
        parts: list[str] = []
        while (char := self._inside('"')) != '"':
            if char in "$`":
                self._refuse(f"a shell would interpret '{char}'")
            if char == "\\" and self._text[self._at + 1 : self._at + 2] in _PROTECTED:
                parts.append(self._escaped())
            else:
                parts.append(self._take(char))
        self._advance()
        return "".join(parts)

    def _inside(self, quote: str) -> str:
        """Return the next character within quotes."""
        char = self._peek()
        if char in ("", "\n"):
            raise ScriptError(
                self._name, self._line, f"the quote {quote} is not closed on its line"
            )
        return char

    def _skip_comment(self) -> None:
        end = self._text.find("\n", self._at)
        self._at = len(self._text) if end < 0 else end

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _take(self, char: str) -> str:
        """Consume a character that becomes part of a word."""
        if _CONTROL.match(char):
            raise ScriptError(
                self._name, self._line, f"it contains the character U+{ord(char):04X}"
            )
        self._advance()
        return char

    def _advance(self, count: int = 1) -> None:
        self._line += self._text.count("\n", self._at, self._at + count)
        self._at += count

    def _refuse(self, problem: str) -> NoReturn:
        raise ScriptError(
            self._name,
            self._line,
            f"{problem}, but no shell runs the script. Write one plain command on a "
            "line, and put characters that are meant literally in single quotes",
        )
