"""One job as the worker sees it, from the first message to the end of its run."""

from collections import deque
from typing import Literal

import msgspec

from sleap_rtc.proto import messages as m
from sleap_rtc.proto.errors import LocalProtocolError, RemoteProtocolError
from sleap_rtc.proto.job_worker_outputs import (
    Admit,
    CheckInput,
    Discard,
    Enqueue,
    MakeOutput,
    Output,
    ReadProbe,
    ReceivePackage,
    SendMessage,
    SendResult,
    StopRun,
)
from sleap_rtc.proto.job_worker_table import EARLY, EXPECTED, State

__all__ = [
    "EXPECTED",
    "Admit",
    "CheckInput",
    "Discard",
    "Enqueue",
    "MakeOutput",
    "Output",
    "ReadProbe",
    "ReceivePackage",
    "SendMessage",
    "SendResult",
    "State",
    "StopRun",
    "WorkerJob",
]


_QUEUED_OR_LATER = (State.QUEUED, State.RUNNING, State.ENDED, State.DISCARDED)


class WorkerJob:
    """One job of a worker.

    Inputs from the world: `receive_message`, `connection_lost`. Reports on effects:
    one method for each, named in the effect. Command of the owner: `cancel`. After each
    of them call `next_output` until it gives None. It has no deadline of its own: what
    a silent client leaves behind is ended by the link's idle timeout.

    A client that goes away before its job is queued takes the job with it; afterwards
    it changes nothing.
    """

    def __init__(self) -> None:
        self.state = State.NEW
        self.job_id = ""
        self.route: m.Route = "shared"
        self.cancel_reason = ""
        self._package = ""
        self._size = 0
        self._output_path = "models"
        self._early: deque[m.Message] = deque()
        self._sequence = 0
        self._results: dict[str, int] = {}
        self._connected = True
        self._outputs: deque[Output] = deque()

    # ------------------------------------------------------------ inputs of the world

    def receive_message(self, message: m.Message, now: float) -> None:
        """Take a message of the client; `now` is part of every machine's contract.

        Raises:
            RemoteProtocolError: If it does not belong here; the state is unchanged.
        """
        if isinstance(message, m.Unknown):
            return
        if isinstance(message, m.Error):
            self.connection_lost(now)
            return
        if type(message) not in EXPECTED[self.state]:
            raise RemoteProtocolError(
                f"{type(message).__name__} is not expected while the job is "
                f"{self._doing()}"
            )
        named = getattr(message, "job_id", None)
        if self.job_id and named not in (None, self.job_id):
            raise RemoteProtocolError(f"{type(message).__name__} is for another job")
        if type(message) in EARLY.get(self.state, ()):
            self._keep(message)
            return
        match self.state, message:
            case State.REFUSED, m.SharedOutputPath() | m.SharedStorageJob():
                pass
            case State.DISCARDED, _:
                pass
            case _:
                self._dispatch(message)

    def connection_lost(self, now: float) -> None:
        """The link is gone; `now` is part of every machine's contract."""
        del now
        self._connected = False
        if self.state not in _QUEUED_OR_LATER:
            self._discard()

    def cancel(self, reason: str) -> None:
        """Stop the job; does nothing before the client has named it, or after its end.

        Args:
            reason: Who wants it and why, for people.
        """
        match self.state:
            case State.QUEUED | State.RUNNING:
                if not self.cancel_reason:
                    self.cancel_reason = reason
                    self._put(StopRun())
            case State.ENDED | State.DISCARDED:
                pass
            case _ if self.job_id:
                self.cancel_reason = reason
                self._discard(reason, "CANCELLED")

    def next_output(self) -> Output | None:
        """Give the next thing to do."""
        return self._outputs.popleft() if self._outputs else None

    @property
    def has_ended(self) -> bool:
        """True once nothing more will run."""
        return self.state in (State.ENDED, State.DISCARDED)

    # ----------------------------------------------------------- reports on effects

    def probe_read(self, content: str) -> None:
        """The probe file holds something with this BLAKE3 hash (hexadecimal)."""
        if self._report(State.PROBING):
            self._enter(State.NEW)
            self._send(m.MountProbed(self.job_id, content))
            self._take_early()

    def probe_failed(self, reason: str) -> None:
        """The probe file can't be read."""
        if self._report(State.PROBING):
            self._enter(State.NEW)
            self._send(m.MountProbeFailed(self.job_id, _clean(reason)))
            self._take_early()

    def input_valid(self) -> None:
        """The package is there, beneath the root, and can be read."""
        if self._report(State.CHECKING_INPUT):
            self._enter(State.INPUT_VALID)
            self._send(m.PathValidated("input"))
            self._take_early()

    def output_made(self) -> None:
        """The directory for the models is there, beneath the root."""
        if self._report(State.MAKING_OUTPUT):
            self._enter(State.READY)
            self._send(m.PathValidated("output"))
            self._take_early()

    def path_refused(self, reason: str) -> None:
        """The path that was asked about is no good."""
        if self._report(State.CHECKING_INPUT, State.MAKING_OUTPUT):
            self._early.clear()
            self._enter(State.REFUSED)
            self._send(m.PathError(_clean(reason)))

    def admitted(self) -> None:
        """There is room for the package."""
        if self._report(State.ADMITTING):
            self._enter(State.ADMITTED)
            self._send(m.JobAccepted(self.job_id))

    def rejected(self, reason: str) -> None:
        """The package can't be taken."""
        if self._report(State.ADMITTING):
            self._send(m.JobRejected(self.job_id, _clean(reason)))
            self._discard()

    def package_received(self) -> None:
        """The package lies in the job directory, verified."""
        if self._report(State.RECEIVING):
            self._queue()

    def package_failed(self, reason: str) -> None:
        """The package did not arrive."""
        if self._report(State.RECEIVING):
            self._discard(reason)

    def queue_moved(self, position: int) -> None:
        """So many jobs are ahead."""
        if self._report(State.QUEUED):
            self._tell("QUEUED", position=position)

    def slot_granted(self) -> None:
        """The job runs from now on."""
        if self._report(State.QUEUED):
            self._enter(State.RUNNING)
            self._tell("RUNNING")

    def output(self, line: int, text: str) -> None:
        """A command printed a line, or printed an earlier one anew."""
        if self._report(State.RUNNING):
            self._send(m.JobLog(self.job_id, self._sequence, line, _clean(text)))
            self._sequence += 1

    def stage_complete(self, stage: Literal["training", "inference"]) -> None:
        """All commands of one kind have succeeded."""
        if self._report(State.RUNNING):
            self._send(
                m.TrainingComplete() if stage == "training" else m.InferenceComplete()
            )

    def run_ended(self, failure: str | None, results: dict[str, int]) -> None:
        """The commands have ended, or will never start.

        Args:
            failure: Why the job failed, or None if it succeeded. What was asked to stop
                counts as stopped whatever its commands said last: the trainer's exit
                status does not tell.
            results: Path, relative to the job directory, and size in bytes of each
                file that the job made. The client hears of those that messages can
                carry, and of how many they are not.
        """
        if not self._report(State.QUEUED, State.RUNNING):
            return
        self._results = _listed(results)
        self._send_results()
        self._enter(State.ENDED)
        if self.cancel_reason:
            self._tell_failure(self.cancel_reason, "CANCELLED")
        elif failure is not None:
            self._tell_failure(failure)
        else:
            missing = len(results) - len(self._results)
            detail = f"{missing} files stay on the worker: too many, or badly named"
            self._tell("COMPLETE", detail=detail if missing else "")
            self._send(m.JobComplete(self.job_id, self._output_path))

    # ------------------------------------------------------------------- transitions

    def _dispatch(self, message: m.Message) -> None:
        match message:
            case m.MountProbe(job_id=job_id, path=path):
                self.job_id = job_id
                self._enter(State.PROBING)
                self._put(ReadProbe(path))
            case m.JobIdentity(job_id=job_id):
                self.job_id = job_id
                self._enter(State.IDENTIFIED)
            case m.SharedInputPath(path=path):
                self._package = path
                self._enter(State.CHECKING_INPUT)
                self._put(CheckInput(path))
            case m.SharedOutputPath(path=path):
                self._output_path = path
                self._enter(State.MAKING_OUTPUT)
                self._put(MakeOutput(path))
            case m.SharedStorageJob():
                self._queue()
            case m.JobSubmit(job_id=job_id, submission=submission):
                self.job_id, self.route = job_id, "channel"
                self._package, self._size = submission.name, submission.size
                self._output_path = "models"
                self._early.clear()
                self._enter(State.ADMITTING)
                self._put(Admit(job_id, submission))
            case m.FileOffer(transfer_id=transfer_id, file=file):
                if (file.name, file.size) != (self._package, self._size):
                    raise RemoteProtocolError(
                        f"{file.name} of {file.size} bytes was not announced"
                    )
                self._enter(State.RECEIVING)
                self._tell("RECEIVING")
                self._put(ReceivePackage(transfer_id, file))
            case m.JobCancel():
                self.cancel("cancelled by the client")
            case m.FileRequest(transfer_id=transfer_id, path=path):
                if path in self._results:
                    self._put(SendResult(transfer_id, path))
                else:
                    reason = f"{path} is no result of this job"
                    self._send(m.FileError(transfer_id, reason))
            case m.ResultsReceived():
                self._discard()
            case _:
                raise RemoteProtocolError(
                    f"{type(message).__name__} is not for workers"
                )

    def _keep(self, message: m.Message) -> None:
        """Keep what the client sent without waiting for the answer about a path."""
        if type(message) not in EARLY[self.state][len(self._early) :][:1]:
            raise RemoteProtocolError(f"{type(message).__name__} came out of turn")
        self._early.append(message)

    def _take_early(self) -> None:
        """Go on with what was kept, until something has to be waited for again."""
        while self._early and self.state not in EARLY:
            self._dispatch(self._early.popleft())

    def _queue(self) -> None:
        self._enter(State.QUEUED)
        self._put(Enqueue(self.job_id, self.route, self._package))

    def _discard(
        self, failure: str | None = None, state: m.JobStateName = "FAILED"
    ) -> None:
        """Leave nothing behind of a job that did not run, or whose results are home."""
        self._enter(State.DISCARDED)
        if failure is not None:
            self._tell_failure(failure, state)
        self._put(Discard())

    def _tell_failure(self, reason: str, state: m.JobStateName = "FAILED") -> None:
        reason = _clean(reason)
        self._tell(state, detail=reason[:_MAX_DETAIL])
        self._send(m.JobFailed(self.job_id, reason))

    def _send_results(self) -> None:
        files = [m.ResultFile(path, size) for path, size in self._results.items()]
        while files:
            page, files = _first_page(files)
            self._send(m.JobResults(self.job_id, m.ResultPage(page, last=not files)))

    # ------------------------------------------------------------------ small helpers

    def _report(self, *states: State) -> bool:
        """Tell whether a report still matters.

        Raises:
            LocalProtocolError: If nothing of the kind can have been asked for.
        """
        if self.state in states:
            return True
        if self.has_ended or (self.route == "channel" and set(states) <= EARLY.keys()):
            return False  # it comes too late: the client has gone another way
        raise LocalProtocolError(f"nobody waits for this while {self._doing()}")

    def _enter(self, state: State) -> None:
        self.state = state

    def _put(self, output: Output) -> None:
        self._outputs.append(output)

    def _send(self, message: m.Message) -> None:
        if self._connected:
            self._put(SendMessage(message))

    def _tell(self, state: m.JobStateName, position: int = 0, detail: str = "") -> None:
        self._send(m.JobState(self.job_id, m.JobProgress(state, position, detail)))

    def _doing(self) -> str:
        return self.state.name.lower().replace("_", " ")


