"""The checks of `doctor`, each with a machine that passes and one that fails."""

import os
import sys
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from bench.ports import reserved_port
from sleap_rtc import doctor
from sleap_rtc.doctor import SIGNALING_TIMEOUT, Check, examine
from sleap_rtc.io.hardware import MachineInfo
from sleap_rtc.proto.messages import Gpu
from tests.client.room_lab import environ_of, worker_in
from tests.io.signaling.lab import HOST, Server, plain_server, running_server
from tests.io.storage.places import ends_while_reading

BARE = MachineInfo(hostname="laptop", gpus=(), sleap_nn="", disk_free=0)


@pytest.fixture(autouse=True)
def _isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the settings and the hardware of this machine away from the tests."""
    monkeypatch.delenv("SHARED_STORAGE_ROOT", raising=False)
    monkeypatch.delenv("SLEAP_RTC_CONFIG", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr(doctor, "describe_machine", lambda path: BARE)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with running_server() as server:
        yield server


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {
        "SLEAP_RTC_STATE_DIR": str(tmp_path / "state"),
        "XDG_CONFIG_HOME": str(tmp_path),
    }


async def checks(environ: dict[str, str], root: Path | None = None) -> dict[str, Check]:
    return {check.name: check async for check in examine(root, environ)}


async def test_each_failure_has_a_remedy(environ: dict[str, str]) -> None:
    found = await checks(environ, Path("/none"))
    assert list(found) == [
        "Python",
        "Signaling",
        "Shared storage",
        "UDP",
        "sleap-nn",
        "GPU",
    ]
    assert found["Signaling"].verdict == "failed"
    assert found["Shared storage"].verdict == "failed"
    assert "does not exist" in found["Shared storage"].found
    for check in found.values():
        assert check.verdict == "ok" or check.advice or check.found, check


async def test_the_workers_of_the_room_are_named(
    tmp_path: Path, server: Server
) -> None:
    environ = environ_of(tmp_path, server.url)
    empty = (await checks(environ))["Signaling"]
    assert empty.verdict == "note"
    assert "no worker is in the room" in empty.found
    async with worker_in(server, "worker-1"), worker_in(server, "worker-2"):
        found = (await checks(environ))["Signaling"]
    assert found.verdict == "ok"
    assert "worker-1" in found.found
    assert "worker-2" in found.found


# -------------------------------------------------------------------------------- HTTP


async def http_check(url: str, environ: dict[str, str]) -> Check:
    environ["SLEAP_RTC_SIGNALING_HTTP"] = url
    return (await checks(environ))["Signaling over HTTP"]


@pytest.mark.parametrize("status", [200, 404])
async def test_any_answer_over_http_is_fine(
    environ: dict[str, str], status: int
) -> None:
    async def handle(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(
            f"HTTP/1.1 {status} X\r\nContent-Length: 0\r\n\r\n".encode()
        )

    async with plain_server(handle) as port:
        check = await http_check(f"http://{HOST}:{port}", environ)
    assert (check.verdict, f"status {status}" in check.found) == ("ok", True)


async def test_a_server_that_refuses_http_fails(environ: dict[str, str]) -> None:
    with reserved_port() as port:
        check = await http_check(f"http://{HOST}:{port}", environ)
    assert check.verdict == "failed"
    assert "refused" in check.found


async def test_a_server_that_is_silent_over_http_fails(
    environ: dict[str, str], mock_clock: trio.testing.MockClock
) -> None:
    async def handle(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        mock_clock.jump(SIGNALING_TIMEOUT)
        await stream.receive_some()

    async with plain_server(handle) as port:
        check = await http_check(f"http://{HOST}:{port}", environ)
    assert check.verdict == "failed"
    assert "does not answer" in check.found


# ------------------------------------------------------------------------- the machine


async def test_storage_that_works_is_described(
    environ: dict[str, str], tmp_path: Path
) -> None:
    check = (await checks(environ, tmp_path))["Shared storage"]
    assert check.verdict == "ok"
    assert str(tmp_path) in check.found
    assert "free" in check.found


async def test_storage_that_is_not_configured_is_a_note(
    environ: dict[str, str],
) -> None:
    check = (await checks(environ))["Shared storage"]
    assert check.verdict == "note"
    assert "SHARED_STORAGE_ROOT" in check.advice


async def test_storage_that_does_not_answer_fails(
    environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The answer of the probe: no real storage hangs as soon as a test asks it to.
    monkeypatch.setattr(doctor, "STORAGE_TIMEOUT", 0.0)
    check = (await checks(environ, tmp_path))["Shared storage"]
    assert check.verdict == "failed"
    assert "did not answer" in check.found
    assert "mount" in check.advice


@pytest.mark.skipif(sys.platform == "win32", reason="FIFOs")
async def test_the_checks_can_be_cancelled_while_the_configuration_hangs(
    environ: dict[str, str], tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    config = tmp_path / "config.toml"
    os.mkfifo(config)
    environ["SLEAP_RTC_CONFIG"] = str(config)
    assert await ends_while_reading(partial(checks, environ), config, mock_clock)


async def test_the_storage_is_that_of_the_environment(
    environ: dict[str, str], tmp_path: Path
) -> None:
    environ["SHARED_STORAGE_ROOT"] = str(tmp_path)
    assert (await checks(environ))["Shared storage"].verdict == "ok"


@pytest.mark.skipif(sys.platform == "win32", reason="FIFOs")
async def test_the_checks_can_be_cancelled_while_the_disk_hangs(
    environ: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mock_clock: trio.testing.MockClock,
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    monkeypatch.setattr(doctor, "describe_machine", lambda path: fifo.read_bytes())
    assert await ends_while_reading(partial(checks, environ), fifo, mock_clock)


@pytest.mark.parametrize(("size", "verdict"), [(1024, "ok"), (2**30, "note")])
async def test_small_socket_buffers_are_a_note(
    environ: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    verdict: str,
) -> None:
    monkeypatch.setattr(doctor, "BUFFER_SIZE", size)
    check = (await checks(environ))["UDP"]
    assert check.verdict == verdict
    assert (f"rmem_max={size}" in check.advice) is (verdict == "note")


async def test_the_gpus_and_sleap_are_described(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = await checks(environ)
    assert (bare["GPU"].verdict, bare["sleap-nn"].verdict) == ("note", "note")
    machine = MachineInfo(
        hostname="gpu",
        gpus=(Gpu("T4", 16 * 1024), Gpu("A100", 80 * 1024)),
        sleap_nn="0.1.2",
        disk_free=0,
    )
    monkeypatch.setattr(doctor, "describe_machine", lambda path: machine)
    found = await checks(environ)
    assert found["GPU"] == Check("GPU", "ok", "T4 (16.0 GiB), A100 (80.0 GiB)")
    assert found["sleap-nn"] == Check("sleap-nn", "ok", "version 0.1.2 on the PATH")
