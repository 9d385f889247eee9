"""The code of ``daemon``: it runs a worker or a signaling server."""

import logging

from sleap_rtc import worker
from sleap_rtc.cli.console import err, out, plain
from sleap_rtc.cli.running import configure_logs, run_logged
from sleap_rtc.errors import UsageError
from sleap_rtc.proto.rendezvous.invite import Invite, encode_invite
from sleap_rtc.rendezvous import server as signaling
from sleap_rtc.rendezvous.rooms import parse_listen_address


def log_everything(*, as_json: bool, verbose: bool) -> None:
    """Configure the logs of a daemon; no other command logs anything but errors."""
    configure_logs(level=logging.DEBUG if verbose else logging.INFO, as_json=as_json)


def run_signaling(listen: str | None) -> None:
    """Run a signaling server until Ctrl-C or SIGTERM stops it.

    Args:
        listen: The value of ``--listen``.

    Raises:
        UsageError: If it is missing or not an address.
    """
    if listen is None:
        raise UsageError(
            "A signaling server needs an address to listen on.",
            "For example: --listen 0.0.0.0:8787",
        )
    where = parse_listen_address(listen)
    run_logged(signaling.run_signaling_daemon, where.host, where.port)


def run_worker(options: worker.WorkerOptions, *, prints_invite: bool) -> None:
    """Run a worker until Ctrl-C or SIGTERM stops it.

    Args:
        options: The settings and the command line.
        prints_invite: Print the invite on standard output once the worker is ready.
    """
    greet = print_directions if prints_invite else None
    run_logged(worker.run_worker, options, on_ready=greet)


def print_directions(invite: Invite, hosted: bool) -> None:
    """Print how to reach this worker; the invite itself never goes to the log."""
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
