"""The scripts of a package, parsed into commands."""

import shlex
import shutil
import subprocess

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sleap_rtc.proto.errors import InvalidInput
from sleap_rtc.proto.job.script import (
    DEFAULT_PROGRAMS,
    MAX_COMMANDS,
    MAX_SCRIPT_LENGTH,
    SCRIPT_KINDS,
    Command,
    ScriptError,
    equivalents,
    plan_scripts_untrusted,
    read_script_untrusted,
)

TRAIN = "train-script.sh"
TRACK = "track-script.sh"
INFERENCE = "inference-script.sh"


def read(text: str, allowed: frozenset[str] = DEFAULT_PROGRAMS) -> list[list[str]]:
    script = read_script_untrusted(TRAIN, text, allowed)
    return [list(command.argv) for command in script.commands]


def refusal(text: str, allowed: frozenset[str] = DEFAULT_PROGRAMS) -> str:
    with pytest.raises(ScriptError) as caught:
        read_script_untrusted(TRAIN, text, allowed)
    return caught.value.reason


# -------------------------------------------------------------- what SLEAP exports

EXPORTS = {
    "1.5.2": (
        "#!/bin/bash\n"
        "sleap-nn-train --config-name centroid.yaml --config-dir . "
        "trainer_config.ckpt_dir=models trainer_config.run_name=240101.centroid.n=2 "
        "trainer_config.zmq.controller_port=9000 "
        "trainer_config.zmq.publish_port=9001 \n"
    ),
    "1.6.6": (
        "#!/bin/bash\n"
        "sleap train --config-name centroid.yaml --config-dir . "
        "'trainer_config.ckpt_dir=\"models\"' "
        "'trainer_config.run_name=\"240101.centroid.n=2\"' \n"
    ),
    "by hand": (
        "#!/bin/bash\n\nset -euo pipefail\n"
        "# both stages\n"
        "sleap-nn train \\\n  --config-name centroid.yaml --config-dir . \\\n"
        "  trainer_config.ckpt_dir=models # where they go\n"
    ),
}


@pytest.mark.parametrize(
    ("version", "line", "expected"),
    [
        (
            "1.5.2",
            2,
            "sleap-nn-train --config-name centroid.yaml --config-dir . "
            "trainer_config.ckpt_dir=models "
            "trainer_config.run_name=240101.centroid.n=2 "
            "trainer_config.zmq.controller_port=9000 "
            "trainer_config.zmq.publish_port=9001",
        ),
        (
            "1.6.6",
            2,
            "sleap train --config-name centroid.yaml --config-dir . "
            'trainer_config.ckpt_dir="models" '
            'trainer_config.run_name="240101.centroid.n=2"',
        ),
        (
            "by hand",
            5,
            "sleap-nn train --config-name centroid.yaml --config-dir . "
            "trainer_config.ckpt_dir=models",
        ),
    ],
)
def test_the_scripts_that_sleap_exports_are_read(
    version: str, line: int, expected: str
) -> None:
    script = read_script_untrusted(TRAIN, EXPORTS[version], DEFAULT_PROGRAMS)
    assert script.kind == "training"
    assert script.commands == (Command(tuple(expected.split(" ")), line, TRAIN),)


# ------------------------------------------------------------------------- quoting


QUOTED: list[tuple[str, list[str]]] = [
    ("sleap  a\tb ", ["sleap", "a", "b"]),
    ("sleap 'a b' \"c d\"", ["sleap", "a b", "c d"]),
    ("sleap a'b'\"c\"d", ["sleap", "abcd"]),
    ("sleap '' \"\"", ["sleap", "", ""]),
    (r"sleap a\ b \' \" \\ \$ \#x", ["sleap", "a b", "'", '"', "\\", "$", "#x"]),
    (
        r'sleap "a\"b" "c\\d" "\$e" "\`" "f\g"',
        ["sleap", 'a"b', "c\\d", "$e", "`", "f\\g"],
    ),
    (r"sleap 'a\b$c`d|e;f&g'", ["sleap", r"a\b$c`d|e;f&g"]),
    ('sleap "a|b;c*d~e#f"', ["sleap", "a|b;c*d~e#f"]),
    ("sleap a#b # comment", ["sleap", "a#b"]),
    ("sleap a\\\nb", ["sleap", "ab"]),
    ('sleap "a\\\nb"', ["sleap", "ab"]),
    ("sleap a\\\r\n  b\r\n", ["sleap", "a", "b"]),
    ("\n  \n\t\nsleap a", ["sleap", "a"]),
    ("'sleap' a", ["sleap", "a"]),
    ("sleap a=b --c=[d,e] f~g y@z%", ["sleap", "a=b", "--c=[d,e]", "f~g", "y@z%"]),
    ("sleap Käse/日本語.slp", ["sleap", "Käse/日本語.slp"]),
    ("\ufeffsleap a", ["sleap", "a"]),
]


