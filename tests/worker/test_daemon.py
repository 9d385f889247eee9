"""A worker in this process: its room, its description there, and its refusals."""

import os
import re
import signal
import socket
import sqlite3
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock

from sleap_rtc.client import list_workers
from sleap_rtc.config import ConfigError, load_settings
from sleap_rtc.errors import UsageError, UserError
from sleap_rtc.io.hardware import MachineInfo
from sleap_rtc.proto.messages import Gpu
from sleap_rtc.proto.rendezvous.envelope import Address
from sleap_rtc.proto.rendezvous.invite import Invite
from sleap_rtc.proto.rendezvous.workers import WorkerCard
from sleap_rtc.worker import read_options, run_worker
from sleap_rtc.worker.daemon import STORE_NAME, Worker
from sleap_rtc.worker.job_store import JobStore, open_store
from tests.io.storage.places import HangingStorage
from tests.worker.stores import record

DEADLINE = 60.0

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="workers run on Linux and macOS"
)


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """Return the variables of an empty home, with a name and a free port for links."""
    (tmp_path / "state").mkdir()
    config = tmp_path / "config.toml"
    config.write_text('[worker]\nname = "Maja\'s GPU"\nlink_port = 0\n')
    return {
        "HOME": str(tmp_path),
        "SLEAP_RTC_STATE_DIR": str(tmp_path / "state"),
        "SLEAP_RTC_CONFIG": str(config),
    }


@asynccontextmanager
async def running(
    environ: dict[str, str], **arguments: object
) -> AsyncIterator[tuple[Invite, bool]]:
    """Run a worker, and yield its invite and True if it serves the room."""
    options = read_options(environ, **arguments)  # type: ignore[arg-type]
    ready: list[tuple[Invite, bool]] = []
    is_ready = trio.Event()

    def on_ready(invite: Invite, hosted: bool) -> None:
        ready.append((invite, hosted))
        is_ready.set()

    async def run() -> None:
        await run_worker(options, on_ready=on_ready)

    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await is_ready.wait()
            yield ready[0]
            nursery.cancel_scope.cancel()


async def cards(environ: dict[str, str]) -> list[WorkerCard]:
    return [worker.card for worker in await list_workers(environ=environ)]


async def refusal(environ: dict[str, str], **arguments: object) -> UserError:
    """Return the error of a worker that cannot start."""
    options = read_options(environ, **arguments)  # type: ignore[arg-type]
    with trio.fail_after(DEADLINE), pytest.raises(UserError) as caught:
        await run_worker(options)
    return caught.value


# ------------------------------------------------------------------------- the room


async def test_the_first_worker_of_a_machine_makes_a_room_and_is_listed(
    environ: dict[str, str], tmp_path: Path
) -> None:
    async with running(environ, slots=3) as (invite, hosted):
        assert hosted
        assert invite.is_loopback
        (card,) = await cards(environ)
    assert card.name == "Maja's GPU"
    assert (card.status, card.slots, card.slots_free) == ("available", 3, 3)
    assert card.disk_free > 0
    assert not card.shared_storage


async def test_a_second_worker_uses_the_room_of_the_first(
    environ: dict[str, str],
) -> None:
    async with (
        running(environ) as (invite, _),
        running(environ, name="other") as (same, hosted),
    ):
        assert not hosted
        assert same == invite
        names = {card.name for card in await cards(environ)}
    assert names == {"Maja's GPU", "other"}


async def test_the_room_sees_that_a_slot_is_taken(environ: dict[str, str]) -> None:
    gpus = (Gpu("small", 1), Gpu("large", 2), Gpu("middle", 1))
    machine = MachineInfo("host", gpus, "0.3.5", 10)
    worker = Worker(read_options(environ), machine, "worker-here-012345")
    ready, ignored = trio.Event(), list[int]()
    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(worker.run, lambda *_: ready.set())
            await ready.wait()
            (card,) = await cards(environ)
            assert (card.gpu_model, card.slots_free) == ("large", 3)
            async with worker._queue.slot(ignored.append):
                while card.slots_free == 3:
                    (card,) = await cards(environ)
            assert (card.slots_free, card.status) == (2, "available")
            nursery.cancel_scope.cancel()


