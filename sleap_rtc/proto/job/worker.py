"""One job as the worker sees it, from the first message to the end of its run."""

from collections import deque
from typing import assert_never

import msgspec
from typing_extensions import override

from sleap_rtc.proto import messages
from sleap_rtc.proto.errors import LocalProtocolError, RemoteProtocolError
from sleap_rtc.proto.job.lines import LineEvent
from sleap_rtc.proto.job.log_history import LogHistory
from sleap_rtc.proto.job.paths import MODELS
from sleap_rtc.proto.job.results import (
    clean_text,
    end_progress,
    listed_results,
    result_pages,
)
from sleap_rtc.proto.job.script import ScriptKind
from sleap_rtc.proto.job.shared_intake import (
    IntakeState,
    SharedIntake,
    SharedRequest,
)
from sleap_rtc.proto.job.worker_outputs import (
    Admit,
    Discard,
    Enqueue,
    Output,
    ReceivePackage,
    Remember,
    SendMessage,
    SendResult,
    StopReceiving,
    StopRun,
)
from sleap_rtc.proto.job.worker_table import (
    ACCEPTED,
    IGNORED,
    TRANSITIONS,
    WorkerState,
    WorkerTrigger,
)
from sleap_rtc.proto.machine import ConnectedMachine, accept_untrusted, move

_NEEDS_ITS_LINK = frozenset(
    {WorkerState.NEW, WorkerState.SHARING, WorkerState.DISCARDED}
)
"""States in which nothing is kept for a client that goes away."""

_NAMES: dict[WorkerState, messages.JobStateName] = {
    WorkerState.QUEUED: "QUEUED",
    WorkerState.RUNNING: "RUNNING",
}
"""Wire names of the states between the arrival of the package and the end."""


class _Ending(msgspec.Struct, frozen=True):
    """Last state of a job, with the reason, or a remark on its results."""

    state: messages.JobStateName
    detail: str


class StageSucceeded(msgspec.Struct, frozen=True):
    """All commands of one kind have succeeded."""

    stage: ScriptKind


RunEvent = LineEvent | StageSucceeded
"""The events of a run: a line was printed or redrawn, or a stage has succeeded."""


