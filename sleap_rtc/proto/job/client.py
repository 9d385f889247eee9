"""One job as the client sees it, from the decision on a route to the results."""

from collections import deque
from typing import assert_never

import msgspec
from typing_extensions import override

from sleap_rtc.proto import messages
from sleap_rtc.proto.errors import LocalProtocolError, RemoteProtocolError
from sleap_rtc.proto.job.client_outputs import (
    DiscardShared,
    JobEnded,
    Outcome,
    Output,
    Reconnect,
    RouteChosen,
    SendMessage,
    SendPackage,
    StopTransfer,
)
from sleap_rtc.proto.job.client_table import (
    ACCEPTED,
    IGNORED,
    TRANSITIONS,
    ClientState,
    ClientTrigger,
)
from sleap_rtc.proto.job.reports import ReportReader
from sleap_rtc.proto.job.retrieval import Retrieval, ending_of
from sleap_rtc.proto.job.route_plan import RoutePlan
from sleap_rtc.proto.job.shared_route import SharedAnswer, SharedRoute, SharedState
from sleap_rtc.proto.machine import (
    ConnectedMachine,
    TimedMachine,
    accept_untrusted,
    move,
)
from sleap_rtc.proto.route.routes import GiveUp, TryShared, UseChannel

REPLY_TIMEOUT = 30.0
"""Seconds for the worker to accept a package, or to resume a job."""

CANCEL_TIMEOUT = 20.0
"""Seconds for the worker to stop a job: it gives the trainer ten to save its model."""

PACKAGE_TRANSFER_ID = 0
"""Transfer id of the package, the first file of a link; results follow it."""

_HAS_PACKAGE = frozenset({"QUEUED", "RUNNING", "COMPLETE"})
"""States that a worker reports only after it has received the whole package."""


class _Cancellation(msgspec.Struct, frozen=True):
    """The user's request to stop the job, with its reason."""

    reason: str
    stopped: bool = False
    """True once the worker has ended the job."""


class _Transfer(msgspec.Struct, frozen=True):
    """The package or the results, on their way."""

    stopped: bool = False
    """True once `StopTransfer` was returned; its report may still come."""


