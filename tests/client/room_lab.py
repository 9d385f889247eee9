"""A room in this process: its signaling server, and workers that tests write."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import structlog

from sleap_rtc.io.connect.listener import Listener, open_listener
from sleap_rtc.io.link.certificates import make_certificate
from sleap_rtc.io.nursery import open_background_nursery
from sleap_rtc.proto.rendezvous.envelope import Address
from sleap_rtc.proto.rendezvous.invite import Invite, RoomKeys, encode_invite
from sleap_rtc.proto.rendezvous.messages import Metadata
from sleap_rtc.proto.rendezvous.workers import WorkerCard
from sleap_rtc.rendezvous.introductions import Authenticator
from tests.client.scripted import ScriptedWorker, scripted_worker
from tests.io.signaling.lab import HOST, Server

SECRET = b"k" * 32
KEYS = RoomKeys.from_secret(SECRET)
CARD = WorkerCard(hostname="gpu", gpu_model="T4", gpu_memory_mb=16000, slots_free=1)

Script = Callable[[ScriptedWorker], Awaitable[None]]


def invite_to(url: str) -> Invite:
    return Invite(url, SECRET)


def environ_of(folder: Path, url: str) -> dict[str, str]:
    """Return the environment of a client that has joined the room of a server."""
    return {
        "SLEAP_RTC_STATE_DIR": str(folder / "state"),
        "SLEAP_RTC_INVITE": encode_invite(invite_to(url)),
    }


@asynccontextmanager
async def worker_in(
    server: Server,
    peer_id: str = "worker-1",
    *,
    card: WorkerCard = CARD,
    at: tuple[str, int] | None = None,
    on_offer: Callable[[], None] | None = None,
) -> AsyncIterator[Listener]:
    """Put a worker into the room; the test accepts its links.

    Args:
        server: The server of the room.
        peer_id: The id of the worker.
        card: Its properties.
        at: The address in its answers, if not that of its listener.
        on_offer: Called instead of answering an offer.
    """
    log = structlog.get_logger()
    certificate = make_certificate()
    authenticator = Authenticator(KEYS, peer_id, certificate.certificate_der, log)
    card = msgspec.structs.replace(card, nonce=authenticator.nonce.hex())
    metadata = Metadata(("sleap-rtc",), msgspec.to_builtins(card))
    async with (
        open_listener(HOST, 0, certificate, authenticator.authenticate) as listener,
        server.room(peer_id, "worker", metadata) as room,
        open_background_nursery() as nursery,
    ):
        await room.wait_registered()

        async def ignore_offers() -> None:
            async for _ in room.offers:
                if on_offer is not None:
                    on_offer()

        address = Address(*(at or (HOST, listener.port)))
        if on_offer is None:
            nursery.start_soon(
                authenticator.answer_offers, room, lambda: (address,), listener.kinds
            )
        else:
            nursery.start_soon(ignore_offers)
        yield listener


async def serve(listener: Listener, *scripts: Script) -> None:
    """Accept one link for each script, and close all further links at once."""
    for script in scripts:
        link = await listener.accept()
        async with scripted_worker(link) as worker:
            await script(worker)
            await worker.wait_closed()
    while True:
        (await listener.accept()).close_now("the test serves no more links")
