"""``invite``, ``join`` and ``workers``: the room of this machine."""

import os
from typing import Annotated

import typer
from rich.table import Table

from sleap_rtc import client
from sleap_rtc.cli.console import err, out, plain, print_json, run
from sleap_rtc.io.storage.files import human_size
from sleap_rtc.proto.rendezvous.invite import encode_invite
from sleap_rtc.proto.rendezvous.workers import Candidate
from sleap_rtc.rendezvous.rooms import join_room, renew_secret, require_invite

_LOOPBACK_HINT = (
    "This invite only works on this machine. For others, start the worker with "
    "`--listen 0.0.0.0:8787` (or a signaling server that all can reach)."
)


def invite(
    new: Annotated[
        bool,
        typer.Option(
            "--new", help="Make a new secret; everybody has to join again with it."
        ),
    ] = False,
) -> None:
    """Print the invite of this machine's room. Whoever holds it can run jobs."""
    found = renew_secret(os.environ) if new else require_invite(os.environ)
    out.print(encode_invite(found), markup=False)
    if new:
        err.print("Restart the workers of this room: they still use the old secret.")
    if found.is_loopback:
        err.print(_LOOPBACK_HINT)


def join(
    invite: Annotated[
        str, typer.Argument(help="The invite that a worker printed; '-' reads it.")
    ],
) -> None:
    """Enter the room of an invite, so that `send` finds its workers."""
    if invite == "-":
        invite = typer.get_text_stream("stdin").readline()
    joined = join_room(invite.strip(), os.environ)
    out.print(f"Joined the room at {joined.url}.", markup=False)
    if joined.is_loopback:
        err.print("Its signaling server can only be reached from the worker's machine.")


def workers(
    json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line.")
    ] = False,
    timeout: Annotated[
        float, typer.Option(help="Seconds to wait for the signaling server.", min=0.1)
    ] = 15.0,
) -> None:
    """List the workers of the room."""
    run(_workers, json, timeout)


async def _workers(json: bool, timeout: float) -> None:
    found = await client.list_workers(timeout=timeout)
    if json:
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
