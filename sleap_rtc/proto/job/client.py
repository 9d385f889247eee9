"""One job as the client sees it: which route, what to send, what to wait for."""

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
    Reconnect,
    RouteChosen,
    SendMessage,
    SendPackage,
    StageComplete,
    StateChanged,
    StopSending,
)
from sleap_rtc.proto.job.client_steps import (
    CANCEL_TIMEOUT,
    PACKAGE_TRANSFER_ID,
    PROBE_TIMEOUT,
    REPLY_TIMEOUT,
    JobSteps,
)
from sleap_rtc.proto.job.client_table import EXPECTED, STALE, State
from sleap_rtc.proto.route.routes import RoutePreference, first_route

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
    "Reconnect",
    "RouteChosen",
    "SendMessage",
    "SendPackage",
    "StageComplete",
    "State",
    "StateChanged",
    "StopSending",
]


class ClientJob(JobSteps):
    """One job, from the decision on a route to the results.

    Inputs from the world: `receive_message`, `handle_timeout`, `connection_lost`, and
    then `link_restored` or `give_up`. Commands: `submit` once, or `resume` if an
    earlier process submitted the job, then `cancel` at any time. Reports on effects:
    `probe_written`, `package_copied`, `shared_failed`, `package_sent`,
    `results_fetched`, `transfer_failed`. After each of them call `next_output` until it
    gives None, then look at `deadline`.

    Args:
        job_id: A fresh id, ``job_`` and hexadecimal digits.
        package: Name of the package file.
        size: Its size in bytes.
    """

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
        self._decide(preference, client_root, worker_root)
        self._take(self._decision, now)

    def resume(
        self,
        preference: RoutePreference,
        now: float,
        *,
        client_root: bool,
        worker_root: bool,
        route: m.Route | None,
    ) -> None:
        """Go on with a job that an earlier process submitted, or start it if it is not.

        Args:
            preference: As in `submit`, as are the next three.
            now: Seconds on the owner's clock.
            client_root: Whether shared storage is configured here.
            worker_root: Whether the worker's greeting says so of itself.
            route: The route that the earlier process took; None if it took none yet.

        Raises:
            LocalProtocolError: If it has started already.
        """
        if self.state is State.ENDED:
            return
        self._decide(preference, client_root, worker_root)
        self.route = route
        self._ask_to_resume(now)

    def _decide(
        self, preference: RoutePreference, client_root: bool, worker_root: bool
    ) -> None:
        """Decide on the first route, over the first link or another one."""
        self._require(State.IDLE)
        self._connected = True
        self._preference = preference
        self._decision = first_route(
            preference, client_root=client_root, worker_root=worker_root
        )

    def cancel(self, reason: str, now: float) -> None:
        """Stop the job; the last event says when it has stopped.

        A job that does not depend on the worker any more, or not yet, ends at once.
        While the worker is stopping it a second call changes nothing.

        Args:
            reason: Why, for people.
            now: Seconds on the owner's clock.
        """
        if self.state is State.ENDED or self._is_cancelling():
            return
        self._cancel_reason = self._cancel_reason or reason
        self._is_cancelled = True
        self._abandon()
        match self.state:
            case State.RESUMING if self._resumed_from is not State.FETCHING:
                self._resumed_from = State.CANCELLING
                self._deadline = now + CANCEL_TIMEOUT
            case State.SUBMITTING | State.SENDING | State.WAITING:
                self._send(m.JobCancel(self.job_id))
                self._enter(State.CANCELLING, now + CANCEL_TIMEOUT)
            case _:
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
        self._probe_path, self._probe_content = path, content
        self._probe(now)

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
        self._copied_path = path
        self._announce(now)

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
            case State.SENDING if self._transferring:
                self._transferring = False
                self._enter(State.WAITING)
            case State.WAITING if self._transferring:
                self._transferring = False
            case _ if self._was_stopped:
                pass  # the job or the loss of the link was quicker than this report
            case _:
                raise LocalProtocolError(f"no package is sent while {self._doing()}")

    def results_fetched(self) -> None:
        """The results are where the user wants them.

        Raises:
            LocalProtocolError: If nobody asked for them.
        """
        if self._is_over():
            return
        if self._was_stopped and self.state is not State.FETCHING:
            return  # they are asked for once more
        self._require(State.FETCHING)
        self._transferring = False
        self._send(m.ResultsReceived(self.job_id))
        self._end_as(self._ending)

    def transfer_failed(self, reason: str) -> None:
        """The package could not be sent, or the results could not be fetched.

        Raises:
            LocalProtocolError: If nothing was being transferred.
        """
        if self._is_over():
            return
        if not self._transferring:
            if self._was_stopped:
                return  # it had failed already, and is tried again
            raise LocalProtocolError(f"no transfer is under way while {self._doing()}")
        self._transferring = False
        if self.state is State.SENDING:
            self._send(m.JobCancel(self.job_id))  # nothing will follow
        if self.state is not State.WAITING:
            self._end("transfer_failed", reason)
        # Otherwise the worker has said that it has the package, and that counts.

    # ------------------------------------------------------------ inputs of the world

    def receive_message(self, message: m.Message, now: float) -> None:
        """Take a message of the worker; after the end of the link it changes nothing.

        Raises:
            RemoteProtocolError: If it does not belong here; the state is unchanged.
        """
        if self.state is State.ENDED or not self._connected:
            return
        if isinstance(message, m.Unknown):
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
        """The link is gone; what needs none goes on meanwhile.

        Args:
            reason: Why, for people.
            now: Not used, but part of every machine's contract.
        """
        del now
        if self.state is State.ENDED or not self._connected:
            return
        self._connected = False
        if self._needs_no_link():
            return
        self._stop_transfer()
        if not self._is_cancelling():
            self._deadline = None
        self._put(Reconnect(reason))

    def link_restored(self, now: float) -> None:
        """There is another link to the same worker, and both sides have greeted.

        Raises:
            LocalProtocolError: If no link was lost, or the job has not been submitted.
        """
        if self.state is State.ENDED or self._needs_no_link():
            return
        self._require_lost_link()
        if self.state is State.IDLE:
            raise LocalProtocolError("the job has not been submitted")
        self._connected = True
        match self.state:
            case State.PREPARING | State.COPYING:
                pass  # what is under way tells the worker when it is ready
            case State.PROBING:
                self._probe(now)
            case State.CHECKING_INPUT | State.CHECKING_OUTPUT:
                self._announce(now)
            case _:
                self._ask_to_resume(now)

    def give_up(self, reason: str) -> None:
        """There will be no other link.

        Args:
            reason: Why, for people.

        Raises:
            LocalProtocolError: If no link was lost.
        """
        if self.state is State.ENDED or self._needs_no_link():
            return
        self._require_lost_link()
        if self._is_cancelling():
            self._end("cancelled", "the worker was not told", confirmed=False)
        else:
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
                self._send(m.JobCancel(self.job_id))
                self._end(
                    "lost", f"the worker did not answer for {REPLY_TIMEOUT:.0f} s"
                )
            case _ if self._is_cancelling():
                self._end("cancelled", "the worker is silent", confirmed=False)
            case State.RESUMING:
                self._end(
                    "lost", f"the worker did not resume for {REPLY_TIMEOUT:.0f} s"
                )
            case _:
                self._deadline = None

    def deadline(self) -> float | None:
        """When `handle_timeout` wants to be called, if ever."""
        return self._deadline

    def next_output(self) -> Output | None:
        """Give the next thing to do or to show."""
        return self._outputs.popleft() if self._outputs else None