class WorkerJob(ConnectedMachine[messages.ClientJobMessage, Output]):
    """One job of a worker.

    Inputs from the world: `receive_message`, `connection_lost`, and then, over another
    link, `connection_restored` and a `JobResume`. Reports on effects: one method for
    each, named in the effect. Command of the owner: `cancel`. After each of them call
    `next_output` until it returns None. It has no deadline of its own: the idle timeout
    of the link handles a silent client.

    A job whose paths are being checked ends with its link. In a later state the job
    outlives its link, and its client may come back over another one.
    """

    def __init__(self) -> None:
        self.state = WorkerState.NEW
        self.job_id = ""
        self.route: messages.Route = "shared"
        self.cancel_reason = ""
        self._intake = SharedIntake()
        self._package = ""
        self._size = 0
        self._output_path = MODELS
        self._sequence = 0
        self._history = LogHistory()
        self._stages: list[messages.JobReport] = []
        self._position = 0
        self._received = 0
        self._results: dict[str, int] = {}
        self._ending: _Ending | None = None
        self._connected = True
        self._resumed = False
        self._outputs: deque[Output] = deque()

    @classmethod
    def restored(
        cls,
        job_id: str,
        route: messages.Route,
        submission: messages.Submission,
        progress: messages.JobProgress,
        *,
        results: dict[str, int],
        output_path: str,
    ) -> "WorkerJob":
        """Return a job that the worker had before it was restarted.

        A job that waited waits again, and one that ran has failed. One whose package
        was not complete can be resumed, as can one whose results were not fetched.

        Args:
            job_id: Its id.
            route: The route of its package.
            submission: Name and size of the package; the name as in `Enqueue`.
            progress: Its state.
            results: As in `run_ended`.
            output_path: Path of its models, as in `JobComplete`.
        """
        job = cls()
        job.job_id, job.route, job._connected = job_id, route, False
        job._package, job._size = submission.name, submission.size
        job._output_path = output_path
        match progress.state:
            case "RECEIVING":
                job.state = WorkerState.SUSPENDED
            case "QUEUED":
                job.state = WorkerState.SUSPENDED
                job.package_received()
            case "RUNNING":
                job.state = WorkerState.RUNNING
                job.run_ended("the worker was stopped while the job ran", results)
            case "COMPLETE" | "FAILED" | "CANCELLED":
                job.state = WorkerState.ENDED
                job._results = listed_results(results)
                job._ending = _Ending(progress.state, progress.detail)
            case _:
                assert_never(progress.state)
        return job

    @property
    def progress(self) -> messages.JobProgress:
        """The state of the job, as its client and the worker's store see it."""
        if self._ending is not None:
            return end_progress(self._ending.state, self._ending.detail)
        name = _NAMES.get(self.state, "RECEIVING")
        position = self._position if name == "QUEUED" else 0
        received = self._received if self.state is WorkerState.RECEIVING else 0
        return messages.JobProgress(name, position, received=received)

    @property
    def submission(self) -> messages.Submission:
        """Name and size of the package; on shared storage, its path and 0."""
        return messages.Submission(self._package, self._size)

    @property
    def output_path(self) -> str:
        """Path of the models, beneath the shared root or the job directory."""
        return self._output_path

    @property
    def results(self) -> dict[str, int]:
        """The files that the job made and that are listed, with their sizes."""
        return self._results

    @property
    def has_ended(self) -> bool:
        """True once nothing more will run."""
        return self.state in (WorkerState.ENDED, WorkerState.DISCARDED)

    @property
    def can_resume(self) -> bool:
        """True if the job outlives its link, and a client may come back to it."""
        return self.state not in _NEEDS_ITS_LINK

    # ------------------------------------------------------------ inputs of the world

    @override
    def receive_message(self, message: messages.ClientJobMessage, now: float) -> None:
        """Handle a message of the client; after the end of the link it is ignored."""
        if not self._connected:
            return
        kind = type(message)
        is_late = kind in IGNORED[self.state]
        if not is_late:
            target = accept_untrusted(TRANSITIONS, ACCEPTED, self.state, kind)
        self._check(message)
        if not is_late:
            self.state = target
            self._handle(message, now)

    @override
    def connection_lost(self, reason: str, now: float) -> None:
        """Keep or discard the job of a client that went away."""
        self._connected = False
        before = self.state
        self._move(WorkerTrigger.LOST)
        if before is WorkerState.RECEIVING:
            self._outputs.append(StopReceiving())
        elif (
            self.state is WorkerState.DISCARDED and before is not WorkerState.DISCARDED
        ):
            self._outputs.append(Discard())

    @override
    def connection_restored(self, now: float) -> None:
        """Serve a client that came back over another link; its `JobResume` follows.

        Raises:
            LocalProtocolError: If the job has a link, or cannot be resumed.
        """
        if self._connected or not self.can_resume:
            raise LocalProtocolError(f"nothing to resume: the job is {self.state.name}")
        self._connected = True

    def cancel(self, reason: str) -> None:
        """Stop the job; nothing happens before the client has named it, or at its end.

        Args:
            reason: Why, for people.
        """
        match self.state:
            case WorkerState.NEW | WorkerState.ENDED | WorkerState.DISCARDED:
                pass
            case WorkerState.QUEUED | WorkerState.RUNNING:
                if not self.cancel_reason:
                    self.cancel_reason = reason
                    self._outputs.append(StopRun())
            case _:
                self.cancel_reason = reason
                self._move(WorkerTrigger.DISCARD)
                self._discard(_Ending("CANCELLED", reason))

    @override
    def next_output(self) -> Output | None:
        return self._outputs.popleft() if self._outputs else None

    # ------------------------------------------------ reports about the shared storage

    def probe_read(self, content: str) -> None:
        """Handle a report: the BLAKE3 hash (hexadecimal) of the probe file."""
        if (intake := self._sharing()) is not None:
            intake.probe_read(content)
            self._follow_intake()

    def probe_failed(self, reason: str) -> None:
        """Handle a report: the probe file cannot be read."""
        if (intake := self._sharing()) is not None:
            intake.probe_failed(reason)
            self._follow_intake()

    def input_valid(self) -> None:
        """Handle a report: the package exists beneath the root, and can be read."""
        if (intake := self._sharing()) is not None:
            intake.input_valid()
            self._follow_intake()

    def output_made(self) -> None:
        """Handle a report: the folder for the models exists beneath the root."""
        if (intake := self._sharing()) is not None:
            intake.output_made()
            self._follow_intake()

    def path_refused(self, reason: str) -> None:
        """Handle a report: the path in question is not acceptable."""
        if (intake := self._sharing()) is not None:
            intake.path_refused(reason)
            self._follow_intake()

    # -------------------------------------------------------- reports about the package

    def admitted(self) -> None:
        """Handle a report: the worker has room for the package."""
        if self._report(WorkerTrigger.ADMITTED):
            if not self._connected:
                self._move(WorkerTrigger.LOST)
            self._outputs.append(Remember())
            if self._resumed:
                self._send(messages.ResumeAccepted(self.job_id, self.progress))
            else:
                self._send(messages.JobAccepted(self.job_id))

    def rejected(self, reason: str) -> None:
        """Handle a report: the worker does not take the package."""
        if self._report(WorkerTrigger.REJECTED):
            self._send(messages.JobRejected(self.job_id, clean_text(reason)))
            self._discard()

    def package_opened(self, received: int) -> None:
        """Handle a report: an earlier link delivered `received` bytes."""
        if self._report(WorkerTrigger.OPENED):
            self._received = received
            self._send_state()

    def package_received(self) -> None:
        """Handle a report: the package is in the job directory, verified."""
        if self._report(WorkerTrigger.RECEIVED):
            self._enqueue()

    def package_failed(self, reason: str) -> None:
        """Handle a report: the package did not arrive.

        Without a link it is ignored, because the client will try again.
        """
        if self._report(WorkerTrigger.RECEIVE_FAILED):
            self._discard(_Ending("FAILED", reason))

    # ------------------------------------------------------------ reports about the run

    def queue_moved(self, position: int) -> None:
        """Handle a report: `position` jobs are ahead in the queue."""
        if self._report(WorkerTrigger.QUEUE_MOVED):
            self._position = position
            self._send_state()

    def slot_granted(self) -> None:
        """Handle a report: the job runs."""
        if self._report(WorkerTrigger.SLOT_GRANTED):
            self._outputs.append(Remember())
            self._send_state()

    def progressed(self, event: RunEvent) -> None:
        """Handle a report: the run has produced this event."""
        if not self._report(WorkerTrigger.PROGRESSED):
            return
        match event:
            case LineEvent(line=line, text=text):
                text = clean_text(text)
                log = messages.JobLog(self.job_id, self._sequence, line, text)
                self._sequence += 1
                self._history.add(log)
                self._send(log)
            case StageSucceeded(stage="training"):
                self._send_stage(messages.TrainingComplete())
            case StageSucceeded():
                self._send_stage(messages.InferenceComplete())
            case _:
                assert_never(event)

    def run_ended(self, failure: str | None, results: dict[str, int]) -> None:
        """Handle a report: the commands have ended, or will never start.

        Args:
            failure: Why the job failed, or None if it succeeded. A job that was asked
                to stop counts as cancelled, whatever the exit status of its commands.
            results: Path, relative to the job directory, and size in bytes of each
                file that the job made. The client gets those that messages can carry,
                and the number of the others.
        """
        if not self._report(WorkerTrigger.RUN_ENDED):
            return
        self._results = listed_results(results)
        unlisted = len(results) - len(self._results)
        if self.cancel_reason:
            self._ending = _Ending("CANCELLED", self.cancel_reason)
        elif failure is not None:
            self._ending = _Ending("FAILED", failure)
        elif unlisted:
            remark = f"{unlisted} files stay on the worker: too many, or badly named"
            self._ending = _Ending("COMPLETE", remark)
        else:
            self._ending = _Ending("COMPLETE", "")
        self._outputs.append(Remember())
        self._send_ending(self._ending)

    # ---------------------------------------------------------- messages of the client

    def _check(self, message: messages.ClientJobMessage) -> None:
        """Raise `RemoteProtocolError` if the message is about another job or file."""
        if (
            isinstance(message, messages.JobMessage | messages.FileRequest)
            and self.job_id
            and message.job_id != self.job_id
        ):
            raise RemoteProtocolError(f"{type(message).__name__} is for another job")
        if isinstance(message, messages.FileOffer) and not self.has_ended:
            file = message.file
            if (file.name, file.size) != (self._package, self._size):
                raise RemoteProtocolError(
                    f"{file.name} of {file.size} bytes was not announced"
                )

    def _handle(self, message: messages.ClientJobMessage, now: float) -> None:
        """Handle a message that led to the present state."""
        if isinstance(message, SharedRequest):
            self._intake.receive_message(message, now)
            if isinstance(message, messages.JobMessage):
                self.job_id = message.job_id
            self._follow_intake()
            return
        match message:
            case messages.JobSubmit(job_id=job_id, submission=submission):
                self.job_id, self.route = job_id, "channel"
                self._package, self._size = submission.name, submission.size
                self._outputs.append(Admit(job_id, submission))
            case messages.JobResume(point=point):
                self._resume(point)
            case messages.FileOffer(transfer_id=transfer_id, file=file):
                self._send_state()
                self._outputs.append(ReceivePackage(transfer_id, file))
            case messages.JobCancel():
                self.cancel("cancelled by the client")
            case messages.FileRequest(transfer_id=transfer_id, path=path):
                if path in self._results:
                    self._outputs.append(SendResult(transfer_id, path))
                else:
                    reason = f"{path} is not a result of this job"
                    self._send(messages.FileError(transfer_id, reason))
            case messages.ResultsReceived():
                self._discard()
            case _:
                assert_never(message)

    def _resume(self, point: messages.ResumePoint) -> None:
        """Send the state of the job, and the messages that the client has missed."""
        if self.state is WorkerState.ADMITTING:
            self._resumed = True  # `admitted` answers
            return
        self._send(messages.ResumeAccepted(self.job_id, self.progress))
        if self.state is not WorkerState.ADMITTED:
            for report in (*self._history.since(point.next_sequence), *self._stages):
                self._send(report)
        if self._ending is not None:
            self._send_ending(self._ending)

    def _follow_intake(self) -> None:
        """Run the outputs of the intake, and queue the job that it started."""
        while (output := self._intake.next_output()) is not None:
            if isinstance(output, SendMessage):
                self._send(output.message)
            else:
                self._outputs.append(output)
        if self._intake.state is IntakeState.STARTED:
            self._package = self._intake.package
            self._output_path = self._intake.output_path
            self._move(WorkerTrigger.STARTED)
            self._enqueue()

    def _send_stage(self, message: messages.JobReport) -> None:
        self._stages.append(message)
        self._send(message)

    def _enqueue(self) -> None:
        self._outputs.append(Remember())
        self._outputs.append(Enqueue(self.job_id, self.route, self._package))

    # ------------------------------------------------------------------------ the end

    def _discard(self, ending: _Ending | None = None) -> None:
        """Discard a job that did not run, or whose results were fetched."""
        if ending is not None:
            progress = end_progress(ending.state, ending.detail)
            self._send(messages.JobState(self.job_id, progress))
            self._send(messages.JobFailed(self.job_id, clean_text(ending.detail)))
        self._outputs.append(Discard())

    def _send_ending(self, ending: _Ending) -> None:
        """Send the results and the outcome; a client that misses them resumes."""
        for page in result_pages(self._results):
            self._send(messages.JobResults(self.job_id, page))
        self._send_state()
        if ending.state == "COMPLETE":
            self._send(messages.JobComplete(self.job_id, self._output_path))
        else:
            self._send(messages.JobFailed(self.job_id, clean_text(ending.detail)))

    # ------------------------------------------------------------------ small helpers

    def _sharing(self) -> SharedIntake | None:
        """Return the intake for a report; None if the client took another route."""
        if self.state is WorkerState.SHARING:
            return self._intake
        if self.has_ended or self.route == "channel":
            return None
        raise LocalProtocolError(f"no path is checked in {self.state.name}")

    def _report(self, trigger: WorkerTrigger) -> bool:
        """Change the state for a report; return False if it is ignored.

        Raises:
            LocalProtocolError: If no such effect can have been asked for.
        """
        if trigger in IGNORED[self.state]:
            return False
        self._move(trigger)
        return True

    def _move(self, trigger: WorkerTrigger) -> None:
        self.state = move(TRANSITIONS, self.state, trigger)

    def _send(self, message: messages.WorkerJobMessage | messages.FileError) -> None:
        if self._connected:
            self._outputs.append(SendMessage(message))

    def _send_state(self) -> None:
        self._send(messages.JobState(self.job_id, self.progress))
