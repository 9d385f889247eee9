"""Both sides of a job in memory: a clock, links with delays, and fake storage.

The world runs the effects of the two machines, as their drivers would, and a scenario
decides which of them fail. Late reports on effects are delivered, but not those of a
process that was restarted, and not once the next transfer has begun.
"""

import functools
import heapq
from collections.abc import Callable
from typing import Literal, assert_never

import msgspec
from blake3 import blake3

from sleap_rtc.proto import messages
from sleap_rtc.proto.job import client_outputs, worker_outputs
from sleap_rtc.proto.job.client import ClientJob
from sleap_rtc.proto.job.client_table import ClientState
from sleap_rtc.proto.job.lines import LineEvent
from sleap_rtc.proto.job.reports import LinePrinted, StageComplete, StateChanged
from sleap_rtc.proto.job.route_plan import RoutePlan
from sleap_rtc.proto.job.worker import StageSucceeded, WorkerJob
from sleap_rtc.proto.job.worker_table import WorkerState
from sleap_rtc.proto.route.routes import RoutePreference
from tests.proto.job.examples import JOB, NAME, SIZE

MAX_STEPS = 50_000
LINES = [(0, "epoch 1"), (0, "epoch 2"), (1, "saved"), (2, "done")]
"""Lines and texts that a job prints; the first line is redrawn."""

PROBE_PATH = f"jobs/{JOB}/.probe"

Mount = Literal["same", "other", "client only", "worker only", "none"]
Trouble = Literal[
    "prepare",
    "copy",
    "probe",
    "input",
    "output",
    "admit",
    "send",
    "receive",
    "run",
    "fetch",
]


class Scenario(msgspec.Struct, frozen=True):
    """The events of a world.

    Args:
        mount: The sides that mount shared storage.
        preference: The route that the user asks for.
        fails: Effects that fail.
        hangs: Effects of the worker that never report.
        cancel_at: Second at which the user cancels.
        owner_cancels_at: Second at which the owner of the worker cancels.
        lose_at: Seconds at which the link breaks.
        back_after: Seconds until the client has another link; None if it gives up.
        worker_lag: Seconds by which the worker notices a loss later than the client.
        restart_client_at: Seconds at which another process replaces the client.
        restart_worker_at: Seconds at which another process, which has only the record,
            replaces the worker.
        results: Number of files that the job makes.
        delay: Returns the seconds that the next message, effect or report takes.
    """

    mount: Mount = "same"
    preference: RoutePreference = "auto"
    fails: frozenset[Trouble] = frozenset()
    hangs: frozenset[Trouble] = frozenset()
    cancel_at: float | None = None
    owner_cancels_at: float | None = None
    lose_at: tuple[float, ...] = ()
    back_after: float | None = 1.0
    worker_lag: float = 0.0
    restart_client_at: tuple[float, ...] = ()
    restart_worker_at: tuple[float, ...] = ()
    results: int = 2
    delay: Callable[[], float] = lambda: 1.0


class _Link:
    """A connection; messages on the way when it breaks are lost."""

    def __init__(self) -> None:
        self.is_alive = True
        self.arrivals = {"client": 0.0, "worker": 0.0}


class _Note(msgspec.Struct, frozen=True):
    """The record of the job in the worker's store."""

    route: messages.Route
    submission: messages.Submission
    progress: messages.JobProgress
    results: dict[str, int]
    output_path: str


