"""Directories of results, and results that can not be fetched."""

from pathlib import Path

import pytest
import trio
import trio.testing

from sleap_rtc.client.results import RESULTS_AT_ONCE, Results
from sleap_rtc.io.link.link import LinkClosedError
from sleap_rtc.io.nursery import open_background_nursery
from sleap_rtc.io.storage.folder import StorageError
from sleap_rtc.io.transfer.connection import Connection, open_connection
from sleap_rtc.proto import messages
from sleap_rtc.proto.transfer.machine import TransferMessage
from tests.client.scripted import ScriptedWorker, result_file, scripted_worker
from tests.io.link.memory import MemoryLink

JOB = "job_0123abcd"
FILES = (messages.ResultFile("best.ckpt", 7), messages.ResultFile("logs/a.csv", 3))


def new_results(directory: Path | None = None) -> Results:
    return Results(JOB, directory, lambda done, total: None)


# ----------------------------------------------------------------------- the directory


async def test_the_default_directory_is_made(tmp_path: Path) -> None:
    default = tmp_path / "job-results"
    results = new_results()
    assert await results.choose_directory(None, default, FILES) == default
    assert is_empty(default)
    # A second call returns the same one, although the directory exists now.
    assert await results.choose_directory(None, default, FILES) == default


async def test_the_default_directory_of_another_job_is_not_shared(
    tmp_path: Path,
) -> None:
    default = tmp_path / "job-results"
    default.mkdir()
    chosen = await new_results().choose_directory(None, default, FILES)
    assert chosen == default / JOB
    assert is_empty(chosen)


@pytest.mark.parametrize("taken", [(), ("other.csv",), ("best.ckpt",)])
async def test_results_overwrite_nothing_in_a_named_directory(
    tmp_path: Path, taken: tuple[str, ...]
) -> None:
    asked = tmp_path / "output"
    asked.mkdir()
    for name in taken:
        (asked / name).write_bytes(b"mine")
    chosen = await new_results().choose_directory(asked, tmp_path / "default", FILES)
    assert chosen == (asked / JOB if "best.ckpt" in taken else asked)
    assert is_empty(tmp_path / "default")


async def test_a_directory_that_cannot_be_made_is_an_error() -> None:
    with pytest.raises(StorageError, match="/dev/null/x"):
        await new_results().choose_directory(Path("/dev/null/x"), Path("y"), FILES)


def is_empty(directory: Path) -> bool:
    return not directory.exists() or not list(directory.iterdir())


# ----------------------------------------------------------------- through the channel


class Pair:
    """Results that are fetched, and the worker that has them."""

    def __init__(
        self, connection: Connection[messages.WorkerMessage], worker: ScriptedWorker
    ) -> None:
        self.connection = connection
        self.worker = worker
        self.progress: list[tuple[int, int]] = []
        self.results = Results(
            JOB, None, lambda done, total: self.progress.append((done, total))
        )
        self.results.start_link(0)
        self.failures: list[str] | None = None

    async def deliver(self) -> None:
        """Deliver messages as a session does."""
        while True:
            message = await self.connection.link.receive_message()
            if not self.results.deliver_offer(message):
                assert isinstance(message, TransferMessage)
                self.connection.transfers.receive_message(message)

    async def fetch(self, *files: messages.ResultFile) -> None:
        self.failures = await self.results.fetch(self.connection, files)


@pytest.fixture
def made(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "worker"
    folder.mkdir()
    paths = [folder / f"model-{number}.ckpt" for number in range(6)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * 9000)
    return paths


async def test_files_come_side_by_side_and_once(
    made: list[Path], tmp_path: Path
) -> None:
    files = [result_file(path) for path in made]
    mine, its = MemoryLink.pair()
    async with (
        open_connection(mine) as connection,
        scripted_worker(its) as worker,
        open_background_nursery() as servants,
    ):
        pair = Pair(connection, worker)
        servants.start_soon(pair.deliver)
        home = await pair.results.choose_directory(None, tmp_path / "home", ())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pair.fetch, *files)
            await trio.testing.wait_all_tasks_blocked()
            assert worker.waiting() == RESULTS_AT_ONCE
            for path in made:
                await worker.send_result(path)
        assert pair.failures == []
        assert pair.progress[-1] == (6 * 9000, 6 * 9000)
        await pair.fetch(*files)  # all of them have arrived already
        assert worker.waiting() == 0
    assert contents(home) == contents(tmp_path / "worker")


async def test_each_failure_is_named_and_the_rest_arrives(
    made: list[Path], tmp_path: Path
) -> None:
    mine, its = MemoryLink.pair()
    async with (
        open_connection(mine) as connection,
        scripted_worker(its) as worker,
        open_background_nursery() as servants,
    ):
        pair = Pair(connection, worker)
        servants.start_soon(pair.deliver)
        home = await pair.results.choose_directory(None, tmp_path / "home", ())
        (home / "taken").mkdir()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(
                pair.fetch,
                messages.ResultFile("gone", 1),
                messages.ResultFile("grown", 1),
                messages.ResultFile("taken", 9000),
                result_file(made[3]),
            )
            requests = {}
            for _ in range(4):
                request = await worker.expect(messages.FileRequest)
                requests[request.path] = request
            numbers = {path: each.transfer_id for path, each in requests.items()}
            await worker.send(messages.FileError(numbers["gone"], "not found"))
            offer = messages.OfferedFile("grown", 2, 4096)
            await worker.send(messages.FileOffer(numbers["grown"], offer))
            offer = messages.OfferedFile("taken", 9000, 4096)
            await worker.send(messages.FileOffer(numbers["taken"], offer))
            await worker.answer(requests[made[3].name], made[3])
    assert pair.failures is not None
    assert sorted(text.partition(":")[0] for text in pair.failures) == [
        "gone",
        "grown",
        "taken",
    ]
    assert "grown: it has 2 bytes instead of 1" in pair.failures
    assert made[3].name in contents(home)


async def test_a_lost_link_ends_the_fetching(made: list[Path], tmp_path: Path) -> None:
    mine, its = MemoryLink.pair()
    async with open_connection(mine) as connection, scripted_worker(its) as worker:
        pair = Pair(connection, worker)
        await pair.results.choose_directory(None, tmp_path / "home", ())
        its.cut("the network is gone")
        with pytest.raises(LinkClosedError):
            await pair.fetch(result_file(made[0]))


async def test_an_answer_that_was_not_asked_for_is_left_to_others() -> None:
    results = new_results()
    results.start_link(0)
    assert not results.deliver_offer(messages.FileError(7, "what?"))
    assert not results.deliver_offer(messages.JobAccepted(JOB))


def contents(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.is_file()}