class ClientJob(
    TimedMachine[messages.WorkerJobMessage | messages.Error, Output],
    ConnectedMachine[messages.WorkerJobMessage | messages.Error, Output],
):
    """One job, over as many links as it takes.

    Inputs from the world: `receive_message`, `handle_timeout`, `connection_lost`, and
    then `connection_restored` or `give_up`. Commands: `submit` once, or `resume` if an
    earlier process submitted the job, then `cancel` at any time. Reports on effects:
    `probe_written`, `package_copied`, `shared_failed`, `package_sent`,
    `results_fetched`, `transfer_failed`. After each of them call `next_output` until it
    returns None, then `deadline`.

    Args:
        job_id: A fresh id, ``job_`` and hexadecimal digits.
        package: Name of the package file.
        size: Its size in bytes.
    """

    def __init__(self, job_id: str, package: str, size: int) -> None:
        self.job_id = job_id
        self.state = ClientState.IDLE
        self.route: messages.Route | None = None
        self._package = package
        self._size = size
        self._plan = RoutePlan()
        self._shared: SharedRoute | None = None
        self._connected = True
        self._resumed_from = ClientState.IDLE
        self._is_known = False
        self._reports = ReportReader()
        self._retrieval = Retrieval(job_id)
        self._transfer: _Transfer | None = None
        self._cancellation: _Cancellation | None = None
        self._deadline: float | None = None
        self._outputs: deque[Output] = deque()

    # ------------------------------------------------------------------- commands

    def submit(self, plan: RoutePlan, now: float) -> None:
        """Start the job, unless it was cancelled or lost before.

        Raises:
            LocalProtocolError: If it has started already.
        """
        if self.state is not ClientState.ENDED:
            self._begin(plan)
            self._follow(plan.first(), now)

    def resume(
        self, plan: RoutePlan, now: float, *, route: messages.Route | None
    ) -> None:
        """Resume a job of an earlier process, or start it if the worker lacks it.

        Args:
            plan: As for `submit`.
            now: Seconds on the owner's clock.
            route: The route that the earlier process took; None if it took none yet.

        Raises:
            LocalProtocolError: If it has started already.
        """
        if self.state is not ClientState.ENDED:
            self._begin(plan)
            self.route = route
            self._ask_to_resume(now)

    def cancel(self, reason: str, now: float) -> None:
        """Stop the job; `JobEnded` follows when it has stopped.

        A job that does not depend on the worker ends at once. While the worker is
        stopping it, a second call changes nothing.

        Args:
            reason: Why, for people.
            now: Seconds on the owner's clock.
        """
        if self.state is ClientState.ENDED or self._is_stopping():
            return
        if self._cancellation is not None:
            reason = self._cancellation.reason
        self._abandon()
        match self.state:
            case ClientState.RESUMING if self._resumed_from is not ClientState.FETCHING:
                self._deadline = now + CANCEL_TIMEOUT
            case ClientState.SUBMITTING | ClientState.SENDING | ClientState.WAITING:
                self._ask_to_stop(now)
            case _:
                self._end("cancelled", reason)
        self._cancellation = _Cancellation(reason)

    # ----------------------------------------------------------- reports on effects

    def probe_written(self, path: str, content: str, now: float) -> None:
        """Handle a report: the probe file exists.

        Args:
            path: Where it is, beneath the root.
            content: BLAKE3 hash of its content, in hexadecimal digits.
            now: Seconds on the owner's clock.

        Raises:
            LocalProtocolError: If it was not asked for.
        """
        if not self._ignores_storage():
            self._sharing().probe_written(path, content, now)
            self._follow_shared(now)

    def package_copied(self, path: str, now: float) -> None:
        """Handle a report: the package is in the job directory.

        Args:
            path: Where it is, beneath the root.
            now: Seconds on the owner's clock.

        Raises:
            LocalProtocolError: If it was not asked for.
        """
        if not self._ignores_storage():
            self._sharing().package_copied(path, now)
            self._follow_shared(now)

    def shared_failed(self, reason: str, now: float) -> None:
        """Handle a report: the shared storage cannot be used from here.

        Args:
            reason: Why, a sentence without its full stop.
            now: Seconds on the owner's clock.

        Raises:
            LocalProtocolError: If the shared route is not being tried.
        """
        if not self._ignores_storage():
            self._sharing().storage_failed(reason)
            self._follow_shared(now)

    def package_sent(self) -> None:
        """Handle a report: the worker has the package and has verified it.

        Raises:
            LocalProtocolError: If it was not being sent.
        """
        self._report(ClientTrigger.SENT)

    def results_fetched(self) -> None:
        """Handle a report: the results are where the user asked for them.

        Raises:
            LocalProtocolError: If they were not asked for.
        """
        # Results that have arrived count, even if their transfer was stopped meanwhile.
        counts = self.state is ClientState.FETCHING
        if self._report(ClientTrigger.FETCHED, even_if_stopped=counts):
            self._confirm_results()

    def transfer_failed(self, reason: str) -> None:
        """Handle a report: the package was not sent, or the results not fetched.

        Raises:
            LocalProtocolError: If nothing was being transferred.
        """
        sending = self.state is ClientState.SENDING
        if not self._report(ClientTrigger.TRANSFER_FAILED):
            return
        if sending:
            self._send(messages.JobCancel(self.job_id))  # no package will follow
        if self.state is ClientState.ENDED:
            self._outputs.append(JobEnded("transfer_failed", reason))

    # ------------------------------------------------------------ inputs of the world

    @override
    def receive_message(
        self, message: messages.WorkerJobMessage | messages.Error, now: float
    ) -> None:
        """Handle a message of the worker; after the end of the link it is ignored."""
        kind = type(message)
        if not self._connected or self.state is ClientState.ENDED:
            return
        if isinstance(message, messages.Error):
            self._lose(f"the worker ended the connection: {message.reason}")
            return
        if isinstance(message, SharedAnswer) and self.route == "channel":
            return  # the answer to a request of the shared route, which was given up
        if isinstance(message, messages.JobMessage) and message.job_id != self.job_id:
            raise RemoteProtocolError(f"{kind.__name__} is for another job")
        if kind in IGNORED[self.state]:
            return
        target = accept_untrusted(TRANSITIONS, ACCEPTED, self.state, kind)
        if target is not self.state:
            self.state, self._deadline = target, None
        self._handle(message, now)

    @override
    def connection_lost(self, reason: str, now: float) -> None:
        """Stop the transfer, and ask for another link."""
        if self.state is ClientState.ENDED or not self._connected:
            return
        self._connected = False
        if self._needs_no_link():
            return
        self._stop_transfer()
        if not self._is_stopping():
            self._deadline = None
        self._outputs.append(Reconnect(reason))

    @override
    def connection_restored(self, now: float) -> None:
        """Continue over another link to the same worker.

        Raises:
            LocalProtocolError: If no link was lost, or the job has not been submitted.
        """
        if self.state is ClientState.ENDED or self._needs_no_link():
            return
        self._require_lost_link()
        if self.state is ClientState.IDLE:
            raise LocalProtocolError("the job has not been submitted")
        self._connected = True
        if self.state is ClientState.SHARING:
            self._sharing().connection_restored(now)
            self._follow_shared(now)
        else:
            self._ask_to_resume(now)

    def give_up(self, reason: str) -> None:
        """End the job, because no other link can be opened.

        Args:
            reason: Why, for people.

        Raises:
            LocalProtocolError: If no link was lost.
        """
        if self.state is ClientState.ENDED or self._needs_no_link():
            return
        self._require_lost_link()
        if self._is_stopping():
            self._end("cancelled", "the worker was not informed", confirmed=False)
        else:
            self._lose(reason)

    @override
    def handle_timeout(self, now: float) -> None:
        """End a job whose worker is silent; nothing happens before `deadline`."""
        deadline = self.deadline()
        if deadline is None or now < deadline:
            return
        if self.state is ClientState.SHARING:
            self._sharing().handle_timeout(now)
            self._follow_shared(now)
        elif self._is_stopping():
            self._end("cancelled", "the worker is silent", confirmed=False)
        elif self.state is ClientState.SUBMITTING:
            self._send(messages.JobCancel(self.job_id))
            self._end("lost", f"the worker did not answer for {REPLY_TIMEOUT:.0f} s")
        else:
            self._end("lost", f"the worker did not resume for {REPLY_TIMEOUT:.0f} s")

    @override
    def deadline(self) -> float | None:
        if self.state is ClientState.SHARING:
            return self._sharing().deadline() if self._connected else None
        return self._deadline

    @override
    def next_output(self) -> Output | None:
        return self._outputs.popleft() if self._outputs else None

    # ----------------------------------------------------------- the way to the worker

    def _begin(self, plan: RoutePlan) -> None:
        """Start over the first link, or over another one if that was lost before."""
        if self.state is not ClientState.IDLE:
            raise LocalProtocolError(f"the job was submitted: it is {self.state.name}")
        self._connected = True
        self._plan = plan

    def _follow(self, decision: TryShared | UseChannel | GiveUp, now: float) -> None:
        match decision:
            case TryShared():
                self._move(ClientTrigger.SHARED)
                self._shared = SharedRoute(self.job_id, self._package)
                self._follow_shared(now)
            case UseChannel(reason=reason):
                self._use_channel(reason)
                self._submit(now)
            case GiveUp(reason=reason):
                self._end("transfer_failed", reason)
            case _:
                assert_never(decision)

    def _follow_shared(self, now: float) -> None:
        """Run the outputs of the shared route, and leave it at its end."""
        shared = self._sharing()
        while (output := shared.next_output()) is not None:
            match output:
                case SendMessage(message=message):
                    self._send(message)
                case RouteChosen(route=route):
                    self.route = route
                    self._outputs.append(output)
                case _:
                    self._outputs.append(output)
        if shared.state is SharedState.STARTED:
            self._move(ClientTrigger.STARTED)
        elif shared.state is SharedState.FAILED:
            self._abandon()
            self._follow(self._plan.after_failure(shared.failure), now)

    def _use_channel(self, reason: str) -> None:
        if self.route != "channel":
            self.route = "channel"
            self._outputs.append(RouteChosen("channel", reason))

    def _submit(self, now: float) -> None:
        submission = messages.Submission(self._package, self._size)
        self._send(messages.JobSubmit(self.job_id, submission))
        self._move(
            ClientTrigger.CHANNEL, now + REPLY_TIMEOUT if self._connected else None
        )

    def _send_package(self) -> None:
        self._outputs.append(SendPackage(PACKAGE_TRANSFER_ID))
        self._transfer = _Transfer()

    # --------------------------------------------------------- messages of the worker

    def _handle(self, message: messages.WorkerJobMessage, now: float) -> None:
        """Handle a message that led to the present state."""
        if isinstance(message, messages.JobReport):
            self._handle_report(message)
            return
        if isinstance(message, SharedAnswer):
            self._sharing().receive_message(message, now)
            self._follow_shared(now)
            return
        match message:
            case messages.JobAccepted():
                self._send_package()
            case messages.JobRejected():
                self._outputs.append(ending_of(message, self._cancelled_for()))
            case messages.ResumeAccepted(progress=progress):
                self._resumed(progress, now)
            case messages.JobUnknown():
                self._start_again(now)
            case messages.JobResults(page=page):
                self._retrieval.add_untrusted(page)
            case messages.JobComplete() | messages.JobFailed():
                self._fetch(ending_of(message, self._cancelled_for()))
            case _:
                assert_never(message)

    def _handle_report(self, report: messages.JobReport) -> None:
        if (event := self._reports.read(report)) is not None:
            self._outputs.append(event)
        if isinstance(report, messages.JobState):
            self._is_known = True
            has_package = report.progress.state in _HAS_PACKAGE
            if self.state is ClientState.SENDING and has_package:
                # The worker may be quicker than the report that all is sent.
                self._move(ClientTrigger.SENT)

    def _ask_to_resume(self, now: float) -> None:
        deadline = self._deadline if self._is_stopping() else now + REPLY_TIMEOUT
        self._retrieval.list_again()
        point = messages.ResumePoint(self._reports.next_sequence)
        self._send(messages.JobResume(self.job_id, point))
        if self.state is not ClientState.RESUMING:
            self._resumed_from = self.state
        self._move(ClientTrigger.RESUME, deadline)

    def _resumed(self, progress: messages.JobProgress, now: float) -> None:
        """Continue a job that the worker has, from its state there."""
        self._is_known = self._is_known or progress.state != "RECEIVING"
        if self.route is None or progress.state == "RECEIVING":
            self._use_channel("the worker has the job already")
        if self._is_stopping():
            self._ask_to_stop(now)
            return
        if (event := self._reports.read_progress(progress)) is not None:
            self._outputs.append(event)
        if progress.state == "RECEIVING":
            self._send_package()
            self._move(ClientTrigger.SEND)
        else:
            self._move(ClientTrigger.CONTINUE)

    def _start_again(self, now: float) -> None:
        """Submit a job that the worker lacks, unless it had the job before."""
        announced = self._shared if self._may_announce() else None
        if self._cancellation is not None and not self._cancellation.stopped:
            if announced is not None:
                self._outputs.append(DiscardShared(self.job_id))
            self._end("cancelled", self._cancellation.reason)
            return
        match self._resumed_from:
            case ClientState.IDLE:
                self.route = None
                self._follow(self._plan.first(), now)
            case ClientState.SUBMITTING | ClientState.SENDING:
                self._submit(now)
            case ClientState.WAITING if announced is not None:
                self._move(ClientTrigger.SHARED)
                announced.announce(now)
                self._follow_shared(now)
            case _:
                self._end("lost", "the worker no longer has the job")

    def _may_announce(self) -> bool:
        """Return whether a worker without the job may have missed its start."""
        return self.route == "shared" and not self._is_known

    # ------------------------------------------------------------------------ the end

    def _fetch(self, ending: JobEnded) -> None:
        """End the job, after fetching its results."""
        self._abandon()
        if self._cancellation is not None:
            self._cancellation = _Cancellation(self._cancellation.reason, stopped=True)
        fetch = self._retrieval.begin(ending, self.route)
        if fetch is not None:
            self._outputs.append(fetch)
            self._transfer = _Transfer()
        else:
            self._move(ClientTrigger.END)
            self._confirm_results()

    def _confirm_results(self) -> None:
        """Release the worker, which needs no copy of the results, and end the job."""
        self._send(messages.ResultsReceived(self.job_id))
        self._outputs.append(self._retrieval.ending)

    def _ask_to_stop(self, now: float) -> None:
        self._send(messages.JobCancel(self.job_id))
        self._move(ClientTrigger.CANCEL, now + CANCEL_TIMEOUT)

    def _lose(self, reason: str) -> None:
        self._abandon()
        self._end("lost", reason)

    def _abandon(self) -> None:
        """Stop the effect that is under way, and discard a useless copy."""
        if self._shared is not None and self._shared.state is not SharedState.STARTED:
            self._shared = None
            self._outputs.append(DiscardShared(self.job_id))
        self._stop_transfer()

    def _stop_transfer(self) -> None:
        if self._is_transferring():
            self._transfer = _Transfer(stopped=True)
            self._outputs.append(StopTransfer())

    def _end(
        self, outcome: Outcome, reason: str = "", *, confirmed: bool = True
    ) -> None:
        self._move(ClientTrigger.END)
        self._outputs.append(JobEnded(outcome, reason, confirmed=confirmed))

    # ------------------------------------------------------------------ small helpers

    def _report(self, trigger: ClientTrigger, *, even_if_stopped: bool = False) -> bool:
        """Change the state for a report on a transfer; return False if it is ignored.

        Raises:
            LocalProtocolError: If nothing was being transferred.
        """
        if trigger in IGNORED[self.state]:
            return False
        if self._transfer is None:
            raise LocalProtocolError(f"no transfer is under way in {self.state.name}")
        if self._transfer.stopped and not even_if_stopped:
            return False
        self._move(trigger)
        self._transfer = None
        return True

    def _move(self, trigger: ClientTrigger, deadline: float | None = None) -> None:
        self.state = move(TRANSITIONS, self.state, trigger)
        self._deadline = deadline

    def _send(self, message: messages.ClientJobMessage) -> None:
        if self._connected:
            self._outputs.append(SendMessage(message))

    def _sharing(self) -> SharedRoute:
        """Return the shared route, if it is being tried."""
        if self._shared is None or self.state is not ClientState.SHARING:
            raise LocalProtocolError(
                f"the shared route is not tried in {self.state.name}"
            )
        return self._shared

    def _ignores_storage(self) -> bool:
        """Return whether a report on the shared storage comes too late to matter."""
        return ClientTrigger.SHARED_REPORT in IGNORED[self.state]

    def _cancelled_for(self) -> str | None:
        return None if self._cancellation is None else self._cancellation.reason

    def _is_stopping(self) -> bool:
        """Return whether the worker has to stop the job, and has not confirmed it."""
        return self._cancellation is not None and not self._cancellation.stopped

    def _is_transferring(self) -> bool:
        return self._transfer is not None and not self._transfer.stopped

    def _needs_no_link(self) -> bool:
        """Return whether results are being copied while the worker is not connected."""
        fetching = self.state is ClientState.FETCHING and self.route == "shared"
        return fetching and not self._connected

    def _require_lost_link(self) -> None:
        if self._connected:
            raise LocalProtocolError(f"no link was lost in {self.state.name}")