@pytest.mark.parametrize(("text", "words"), QUOTED)
def test_words_are_split_by_the_rules_of_the_shell(text: str, words: list[str]) -> None:
    assert read(text) == [words]


@pytest.mark.skipif(shutil.which("sh") is None, reason="no shell to compare with")
@pytest.mark.parametrize(("text", "words"), QUOTED[:-1])
def test_a_real_shell_splits_into_the_same_words(text: str, words: list[str]) -> None:
    script = "sleap() { printf '%s\\0' sleap \"$@\"; }\n" + text.replace("\r", "")
    done = subprocess.run(["sh", "-c", script], capture_output=True, check=True)
    assert done.stdout.decode().split("\0")[:-1] == words


@given(st.lists(st.text(st.characters(exclude_categories=("C", "Zl", "Zp")))))
@example(["$x", "`y`", "it's", 'a "b"', "~", "*", "\\", "#"])
def test_quoted_words_are_parsed_back(words: list[str]) -> None:
    argv = ["sleap", *words]
    assert read(shlex.join(argv)) == [argv]


@pytest.mark.parametrize(
    ("text", "line", "why"),
    [
        ("sleap a | tee log", 1, "interpret '|'"),
        ("sleap a && sleap b", 1, "interpret '&'"),
        ("sleap a; sleap b", 1, "interpret ';'"),
        ("sleap < in", 1, "interpret '<'"),
        ("sleap a>out", 1, "interpret '>'"),
        ("(sleap a)", 1, "interpret '('"),
        ("sleap)", 1, "interpret ')'"),
        ("sleap `id`", 1, "interpret '`'"),
        ("sleap $HOME", 1, "interpret '$'"),
        ('sleap "$HOME"', 1, "interpret '$'"),
        ('sleap "`id`"', 1, "interpret '`'"),
        ("\n\nsleap *.slp", 3, "expand '*'"),
        ("sleap a?", 1, "expand '?'"),
        ("sleap {a,b}", 1, "expand '{'"),
        ("sleap ~/x", 1, "home folder"),
        ("# x\nX=1 sleap a", 2, "variables cannot be set"),
        ("X+=1", 1, "variables cannot be set"),
        ("export X", 1, "does not run 'export'"),
        ("sleap a\ncd models\nsleap b", 2, "'cd' is not possible"),
        ("sleap 'a\nsleap b'", 1, "quote ' is not closed"),
        ('sleap \\\n "a', 2, 'quote " is not closed'),
        ("sleap a\\", 1, "ends in a backslash"),
        ("sleap a\x00b", 1, "U+0000"),
        ("sleap '\x1b[2J'", 1, "U+001B"),
        ("sleap a\rb", 1, "U+000D"),
        ('sleap "\x9b"', 1, "U+009B"),
        ("sleap \\\x07", 1, "U+0007"),
        ("sleap \ud800", 1, "U+D800"),
        ("set -- a b", 1, "does not run 'set'"),
        ("set", 1, "does not run 'set'"),
        ("if true", 1, "does not run 'if'"),
        ("''", 1, "does not run ''"),
    ],
)
def test_syntax_that_a_shell_would_interpret_is_refused(
    text: str, line: int, why: str
) -> None:
    reason = refusal(text)
    assert reason.startswith(f"{TRAIN}, line {line}: ")
    assert why in reason


@pytest.mark.parametrize("options", ["-e", "-eu", "-euo pipefail", "+x", "-o errexit"])
def test_options_of_the_shell_are_ignored(options: str) -> None:
    assert read(f"set {options}\nsleap a\n") == [["sleap", "a"]]


# ------------------------------------------------------------------- the allow-list


def test_a_program_that_is_not_allowed_is_named_with_its_line() -> None:
    assert refusal("#!/bin/sh\nsleap a\nrm -rf /\n") == (
        "train-script.sh, line 3: this worker does not run 'rm' (allowed: sleap, "
        "sleap-nn, sleap-nn-track, sleap-nn-train). Its owner can allow more with "
        "--allow."
    )


@pytest.mark.parametrize("program", ["./sleap", "/usr/bin/sleap", "models/sleap"])
def test_a_path_is_allowed_only_if_exactly_that_path_is(program: str) -> None:
    assert "does not run" in refusal(program)
    assert read(program, frozenset({program})) == [[program]]
    assert "does not run" in refusal("sleap", frozenset({program}))


