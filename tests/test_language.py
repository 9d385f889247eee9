"""The English of comments, docstrings, messages and pages follows the house rules.

Only patterns that a program can find are checked here. For the findings of one
folder or file: ``python -m tests.test_language sleap_rtc/cli docs/protocol.md``.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from typing_extensions import override

ROOT = Path(__file__).parent.parent

TOPS = ["sleap_rtc", "tests", "bench", "examples", "docs", ".github", ".ci"]
"""Folders that are searched, besides the files at the top."""

SUFFIXES = {".py", ".md", ".toml", ".yml", ""}
"""Suffixes of the files that people read."""

SKIPPED = {Path("tests/test_language.py"), Path("constraints.txt"), Path("LICENSE")}
"""Files that are not searched; this one quotes what it forbids."""


class Text(NamedTuple):
    """A piece of prose and its place."""

    path: str
    line: int
    kind: str
    """One of: docstring, constant (its docstring), comment, message, name, page."""
    prose: str


class Rule(NamedTuple):
    """A pattern that plain technical English does not need."""

    name: str
    kinds: frozenset[str]
    pattern: re.Pattern[str]
    bad: str
    """A sample that breaks the rule."""
    good: str
    """The sample in better words; it breaks no rule."""


DOCSTRINGS = frozenset({"docstring", "constant"})
SENTENCES = DOCSTRINGS | {"comment", "message", "page"}
ANYWHERE = SENTENCES | {"name"}


def word(pattern: str) -> re.Pattern[str]:
    """Compile a pattern of whole words, with any white space between them."""
    spaced = pattern.replace(" ", r"\s+")
    return re.compile(rf"(?<![\w-])(?:{spaced})(?![\w-])", re.IGNORECASE)


def opening(words: str) -> re.Pattern[str]:
    """Compile a pattern of words that a text begins with."""
    return re.compile(rf"\A\s*(?:{words})(?![\w-])")


PREPOSITIONS = "about|at|by|for|from|in|into|of|on|over|to|through|with"

RULES = [
    Rule(
        "name the role",
        ANYWHERE,
        word("whoever|nobody|somebody|anybody|everybody|the other one"),
        "Whoever opens it, closes it.",
        "The opener closes it.",
    ),
    Rule(
        "again, not anew or once more",
        ANYWHERE,
        word("anew|once more"),
        "Start anew.",
        "Start again.",
    ),
    Rule(
        "no longer, not any more",
        ANYWHERE,
        word("any more|anymore"),
        "It is not needed any more.",
        "It is no longer needed.",
    ),
    Rule(
        "is not an X, not is no X",
        ANYWHERE,
        re.compile(
            r"(?<!there )(?<!there\n)\b(?:is|are|was|were|be)\s+no\b"
            r"(?!\s+(?:longer\b|(?:more|less|\w+er)\s+than\b))",
            re.IGNORECASE,
        ),
        "A zip that is no package is refused.",
        "A zip that is not a package is refused; there is no other check, it is no "
        "longer made, and it was no faster than this.",
    ),
    Rule(
        "exists, not is there",
        ANYWHERE,
        re.compile(
            r"(?<![.!?:|]\s)(?<!\A)\b(?:is|are|was|were)(?:\s+(?:not|already|still))?"
            r"\s+there\b"
        ),
        "Wait until the file is there.",
        "Wait until the file exists. There is a limit.",
    ),
    Rule(
        "n bytes, not so many bytes",
        ANYWHERE,
        word("so many"),
        "Read so many bytes.",
        "Read n bytes.",
    ),
    Rule(
        "even if, not also if",
        ANYWHERE,
        word("also (?:if|when)"),
        "Close it, also if it failed.",
        "Close it even if it failed.",
    ),
    Rule(
        "must or should, not shall",
        ANYWHERE,
        word("shall"),
        "It shall end.",
        "It must end.",
    ),
    Rule(
        "also, not a trailing too",
        ANYWHERE,
        re.compile(r"\btoo(?=\s*(?:[.,;:)]|\Z))"),
        "It closes the socket, too.",
        "It also closes the socket. The name is too long.",
    ),
    Rule(
        "idioms of another language",
        ANYWHERE,
        word(
            "lets? go of|last words|(?:is|are) told(?! apart)|how far"
            "|stands(?! for| in for)"
        ),
        "The last words of the peer.",
        "The close reason of the peer stands for the rest.",
    ),
    Rule(
        "no sentence opens with a free what-clause",
        SENTENCES,
        re.compile(
            r"(?:\A|(?<=[.!?;:|*-]\s))\s*(?:What|Whatever|Who|Whose|Whoever)\s(?!to\s)"
            r"(?![^.!?]*\?)"
        ),
        "It ends. What it wrote stays.",
        "It ends. Its files stay. What is left?",
    ),
    Rule(
        "a docstring opens with its verb or noun, not with a clause",
        DOCSTRINGS,
        opening(
            "What|Whatever|Who|Whose|Whoever|Whom|Which|Whichever|Whether|Where"
            "|When|Why|How|That|If"
        ),
        "Whether it has ended.",
        "Return whether it has ended.",
    ),
    Rule(
        "the verb of the field: Return, Parse, Send, Queue, Record, Check, Raise",
        DOCSTRINGS,
        opening("Take|Note|Say|Let|Tell|Give|Go|See|Make sure|Do what|Be|Have"),
        "Take a message of the client.",
        "Handle a message of the client.",
    ),
    Rule(
        "the docstring of a constant is a full sentence, unit first",
        frozenset({"constant"}),
        opening(
            "Of|By|From|For|As|Than|With|Without|To|Until|After|Before|In|At|On|So many"
        ),
        "Of one peer, as JSON.",
        "Bytes of the metadata of one peer, as JSON.",
    ),
    Rule(
        "subject first: Cannot open X, not X can't be opened at",
        SENTENCES,
        re.compile(
            r"\b(?:can't|cannot|could not|couldn't|can not)\s+be\s+\w+\s+"
            rf"(?:{PREPOSITIONS})\b(?=\s*(?:[:.,;]|\Z))"
        ),
        "Links can't be listened for: the port is taken.",
        "Cannot listen for links: the port is taken.",
    ),
]


class Finding(NamedTuple):
    """A place that breaks a rule."""

    path: str
    line: int
    found: str
    rule: str

    @override
    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.found}  ({self.rule})"


CODE = re.compile(r"``[^`]+``|`[^`]+`")
"""Quoted names in a text; they are not English."""


def check(text: Text) -> Iterator[Finding]:
    """Yield the places of a text that break a rule."""
    prose = CODE.sub(lambda match: re.sub(r"[^\n]", "x", match.group()), text.prose)
    for rule in RULES:
        if text.kind not in rule.kinds:
            continue
        for match in rule.pattern.finditer(prose):
            start = match.start() + len(match.group()) - len(match.group().lstrip())
            line = text.line + prose.count("\n", 0, start)
            around = text.prose[max(0, start - 20) : match.end() + 25]
            yield Finding(text.path, line, " ".join(around.split()), rule.name)


# ------------------------------------------------------------------------- reading


def read_python(path: str, source: str) -> Iterator[Text]:
    """Yield the docstrings, messages, test names and comments of a module."""
    docstrings = {}
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            for number, statement in enumerate(body):
                match statement:
                    case ast.Expr(ast.Constant(str()) as docstring):
                        before = body[number - 1] if number else None
                        assigned = isinstance(before, ast.Assign | ast.AnnAssign)
                        docstrings[docstring] = "constant" if assigned else "docstring"
    parts: set[tuple[int, int]] = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                if name.startswith("test_"):
                    line, prose = node.lineno, name.replace("_", " ")
                    yield Text(path, line, "name", prose)
    for docstring, kind in docstrings.items():
        yield Text(path, docstring.lineno, kind, str(docstring.value))
    lines = {docstring.lineno for docstring in docstrings}
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.JoinedStr(values=values):
                parts.update((v.lineno, v.col_offset) for v in values)
                written = [
                    str(v.value) if isinstance(v, ast.Constant) else "{}"
                    for v in values
                ]
                yield Text(path, node.lineno, "message", "".join(written))
            case ast.Constant(str() as value):
                inside = (node.lineno, node.col_offset) in parts
                if " " in value and node.lineno not in lines and not inside:
                    yield Text(path, node.lineno, "message", value)
    yield from read_comments(path, source)


def read_comments(path: str, source: str) -> Iterator[Text]:
    """Yield the comments of a module; lines that follow each other are one text."""
    start, last, column, block = 0, -1, -1, [""]
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        row, col = token.start
        text = token.string.lstrip("#!:").strip()
        if row == last + 1 and col == column:
            block.append(text)
        else:
            yield Text(path, start, "comment", "\n".join(block))
            start, column, block = row, col, [text]
        last = row
    yield Text(path, start, "comment", "\n".join(block))


def read_page(path: str, source: str) -> Iterator[Text]:
    """Yield the paragraphs, list items and table rows of a page, without its code."""
    start, block, fenced = 1, [""], False
    for number, line in enumerate(source.splitlines(), 1):
        text = line.strip()
        if text.startswith("```"):
            fenced, text = not fenced, ""
        elif fenced or text.startswith("#"):
            text = ""
        if not text or re.match(r"[-*|]|\d+\.\s", text):
            yield Text(path, start, "page", "\n".join(block))
            start, block = number, [text]
        else:
            block.append(text)
    yield Text(path, start, "page", "\n".join(block))


def read_settings(path: str, source: str) -> Iterator[Text]:
    """Yield the comments of a file in a language that has no reader here."""
    start, block = 0, [""]
    for number, line in enumerate(source.splitlines(), 1):
        before, mark, text = line.partition("# ")
        if not mark:
            continue
        if number == start + len(block) and not before.strip():
            block.append(text)
        else:
            yield Text(path, start, "comment", "\n".join(block))
            start, block = number, [text]
    yield Text(path, start, "comment", "\n".join(block))


def read(path: Path) -> Iterator[Text]:
    """Yield the prose of a file."""
    readers = {".py": read_python, ".md": read_page}
    source = (ROOT / path).read_text(encoding="utf-8")
    yield from readers.get(path.suffix, read_settings)(path.as_posix(), source)


def files() -> list[Path]:
    """List the files that are searched."""
    inside = [path for top in TOPS for path in sorted((ROOT / top).rglob("*"))]
    found = [
        path.relative_to(ROOT)
        for path in [*sorted(ROOT.glob("*")), *inside]
        if path.is_file() and path.suffix in SUFFIXES
    ]
    return [
        path
        for path in found
        if path not in SKIPPED
        and "__pycache__" not in path.parts
        and path.name[0] != "."
    ]


def is_in(path: Path, places: Iterable[str]) -> bool:
    """Return whether a file is one of the places, or in a folder that is one."""
    return any(path.is_relative_to(place) for place in places)


def search(places: Iterable[str]) -> list[Finding]:
    """List the places in some files and folders that break a rule."""
    return [
        finding
        for path in files()
        if is_in(path, places)
        for text in read(path)
        for finding in check(text)
    ]


# --------------------------------------------------------------------------- tests


def test_every_text_is_plain_english() -> None:
    found = sorted(set(search(["."])))
    assert not found, "\n" + "\n".join(map(str, found))


def broken(kind: str, prose: str) -> list[str]:
    return [finding.rule for finding in check(Text("page", 1, kind, prose))]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_rule_finds_its_bad_sample_and_passes_the_good_one(rule: Rule) -> None:
    for kind in rule.kinds:
        assert rule.name in broken(kind, rule.bad)
        assert broken(kind, rule.good) == []


MODULE = '''"""What it is for."""

LIMIT = 3
"""Of one peer."""


class Peer:
    """Another peer."""

    name: str
    """Whether it
    has
    a name that is no name."""


def test_the_name_is_not_used_any_more(peer):
    # First the old one,
    # then anew.
    print(f"{peer} can't be listened for: {peer}", "it closes, too")
    return "`nobody`", "nobody"  # somebody
'''


def test_every_place_of_a_module_is_read() -> None:
    found = [
        (finding.line, finding.rule)
        for text in read_python("module.py", MODULE)
        for finding in check(text)
    ]
    assert sorted(found) == [
        (1, "a docstring opens with its verb or noun, not with a clause"),
        (1, "no sentence opens with a free what-clause"),
        (4, "the docstring of a constant is a full sentence, unit first"),
        (11, "a docstring opens with its verb or noun, not with a clause"),
        (13, "is not an X, not is no X"),
        (16, "no longer, not any more"),
        (18, "again, not anew or once more"),
        (19, "also, not a trailing too"),
        (19, "subject first: Cannot open X, not X can't be opened at"),
        (20, "name the role"),
    ]


PAGE = """# What is it

A page. Nothing here
is there anew.

```
whoever
```

* Who reads this finds it.
"""


def test_the_prose_of_a_page_is_read_and_its_code_is_not() -> None:
    found = [
        (finding.line, finding.rule)
        for text in read_page("page.md", PAGE)
        for finding in check(text)
    ]
    assert sorted(found) == [
        (4, "again, not anew or once more"),
        (4, "exists, not is there"),
        (10, "no sentence opens with a free what-clause"),
    ]


def test_the_comments_of_settings_are_read() -> None:
    source = 'a = "# 1"\n# It shall\n# be anew.\nb = 2  # whoever\n'
    found = [
        (finding.line, finding.rule)
        for text in read_settings("settings.toml", source)
        for finding in check(text)
    ]
    assert sorted(found) == [
        (2, "must or should, not shall"),
        (3, "again, not anew or once more"),
        (4, "name the role"),
    ]


if __name__ == "__main__":
    for finding in search(sys.argv[1:] or ["."]):
        print(finding)
