"""One job as the worker sees it, from the first message to the end of its run."""

from collections import deque
from typing import Literal

from sleap_rtc.proto import messages as m
from sleap_rtc.proto.errors import LocalProtocolError, RemoteProtocolError
from sleap_rtc.proto.job.log_history import LogHistory
from sleap_rtc.proto.job.results import (
    clean_text,
    end_progress,
    listed_results,
    result_pages,
)
from sleap_rtc.proto.job.worker_outputs import (
    Admit,
    CheckInput,
    Discard,
    Enqueue,
    MakeOutput,
    Output,
    ReadProbe,
    ReceivePackage,
    Remember,
    SendMessage,
    SendResult,
    StopReceiving,
    StopRun,
)
from sleap_rtc.proto.job.worker_table import EARLY, EXPECTED, State

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
    "Remember",
    "SendMessage",
    "SendResult",
    "State",
    "StopReceiving",
    "StopRun",
    "WorkerJob",
]


_OUTLIVES_ITS_LINK = frozenset(
    {
        State.ADMITTING,
        State.ADMITTED,
        State.RECEIVING,
        State.SUSPENDED,
        State.QUEUED,
        State.RUNNING,
        State.ENDED,
    }
)

_NAMES: dict[State, m.JobStateName] = {
    State.QUEUED: "QUEUED",
    State.RUNNING: "RUNNING",
}
"""What a job is called that neither waits for its package nor has ended."""


