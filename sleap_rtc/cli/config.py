"""``config show``, ``config path`` and ``version``."""

import os
import platform
from typing import Annotated

import msgspec
import typer

import sleap_rtc
from sleap_rtc.cli.console import out
from sleap_rtc.config import (
    SHARED_STORAGE_VARIABLE,
    chosen_environment,
    config_path,
    environment_name,
    load_settings,
    state_directory,
)
from sleap_rtc.proto.messages import PROTOCOL_VERSION

app = typer.Typer(help="Show the settings that are in force.", no_args_is_help=True)


@app.command("path")
def path_command() -> None:
    """Print where the configuration file is, or would be."""
    out.print(str(config_path()), markup=False)


@app.command()
def show(
    json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False,
) -> None:
    """Print the settings that are in force, and where they come from."""
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
    if json:
        out.print(msgspec.json.encode(values).decode(), markup=False)
        return
    for key, value in values.items():
        shown = "not set" if value is None else value
        out.print(f"{key} = {shown}", markup=False)


def version() -> None:
    """Print the versions of the program, the protocol and Python."""
    out.print(
        f"sleap-rtc {sleap_rtc.__version__} (protocol {PROTOCOL_VERSION}, "
        f"Python {platform.python_version()}, {platform.system()})"
    )
