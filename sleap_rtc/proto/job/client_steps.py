"""What a client's job does from one state to the next, without its public inputs."""

from collections import deque
from typing import Literal, assert_never

from sleap_rtc.proto import messages as m
from sleap_rtc.proto.errors import LocalProtocolError, RemoteProtocolError
from sleap_rtc.proto.job.client_outputs import (
    CopyPackage,
    DiscardShared,
    FetchResults,
    JobEnded,
    LinePrinted,
    Outcome,
    Output,
    PrepareShared,
    RouteChosen,
    SendMessage,
    SendPackage,
    StageComplete,
    StateChanged,
    StopSending,
)
from sleap_rtc.proto.job.client_table import SHARED_STATES, State
from sleap_rtc.proto.route.routes import (
    GiveUp,
    RoutePreference,
    TryShared,
    UseChannel,
    after_shared_failure,
)

PROBE_TIMEOUT = 30.0
"""Seconds for the worker to read the probe file: a slow mount takes several."""

REPLY_TIMEOUT = 30.0
"""Seconds for the worker to look at a path, to accept a package, or to resume."""

CANCEL_TIMEOUT = 20.0
"""Seconds for the worker to stop a job: it gives the trainer ten to save its model."""

PACKAGE_TRANSFER_ID = 0
"""The package is the first file of a link; results follow it."""

_HAS_PACKAGE = frozenset({"QUEUED", "RUNNING", "COMPLETE"})
"""What a worker says of a job only after it has received the whole package."""