class WorkerJob:
    """One job of a worker.

    Inputs from the world: `receive_message`, `connection_lost`, `attached`. Reports on
    effects: one method for each, named in the effect. Command of the owner: `cancel`.
    After each of them call `next_output` until it gives None. It has no deadline of its
    own: what a silent client leaves behind is ended by the link's idle timeout.

    A client that goes away while paths are being checked takes the job with it; later
    it changes nothing, and may come back over another link.
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
        self._history = LogHistory()
        self._stages: list[m.Message] = []
        self._position = 0
        self._received = 0
        self._results: dict[str, int] = {}
        self._unlisted = ""
        self._failure: str | None = None
        self._connected = True
        self._resumed = False
        self._outputs: deque[Output] = deque()

    @classmethod
    def restored(
        cls,
        job_id: str,
        route: m.Route,
        submission: m.Submission,
        progress: m.JobProgress,
        *,
        results: dict[str, int],
        output_path: str,
    ) -> "WorkerJob":
        """Go on with a job that a worker had before it was restarted.

        A job that waited waits again; one that ran has failed; one that was on its way
        can be resumed, as can one whose results were not fetched.

        Args:
            job_id: Its id.
            route: How its package came.
            submission: Name and size of the package; the name as in `Enqueue`.
            progress: Where it stood.
            results: As in `run_ended`.
            output_path: Where its models are, as in `JobComplete`.
        """
        job = cls()
        job.job_id, job.route, job._connected = job_id, route, False
        job._package, job._size = submission.name, submission.size
        job._output_path = output_path
        match progress.state:
            case "RECEIVING":
                job._enter(State.SUSPENDED)
            case "QUEUED":
                job._queue()
            case "RUNNING":
                job._enter(State.RUNNING)
                job.run_ended("the worker was stopped while the job ran", results)
            case "COMPLETE" | "FAILED" | "CANCELLED":
                job._enter(State.ENDED)
                job._results = listed_results(results)
                job._restore_ending(progress)
        return job

    @property
    def progress(self) -> m.JobProgress:
        """Where the job stands, as its client and the worker's memory are told."""
        if self.state is State.ENDED:
            return self._end_progress()
        name = _NAMES.get(self.state, "RECEIVING")
        position = self._position if name == "QUEUED" else 0
        received = self._received if self.state is State.RECEIVING else 0
        return m.JobProgress(name, position, received=received)

    @property
    def submission(self) -> m.Submission:
        """Name and size of the package; on shared storage, its path and 0."""
        return m.Submission(self._package, self._size)

    @property
    def output_path(self) -> str:
        """Where the models are, beneath the shared root or the job directory."""
        return self._output_path

    @property
    def results(self) -> dict[str, int]:
        """The files that the job made, and their sizes; those that are listed."""
        return self._results

    # ------------------------------------------------------------ inputs of the world

    def receive_message(self, message: m.Message, now: float) -> None:
        """Take a message of the client; `now` is part of every machine's contract.

        What comes after the end of the link changes nothing.

        Raises:
            RemoteProtocolError: If it does not belong here; the state is unchanged.
        """
        if isinstance(message, m.Unknown) or not self._connected:
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
        match self.state:
            case State.ADMITTED:
                self._enter(State.SUSPENDED)
            case State.RECEIVING:
                self._put(StopReceiving())
                self._enter(State.SUSPENDED)
            case State.DISCARDED:
                pass
            case _ if not self.can_resume:
                self._discard()

    @property
    def can_resume(self) -> bool:
        """True if `attached` may be called once `connection_lost` has been."""
        return self.state in _OUTLIVES_ITS_LINK

    def attached(self, next_sequence: int, now: float) -> None:
        """A client has asked for this job over another link, and gets what it missed.

        Args:
            next_sequence: The first line of output that it misses.
            now: Part of every machine's contract.

        Raises:
            LocalProtocolError: If the job has a link, or nothing to go on with.
        """
        del now
        if self._connected or not self.can_resume:
            raise LocalProtocolError(f"nothing to resume: the job is {self._doing()}")
        self._connected = True
        match self.state:
            case State.ADMITTING:
                self._resumed = True  # `admitted` answers
            case State.SUSPENDED:
                self._enter(State.ADMITTED)
                self._send(m.JobResumed(self.job_id, self.progress))
            case _:
                self._send(m.JobResumed(self.job_id, self.progress))
                for message in (*self._history.since(next_sequence), *self._stages):
                    self._send(message)
                if self.state is State.ENDED:
                    self._tell_end()

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
            self._send(m.MountProbeFailed(self.job_id, clean_text(reason)))
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
            self._send(m.PathError(clean_text(reason)))

    def admitted(self) -> None:
        """There is room for the package."""
        if self._report(State.ADMITTING):
            self._enter(State.ADMITTED if self._connected else State.SUSPENDED)
            self._put(Remember())
            if self._resumed:
                self._send(m.JobResumed(self.job_id, self.progress))
            else:
                self._send(m.JobAccepted(self.job_id))

    def rejected(self, reason: str) -> None:
        """The package can't be taken."""
        if self._report(State.ADMITTING):
            self._send(m.JobRejected(self.job_id, clean_text(reason)))
            self._discard()

    def package_opened(self, received: int) -> None:
        """So many bytes of the package are here from before."""
        if self.state is State.SUSPENDED:
            return  # the link was lost meanwhile
        if self._report(State.RECEIVING):
            self._received = received
            self._tell()

    def package_received(self) -> None:
        """The package lies in the job directory, verified."""
        if self._report(State.RECEIVING, State.SUSPENDED):
            self._queue()

    def package_failed(self, reason: str) -> None:
        """The package did not arrive.

        Without a link this says little, and nobody hears it: the client tries again.
        """
        if self._report(State.RECEIVING, State.SUSPENDED) and self._connected:
            self._discard(reason)

    def queue_moved(self, position: int) -> None:
        """So many jobs are ahead."""
        if self._report(State.QUEUED):
            self._position = position
            self._tell()

    def slot_granted(self) -> None:
        """The job runs from now on."""
        if self._report(State.QUEUED):
            self._enter(State.RUNNING)
            self._put(Remember())
            self._tell()

    def output(self, line: int, text: str) -> None:
        """A command printed a line, or printed an earlier one anew."""
        if self._report(State.RUNNING):
            message = m.JobLog(self.job_id, self._sequence, line, clean_text(text))
            self._sequence += 1
            self._history.add(message)
            self._send(message)

    def stage_complete(self, stage: Literal["training", "inference"]) -> None:
        """All commands of one kind have succeeded."""
        if self._report(State.RUNNING):
            kinds = {"training": m.TrainingComplete, "inference": m.InferenceComplete}
            self._stages.append(kinds[stage]())
            self._send(self._stages[-1])

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
        self._results = listed_results(results)
        unlisted = len(results) - len(self._results)
        if unlisted:
            self._unlisted = (
                f"{unlisted} files stay on the worker: too many, or badly named"
            )
        self._failure = failure
        self._enter(State.ENDED)
        self._put(Remember())
        self._tell_end()

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
                self._tell()
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
        self._put(Remember())
        self._put(Enqueue(self.job_id, self.route, self._package))

    def _discard(
        self, failure: str | None = None, state: m.JobStateName = "FAILED"
    ) -> None:
        """Leave nothing behind of a job that did not run, or whose results are home."""
        self._enter(State.DISCARDED)
        if failure is not None:
            self._tell_failure(failure, state)
        self._put(Discard())

    def _end_progress(self) -> m.JobProgress:
        """Say how a job ended that ran, or was stopped while it waited."""
        if self.cancel_reason:
            return end_progress("CANCELLED", self.cancel_reason)
        if self._failure is not None:
            return end_progress("FAILED", self._failure)
        return end_progress("COMPLETE", self._unlisted)

    def _restore_ending(self, progress: m.JobProgress) -> None:
        """The reverse of `_end_progress`."""
        match progress.state:
            case "CANCELLED":
                self.cancel_reason = progress.detail or "cancelled"
            case "FAILED":
                self._failure = progress.detail
            case _:
                self._unlisted = progress.detail

    def _tell_end(self) -> None:
        """Tell what the job made and how it ended; a client may miss it, and ask."""
        for page in result_pages(self._results):
            self._send(m.JobResults(self.job_id, page))
        self._tell()
        reason = self.cancel_reason or self._failure
        if reason is None:
            self._send(m.JobComplete(self.job_id, self._output_path))
        else:
            self._send(m.JobFailed(self.job_id, clean_text(reason)))

    def _tell_failure(self, reason: str, state: m.JobStateName = "FAILED") -> None:
        self._send(m.JobState(self.job_id, end_progress(state, reason)))
        self._send(m.JobFailed(self.job_id, clean_text(reason)))

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

    def _tell(self) -> None:
        self._send(m.JobState(self.job_id, self.progress))

    def _doing(self) -> str:
        return self.state.name.lower().replace("_", " ")
