"""The shared route of a session: the package and results on common storage."""

from pathlib import Path

import msgspec
import pytest
from blake3 import blake3

from sleap_rtc.client import events
from sleap_rtc.proto import messages
from sleap_rtc.proto.job.client_outputs import RouteChosen
from tests.client.scripted import ScriptedWorker
from tests.client.session_world import CONTENT, JOB, Client, names
from tests.io.link.memory import MemoryLink


async def share(worker: ScriptedWorker, root: Path) -> Path:
    """Answer like a worker on the shared route; return the path of the package."""
    await worker.greet(shared=True)
    probe = await worker.expect(messages.MountProbe)
    content = (root / probe.path).read_bytes()
    await worker.send(messages.MountProbed(JOB, blake3(content).hexdigest()))
    await worker.expect(messages.JobIdentity)
    path = (await worker.expect(messages.SharedInputPath)).path
    await worker.send(messages.PathValidated("input"))
    await worker.expect(messages.SharedOutputPath)
    await worker.send(messages.PathValidated("output"))
    await worker.expect(messages.SharedStorageJob)
    await worker.send(messages.JobState(JOB, messages.JobProgress("RUNNING")))
    return root / path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "storage"
    root.mkdir()
    return root


def make_result(root: Path) -> Path:
    """Write a result like a worker that shares the storage."""
    path = root / "jobs" / JOB / "best.ckpt"
    path.write_bytes(b"weights")
    return path


async def test_shared_results_stay_where_they_are(client: Client, root: Path) -> None:
    client.plan = msgspec.structs.replace(client.plan, shared_root=root)
    copies: list[bytes] = []

    async def script(worker: ScriptedWorker) -> None:
        copies.append((await share(worker, root)).read_bytes())
        await worker.complete(JOB, make_result(root))
        await worker.expect(messages.ResultsReceived)

    ending = await client.run(script)
    assert ending.outcome == "complete"
    assert copies == [CONTENT]
    assert names(root / "jobs" / JOB) == ["best.ckpt", "job.zip"]
    assert client.of(events.ResultsStored) == [
        events.ResultsStored(root / "jobs" / JOB, 1, 7)
    ]
    (copied,) = client.of(events.PackageCopied)
    assert isinstance(copied, events.PackageCopied)
    assert copied.size == len(CONTENT)


async def test_shared_results_are_copied_to_the_output(
    client: Client, root: Path, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    client.plan = msgspec.structs.replace(client.plan, shared_root=root, output=output)

    async def script(worker: ScriptedWorker) -> None:
        await share(worker, root)
        await worker.complete(JOB, make_result(root))

    assert (await client.run(script)).outcome == "complete"
    assert (output / "best.ckpt").read_bytes() == b"weights"


async def test_shared_results_are_copied_without_the_worker(
    client: Client, root: Path, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    client.plan = msgspec.structs.replace(client.plan, shared_root=root, output=output)

    async def script(worker: ScriptedWorker) -> None:
        await share(worker, root)
        await worker.complete(JOB, make_result(root))
        assert isinstance(worker.link, MemoryLink)
        worker.link.cut("the worker left")

    assert (await client.run(script)).outcome == "complete"
    assert client.attempts == 0
    assert (output / "best.ckpt").read_bytes() == b"weights"


async def test_a_result_that_leads_out_of_the_storage_is_not_copied(
    client: Client, root: Path, tmp_path: Path
) -> None:
    client.plan = msgspec.structs.replace(
        client.plan, shared_root=root, output=tmp_path / "output"
    )

    async def script(worker: ScriptedWorker) -> None:
        await share(worker, root)
        path = make_result(root)
        await worker.complete(JOB, path)
        path.unlink()
        path.symlink_to("/etc/passwd")

    ending = await client.run(script)
    assert ending.outcome == "transfer_failed"
    assert "best.ckpt" in ending.reason
    assert names(tmp_path / "output") == []


async def test_a_worker_with_other_storage_gets_the_package_through_the_channel(
    client: Client, root: Path, tmp_path: Path
) -> None:
    client.plan = msgspec.structs.replace(client.plan, shared_root=root)

    async def script(worker: ScriptedWorker) -> None:
        await worker.greet(shared=True)
        await worker.expect(messages.MountProbe)
        await worker.send(messages.MountProbeFailed(JOB, "no such file"))
        await worker.accept()
        await worker.receive_package(tmp_path / "worker")
        await worker.send(messages.JobFailed(JOB, "enough"))

    (tmp_path / "worker").mkdir()
    assert (await client.run(script)).outcome == "failed"
    assert names(root / "jobs") == []


async def test_storage_that_is_gone_is_not_used(
    client: Client, root: Path, tmp_path: Path
) -> None:
    client.plan = msgspec.structs.replace(client.plan, shared_root=root / "none")

    async def script(worker: ScriptedWorker) -> None:
        await worker.greet(shared=True)
        await worker.accept()
        await worker.send(messages.JobFailed(JOB, "enough"))

    assert (await client.run(script)).outcome == "failed"
    (route,) = client.of(RouteChosen)
    assert isinstance(route, RouteChosen)
    assert route.route == "channel"


async def test_a_package_that_cannot_be_copied_goes_through_the_channel(
    client: Client, root: Path
) -> None:
    client.plan = msgspec.structs.replace(client.plan, shared_root=root, size=1)

    async def script(worker: ScriptedWorker) -> None:
        await worker.greet(shared=True)
        probe = await worker.expect(messages.MountProbe)
        content = (root / probe.path).read_bytes()
        await worker.send(messages.MountProbed(JOB, blake3(content).hexdigest()))
        await worker.accept()
        await worker.expect(messages.JobCancel)

    ending = await client.run(script)
    assert ending.reason == "job.zip changed in the meantime"
    routes = [e.route for e in client.of(RouteChosen) if isinstance(e, RouteChosen)]
    assert routes == ["shared", "channel"]
    assert names(root / "jobs") == []
