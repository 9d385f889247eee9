import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sleap_rtc.proto.errors import InvalidInput
from sleap_rtc.proto.paths import (
    check_file_name_untrusted,
    check_portable_path_untrusted,
    check_relative_path_untrusted,
    fold_path,
)

CHECKS = [
    check_relative_path_untrusted,
    check_portable_path_untrusted,
    check_file_name_untrusted,
]

HOSTILE_TEXT = st.text(
    st.one_of(st.characters(), st.sampled_from("./\\\0:~ \x1b\x7f\ud800")), max_size=40
)


@pytest.mark.parametrize(
    "path",
    [
        "training.zip",
        "jobs/job_f3a8b2c1/training.zip",
        "a b/Maße (1)/日本.zip",
        "...",
        "a..b/..c/d..",
        "-rf",
        "~/a",
        ".hidden/file",
        "n" * 255,
        "/".join(["n" * 15] * 256),
    ],
)
def test_a_harmless_path_comes_back_unchanged(path: str) -> None:
    assert check_relative_path_untrusted(path) == path


@pytest.mark.parametrize(
    "path",
    [
        "..",
        "../jobs",
        "jobs/../../etc/passwd",
        "jobs/..",
        "/",
        "/etc/passwd",
        "//host/share",
        "C:/jobs",
        "z:jobs",
        "\\\\host\\share",
        "jobs\\..\\..",
        "jobs/training.zip\0.txt",
    ],
)
def test_a_path_that_leads_out_is_named_as_such(path: str) -> None:
    with pytest.raises(InvalidInput, match=r"^Path outside shared storage: "):
        check_relative_path_untrusted(path)


@pytest.mark.parametrize(
    "path",
    [
        "",
        ".",
        "./jobs",
        "jobs/./a",
        "jobs//a",
        "jobs/",
        "jobs/\n",
        "\x1b[31mred",
        "\x7f",
        "\x85",
        "\ud800",
        "n" * 256,
        "ä" * 128,
        "n/" * 2048 + "n",
    ],
)
def test_a_malformed_path_is_invalid(path: str) -> None:
    with pytest.raises(InvalidInput, match=r"^Invalid path: "):
        check_relative_path_untrusted(path)


@pytest.mark.parametrize(
    "name",
    [
        ".",
        "..",
        ".bashrc",
        "NUL",
        "nul.txt",
        "Com1.tar.gz",
        "lpt¹",
        "CONIN$",
        "aux .txt",
        "name.",
        "name ",
        "a:stream",
        'say "hi"',
        "what?",
        "a*",
        "a|b",
        "<a>",
    ],
)
def test_a_name_that_some_system_cannot_store_is_refused(name: str) -> None:
    with pytest.raises(InvalidInput):
        check_file_name_untrusted(name)
    with pytest.raises(InvalidInput):
        check_portable_path_untrusted(f"models/{name}/best.ckpt")


@pytest.mark.parametrize("name", ["a.zip", "com10", "console", "näm€ (2).slp", "auxin"])
def test_an_ordinary_name_passes(name: str) -> None:
    assert check_file_name_untrusted(name) == name
    assert check_portable_path_untrusted(f"models/{name}") == f"models/{name}"


def test_a_file_name_cannot_be_a_path() -> None:
    for name in ["models/best.ckpt", "../../.ssh/authorized_keys", "a/", "/a", "a\\b"]:
        with pytest.raises(InvalidInput):
            check_file_name_untrusted(name)


def test_an_error_shows_a_hostile_path_escaped_and_short() -> None:
    with pytest.raises(InvalidInput) as caught:
        check_relative_path_untrusted("/\x1b[2J" + "x" * 3000)
    assert "\x1b" not in caught.value.reason
    assert len(caught.value.reason) < 250


def test_paths_that_some_system_cannot_tell_apart_fold_to_one_key() -> None:
    composed, decomposed = "\u00c9", "E\u0301"
    assert composed != decomposed
    assert fold_path(composed) == fold_path(decomposed) == fold_path("\u00e9")
    assert fold_path("STRASSE") == fold_path("straße")
    assert fold_path("a") != fold_path("b")


@given(HOSTILE_TEXT)
def test_a_checked_path_stays_beneath_its_root(text: str) -> None:
    for check in CHECKS:
        try:
            path = check(text)
        except InvalidInput as error:
            error.reason.encode()
            continue
        assert path == text
        names = path.split("/")
        assert not {"", ".", ".."} & set(names)
        assert not any(unicodedata.category(letter) == "Cc" for letter in path)
        assert "\\" not in path
        if check is check_file_name_untrusted:
            assert len(names) == 1


@given(st.text(max_size=20))
def test_folding_twice_changes_nothing(text: str) -> None:
    assert fold_path(fold_path(text)) == fold_path(text)