async def test_a_signal_ends_a_worker_in_order(environ: dict[str, str]) -> None:
    def end(_invite: Invite, _hosted: bool) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with trio.fail_after(DEADLINE):
        await run_worker(read_options(environ), on_ready=end)


@pytest.mark.parametrize("step", ["make_state_directory", "take_identity", "hosting"])
async def test_a_worker_whose_home_hangs_can_be_stopped(
    environ: dict[str, str],
    tmp_path: Path,
    step: str,
    monkeypatch: pytest.MonkeyPatch,
    mock_clock: MockClock,
) -> None:
    options = read_options(environ)
    with HangingStorage(tmp_path / "fifo") as storage:
        monkeypatch.setattr(
            f"sleap_rtc.worker.daemon.{step}", lambda *_: storage.touch()
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run_worker, options)
            await storage.wait_touched()
            nursery.cancel_scope.cancel()
            mock_clock.rate = 50


# --------------------------------------------------------------------- the refusals


async def test_a_port_that_is_taken_is_named_with_advice(
    environ: dict[str, str],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        error = await refusal(environ, port=taken.getsockname()[1])
    assert isinstance(error, ConfigError)
    assert str(error).startswith("Cannot listen for links: ")
    assert "--port" in str(error)


async def test_a_signaling_address_that_is_taken_is_named(
    environ: dict[str, str],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = await refusal(environ, listen=f"127.0.0.1:{port}")
    assert str(port) in str(error)


async def test_listen_has_no_meaning_in_a_room_elsewhere(
    environ: dict[str, str],
) -> None:
    environ["SLEAP_RTC_SIGNALING_WS"] = "ws://signaling.example:8787"
    error = await refusal(environ, listen="127.0.0.1:0")
    assert isinstance(error, UsageError)
    assert "--listen has no meaning" in str(error)


async def test_a_damaged_store_keeps_a_worker_from_starting(
    environ: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "state" / STORE_NAME).write_bytes(b"not a database" * 100)
    error = await refusal(environ)
    assert isinstance(error, ConfigError)
    assert "is damaged" in str(error)


async def test_a_job_that_cannot_be_read_costs_only_itself(
    environ: dict[str, str], tmp_path: Path
) -> None:
    async with running(environ):
        pass
    (identity,) = (tmp_path / "state" / "workers").glob("*.json")
    tag = re.findall(r"[0-9a-f]{6}", identity.read_text())[0]
    path = tmp_path / "state" / STORE_NAME
    store: JobStore = open_store(path)
    for number in (1, 2):
        store.save(record(number, worker_id=f"worker-maja-s-gpu-{tag}", state="FAILED"))
    store.close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE jobs SET state = 'MAD' WHERE number = 1")
    connection.close()
    with capture_logs() as logs:
        async with running(environ):
            while not any(log["event"] == "job restored" for log in logs):
                await trio.lowlevel.checkpoint()
    events = [log["event"] for log in logs]
    assert events.count("job not restored") == 1
    assert events.count("job restored") == 1


# ---------------------------------------------------------------------- the options


def test_arguments_come_before_the_settings(environ: dict[str, str]) -> None:
    Path(environ["SLEAP_RTC_CONFIG"]).write_text(
        '[worker]\nname = "settings"\nslots = 2\nallow = ["a"]\nlink_port = 1\n'
        'public_address = "gpu.example:7"\n'
    )
    options = read_options(environ)
    assert (options.name, options.slots, options.port) == ("settings", 2, 1)
    assert options.public_address == Address("gpu.example", 7)
    options = read_options(
        environ, name="mine", slots=3, port=0, allow=("b",), public_address="x:8"
    )
    assert (options.name, options.slots, options.port) == ("mine", 3, 0)
    assert options.public_address == Address("x", 8)
    assert {"a", "b", "sleap-nn"} <= options.programs
    assert options.settings == load_settings(environ)


@pytest.mark.parametrize(
    ("name", "slug"),
    [("Maja's GPU", "maja-s-gpu"), ("---", "machine"), ("x" * 80, "x" * 32)],
)
def test_a_name_becomes_a_part_of_the_peer_id(
    environ: dict[str, str], name: str, slug: str
) -> None:
    assert read_options(environ, name=name).slug == slug
