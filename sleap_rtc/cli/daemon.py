"""``daemon``: run a worker, or a signaling server."""

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sleap_rtc import worker
from sleap_rtc.cli.console import (
    LogFormat,
    LogLevel,
    configure_logs,
    err,
    out,
    plain,
    run,
)
from sleap_rtc.errors import UsageError
from sleap_rtc.proto.rendezvous.invite import Invite, encode_invite
from sleap_rtc.rendezvous import server as signaling
from sleap_rtc.rendezvous.rooms import parse_listen_address


class Role(StrEnum):
    """What a daemon does."""

    worker = "worker"
    signaling = "signaling"


def daemon(
    role: Annotated[
        Role, typer.Option(help="Run jobs, or only introduce peers.")
    ] = Role.worker,
    listen: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Where the signaling server listens, a worker's own one included.",
        ),
    ] = None,
    public_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="How others reach the worker's own signaling server (ws:// or wss://).",
        ),
    ] = None,
    public_address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="How others reach the links, if a router maps the port to another.",
        ),
    ] = None,
    shared_storage_root: Annotated[
        Path | None,
        typer.Option(help="Where this machine mounts the shared storage."),
    ] = None,
    slots: Annotated[
        int | None,
        typer.Option(min=1, help="Jobs at the same time; default: one for each GPU."),
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(help="A program that jobs may run beside SLEAP's; repeatable."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What the worker is called in lists.")
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
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")] = False,
) -> None:
    """Run a daemon until Ctrl-C or SIGTERM ends it."""
    configure_logs(log_format, LogLevel.verbose if verbose else LogLevel.normal)
    if role is Role.signaling:
        if listen is None:
            raise UsageError(
                "A signaling server needs an address to listen on.",
                "For example: --listen 0.0.0.0:8787",
            )
        where = parse_listen_address(listen)
        run(signaling.run_signaling_daemon, where.host, where.port)
        return
    options = worker.read_options(
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
    greet = _print_invite if log_format is LogFormat.text else None
    run(worker.run_worker, options, on_ready=greet)


def _print_invite(invite: Invite, hosted: bool) -> None:
    """Say how to reach this worker; the invite itself never goes to the log."""
    text = encode_invite(invite)
    if invite.is_loopback:
        out.print("Send a job from this machine:  sleap-rtc send job.zip")
        out.print(
            "Only this machine can reach this worker: its signaling server is at "
            f"{plain(invite.url)}. For others, start it with --listen 0.0.0.0:8787"
        )
        return
    out.print("Type this once on the machine that sends jobs:")
    out.print(f"  sleap-rtc join {text}", markup=False)
    if not hosted:
        err.print(f"Signaling server: {plain(invite.url)}")