class World:
    """Runs one scenario; its attributes hold the outcome."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.now = 0.0
        self.client = ClientJob(JOB, NAME, SIZE)
        self.worker = WorkerJob()
        self.events: list[client_outputs.Output] = []
        self.to_worker: list[messages.Message] = []
        self.to_client: list[messages.Message] = []
        self.enqueued: list[worker_outputs.Enqueue] = []
        self.enqueued_by: list[int] = []
        self.runs = 0
        self.restarts_since_run = 0
        self.discards: list[WorkerJob] = []
        self.disturbed: list[ClientState | WorkerState] = []
        self.fetched: set[str] = set()
        self.client_storage: dict[str, bytes] = {}
        self.worker_storage = (
            self.client_storage if scenario.mount == "same" else dict[str, bytes]()
        )
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._wanted: set[str] = set()
        self._discarded = False
        self._scripted = False
        # The client: its process, its link, and the record of an earlier process.
        self._client_life = 0
        self._link: _Link | None = _Link()
        self._transfer = 0
        self._sending = False
        self._noted_route: messages.Route | None = None
        # The worker: its process, its jobs and their links, and its record.
        self._worker_life = 0
        self._jobs: dict[WorkerJob, _Link | None] = {self.worker: self._link}
        self._known: dict[str, WorkerJob] = {}
        self._receiving: set[WorkerJob] = set()
        self._newest = self._link
        self._note: _Note | None = None

    def run(self) -> "World":
        """Start the job, and run until nothing is left to happen."""
        scenario = self.scenario
        self.client.submit(self._plan(), self.now)
        if scenario.cancel_at is not None:
            self._at(scenario.cancel_at, self._cancel)
        if scenario.owner_cancels_at is not None:
            self._at(scenario.owner_cancels_at, self._owner_cancels)
        for moment in scenario.lose_at:
            self._at(moment, self._lose)
        for moment in scenario.restart_client_at:
            self._at(moment, self._restart_client)
        for moment in scenario.restart_worker_at:
            self._at(moment, self._restart_worker)
        return self._go_on()

    def run_script(self, script: list[messages.Message]) -> "World":
        """Run with a scripted client, which sends these messages at once."""
        self._scripted = True
        for message in script:
            self._send("worker", message, self._link)
        return self._go_on()

    def _plan(self) -> RoutePlan:
        mount = self.scenario.mount
        both = mount in ("same", "other")
        client_root, worker_root = mount == "client only", mount == "worker only"
        preference = self.scenario.preference
        return RoutePlan(preference, both or client_root, both or worker_root)

    @property
    def ended(self) -> client_outputs.JobEnded:
        """The end of the job, for the client."""
        [ending] = [
            each for each in self.events if isinstance(each, client_outputs.JobEnded)
        ]
        assert self.events[-1] is ending
        return ending

    @property
    def route_reasons(self) -> list[str]:
        """The client's reasons for the routes it chose."""
        return [
            e.reason for e in self.events if isinstance(e, client_outputs.RouteChosen)
        ]

    # --------------------------------------------------------------------- the engine

    def _go_on(self) -> "World":
        self._drain()
        for _ in range(MAX_STEPS):
            if not self._step():
                return self
        raise AssertionError("the world does not come to rest")

    def _at(self, when: float, action: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._heap, (when, self._count, action))

    def _later(self, action: Callable[[], None]) -> None:
        self._at(self.now + self.scenario.delay(), action)

    def _later_for_client(self, action: Callable[[], None]) -> None:
        """Report an effect, unless its process has gone."""
        life = self._client_life
        self._later(lambda: action() if life == self._client_life else None)

    def _later_for_transfer(self, action: Callable[[], None]) -> None:
        """Report a transfer, unless the next one has begun."""
        number = self._transfer
        self._later_for_client(lambda: action() if number == self._transfer else None)

    def _at_worker(self, when: float, action: Callable[[], None]) -> None:
        life = self._worker_life
        self._at(when, lambda: action() if life == self._worker_life else None)

    def _later_for_worker(self, action: Callable[[], None]) -> None:
        self._at_worker(self.now + self.scenario.delay(), action)

    def _step(self) -> bool:
        deadline = self.client.deadline()
        if deadline is not None and (not self._heap or deadline <= self._heap[0][0]):
            self.now = max(self.now, deadline)
            self.client.handle_timeout(self.now)
        elif self._heap:
            self.now, _, action = heapq.heappop(self._heap)
            action()
        else:
            return False
        self._drain()
        return True

    def _drain(self) -> None:
        while (wish := self.client.next_output()) is not None:
            self.events.append(wish)
            self._do_for_client(wish)
        for job in list(self._jobs):
            while (output := job.next_output()) is not None:
                self._do_for_worker(job, output)

    def _note_disturbance(self) -> None:
        self.disturbed += [self.client.state, *(job.state for job in self._jobs)]

    def _cancel(self) -> None:
        self._note_disturbance()
        self.client.cancel("Ctrl-C", self.now)

    def _owner_cancels(self) -> None:
        self._note_disturbance()
        for job in list(self._jobs):
            job.cancel("the owner stops it")

    def _lose(self) -> None:
        """Break the link; messages on the way are lost."""
        self._note_disturbance()
        link = self._link
        if link is not None and link.is_alive:
            link.is_alive = False
            self._later_for_client(lambda: self._client_hears(link))
            when = self.now + self.scenario.delay() + self.scenario.worker_lag
            self._at_worker(when, lambda: self._worker_hears(link))

    def _client_hears(self, link: _Link) -> None:
        if self._link is link:
            self._link = None
            self.client.connection_lost("gone", self.now)

    def _worker_hears(self, link: _Link) -> None:
        for job, its_link in self._jobs.items():
            if its_link is link:
                self._jobs[job] = None
                job.connection_lost("gone", self.now)

    def _reconnect(self) -> None:
        if self.scenario.back_after is None:
            self._later_for_client(lambda: self.client.give_up("it stays away"))
            return
        life = self._client_life
        self._at(self.now + self.scenario.back_after, lambda: self._come_back(life))

    def _come_back(self, life: int) -> None:
        if life == self._client_life and self.client.state is not ClientState.ENDED:
            self._dial()
            self.client.connection_restored(self.now)

    def _dial(self) -> None:
        self._link = _Link()
        self.worker = WorkerJob()
        self._jobs[self.worker] = self._link

    def _restart_client(self) -> None:
        """Replace the client by another process, which has only the route."""
        self._note_disturbance()
        if self.client.state is ClientState.ENDED:
            return
        self._client_life += 1
        self._discarded = self._sending = False
        link, self._link = self._link, None
        if link is not None:
            link.is_alive = False
            when = self.now + self.scenario.delay() + self.scenario.worker_lag
            self._at_worker(when, lambda: self._worker_hears(link))
        self.client = ClientJob(JOB, NAME, SIZE)
        self.events = []
        self._later_for_client(self._resume)

    def _resume(self) -> None:
        if self.client.state is ClientState.ENDED:
            return
        self._dial()
        self.client.resume(self._plan(), self.now, route=self._noted_route)

    def _restart_worker(self) -> None:
        """Replace the worker by another process, which has only the record."""
        self._note_disturbance()
        self._worker_life += 1
        self.restarts_since_run += self.runs
        self._jobs, self._known, self._receiving = {}, {}, set()
        link = self._link
        if link is not None and link.is_alive:
            link.is_alive = False
            self._later_for_client(lambda: self._client_hears(link))
        if self._note is not None:
            note = self._note
            self.worker = WorkerJob.restored(
                JOB,
                note.route,
                note.submission,
                note.progress,
                results=note.results,
                output_path=note.output_path,
            )
            self._known[JOB] = self.worker
            self._jobs[self.worker] = None

    # ----------------------------------------------------------------------- the link

    def _send(
        self,
        to: Literal["client", "worker"],
        message: messages.Message,
        link: _Link | None,
    ) -> None:
        if link is None:
            return
        text = messages.encode_message(message)
        # Messages stay in order, whatever their delays.
        arrival = max(link.arrivals[to], self.now + self.scenario.delay())
        link.arrivals[to] = arrival
        arrive = self._arrive_at_worker if to == "worker" else self._arrive_at_client
        self._at(arrival, lambda: arrive(text, link) if link.is_alive else None)

    def _arrive_at_worker(self, text: str, link: _Link) -> None:
        message = messages.decode_client_message_untrusted(text)
        assert isinstance(message, messages.ClientJobMessage)
        self.to_worker.append(message)
        [job] = [job for job, its_link in self._jobs.items() if its_link is link]
        if not isinstance(message, messages.JobResume):
            job.receive_message(message, self.now)
            return
        assert job.state is WorkerState.NEW
        self._newest = link
        self._attach(message, link, job)

    def _arrive_at_client(self, text: str, link: _Link) -> None:
        message = messages.decode_worker_message_untrusted(text)
        if isinstance(message, messages.FileError) or link is not self._link:
            return
        assert isinstance(message, messages.WorkerJobMessage)
        self.to_client.append(message)
        if not self._scripted:
            self.client.receive_message(message, self.now)

    def _attach(
        self, message: messages.JobResume, link: _Link, fresh: WorkerJob
    ) -> None:
        """Attach a job to the link that asks for it, once no effect of the job runs."""
        job = self._known.get(JOB)
        if self._jobs.get(fresh) is not link or link is not self._newest:
            return  # the client went away, or came back over another link
        if job is None or not job.can_resume:
            self._send("client", messages.JobUnknown(JOB), link)
            return
        self._jobs[job] = None
        job.connection_lost("gone", self.now)
        if job in self._receiving:
            self._later_for_worker(lambda: self._attach(message, link, fresh))
            return
        del self._jobs[fresh]
        self.worker = job
        self._jobs[job] = link
        job.connection_restored(self.now)
        job.receive_message(message, self.now)

    def _close(self) -> None:
        """Close the link like a client whose job has ended; its messages arrive."""
        link = self._link
        if link is not None:
            arrival = max(link.arrivals["worker"], self.now + self.scenario.delay())
            self._at_worker(arrival, lambda: self._worker_hears(link))

    # ------------------------------------------------------------ effects of the client

    def _do_for_client(self, wish: client_outputs.Output) -> None:
        match wish:
            case client_outputs.SendMessage(message=message):
                self._send("worker", message, self._link)
            case client_outputs.PrepareShared():
                self._discarded = False
                self._later_for_client(self._prepare)
            case client_outputs.CopyPackage(path=path):
                self._later_for_client(lambda: self._copy(path))
            case client_outputs.DiscardShared():
                self._discarded = True
                self.client_storage.clear()
            case client_outputs.SendPackage(transfer_id=transfer_id):
                self._sending = True
                self._transfer += 1
                file = messages.OfferedFile(NAME, SIZE, 4096)
                self._send("worker", messages.FileOffer(transfer_id, file), self._link)
                if "send" in self.scenario.fails:
                    self._later_for_transfer(
                        lambda: self.client.transfer_failed("file changed")
                    )
            case client_outputs.StopTransfer():
                self._sending = False
            case client_outputs.FetchResults():
                self._fetch(wish)
            case client_outputs.Reconnect():
                self._reconnect()
            case client_outputs.JobEnded():
                self._close()
            case client_outputs.RouteChosen(route=route):
                self._noted_route = route
            case StateChanged() | LinePrinted() | StageComplete():
                pass
            case _:
                assert_never(wish)

    def _prepare(self) -> None:
        if "prepare" in self.scenario.fails:
            self.client.shared_failed("Permission denied", self.now)
            return
        if not self._discarded:
            self.client_storage[PROBE_PATH] = b"nonce"
        self.client.probe_written(PROBE_PATH, blake3(b"nonce").hexdigest(), self.now)

    def _copy(self, path: str) -> None:
        if "copy" in self.scenario.fails:
            self.client.shared_failed("No space left on device", self.now)
            return
        if not self._discarded:
            self.client_storage[path] = b"package"
        self.client.package_copied(path, self.now)

    def _fetch(self, wish: client_outputs.FetchResults) -> None:
        paths = {file.path for file in wish.files}
        assert len(paths) == len(wish.files)
        self._transfer += 1
        self._wanted, self.fetched = paths, set()
        if "fetch" in self.scenario.fails:
            self._later_for_transfer(
                lambda: self.client.transfer_failed("No space left on device")
            )
        elif wish.route == "shared":
            self.fetched = paths
            self._later_for_transfer(self.client.results_fetched)
        else:
            for number, path in enumerate(sorted(paths), start=1):
                self._send(
                    "worker", messages.FileRequest(number, JOB, path), self._link
                )

    # ------------------------------------------------------------ effects of the worker

    def _do_for_worker(self, job: WorkerJob, output: worker_outputs.Output) -> None:
        match output:
            case worker_outputs.SendMessage(message=message):
                self._send("client", message, self._jobs[job])
            case worker_outputs.ReadProbe(path=path):
                self._report("probe", lambda: self._read_probe(job, path))
            case worker_outputs.CheckInput(path=path):
                self._report("input", lambda: self._check_input(job, path))
            case worker_outputs.MakeOutput():
                self._report("output", lambda: self._make_output(job))
            case worker_outputs.Admit():
                taken = self._known.setdefault(JOB, job) is not job
                self._report("admit", lambda: self._admit(job, taken))
            case worker_outputs.ReceivePackage():
                self._receiving.add(job)
                link, number = self._jobs[job], self._transfer
                self._later_for_worker(lambda: self._receive(job, link, number))
            case worker_outputs.StopReceiving():
                pass  # a package that was complete may still be reported
            case worker_outputs.Remember():
                self._known[JOB] = job
                self._note = _Note(
                    job.route,
                    job.submission,
                    job.progress,
                    job.results,
                    job.output_path,
                )
            case worker_outputs.Enqueue():
                self.enqueued.append(output)
                self.enqueued_by.append(self._worker_life)
                self._start_run(job)
            case worker_outputs.StopRun():
                self._later_for_worker(lambda: job.run_ended("killed by a signal", {}))
            case worker_outputs.SendResult(path=path):
                link = self._jobs[job]
                self._later_for_transfer(lambda: self._result_arrives(path, link))
            case worker_outputs.Discard():
                self.discards.append(job)
                self._receiving.discard(job)
                if self._known.get(JOB) is job:
                    del self._known[JOB]
                    self._note = None
            case _:
                assert_never(output)

    def _report(self, effect: Trouble, action: Callable[[], None]) -> None:
        if effect not in self.scenario.hangs:
            self._later_for_worker(action)

    def _read_probe(self, job: WorkerJob, path: str) -> None:
        content = self.worker_storage.get(path)
        if "probe" in self.scenario.fails:
            content = b"an older file"
        if content is None:
            job.probe_failed("no such file")
        else:
            job.probe_read(blake3(content).hexdigest())

    def _check_input(self, job: WorkerJob, path: str) -> None:
        if "input" in self.scenario.fails or path not in self.worker_storage:
            job.path_refused("no such file")
        else:
            job.input_valid()

    def _make_output(self, job: WorkerJob) -> None:
        if "output" in self.scenario.fails:
            job.path_refused("Permission denied")
        else:
            job.output_made()

    def _admit(self, job: WorkerJob, taken: bool) -> None:
        if "admit" in self.scenario.fails or taken:
            job.rejected("Insufficient disk space")
            if self._known.get(JOB) is job:
                del self._known[JOB]
        else:
            job.admitted()

    def _receive(self, job: WorkerJob, link: _Link | None, number: int) -> None:
        """Deliver the whole package, if its sender is still connected."""
        arrived = self._sending and number == self._transfer
        arrived = arrived and link is not None and link.is_alive
        if "receive" in self.scenario.fails:
            self._receiving.discard(job)
            job.package_failed("No space left on device")
        elif arrived and "send" not in self.scenario.fails:
            # The link may be lost before the report.
            self._later_for_worker(lambda: self._received(job))
            self._later_for_transfer(self.client.package_sent)
        else:
            self._receiving.discard(job)

    def _received(self, job: WorkerJob) -> None:
        self._receiving.discard(job)
        job.package_received()

    def _start_run(self, job: WorkerJob) -> None:
        made = {
            f"models/{number:05}.ckpt": 1 for number in range(self.scenario.results)
        }
        failure = "exit status 1" if "run" in self.scenario.fails else None
        reports: list[Callable[[], None]] = [
            lambda: job.queue_moved(1),
            lambda: self._run(job),
            *[
                functools.partial(job.progressed, LineEvent(line, text))
                for line, text in LINES
            ],
            lambda: job.progressed(StageSucceeded("training")),
            lambda: job.run_ended(failure, made),
        ]
        when = self.now
        for report in reports:
            when += self.scenario.delay()
            self._at_worker(when, report)

    def _run(self, job: WorkerJob) -> None:
        if not job.has_ended:
            self.runs += 1
        job.slot_granted()

    def _result_arrives(self, path: str, link: _Link | None) -> None:
        if link is None or not link.is_alive or path in self.fetched:
            return
        self.fetched.add(path)
        if self.fetched == self._wanted:
            self.client.results_fetched()
