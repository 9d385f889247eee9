"""Both sides of a job in memory: a clock, a link with delays, and fake storage.

The world carries out what the two machines want, as their drivers would, and lets a
scenario decide what goes wrong. Reports of effects come even when they come too late.
"""

import heapq
from collections.abc import Callable
from typing import Literal, assert_never

import msgspec
from blake3 import blake3

from sleap_rtc.proto import job_client as client
from sleap_rtc.proto import job_worker as worker
from sleap_rtc.proto import messages as m
from sleap_rtc.proto.routes import RoutePreference
from tests.proto.job_examples import JOB, NAME, SIZE

MAX_STEPS = 50_000
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
    """What happens in a world.

    Args:
        mount: Who mounts which storage.
        preference: The route that the user asks for.
        fails: Effects that fail.
        hangs: Effects of the worker that never report.
        cancel_at: When the user cancels, in seconds.
        owner_cancels_at: When the owner of the worker does.
        lose_at: When the link breaks.
        results: Files that the job makes.
        delay: Seconds that the next message, effect or report takes.
    """

    mount: Mount = "same"
    preference: RoutePreference = "auto"
    fails: frozenset[Trouble] = frozenset()
    hangs: frozenset[Trouble] = frozenset()
    cancel_at: float | None = None
    owner_cancels_at: float | None = None
    lose_at: float | None = None
    results: int = 2
    delay: Callable[[], float] = lambda: 1.0


