import os
import stat
import sys
from pathlib import Path

import pytest

from sleap_rtc import config
from sleap_rtc.config import (
    ConfigError,
    Environment,
    SharedStorageConfig,
    SharedStorageConfigError,
    WorkerSettings,
    chosen_environment,
    environment_name,
    load_invite_text,
    load_settings,
    make_state_directory,
    save_invite_text,
)

get_root = SharedStorageConfig.get_shared_storage_root

posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep the settings of the user away from the tests."""
    for name in list(os.environ):
        if name.startswith("SLEAP_RTC_") or name == "SHARED_STORAGE_ROOT":
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "configuration"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The path of the configuration file, which does not exist yet."""
    path = tmp_path / "config.toml"
    monkeypatch.setenv("SLEAP_RTC_CONFIG", str(path))
    return path


def permissions(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# ------------------------------------------------------------- the shared storage root


@pytest.fixture
def roots(tmp_path: Path) -> dict[str, Path]:
    paths = {name: tmp_path / name for name in ("flag", "variable", "file")}
    for path in paths.values():
        path.mkdir()
    return paths


@pytest.mark.parametrize(
    ("given", "winner"),
    [
        (["flag", "variable", "file"], "flag"),
        (["flag", "file"], "flag"),
        (["flag"], "flag"),
        (["variable", "file"], "variable"),
        (["variable"], "variable"),
        (["file"], "file"),
        ([], None),
    ],
)
def test_the_flag_beats_the_variable_and_the_variable_beats_the_file(
    given: list[str],
    winner: str | None,
    roots: dict[str, Path],
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file.write_text(
        f"shared_storage_root = '{roots['file']}'\n" if "file" in given else ""
    )
    if "variable" in given:
        monkeypatch.setenv("SHARED_STORAGE_ROOT", str(roots["variable"]))
    flag = roots["flag"] if "flag" in given else None
    expected = roots[winner].resolve() if winner else None
    assert get_root(flag) == expected
    assert get_root(str(flag) if flag else "") == expected


def test_an_empty_variable_counts_as_none(
    roots: dict[str, Path], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text(f"shared_storage_root = '{roots['file']}'\n")
    monkeypatch.setenv("SHARED_STORAGE_ROOT", "")
    assert get_root() == roots["file"].resolve()


def test_without_any_configuration_there_is_no_root() -> None:
    assert get_root() is None


def test_a_broken_file_does_not_matter_when_the_flag_is_given(
    roots: dict[str, Path], file: Path
) -> None:
    file.write_text("= broken")
    assert get_root(roots["flag"]) == roots["flag"].resolve()
    with pytest.raises(ConfigError, match="not valid TOML"):
        get_root()


def test_the_root_may_be_given_from_the_home_directory(
    roots: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("USERPROFILE", os.environ["HOME"])
    assert get_root("~/flag") == roots["flag"].resolve()


def test_a_link_and_a_relative_path_lead_to_the_real_root(
    roots: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(roots["flag"])
    monkeypatch.chdir(tmp_path)
    assert get_root("link") == roots["flag"].resolve()


def bad_root(tmp_path: Path, kind: str) -> str:
    (tmp_path / "a file").write_text("")
    return {
        "missing": str(tmp_path / "missing"),
        "file": str(tmp_path / "a file"),
        "below a file": str(tmp_path / "a file" / "root"),
        "too long": str(tmp_path / ("x" * 5000)),
        "NUL": "a\0b",
        "unknown user": "~nobody-of-this-name/root",
    }[kind]


BAD_ROOTS = [
    ("missing", "does not exist"),
    ("file", "is not a directory"),
    ("below a file", "cannot be used"),
    ("too long", "cannot be used"),
    ("NUL", "cannot be used"),
    ("unknown user", "cannot be used"),
]


@pytest.mark.parametrize(("kind", "words"), BAD_ROOTS)
@posix
def test_a_root_that_is_not_a_directory_is_refused(
    kind: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(SharedStorageConfigError, match=words) as caught:
        get_root(bad_root(tmp_path, kind))
    assert "(from --shared-storage-root)" in str(caught.value)
    assert issubclass(SharedStorageConfigError, ConfigError)


def test_the_error_names_the_setting_that_was_wrong(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text("shared_storage_root = '/not/there'\n")
    with pytest.raises(SharedStorageConfigError, match=r"config\.toml"):
        get_root()
    monkeypatch.setenv("SHARED_STORAGE_ROOT", "/not/there/either")
    with pytest.raises(SharedStorageConfigError, match="SHARED_STORAGE_ROOT"):
        get_root()


@posix
@pytest.mark.unprivileged
@pytest.mark.parametrize("mode", [0o500, 0o300, 0o600])
def test_a_root_without_permission_is_refused(
    mode: int, roots: dict[str, Path]
) -> None:
    roots["flag"].chmod(mode)
    try:
        with pytest.raises(
            SharedStorageConfigError, match="cannot be read and written"
        ):
            get_root(roots["flag"])
    finally:
        roots["flag"].chmod(0o700)


# ------------------------------------------------------------------------- the file


def test_without_a_file_the_defaults_apply() -> None:
    settings = load_settings()
    assert settings == config.Settings()
    assert settings.worker == WorkerSettings()


def test_a_whole_file_is_read(file: Path) -> None:
    file.write_text("""
shared_storage_root = "/mnt/lab"

[environments.staging]
signaling_websocket = "wss://staging.example.org:8000/signal"
signaling_http = "https://staging.example.org"

[worker]
slots = 2
allow = ["nvidia-smi"]
gpus = [0, 3]
link_port = 4433
public_address = "rig.example.org:4434"
name = "rig"
""")
    settings = load_settings()
    assert settings.shared_storage_root == "/mnt/lab"
    assert settings.environments == {
        "staging": Environment(
            "wss://staging.example.org:8000/signal", "https://staging.example.org"
        )
    }
    assert settings.worker == WorkerSettings(
        2, ("nvidia-smi",), (0, 3), 4433, "rig.example.org:4434", "rig"
    )


def test_the_variable_replaces_the_root_of_the_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text("shared_storage_root = '/mnt/lab'\n")
    monkeypatch.setenv("SHARED_STORAGE_ROOT", "/mnt/other")
    assert load_settings().shared_storage_root == "/mnt/other"


BAD_FILES = [
    ("shared_storage_rot = '/x'", "Did you mean 'shared_storage_root'"),
    ("[worker]\nslot = 1", "'worker.slot'. Did you mean 'slots'"),
    ("[environments.stagin]", "'environments.stagin'. Did you mean 'staging'"),
    (
        "[environments.staging]\nsignaling_websockt = 'ws://x'",
        "'environments.staging.signaling_websockt'. Did you mean 'signaling_websocket'",
    ),
    ("xyzzy = 1", "unknown setting 'xyzzy'. Known settings here: shared_storage_root"),
    ("worker = [", "not valid TOML"),
    ("a = 1\na = 2", "not valid TOML"),
    ("worker = 3", "$.worker"),
    ("environments = 3", "$.environments"),
    ("shared_storage_root = 3", "$.shared_storage_root"),
    ("[worker]\nslots = 0", "$.worker.slots"),
    ("[worker]\nslots = 'two'", "$.worker.slots"),
    ("[worker]\ngpus = [-1]", "$.worker.gpus"),
    ("[worker]\nlink_port = 65536", "$.worker.link_port"),
    ("[worker]\nallow = ['']", "$.worker.allow"),
    ("[environments]\nstaging = 3", "$.environments"),
    (
        "[environments.staging]\nsignaling_websocket = 'http://x'",
        "signaling_websocket",
    ),
]


@pytest.mark.parametrize(("text", "words"), BAD_FILES)
def test_a_bad_file_is_refused_and_the_key_named(
    text: str, words: str, file: Path
) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_settings()
    assert words in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_file_that_is_not_text_is_refused(file: Path) -> None:
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_settings()


def test_a_file_that_was_named_must_exist(file: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"Cannot read the configuration .*No such file"
    ):
        load_settings()
    file.mkdir()
    with pytest.raises(ConfigError, match="Cannot read"):
        load_settings()


# -------------------------------------------------------------------- environments


def test_production_is_the_environment_unless_another_is_named() -> None:
    assert environment_name({}) == "production"
    assert environment_name({"SLEAP_RTC_ENV": ""}) == "production"
    for name in ("development", "staging", "production"):
        assert environment_name({"SLEAP_RTC_ENV": name}) == name
    with pytest.raises(ConfigError, match="'prod', but must be one of development"):
        environment_name({"SLEAP_RTC_ENV": "prod"})


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Environment("wss://production", "https://production")),
        ({"SLEAP_RTC_ENV": "staging"}, Environment("ws://staging")),
        ({"SLEAP_RTC_ENV": "development"}, Environment()),
        (
            {"SLEAP_RTC_SIGNALING_WS": "ws://here:1"},
            Environment("ws://here:1", "https://production"),
        ),
        (
            {"SLEAP_RTC_ENV": "staging", "SLEAP_RTC_SIGNALING_HTTP": "http://here:2"},
            Environment("ws://staging", "http://here:2"),
        ),
    ],
)
def test_variables_choose_the_signaling_server(
    variables: dict[str, str], expected: Environment, file: Path
) -> None:
    file.write_text("""
[environments.production]
signaling_websocket = "wss://production"
signaling_http = "https://production"
[environments.staging]
signaling_websocket = "ws://staging"
""")
    assert chosen_environment(load_settings(), variables) == expected


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("SLEAP_RTC_SIGNALING_WS", "http://here"),
        ("SLEAP_RTC_SIGNALING_WS", "here:8000"),
        ("SLEAP_RTC_SIGNALING_WS", "ws://"),
        ("SLEAP_RTC_SIGNALING_HTTP", "ws://here"),
    ],
)
def test_a_variable_that_is_not_an_address_is_refused(
    variable: str, value: str
) -> None:
    with pytest.raises(ConfigError, match=variable):
        chosen_environment(config.Settings(), {variable: value})


# ------------------------------------------------------------ the state and the invite


@pytest.fixture
def state(tmp_path: Path) -> dict[str, str]:
    return {"SLEAP_RTC_STATE_DIR": str(tmp_path / "deep" / "state")}


@posix
def test_only_the_owner_can_read_the_state_directory(state: dict[str, str]) -> None:
    before = os.umask(0)
    try:
        path = make_state_directory(state)
    finally:
        os.umask(before)
    assert path == Path(state["SLEAP_RTC_STATE_DIR"])
    assert permissions(path) == 0o700
    assert make_state_directory(state) == path


def test_a_state_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="SLEAP_RTC_STATE_DIR"):
        make_state_directory({"SLEAP_RTC_STATE_DIR": str(tmp_path / "file" / "state")})


def test_an_invite_is_kept_and_replaced(state: dict[str, str]) -> None:
    assert load_invite_text(state) is None
    path = save_invite_text("first", state)
    assert load_invite_text(state) == "first"
    save_invite_text("second", state)
    assert load_invite_text(state) == "second"
    assert list(path.parent.iterdir()) == [path]


def test_an_empty_invite_file_counts_as_none(state: dict[str, str]) -> None:
    save_invite_text("", state)
    assert load_invite_text(state) is None


def test_the_variable_beats_the_stored_invite(state: dict[str, str]) -> None:
    save_invite_text("stored", state)
    assert load_invite_text({**state, "SLEAP_RTC_INVITE": " given\n"}) == "given"
    assert load_invite_text({**state, "SLEAP_RTC_INVITE": " "}) == "stored"


@posix
@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_other_users_cannot_read_an_invite_at_any_moment(
    umask: int, state: dict[str, str]
) -> None:
    seen: list[int] = []
    directory = make_state_directory(state)
    # An earlier version of the file that all users could read changes nothing.
    for name in ("invite", f".invite.{os.getpid()}"):
        (directory / name).write_text("old")
        (directory / name).chmod(0o666)

    def look(*_: object) -> None:
        for path in directory.iterdir():
            if "secret" in path.read_text():
                seen.append(permissions(path))

    before = os.umask(umask)
    sys.setprofile(look)  # after every single call, even of a C function
    try:
        path = save_invite_text("secret", state)
    finally:
        sys.setprofile(None)
        os.umask(before)
    assert set(seen) == {0o600}
    assert permissions(path) == 0o600


@posix
def test_an_invite_that_cannot_be_written_leaves_nothing(
    state: dict[str, str],
) -> None:
    directory = make_state_directory(state)
    (directory / "invite").mkdir()
    (directory / "invite" / "in the way").write_text("")
    with pytest.raises(ConfigError, match="Cannot write the invite") as caught:
        save_invite_text("secret", state)
    assert "secret" not in str(caught.value)
    assert [path.name for path in directory.iterdir()] == ["invite"]


def test_an_invite_that_cannot_be_read_is_not_shown(state: dict[str, str]) -> None:
    path = save_invite_text("old", state)
    path.write_bytes(b"secret \xff")
    with pytest.raises(ConfigError, match="Cannot read") as caught:
        load_invite_text(state)
    assert "secret" not in str(caught.value)