class JobSteps:
    """The state of one job, and every transition of it.

    `ClientJob` adds the inputs, and says which of them belongs to which state.
    """

    def __init__(self, job_id: str, package: str, size: int) -> None:
        self.job_id = job_id
        self.state = State.IDLE
        self.route: m.Route | None = None
        self._package = package
        self._size = size
        self._preference: RoutePreference = "auto"
        self._probe_content = ""
        self._cancel_reason = ""
        self._is_cancelled = False
        self._probe_path = ""
        self._copied_path = ""
        self._decision: TryShared | UseChannel | GiveUp = GiveUp("not submitted")
        self._connected = True
        self._resumed_from = State.IDLE
        self._is_known = False
        self._next_sequence = 0
        self._stages: set[str] = set()
        self._progress: m.JobProgress | None = None
        self._transferring = False
        self._was_stopped = False
        self._results: list[m.ResultFile] = []
        self._result_paths = 0
        self._ending = JobEnded("lost")
        self._deadline: float | None = None
        self._outputs: deque[Output] = deque()

    # --------------------------------------------------------- messages of the worker

    def _dispatch(self, message: m.Message, now: float) -> None:
        match message:
            case m.MountProbed(content=content):
                if content == self._probe_content:
                    self._probe_succeeded()
                else:
                    self._leave_shared("The worker mounts other storage", now)
            case m.MountProbeFailed(reason=reason):
                self._leave_shared(
                    f"The worker does not see this storage: {reason}", now
                )
            case m.PathValidated(which=which):
                self._path_validated(which, now)
            case m.PathError(reason=reason):
                self._leave_shared(f"The worker refused the path: {reason}", now)
            case m.JobAccepted():
                if self.state is State.SUBMITTING:
                    self._send_package()
            case m.JobRejected(reason=reason):
                self._end("cancelled" if self._is_cancelled else "rejected", reason)
            case m.JobResumed(progress=progress):
                self._resumed(progress, now)
            case m.JobUnknown():
                self._start_again(now)
            case m.JobState(progress=progress):
                self._is_known = True
                self._tell(progress)
                if self.state is State.SENDING and progress.state in _HAS_PACKAGE:
                    # The worker may be quicker than the report that all is sent.
                    self._enter(State.WAITING)
            case m.JobLog(sequence=sequence, line=line, text=text):
                if sequence >= self._next_sequence:
                    self._next_sequence = sequence + 1
                    self._put(LinePrinted(line, text))
            case m.TrainingComplete():
                self._stage_complete("training")
            case m.InferenceComplete():
                self._stage_complete("inference")
            case m.JobResults(page=page):
                self._take_results(page)
            case m.JobComplete(path=path):
                self._fetch(JobEnded("complete", path=path))
            case m.JobFailed(reason=reason):
                self._job_failed(reason)
            case _:
                raise RemoteProtocolError(
                    f"{type(message).__name__} is not for clients"
                )

    def _probe_succeeded(self) -> None:
        self.route = "shared"
        self._put(RouteChosen("shared", "both sides see the same storage"))
        self._put(CopyPackage(f"jobs/{self.job_id}/{self._package}"))
        self._enter(State.COPYING)

    def _path_validated(self, which: Literal["input", "output"], now: float) -> None:
        wanted = "input" if self.state is State.CHECKING_INPUT else "output"
        if which != wanted:
            raise RemoteProtocolError(
                f"PATH_VALIDATED::{which} is not expected while {self._doing()}"
            )
        if which == "input":
            self._send(m.SharedOutputPath(f"jobs/{self.job_id}/models"))
            self._enter(State.CHECKING_OUTPUT, now + REPLY_TIMEOUT)
        else:
            self._send(m.SharedStorageJob())
            self._enter(State.WAITING)

    def _probe(self, now: float) -> None:
        self._send(m.MountProbe(self.job_id, self._probe_path))
        self._enter_with_link(State.PROBING, now + PROBE_TIMEOUT)

    def _announce(self, now: float) -> None:
        """Tell the worker about a package that lies on the shared storage."""
        self._send(m.JobIdentity(self.job_id))
        self._send(m.SharedInputPath(self._copied_path))
        self._enter_with_link(State.CHECKING_INPUT, now + REPLY_TIMEOUT)

    def _ask_to_resume(self, now: float) -> None:
        deadline = self._deadline if self._is_cancelling() else now + REPLY_TIMEOUT
        self._results, self._result_paths = [], 0  # they come once more
        self._send(m.JobResume(self.job_id, m.ResumePoint(self._next_sequence)))
        if self.state is not State.RESUMING:
            self._resumed_from = self.state
        self._enter(State.RESUMING, deadline)

    def _resumed(self, progress: m.JobProgress, now: float) -> None:
        """The worker has the job: go on where it stands there."""
        self._is_known = self._is_known or progress.state != "RECEIVING"
        if self.route is None or progress.state == "RECEIVING":
            self._use_channel("the worker has the job already")
        if self._resumed_from is State.CANCELLING:
            self._send(m.JobCancel(self.job_id))
            self._enter(State.CANCELLING, now + CANCEL_TIMEOUT)
            return
        self._tell(progress)
        if progress.state == "RECEIVING":
            self._send_package()
        else:
            self._enter(State.WAITING)

    def _start_again(self, now: float) -> None:
        """The worker does not have the job: submit it, unless it had it once."""
        match self._resumed_from:
            case State.CANCELLING:
                if self._may_announce():
                    self._put(DiscardShared(self.job_id))
                self._end("cancelled", self._cancel_reason)
            case State.IDLE:
                self.route = None
                self._take(self._decision, now)
            case State.SUBMITTING | State.SENDING:
                self._submit(now)
            case State.WAITING if self._may_announce():
                self._announce(now)
            case _:
                self._end("lost", "the worker does not know the job any more")

    def _stage_complete(self, stage: Literal["training", "inference"]) -> None:
        if stage not in self._stages:  # a worker that resumes says it again
            self._stages.add(stage)
            self._put(StageComplete(stage))

    def _take_results(self, page: m.ResultPage) -> None:
        if len(self._results) + len(page.files) > m.MAX_RESULT_FILES:
            raise RemoteProtocolError(f"more than {m.MAX_RESULT_FILES} result files")
        size = sum(len(file.path) for file in page.files)
        if self._result_paths + size > m.MAX_RESULT_PATHS:
            raise RemoteProtocolError("the paths of the result files are too long")
        self._result_paths += size
        self._results += page.files

    def _job_failed(self, reason: str) -> None:
        if self._is_cancelled:
            self._fetch(JobEnded("cancelled", self._cancel_reason))
        else:
            self._fetch(JobEnded("failed", reason))

    def _fetch(self, ending: JobEnded) -> None:
        """End, but bring home first what the job made."""
        self._abandon()
        self._ending = ending
        if not self._results or self.route is None:
            # There is nothing to wait for, so the worker needs no copy either.
            self._send(m.ResultsReceived(self.job_id))
            self._end_as(ending)
            return
        self._put(FetchResults(self.job_id, self.route, tuple(self._results)))
        self._transferring = True
        self._enter(State.FETCHING)

    def _take(self, decision: TryShared | UseChannel | GiveUp, now: float) -> None:
        match decision:
            case TryShared():
                self._put(PrepareShared(self.job_id))
                self._enter(State.PREPARING)
            case UseChannel(reason=reason):
                self._use_channel(reason)
                self._submit(now)
            case GiveUp(reason=reason):
                self._end("transfer_failed", reason)
            case _:
                assert_never(decision)

    def _use_channel(self, reason: str) -> None:
        if self.route != "channel":
            self.route = "channel"
            self._put(RouteChosen("channel", reason))

    def _send_package(self) -> None:
        self._put(SendPackage(PACKAGE_TRANSFER_ID))
        self._transferring = True
        self._enter(State.SENDING)

    def _submit(self, now: float) -> None:
        submission = m.Submission(self._package, self._size)
        self._send(m.JobSubmit(self.job_id, submission))
        self._enter_with_link(State.SUBMITTING, now + REPLY_TIMEOUT)

    def _leave_shared(self, reason: str, now: float) -> None:
        self._abandon()
        self._take(after_shared_failure(self._preference, reason), now)

    def _lose(self, reason: str) -> None:
        self._abandon()
        self._end("lost", reason)

    def _abandon(self) -> None:
        """Stop the effect that is under way, and undo what nobody will use."""
        if self.state in SHARED_STATES:
            self._put(DiscardShared(self.job_id))
        self._stop_transfer()

    def _stop_transfer(self) -> None:
        if self._transferring:
            self._transferring = False
            self._was_stopped = True
            self._put(StopSending())

    # ------------------------------------------------------------------ small helpers

    def _enter(self, state: State, deadline: float | None = None) -> None:
        self.state = state
        self._deadline = deadline

    def _enter_with_link(self, state: State, deadline: float) -> None:
        """Enter a state in which the worker is asked, now or once there is a link."""
        self._enter(state, deadline if self._connected else None)

    def _is_cancelling(self) -> bool:
        return self.state is State.CANCELLING or (
            self.state is State.RESUMING and self._resumed_from is State.CANCELLING
        )

    def _may_announce(self) -> bool:
        """Tell whether a worker without the job may never have heard of its start."""
        return self.route == "shared" and not self._is_known

    def _end(
        self, outcome: Outcome, reason: str = "", *, confirmed: bool = True
    ) -> None:
        self._end_as(JobEnded(outcome, reason, confirmed=confirmed))

    def _end_as(self, ending: JobEnded) -> None:
        self._enter(State.ENDED)
        self._put(ending)

    def _put(self, output: Output) -> None:
        self._outputs.append(output)

    def _tell(self, progress: m.JobProgress) -> None:
        if progress != self._progress:  # a worker that resumes says it again
            self._progress = progress
            self._put(StateChanged(progress))

    def _send(self, message: m.Message) -> None:
        if self._connected:
            self._put(SendMessage(message))

    def _doing(self) -> str:
        return self.state.name.lower().replace("_", " ")

    def _is_over(self) -> bool:
        """Effects may report after their job was cancelled or its link was lost."""
        return self.state in (State.CANCELLING, State.RESUMING, State.ENDED)

    def _needs_no_link(self) -> bool:
        """Tell whether results are being copied without the worker, which is gone."""
        fetching = self.state is State.FETCHING and self.route == "shared"
        return fetching and not self._connected

    def _require_lost_link(self) -> None:
        if self._connected:
            raise LocalProtocolError(f"no link was lost while {self._doing()}")

    def _require(self, state: State) -> None:
        if self.state is not state:
            raise LocalProtocolError(
                f"this belongs to {state.name}, but the job is {self._doing()}"
            )
