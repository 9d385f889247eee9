"""The code of ``invite``, ``join`` and ``workers``: the room of this machine."""

import os

from rich.table import Table

from sleap_rtc import client
from sleap_rtc.cli.console import err, out, plain, print_json
from sleap_rtc.cli.running import run
from sleap_rtc.proto.rendezvous.invite import encode_invite
from sleap_rtc.proto.rendezvous.workers import Candidate
from sleap_rtc.proto.sizes import human_size
from sleap_rtc.rendezvous.rooms import join_room, renew_secret, require_invite

_LOOPBACK_HINT = (
    "This invite only works on this machine. For others, start the worker with "
    "`--listen 0.0.0.0:8787` (or a signaling server that all can reach)."
)


def print_invite(*, new: bool) -> None:
    """Print the invite of this machine's room.

    Args:
        new: Replace the secret of the room first.

    Raises:
        UsageError: If this machine has not joined a room.
    """
    found = renew_secret(os.environ) if new else require_invite(os.environ)
    out.print(encode_invite(found), markup=False)
    if new:
        err.print("Restart the workers of this room: they still use the old secret.")
    if found.is_loopback:
        err.print(_LOOPBACK_HINT)


def join_and_report(invite: str) -> None:
    """Join the room of an invite, and print where it is.

    Raises:
        UsageError: If it is not an invite.
    """
    joined = join_room(invite, os.environ)
    out.print(f"Joined the room at {joined.url}.", markup=False)
    if joined.is_loopback:
        err.print("Only the worker's machine can reach its signaling server.")


def print_workers(*, timeout: float, as_json: bool) -> None:
    """Print the workers of the room.

    Args:
        timeout: Seconds to wait for the signaling server.
        as_json: Print one JSON object per line instead of a table.
    """
    run(_print_workers, timeout, as_json)


async def _print_workers(timeout: float, as_json: bool) -> None:
    show_workers(await client.list_workers(timeout=timeout), as_json=as_json)


def show_workers(found: list[Candidate], *, as_json: bool) -> None:
    """Print these workers as a table or as JSON."""
    if as_json:
        for worker in found:
            print_json("worker", peer_id=worker.peer_id, **_fields(worker))
        return
    if not found:
        out.print("No worker is in the room. Start one: sleap-rtc daemon --role worker")
        return
    table = Table(box=None, pad_edge=False)
    for title in (
        "worker",
        "status",
        "slots",
        "GPU",
        "sleap-nn",
        "shared",
        "disk free",
    ):
        table.add_column(title)
    for worker in found:
        card = worker.card
        table.add_row(
            plain(worker.peer_id),
            card.status,
            f"{card.slots_free} of {card.slots} free",
            plain(_gpu(worker)),
            plain(card.sleap_nn_version or "not found"),
            "yes" if card.shared_storage else "no",
            human_size(card.disk_free),
        )
    out.print(table)


def _gpu(worker: Candidate) -> str:
    card = worker.card
    if not card.gpu_memory_mb:
        return "none"
    return f"{card.gpu_model}, {human_size(card.gpu_memory_mb * 1024**2)}"


def _fields(worker: Candidate) -> dict[str, object]:
    card = worker.card
    return {
        name: getattr(card, name) for name in card.__struct_fields__ if name != "nonce"
    }