class World:
    """Runs one scenario; look at its attributes afterwards."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.now = 0.0
        self.client = client.ClientJob(JOB, NAME, SIZE)
        self.worker = worker.WorkerJob()
        self.events: list[client.Output] = []
        self.to_worker: list[m.Message] = []
        self.to_client: list[m.Message] = []
        self.enqueued: list[worker.Enqueue] = []
        self.discards = 0
        self.disturbed: list[client.State | worker.State] = []
        self.fetched: set[str] = set()
        self.client_storage: dict[str, bytes] = {}
        self.worker_storage = (
            self.client_storage if scenario.mount == "same" else dict[str, bytes]()
        )
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._arrivals = {"client": 0.0, "worker": 0.0}
        self._connected = True
        self._wanted: set[str] = set()
        self._discarded = False
        self._sending = False
        self._scripted = False

    def run(self) -> "World":
        """Start the job, and go on until nothing happens any more."""
        scenario = self.scenario
        self.client.submit(
            scenario.preference,
            self.now,
            client_root=scenario.mount in ("same", "other", "client only"),
            worker_root=scenario.mount in ("same", "other", "worker only"),
        )
        if scenario.cancel_at is not None:
            self._at(scenario.cancel_at, self._cancel)
        if scenario.owner_cancels_at is not None:
            self._at(scenario.owner_cancels_at, self._owner_cancels)
        if scenario.lose_at is not None:
            self._at(scenario.lose_at, self._lose)
        return self._go_on()

    def run_script(self, messages: list[m.Message]) -> "World":
        """Let a client of another kind say all this at once, and go on."""
        self._scripted = True
        for message in messages:
            self._send("worker", message)
        return self._go_on()

    @property
    def ended(self) -> client.JobEnded:
        """How the job ended for the client."""
        [ending] = [each for each in self.events if isinstance(each, client.JobEnded)]
        assert self.events[-1] is ending
        return ending

    @property
    def route_reasons(self) -> list[str]:
        """What the client said about each route it chose."""
        return [e.reason for e in self.events if isinstance(e, client.RouteChosen)]

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
        while (output := self.worker.next_output()) is not None:
            self._do_for_worker(output)

    def _note_disturbance(self) -> None:
        self.disturbed += [self.client.state, self.worker.state]

    def _cancel(self) -> None:
        self._note_disturbance()
        self.client.cancel("Ctrl-C", self.now)

    def _owner_cancels(self) -> None:
        self._note_disturbance()
        self.worker.cancel("the owner stops it")

    def _lose(self) -> None:
        """Break the link; whatever is on the way is lost."""
        self._note_disturbance()
        if self._connected:
            self._connected = False
            self._later(lambda: self.client.connection_lost("gone", self.now))
            self._later(lambda: self.worker.connection_lost(self.now))

    # ----------------------------------------------------------------------- the link

    def _send(self, to: Literal["client", "worker"], message: m.Message) -> None:
        text = m.encode_message(message)
        # Messages stay in order, whatever their delays.
        arrival = max(self._arrivals[to], self.now + self.scenario.delay())
        self._arrivals[to] = arrival
        self._at(arrival, lambda: self._arrive(to, m.decode_message_untrusted(text)))

    def _arrive(self, to: Literal["client", "worker"], message: m.Message) -> None:
        if not self._connected:
            return
        if to == "worker":
            self.to_worker.append(message)
            self.worker.receive_message(message, self.now)
        elif not isinstance(message, m.FileError):
            self.to_client.append(message)
            if not self._scripted:
                self.client.receive_message(message, self.now)

    def _close(self) -> None:
        """The client closes the link when its job has ended; what it sent arrives."""
        arrival = max(self._arrivals["worker"], self.now + self.scenario.delay())
        self._at(arrival, lambda: self.worker.connection_lost(self.now))

    # ------------------------------------------------------------ effects of the client

    def _do_for_client(self, wish: client.Output) -> None:
        match wish:
            case client.SendMessage(message=message):
                self._send("worker", message)
            case client.PrepareShared():
                self._later(self._prepare)
            case client.CopyPackage(path=path):
                self._later(lambda: self._copy(path))
            case client.DiscardShared():
                self._discarded = True
                self.client_storage.clear()
            case client.SendPackage(transfer_id=transfer_id):
                self._sending = True
                file = m.OfferedFile(NAME, SIZE, 4096)
                self._send("worker", m.FileOffer(transfer_id, file))
                if "send" in self.scenario.fails:
                    self._later(lambda: self.client.transfer_failed("file changed"))
            case client.StopSending():
                self._sending = False
            case client.FetchResults():
                self._fetch(wish)
            case client.JobEnded():
                self._close()
            case (
                client.RouteChosen()
                | client.StateChanged()
                | client.LinePrinted()
                | client.StageComplete()
            ):
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

    def _fetch(self, wish: client.FetchResults) -> None:
        paths = {file.path for file in wish.files}
        if "fetch" in self.scenario.fails:
            self._later(lambda: self.client.transfer_failed("No space left on device"))
        elif wish.route == "shared":
            self.fetched = paths
            self._later(self.client.results_fetched)
        else:
            self._wanted = paths
            for number, path in enumerate(sorted(paths), start=1):
                self._send("worker", m.FileRequest(number, JOB, path))

    # ------------------------------------------------------------ effects of the worker

    def _do_for_worker(self, output: worker.Output) -> None:
        match output:
            case worker.SendMessage(message=message):
                self._send("client", message)
            case worker.ReadProbe(path=path):
                self._report("probe", lambda: self._read_probe(path))
            case worker.CheckInput(path=path):
                self._report("input", lambda: self._check_input(path))
            case worker.MakeOutput():
                self._report("output", self._make_output)
            case worker.Admit():
                self._report("admit", self._admit)
            case worker.ReceivePackage():
                self._later(self._receive)
            case worker.Enqueue():
                self.enqueued.append(output)
                self._start_run()
            case worker.StopRun():
                self._later(lambda: self.worker.run_ended("killed by a signal", {}))
            case worker.SendResult(path=path):
                self._later(lambda: self._result_arrives(path))
            case worker.Discard():
                self.discards += 1
            case _:
                assert_never(output)

    def _report(self, effect: Trouble, action: Callable[[], None]) -> None:
        if effect not in self.scenario.hangs:
            self._later(action)

    def _read_probe(self, path: str) -> None:
        content = self.worker_storage.get(path)
        if "probe" in self.scenario.fails:
            content = b"an older file"
        if content is None:
            self.worker.probe_failed("no such file")
        else:
            self.worker.probe_read(blake3(content).hexdigest())

    def _check_input(self, path: str) -> None:
        if "input" in self.scenario.fails or path not in self.worker_storage:
            self.worker.path_refused("no such file")
        else:
            self.worker.input_valid()

    def _make_output(self) -> None:
        if "output" in self.scenario.fails:
            self.worker.path_refused("Permission denied")
        else:
            self.worker.output_made()

    def _admit(self) -> None:
        if "admit" in self.scenario.fails:
            self.worker.rejected("Insufficient disk space")
        else:
            self.worker.admitted()

    def _receive(self) -> None:
        """The whole package arrives, if its sender is still there."""
        if "receive" in self.scenario.fails:
            self.worker.package_failed("No space left on device")
        elif self._sending and self._connected and "send" not in self.scenario.fails:
            self.worker.package_received()
            self._later(self.client.package_sent)

    def _start_run(self) -> None:
        made = {
            f"models/{number:05}.ckpt": 1 for number in range(self.scenario.results)
        }
        failure = "exit status 1" if "run" in self.scenario.fails else None
        reports: list[Callable[[], None]] = [
            lambda: self.worker.queue_moved(1),
            self.worker.slot_granted,
            lambda: self.worker.output(0, "epoch 1"),
            lambda: self.worker.output(0, "epoch 2"),
            lambda: self.worker.stage_complete("training"),
            lambda: self.worker.run_ended(failure, made),
        ]
        when = self.now
        for report in reports:
            when += self.scenario.delay()
            self._at(when, report)

    def _result_arrives(self, path: str) -> None:
        if self._connected and path not in self.fetched:
            self.fetched.add(path)
            if self.fetched == self._wanted:
                self.client.results_fetched()