def test_a_refused_name_cannot_harm_a_terminal() -> None:
    reason = refusal("'" + "\u202e" + "x" * 1000 + "'")
    assert len(reason) < 300
    assert "\u202e" not in reason


def test_scripts_are_limited() -> None:
    assert len(read("sleap\n" * MAX_COMMANDS)) == MAX_COMMANDS
    assert "more than" in refusal("sleap\n" * (MAX_COMMANDS + 1))
    assert read("#" * MAX_SCRIPT_LENGTH) == []
    assert "more than" in refusal("#" * (MAX_SCRIPT_LENGTH + 1))


@given(st.text(), st.sampled_from([*SCRIPT_KINDS, "other.sh"]))
def test_garbage_is_a_script_or_invalid_input(text: str, name: str) -> None:
    for body in (text, f"sleap {text}", f'sleap "{text}"'):
        try:
            read_script_untrusted(name, body, DEFAULT_PROGRAMS)
            plan_scripts_untrusted({name: body}, DEFAULT_PROGRAMS)
        except InvalidInput:
            pass


# ------------------------------------------------------------------------ the plan


def plan(files: dict[str, str]) -> list[str]:
    return [script.name for script in plan_scripts_untrusted(files, DEFAULT_PROGRAMS)]


@pytest.mark.parametrize(
    ("files", "order"),
    [
        ({TRAIN: "sleap a"}, [TRAIN]),
        ({TRACK: "sleap a"}, [TRACK]),
        ({INFERENCE: "sleap b", TRAIN: "sleap a"}, [TRAIN, INFERENCE]),
        ({INFERENCE: "#!/bin/bash\n", TRAIN: "sleap a"}, [TRAIN]),
        ({INFERENCE: "sleap b", TRAIN: "#!/bin/bash\n"}, [INFERENCE]),
        (
            {INFERENCE: "sleap c", TRACK: "sleap b", TRAIN: "sleap a"},
            [TRAIN, TRACK, INFERENCE],
        ),
        ({INFERENCE: "sleap b", TRACK: "# b\nsleap 'b'"}, [TRACK]),
        ({"notes.sh": "rm -rf /", TRAIN: "sleap a"}, [TRAIN]),
    ],
)
def test_training_comes_before_inference(
    files: dict[str, str], order: list[str]
) -> None:
    assert plan(files) == order


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({}, "has no train-script.sh, track-script.sh or inference-script.sh"),
        ({"run.sh": "sleap a"}, "has no train-script.sh"),
        ({TRAIN: "#!/bin/bash\n"}, "train-script.sh of the package has no command"),
        (
            {TRAIN: "", INFERENCE: "set -e"},
            "inference-script.sh of the package have no",
        ),
        ({TRAIN: "sleap a", INFERENCE: "rm x"}, "inference-script.sh, line 1: this"),
    ],
)
def test_a_package_that_cannot_run_is_refused_with_the_reason(
    files: dict[str, str], why: str
) -> None:
    with pytest.raises(ScriptError, match=why):
        plan(files)


# ------------------------------------------------------------------ other spellings


@pytest.mark.parametrize(
    ("command", "others"),
    [
        ("sleap-nn-train x", ["sleap-nn train x", "sleap train x"]),
        ("sleap-nn train x", ["sleap-nn-train x", "sleap train x"]),
        ("sleap train x", ["sleap-nn train x", "sleap-nn-train x"]),
        ("sleap-nn-track x", ["sleap-nn track x", "sleap track x"]),
        ("sleap-nn track x", ["sleap-nn-track x", "sleap track x"]),
        ("sleap track x", ["sleap-nn track x", "sleap-nn-track x"]),
        ("sleap predict x", ["sleap-nn predict x"]),
        ("sleap-nn predict x", ["sleap predict x"]),
        ("sleap", []),
        ("sleap-nn x train", []),
        ("sleap label x", []),
    ],
)
def test_a_command_has_other_spellings(command: str, others: list[str]) -> None:
    found = [" ".join(argv) for argv in equivalents(tuple(command.split()))]
    assert found == others


@pytest.mark.parametrize(
    ("argv", "title"),
    [
        (("sleap-nn", "train", "--config-name", "x"), "sleap-nn train"),
        (("sleap-nn-train", "--config-name", "x"), "sleap-nn-train"),
        (("sleap", "X.yaml"), "sleap"),
        (("sleap",), "sleap"),
    ],
)
def test_a_command_has_a_name_for_people(argv: tuple[str, ...], title: str) -> None:
    command = Command(argv, 2, TRAIN)
    assert command.title == title
    assert str(command) == f"'{title}' (train-script.sh, line 2)"
