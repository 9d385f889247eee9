"""Settings: defaults < TOML file < environment variables < command line."""

import difflib
import os
import stat
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import platformdirs
from msgspec import Meta

from sleap_rtc.errors import UsageError
from sleap_rtc.io.storage.private import write_private

APPLICATION = "sleap-rtc"

SHARED_STORAGE_VARIABLE = "SHARED_STORAGE_ROOT"
CONFIG_VARIABLE = "SLEAP_RTC_CONFIG"
ENVIRONMENT_VARIABLE = "SLEAP_RTC_ENV"
INVITE_VARIABLE = "SLEAP_RTC_INVITE"
STATE_VARIABLE = "SLEAP_RTC_STATE_DIR"
SIGNALING_VARIABLES = {
    "signaling_websocket": "SLEAP_RTC_SIGNALING_WS",
    "signaling_http": "SLEAP_RTC_SIGNALING_HTTP",
}

ENVIRONMENTS = ("development", "staging", "production")


class ConfigError(UsageError):
    """The configuration cannot be used; the message names the key, file and cause."""


class SharedStorageConfigError(ConfigError):
    """The configured shared storage root is not a directory that can be used."""


class Environment(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True
):
    """The signaling server of one environment.

    Args:
        signaling_websocket: Its address, ``ws://`` or ``wss://``. Without one, a
            worker runs a signaling server of its own.
        signaling_http: Address at which the same server answers HTTP; `doctor` asks it.
    """

    signaling_websocket: (
        Annotated[str, Meta(pattern=r"\Awss?://[^/\s]+\S*\Z")] | None
    ) = None
    signaling_http: Annotated[str, Meta(pattern=r"\Ahttps?://[^/\s]+\S*\Z")] | None = (
        None
    )


class WorkerSettings(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True
):
    """Settings of the worker role.

    Args:
        slots: Jobs at the same time; by default one for each GPU, at least one.
        allow: Programs that jobs may run besides those of SLEAP.
        gpus: Indexes of the GPUs that jobs may use; by default all of them.
        link_port: Port of the links; 0 takes a free one.
        public_address: ``HOST:PORT`` of the links for other machines, if a provider or
            a router maps the port to another one.
        name: Name of the worker in lists; by default the host name.
    """

    slots: Annotated[int, Meta(ge=1, le=1024)] | None = None
    allow: tuple[Annotated[str, Meta(min_length=1, max_length=4096)], ...] = ()
    gpus: tuple[Annotated[int, Meta(ge=0, le=1023)], ...] | None = None
    link_port: Annotated[int, Meta(ge=0, le=65535)] = 0
    public_address: Annotated[str, Meta(max_length=255)] | None = None
    name: Annotated[str, Meta(max_length=64)] | None = None


class Settings(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True
):
    """All settings.

    Args:
        shared_storage_root: Where this machine mounts the shared storage.
        environments: Signaling servers by name.
        worker: Settings of the worker role.
    """

    shared_storage_root: str | None = None
    environments: dict[str, Environment] = {}
    worker: WorkerSettings = WorkerSettings()


def config_path(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the path of the configuration file, whether or not it exists."""
    named = environ.get(CONFIG_VARIABLE)
    if named:
        return Path(named)
    return platformdirs.user_config_path(APPLICATION, appauthor=False) / "config.toml"


def state_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the directory of the invite, the notes and the worker's jobs."""
    named = environ.get(STATE_VARIABLE)
    if named:
        return Path(named).absolute()
    return platformdirs.user_state_path(APPLICATION, appauthor=False)


def make_state_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """Create the state directory, readable by its owner only, and return it.

    Raises:
        ConfigError: If it cannot be created.
    """
    path = state_directory(environ)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"Cannot create the state directory {path}: {error.strerror}. "
            f"Set {STATE_VARIABLE} to a directory that you can write."
        ) from None
    return path


def load_settings(environ: Mapping[str, str] = os.environ) -> Settings:
    """Read the configuration file, if it exists, and the environment variables.

    Args:
        environ: Environment variables.

    Returns:
        The settings; environment variables replace values of the file.

    Raises:
        ConfigError: If the file cannot be read, is not TOML, or has an unknown key or
            a bad value. A file that is named in the environment must exist.
    """
    required = bool(environ.get(CONFIG_VARIABLE))
    settings = _read_file(config_path(environ), required=required)
    root = environ.get(SHARED_STORAGE_VARIABLE)
    if root:
        settings = msgspec.structs.replace(settings, shared_storage_root=root)
    return settings


