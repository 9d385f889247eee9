import os
from pathlib import Path

import pytest
import trio

from sleap_rtc.io.storage.folder import StorageError
from sleap_rtc.io.storage.probe import probe_storage, read_probe, write_probe
from sleap_rtc.proto.errors import InvalidInput


async def test_healthy_storage_reports_its_free_space(tmp_path: Path) -> None:
    with trio.fail_after(60):
        health = await probe_storage(tmp_path, timeout=15)
    assert health.ok
    assert health.reason == ""
    assert 0 < health.free_bytes <= health.total_bytes
    assert health.write_seconds > 0
    assert os.listdir(tmp_path) == []


async def test_missing_storage_is_named(tmp_path: Path) -> None:
    with trio.fail_after(60):
        health = await probe_storage(tmp_path / "unmounted", timeout=15)
    assert not health.ok
    assert "unmounted: No such file" in health.reason


async def test_storage_that_cannot_be_written_is_not_healthy() -> None:
    with trio.fail_after(60):
        health = await probe_storage(Path("/proc"), timeout=15)
    assert not health.ok


async def test_storage_that_does_not_answer_is_given_up(tmp_path: Path) -> None:
    with trio.fail_after(60):
        health = await probe_storage(tmp_path, timeout=0)
    assert not health.ok
    assert "did not answer within 0 seconds" in health.reason


async def test_a_cancelled_probe_ends_its_child(tmp_path: Path) -> None:
    with trio.fail_after(60), trio.CancelScope() as scope:
        scope.cancel()
        await probe_storage(tmp_path, timeout=15)
    assert scope.cancelled_caught


def test_a_probe_is_read_back_through_another_path(tmp_path: Path) -> None:
    (tmp_path / "root/jobs").mkdir(parents=True)
    (tmp_path / "mount").symlink_to("root")
    write_probe(tmp_path / "root", "jobs/.probe", b"n" * 32)
    assert read_probe(tmp_path / "mount", "jobs/.probe") == b"n" * 32
    with pytest.raises(StorageError, match="File exists"):
        write_probe(tmp_path / "root", "jobs/.probe", b"other")


def test_a_probe_on_other_storage_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="File not found"):
        read_probe(tmp_path, "jobs/.probe")


def test_a_huge_probe_is_not_read_whole(tmp_path: Path) -> None:
    (tmp_path / "probe").write_bytes(bytes(100_000))
    assert len(read_probe(tmp_path, "probe")) == 64
    with pytest.raises(ValueError, match="at most 64"):
        write_probe(tmp_path, "other", bytes(65))