_MAX_DETAIL = 1024
"""Characters of `JobProgress.detail`."""

_MAX_TEXT = 60 * 1024
"""Bytes of a text that fit into a message beside its other fields."""

_MAX_PATH = 4096
"""Characters of a `WirePath`."""


def _clean(text: str) -> str:
    """Make a text fit for a message: no stray surrogates, and not too long."""
    data = text[:_MAX_TEXT].encode("utf-8", "replace")
    return data[:_MAX_TEXT].decode("utf-8", "ignore")


def _listed(results: dict[str, int]) -> dict[str, int]:
    """Leave out the files whose paths no message can carry, and those over a limit."""
    listed: dict[str, int] = {}
    characters = 0
    for path, size in results.items():
        characters += len(path)
        if len(listed) == m.MAX_RESULT_FILES or characters > m.MAX_RESULT_PATHS:
            break
        if 0 < len(path) <= _MAX_PATH and path == _clean(path):
            listed[path] = size
    return listed


_PAGE_BYTES = m.MAX_MESSAGE_BYTES // 2
"""Half a message: JSON may need two bytes for one of a path."""


def _first_page(
    files: list[m.ResultFile],
) -> tuple[tuple[m.ResultFile, ...], list[m.ResultFile]]:
    """Cut off as many files as one message can carry."""
    size = 0
    for count, file in enumerate(files):
        size += len(msgspec.json.encode(file)) + 1
        if count == m.MAX_JOB_RESULTS or (count and size > _PAGE_BYTES):
            return tuple(files[:count]), files[count:]
    return tuple(files), []