def _read_file(path: Path, *, required: bool) -> Settings:
    try:
        with path.open("rb") as file:
            document = tomllib.load(file)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not required:
            return Settings()
        raise ConfigError(
            f"Cannot read the configuration file {path}: {error.strerror}."
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from None
    _check_keys(path, document)
    try:
        return msgspec.convert(document, Settings)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {error}.") from None


def _check_keys(path: Path, document: dict[str, Any]) -> None:
    """Raise an error for an unknown key, with the key that was probably meant."""
    tables: list[tuple[str, object, tuple[str, ...]]] = [
        ("", document, Settings.__struct_fields__),
        ("worker.", document.get("worker"), WorkerSettings.__struct_fields__),
        ("environments.", document.get("environments"), ENVIRONMENTS),
    ]
    environments = document.get("environments")
    if isinstance(environments, dict):
        tables += [
            (f"environments.{name}.", table, Environment.__struct_fields__)
            for name, table in environments.items()
        ]
    for prefix, table, known in tables:
        for key in table if isinstance(table, dict) else ():
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                hint = f" Did you mean '{close[0]}'?" if close else ""
                raise ConfigError(
                    f"{path}: unknown setting '{prefix}{key}'.{hint} "
                    f"Known settings here: {', '.join(known)}."
                )


def environment_name(environ: Mapping[str, str] = os.environ) -> str:
    """Return the name of the chosen environment.

    Raises:
        ConfigError: If the variable names none of `ENVIRONMENTS`.
    """
    name = environ.get(ENVIRONMENT_VARIABLE) or "production"
    if name not in ENVIRONMENTS:
        raise ConfigError(
            f"{ENVIRONMENT_VARIABLE} is '{name}', but must be one of "
            f"{', '.join(ENVIRONMENTS)}."
        )
    return name


def chosen_environment(
    settings: Settings, environ: Mapping[str, str] = os.environ
) -> Environment:
    """Return the signaling addresses of the chosen environment.

    Raises:
        ConfigError: If a variable does not name an environment or an address.
    """
    chosen = settings.environments.get(environment_name(environ), Environment())
    values = msgspec.structs.asdict(chosen)
    for key, variable in SIGNALING_VARIABLES.items():
        if environ.get(variable):
            values[key] = environ[variable]
    try:
        return msgspec.convert(values, Environment)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"{' or '.join(SIGNALING_VARIABLES.values())}: {error}."
        ) from None


class SharedStorageConfig:
    """The mount point of the storage that this machine shares with its peers.

    Example:
        >>> root = SharedStorageConfig.get_shared_storage_root()
        >>> if root is None:
        ...     print("Shared storage not configured, will use RTC transfer")
    """

    @staticmethod
    def get_shared_storage_root(
        cli_override: str | os.PathLike[str] | None = None,
    ) -> Path | None:
        """Find the shared storage root.

        ``--shared-storage-root`` beats the variable ``SHARED_STORAGE_ROOT``, which
        beats ``shared_storage_root`` in the configuration file.

        Args:
            cli_override: The value of the command line, if any.

        Returns:
            The absolute path of the root, or None if none is configured.

        Raises:
            SharedStorageConfigError: If the configured root does not exist, is not a
                directory, or cannot be read and written.
            ConfigError: If the configuration file cannot be used.
        """
        return find_shared_root(cli_override, os.environ)


def find_shared_root(
    override: str | os.PathLike[str] | None, environ: Mapping[str, str]
) -> Path | None:
    """Find the shared storage root; see `SharedStorageConfig`.

    Args:
        override: The value of the command line, if any.
        environ: Environment variables.
    """
    value = os.fspath(override) if override else None
    source = "--shared-storage-root"
    if not value:
        value = environ.get(SHARED_STORAGE_VARIABLE)
        source = SHARED_STORAGE_VARIABLE
    if not value:
        value = load_settings(environ).shared_storage_root
        source = str(config_path(environ))
    return _checked_root(value, source) if value else None


def _checked_root(value: str, source: str) -> Path:
    where = f"The shared storage root {value} (from {source})"
    try:
        path = Path(value).expanduser()
        is_directory = stat.S_ISDIR(path.stat().st_mode)
    except FileNotFoundError:
        raise SharedStorageConfigError(
            f"{where} does not exist. Mount the storage, or correct the path."
        ) from None
    except OSError as error:
        raise SharedStorageConfigError(
            f"{where} cannot be used: {error.strerror}. Correct the path."
        ) from None
    except (ValueError, RuntimeError) as error:  # a NUL, or an unknown "~user"
        raise SharedStorageConfigError(
            f"{where} cannot be used: {error}. Correct the path."
        ) from None
    if not is_directory:
        raise SharedStorageConfigError(f"{where} is not a directory.")
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise SharedStorageConfigError(
            f"{where} cannot be read and written by this user. "
            "Ask its owner for access."
        )
    return path.resolve()


# -------------------------------------------------------------------------- invites


def invite_path(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the path of the invite of this machine's room."""
    return state_directory(environ) / "invite"


def load_invite_text(environ: Mapping[str, str] = os.environ) -> str | None:
    """Read the invite of the room that this machine has made or joined.

    Raises:
        ConfigError: If the file exists but cannot be read.
    """
    named = environ.get(INVITE_VARIABLE, "").strip()
    if named:
        return named
    path = invite_path(environ)
    try:
        return path.read_text(encoding="ascii").strip() or None
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read the invite in {path}: {error}.") from None


def save_invite_text(text: str, environ: Mapping[str, str] = os.environ) -> Path:
    """Write an invite, readable by its owner only.

    Args:
        text: The invite.
        environ: Environment variables.

    Returns:
        The file.

    Raises:
        ConfigError: If it cannot be written.
    """
    path = make_state_directory(environ) / "invite"
    try:
        write_private(path, f"{text}\n".encode("ascii"))
    except OSError as error:
        raise ConfigError(
            f"Cannot write the invite to {path}: {error.strerror}."
        ) from None
    return path
