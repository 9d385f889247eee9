"""The code of ``config``: it prints the settings in force."""

import os

import msgspec

from sleap_rtc.cli.console import out
from sleap_rtc.config import (
    SHARED_STORAGE_VARIABLE,
    chosen_environment,
    config_path,
    environment_name,
    load_settings,
    state_directory,
)


def print_path() -> None:
    """Print the path of the configuration file, whether or not it exists."""
    out.print(str(config_path()), markup=False)


def print_settings(*, as_json: bool) -> None:
    """Print the settings in force, and their sources.

    Raises:
        ConfigError: If the configuration cannot be used.
    """
    settings = load_settings()
    environment = chosen_environment(settings)
    values: dict[str, object] = {
        "config_file": str(config_path()),
        "config_file_exists": config_path().exists(),
        "state_directory": str(state_directory()),
        "environment": environment_name(),
        "signaling_websocket": environment.signaling_websocket,
        "signaling_http": environment.signaling_http,
        "shared_storage_root": settings.shared_storage_root,
        "shared_storage_root_from": (
            SHARED_STORAGE_VARIABLE
            if os.environ.get(SHARED_STORAGE_VARIABLE)
            else "config file" if settings.shared_storage_root else None
        ),
        "worker": msgspec.to_builtins(settings.worker),
    }
    if as_json:
        out.print(msgspec.json.encode(values).decode(), markup=False)
        return
    for key, value in values.items():
        shown = "not set" if value is None else value
        out.print(f"{key} = {shown}", markup=False)
