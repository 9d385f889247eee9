"""One job as the client sees it: which route, what to send, what to wait for."""

from collections import deque
from typing import Literal, assert_never

from sleap_rtc.proto import messages as m
from sleap_rtc.proto.errors import LocalProtocolError, RemoteProtocolError
from sleap_rtc.proto.job_client_outputs import (
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
from sleap_rtc.proto.job_client_table import EXPECTED, SHARED_STATES, STALE, State
from sleap_rtc.proto.routes import (
    GiveUp,
    RoutePreference,
    TryShared,
    UseChannel,
    after_shared_failure,
    first_route,
)

__all__ = [
    "CANCEL_TIMEOUT",
    "EXPECTED",
    "PACKAGE_TRANSFER_ID",
    "PROBE_TIMEOUT",
    "REPLY_TIMEOUT",
    "ClientJob",
    "CopyPackage",
    "DiscardShared",
    "FetchResults",
    "JobEnded",
    "LinePrinted",
    "Outcome",
    "Output",
    "PrepareShared",
    "RouteChosen",
    "SendMessage",
    "SendPackage",
    "StageComplete",
    "State",
    "StateChanged",
    "StopSending",
]

PROBE_TIMEOUT = 30.0
"""Seconds for the worker to read the probe file: a slow mount takes several."""

REPLY_TIMEOUT = 30.0
"""Seconds for the worker to look at a path, or to accept a package."""

CANCEL_TIMEOUT = 20.0
"""Seconds for the worker to stop a job: it gives the trainer ten to save its model."""

PACKAGE_TRANSFER_ID = 0
"""The package is the first file of a link; results follow it."""

_HAS_PACKAGE = frozenset({"QUEUED", "RUNNING", "COMPLETE"})
"""What a worker says of a job only after it has received the whole package."""


class ClientJob:
    """One job, from the decision on a route to the results.

    Inputs from the world: `receive_message`, `handle_timeout`, `connection_lost`.
    Commands: `submit` once, then `cancel` at any time. Reports on effects:
    `probe_written`, `package_copied`, `shared_failed`, `package_sent`,
    `results_fetched`, `transfer_failed`. After each of them call `next_output` until it
    gives None, then look at `deadline`.

    Args:
        job_id: A fresh id, ``job_`` and hexadecimal digits.
        package: Name of the package file.
        size: Its size in bytes.
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
        self._transferring = False
        self._results: list[m.ResultFile] = []
        self._result_paths = 0
        self._ending = JobEnded("lost")
        self._deadline: float | None = None
        self._outputs: deque[Output] = deque()

    # ------------------------------------------------------------------- commands

    def submit(
        self,
        preference: RoutePreference,
        now: float,
        *,
        client_root: bool,
        worker_root: bool,
    ) -> None:
        """Start; does nothing if the job was cancelled or lost before.

        Args:
            preference: The route that the user asked for.
            now: Seconds on the owner's clock.
            client_root: Whether shared storage is configured here.
            worker_root: Whether the worker's greeting says so of itself.

        Raises:
            LocalProtocolError: If it has started already.
        """
        if self.state is State.ENDED:
            return
        self._require(State.IDLE)
        self._preference = preference
        self._take(
            first_route(preference, client_root=client_root, worker_root=worker_root),
            now,
        )

    def cancel(self, reason: str, now: float) -> None:
        """Stop the job; the last event says when it has stopped.

        A job that does not depend on the worker any more, or not yet, ends at once.
        While the worker is stopping it a second call changes nothing.

        Args:
            reason: Why, for people.
            now: Seconds on the owner's clock.
        """
        if self._is_over():
            return
        self._cancel_reason = self._cancel_reason or reason
        self._abandon()
        if self.state in (State.SUBMITTING, State.SENDING, State.WAITING):
            self._send(m.JobCancel(self.job_id))
            self._enter(State.CANCELLING, now + CANCEL_TIMEOUT)
        else:
            self._end("cancelled", self._cancel_reason)

    # ----------------------------------------------------------- reports on effects

    def probe_written(self, path: str, content: str, now: float) -> None:
        """The probe file is there.

        Args:
            path: Where, beneath the root.
            content: BLAKE3 hash of what it holds, in hexadecimal digits.
            now: Seconds on the owner's clock.

        Raises:
            LocalProtocolError: If nobody asked for it.
        """
        if self._is_over():
            return
        self._require(State.PREPARING)
        self._probe_content = content
        self._send(m.MountProbe(self.job_id, path))
        self._enter(State.PROBING, now + PROBE_TIMEOUT)

    def package_copied(self, path: str, now: float) -> None:
        """The package lies in the job directory.

        Args:
            path: Where, beneath the root.
            now: Seconds on the owner's clock.

        Raises:
            LocalProtocolError: If nobody asked for it.
        """
        if self._is_over():
            return
        self._require(State.COPYING)
        self._send(m.JobIdentity(self.job_id))
        self._send(m.SharedInputPath(path))
        self._enter(State.CHECKING_INPUT, now + REPLY_TIMEOUT)

    def shared_failed(self, reason: str, now: float) -> None:
        """The shared storage can't be used from here.

        Args:
            reason: Why, a sentence without its full stop.
            now: Seconds on the owner's clock.

        Raises:
            LocalProtocolError: If the shared route is not being tried.
        """
        if self._is_over():
            return
        if self.state not in (State.PREPARING, State.COPYING):
            raise LocalProtocolError(f"no copy is under way while {self._doing()}")
        self._leave_shared(reason, now)

    def package_sent(self) -> None:
        """The worker has the package and has verified it.

        Raises:
            LocalProtocolError: If it was not being sent.
        """
        if self._is_over():
            return
        match self.state:
            case State.SENDING:
                self._transferring = False
                self._enter(State.WAITING)
            case State.WAITING if self._transferring:
                self._transferring = False
            case State.FETCHING if self.route == "channel":
                pass  # the job was quicker than this report
            case _:
                raise LocalProtocolError(f"no package is sent while {self._doing()}")

    def results_fetched(self) -> None:
        """The results are where the user wants them.

        Raises:
            LocalProtocolError: If nobody asked for them.
        """
        if self._is_over():
            return
        self._require(State.FETCHING)
        self._transferring = False
        self._send(m.ResultsReceived(self.job_id))
        self._end(self._ending.outcome, self._ending.reason, self._ending.path)

    def transfer_failed(self, reason: str) -> None:
        """The package could not be sent, or the results could not be fetched.

        Raises:
            LocalProtocolError: If nothing was being transferred.
        """
        if self._is_over():
            return
        if not self._transferring:
            raise LocalProtocolError(f"no transfer is under way while {self._doing()}")
        self._transferring = False
        if self.state is not State.WAITING:
            self._end("transfer_failed", reason)
        # Otherwise the worker has said that it has the package, and that counts.

    # ------------------------------------------------------------ inputs of the world

    def receive_message(self, message: m.Message, now: float) -> None:
        """Take a message of the worker.

        Raises:
            RemoteProtocolError: If it does not belong here; the state is unchanged.
        """
        if self.state is State.ENDED or isinstance(message, m.Unknown):
            return
        if isinstance(message, m.Error):
            self._lose(f"the worker ended the connection: {message.reason}")
            return
        expected = EXPECTED[self.state]
        if type(message) not in expected:
            if type(message) in STALE and self.route == "channel":
                return
            raise RemoteProtocolError(
                f"{type(message).__name__} is not expected while {self._doing()}"
            )
        if getattr(message, "job_id", self.job_id) != self.job_id:
            raise RemoteProtocolError(f"{type(message).__name__} is for another job")
        self._dispatch(message, now)

    def connection_lost(self, reason: str, now: float) -> None:
        """The link is gone; `now` is not used, but part of every machine's contract."""
        del now
        if self.state is not State.ENDED:
            self._lose(reason)

    def handle_timeout(self, now: float) -> None:
        """Look at the clock; does nothing before the deadline."""
        if self._deadline is None or now < self._deadline:
            return
        match self.state:
            case State.PROBING:
                self._leave_shared(
                    "The worker did not find the probe file in time", now
                )
            case State.CHECKING_INPUT | State.CHECKING_OUTPUT:
                self._leave_shared("The worker did not check the paths in time", now)
            case State.SUBMITTING:
                self._end(
                    "lost", f"the worker did not answer for {REPLY_TIMEOUT:.0f} s"
                )
            case State.CANCELLING:
                self._end("cancelled", f"{self._cancel_reason}; the worker is silent")
            case _:
                self._deadline = None

    def deadline(self) -> float | None:
        """When `handle_timeout` wants to be called, if ever."""
        return self._deadline

    def next_output(self) -> Output | None:
        """Give the next thing to do or to show."""
        return self._outputs.popleft() if self._outputs else None

    # ------------------------------------------------------------------- transitions

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
                    self._put(SendPackage(PACKAGE_TRANSFER_ID))
                    self._transferring = True
                    self._enter(State.SENDING)
            case m.JobRejected(reason=reason):
                self._end(
                    "cancelled" if self.state is State.CANCELLING else "rejected",
                    reason,
                )
            case m.JobState(progress=progress):
                self._put(StateChanged(progress))
                if self.state is State.SENDING and progress.state in _HAS_PACKAGE:
                    # The worker may be quicker than the report that all is sent.
                    self._enter(State.WAITING)
            case m.JobLog(line=line, text=text):
                self._put(LinePrinted(line, text))
            case m.TrainingComplete():
                self._put(StageComplete("training"))
            case m.InferenceComplete():
                self._put(StageComplete("inference"))
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

    def _take_results(self, page: m.ResultPage) -> None:
        if len(self._results) + len(page.files) > m.MAX_RESULT_FILES:
            raise RemoteProtocolError(f"more than {m.MAX_RESULT_FILES} result files")
        size = sum(len(file.path) for file in page.files)
        if self._result_paths + size > m.MAX_RESULT_PATHS:
            raise RemoteProtocolError("the paths of the result files are too long")
        self._result_paths += size
        self._results += page.files

    def _job_failed(self, reason: str) -> None:
        if self.state is State.CANCELLING:
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
            self._end(ending.outcome, ending.reason, ending.path)
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
                self.route = "channel"
                self._put(RouteChosen("channel", reason))
                self._send(
                    m.JobSubmit(self.job_id, m.Submission(self._package, self._size))
                )
                self._enter(State.SUBMITTING, now + REPLY_TIMEOUT)
            case GiveUp(reason=reason):
                self._end("transfer_failed", reason)
            case _:
                assert_never(decision)

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
        if self._transferring:
            self._transferring = False
            self._put(StopSending())

    # ------------------------------------------------------------------ small helpers

    def _enter(self, state: State, deadline: float | None = None) -> None:
        self.state = state
        self._deadline = deadline

    def _end(self, outcome: Outcome, reason: str = "", path: str = "") -> None:
        self._enter(State.ENDED)
        self._put(JobEnded(outcome, reason, path))

    def _put(self, output: Output) -> None:
        self._outputs.append(output)

    def _send(self, message: m.Message) -> None:
        self._put(SendMessage(message))

    def _doing(self) -> str:
        return self.state.name.lower().replace("_", " ")

    def _is_over(self) -> bool:
        """Effects may report after their job was cancelled or its link was lost."""
        return self.state in (State.CANCELLING, State.ENDED)

    def _require(self, state: State) -> None:
        if self.state is not state:
            raise LocalProtocolError(
                f"this belongs to {state.name}, but the job is {self._doing()}"
            )
