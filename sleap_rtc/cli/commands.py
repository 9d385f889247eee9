"""The commands and their options; the code of a command is imported when it runs.

``--help`` and ``version`` need this module only, so it imports nothing slow: no event
loop, no links, no consoles.
"""

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sleap_rtc.cli.failures import reported_errors
from sleap_rtc.proto.rendezvous.workers import FIND_TIMEOUT
from sleap_rtc.proto.route.reconnection import PATIENCE
from sleap_rtc.proto.route.routes import RoutePreference

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object per line instead.")
]
SharedStorageRoot = Annotated[
    Path | None,
    typer.Option(help="Directory where this machine mounts the shared storage."),
]


class Role(StrEnum):
    """The roles of a daemon."""

    worker = "worker"
    signaling = "signaling"


class LogFormat(StrEnum):
    """The formats of log lines."""

    text = "text"
    json = "json"


def send(
    package: Annotated[
        Path,
        typer.Argument(help="A job package as SLEAP exports it: zip or directory."),
    ],
    worker: Annotated[
        str | None,
        typer.Option(help="Id, name or host name of the worker; default: choose one."),
    ] = None,
    route: Annotated[
        RoutePreference,
        typer.Option(
            help="Use shared storage, or send in chunks through the channel. The "
            "channel uses TCP if possible; tcp and quic name the link."
        ),
    ] = "auto",
    output: Annotated[
        Path | None,
        typer.Option(help="Directory for the results; default: PACKAGE-results."),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(min=0.1, help="Cancel the job after this many seconds."),
    ] = None,
    shared_storage_root: SharedStorageRoot = None,
    patience: Annotated[
        float,
        typer.Option(min=0, help="Seconds to keep trying to reopen a lost connection."),
    ] = PATIENCE,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh",
            help="Start a new job even if this package was already submitted.",
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Run a package on a worker. Ctrl-C cancels the job; a second one exits at once."""
    with reported_errors(as_json=json):
        from sleap_rtc.cli.send import send_package
        from sleap_rtc.client import JobRequest

        request = JobRequest(
            package=package,
            worker=worker,
            route=route,
            output=output,
            timeout=timeout,
            shared_storage_root=shared_storage_root,
            patience=patience,
            fresh=fresh,
        )
        send_package(request, as_json=json)


def daemon(
    role: Annotated[
        Role, typer.Option(help="Run jobs, or only introduce peers to each other.")
    ] = Role.worker,
    listen: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Address of the signaling server, including a worker's own.",
        ),
    ] = None,
    public_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="URL at which other machines reach the worker's own signaling server "
            "(ws:// or wss://).",
        ),
    ] = None,
    public_address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Address at which other machines reach the links, if a router maps "
            "the port to another.",
        ),
    ] = None,
    shared_storage_root: SharedStorageRoot = None,
    slots: Annotated[
        int | None,
        typer.Option(min=1, help="Jobs at the same time; default: one for each GPU."),
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(help="A program that jobs may run besides SLEAP's; repeatable."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the worker in lists.")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            min=0, max=65535, help="Port of the links; default: any free one."
        ),
    ] = None,
    log_format: Annotated[
        LogFormat, typer.Option(help="Log lines for people, or as JSON.")
    ] = LogFormat.text,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Log more details.")
    ] = False,
) -> None:
    """Run a daemon until Ctrl-C or SIGTERM stops it."""
    from sleap_rtc.cli import daemon as code
    from sleap_rtc.worker import read_options

    as_json = log_format is LogFormat.json
    code.log_everything(as_json=as_json, verbose=verbose)
    if role is Role.signaling:
        code.run_signaling(listen)
        return
    options = read_options(
        os.environ,
        listen=listen,
        public_url=public_url,
        public_address=public_address,
        shared_storage_root=shared_storage_root,
        slots=slots,
        allow=tuple(allow or ()),
        name=name,
        port=port,
    )
    code.run_worker(options, prints_invite=not as_json)


def invite(
    new: Annotated[
        bool,
        typer.Option(
            "--new", help="Make a new secret; all machines have to join again with it."
        ),
    ] = False,
) -> None:
    """Print the invite of this machine's room. Its holders can run jobs here."""
    from sleap_rtc.cli.rooms import print_invite

    print_invite(new=new)


def join(
    invite: Annotated[
        str,
        typer.Argument(
            help="The invite that a worker printed; '-' reads it from stdin."
        ),
    ],
) -> None:
    """Join the room of an invite, so that `send` finds its workers."""
    from sleap_rtc.cli.rooms import join_and_report

    if invite == "-":
        invite = typer.get_text_stream("stdin").readline()
    join_and_report(invite.strip())


def workers(
    json: Json = False,
    timeout: Annotated[
        float, typer.Option(help="Seconds to wait for the signaling server.", min=0.1)
    ] = FIND_TIMEOUT,
) -> None:
    """List the workers of the room."""
    from sleap_rtc.cli.rooms import print_workers

    print_workers(timeout=timeout, as_json=json)


def doctor(shared_storage_root: SharedStorageRoot = None, json: Json = False) -> None:
    """Check Python, signaling, shared storage, UDP, sleap-nn and GPUs."""
    from sleap_rtc.cli.doctor import print_checks

    print_checks(shared_storage_root, as_json=json)


config = typer.Typer(help="Show the settings in force.", no_args_is_help=True)


@config.command("path")
def config_path() -> None:
    """Print the path of the configuration file, whether or not it exists."""
    from sleap_rtc.cli.config import print_path

    print_path()


@config.command("show")
def config_show(
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead.")
    ] = False,
) -> None:
    """Print the settings in force, and their sources."""
    from sleap_rtc.cli.config import print_settings

    print_settings(as_json=json)


def version() -> None:
    """Print the versions of the program, the protocol and Python."""
    import platform

    import sleap_rtc
    from sleap_rtc.proto.messages import PROTOCOL_VERSION

    typer.echo(
        f"sleap-rtc {sleap_rtc.__version__} (protocol {PROTOCOL_VERSION}, "
        f"Python {platform.python_version()}, {platform.system()})"
    )
