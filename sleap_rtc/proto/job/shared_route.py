"""The client's way to start a job over shared storage.

A probe file shows whether the worker mounts the same storage. If it does, the package
is copied there, and the worker checks the path of the package and that of the models.
"""

from collections import deque
from enum import Enum, auto
from typing import assert_never

from typing_extensions import override

from sleap_rtc.proto import messages
from sleap_rtc.proto.job.client_outputs import (
    CopyPackage,
    PrepareShared,
    RouteChosen,
    SendMessage,
)
from sleap_rtc.proto.job.paths import JobPaths
from sleap_rtc.proto.machine import Table, TimedMachine, move, move_untrusted

PROBE_TIMEOUT = 30.0
"""Seconds for the worker to read the probe file: a slow mount takes several."""

PATH_TIMEOUT = 30.0
"""Seconds for the worker to check one path."""

SharedAnswer = (
    messages.MountProbed
    | messages.MountProbeFailed
    | messages.PathValidated
    | messages.PathError
)

SharedOutput = SendMessage | PrepareShared | CopyPackage | RouteChosen


class SharedState(Enum):
    """Step on the way to a start over shared storage."""

    PREPARING = auto()  #        the client makes the directory and the probe file
    PROBING = auto()  #          the worker looks for the probe file
    COPYING = auto()  #          the client copies the package
    CHECKING_INPUT = auto()  #   the worker checks the path of the package
    CHECKING_OUTPUT = auto()  #  the worker makes the folder for the models
    STARTED = auto()
    FAILED = auto()


class SharedTrigger(Enum):
    """Causes of a transition besides the messages of the worker."""

    PROBE_WRITTEN = auto()  #   reports of the owner
    COPIED = auto()
    STORAGE_FAILED = auto()
    OTHER_STORAGE = auto()  #   the worker found another probe file
    INPUT_VALID = auto()  #     the worker validated the path of the package
    OUTPUT_VALID = auto()  #    the worker validated the path of the models
    ANNOUNCE = auto()  #        the package is announced again
    TIMEOUT = auto()


_M, _S, _T = messages, SharedState, SharedTrigger

TRANSITIONS: Table[SharedState] = {
    _S.PREPARING: {_T.PROBE_WRITTEN: _S.PROBING, _T.STORAGE_FAILED: _S.FAILED},
    _S.PROBING: {
        _M.MountProbed: _S.COPYING,
        _T.OTHER_STORAGE: _S.FAILED,
        _M.MountProbeFailed: _S.FAILED,
        _T.TIMEOUT: _S.FAILED,
    },
    _S.COPYING: {_T.COPIED: _S.CHECKING_INPUT, _T.STORAGE_FAILED: _S.FAILED},
    _S.CHECKING_INPUT: {
        _T.INPUT_VALID: _S.CHECKING_OUTPUT,
        _M.PathError: _S.FAILED,
        _T.TIMEOUT: _S.FAILED,
        _T.ANNOUNCE: _S.CHECKING_INPUT,
    },
    _S.CHECKING_OUTPUT: {
        _T.OUTPUT_VALID: _S.STARTED,
        _M.PathError: _S.FAILED,
        _T.TIMEOUT: _S.FAILED,
        _T.ANNOUNCE: _S.CHECKING_INPUT,
    },
    _S.STARTED: {_T.ANNOUNCE: _S.CHECKING_INPUT},  # its start may have been lost
    _S.FAILED: {},
}


class SharedRoute(TimedMachine[SharedAnswer, SharedOutput]):
    """Asks for a start over shared storage, until it is `STARTED` or has `FAILED`.

    While no link exists, the owner drops messages and does not call `handle_timeout`.

    Args:
        job_id: The id of the job.
        package: Name of the package file.
    """

    def __init__(self, job_id: str, package: str) -> None:
        self.state = SharedState.PREPARING
        self.failure = ""
        """Reason why the route failed, a sentence without its full stop."""

        self._paths = JobPaths(job_id)
        self._package = package
        self._probe: messages.MountProbe | None = None
        self._probe_content = ""
        self._copied_path = ""
        self._deadline: float | None = None
        self._outputs: deque[SharedOutput] = deque([PrepareShared(job_id)])

    @override
    def receive_message(self, message: SharedAnswer, now: float) -> None:
        match message:
            case messages.MountProbed(content=content):
                if content == self._probe_content:
                    self._move_untrusted(messages.MountProbed)
                    reason = "both sides see the same storage"
                    self._outputs.append(RouteChosen("shared", reason))
                    path = self._paths.file(self._package)
                    self._outputs.append(CopyPackage(path))
                else:
                    self._move_untrusted(_T.OTHER_STORAGE)
                    self.failure = "The worker mounts other storage"
            case messages.MountProbeFailed(reason=reason):
                self._move_untrusted(messages.MountProbeFailed)
                self.failure = f"The worker does not see this storage: {reason}"
            case messages.PathValidated(which="input"):
                self._move_untrusted(_T.INPUT_VALID)
                self._send(messages.SharedOutputPath(self._paths.models))
                self._deadline = now + PATH_TIMEOUT
            case messages.PathValidated():
                self._move_untrusted(_T.OUTPUT_VALID)
                self._send(messages.SharedStorageJob())
            case messages.PathError(reason=reason):
                self._move_untrusted(messages.PathError)
                self.failure = f"The worker refused the path: {reason}"
            case _:
                assert_never(message)

    def probe_written(self, path: str, content: str, now: float) -> None:
        """Ask the worker for the content of the probe file.

        Args:
            path: Where it is, beneath the root.
            content: BLAKE3 hash of its content, in hexadecimal digits.
            now: Seconds on the owner's clock.

        Raises:
            LocalProtocolError: If it was not asked for.
        """
        self._move(_T.PROBE_WRITTEN)
        self._probe = messages.MountProbe(self._paths.job_id, path)
        self._probe_content = content
        self._ask_for_probe(self._probe, now)

    def package_copied(self, path: str, now: float) -> None:
        """Announce the package that was copied to this path beneath the root.

        Raises:
            LocalProtocolError: If it was not asked for.
        """
        self._move(_T.COPIED)
        self._copied_path = path
        self._ask_for_paths(now)

    def storage_failed(self, reason: str) -> None:
        """Record that the shared storage cannot be used from here.

        Raises:
            LocalProtocolError: If neither the probe nor a copy was asked for.
        """
        self._move(_T.STORAGE_FAILED)
        self.failure = reason

    def announce(self, now: float) -> None:
        """Announce the package again: the worker does not have the job.

        Raises:
            LocalProtocolError: If it was not announced before.
        """
        self._move(_T.ANNOUNCE)
        self._ask_for_paths(now)

    def connection_restored(self, now: float) -> None:
        """Repeat the unanswered request over the new link."""
        match self.state:
            case SharedState.PROBING if self._probe is not None:
                self._ask_for_probe(self._probe, now)
            case SharedState.CHECKING_INPUT | SharedState.CHECKING_OUTPUT:
                self.announce(now)
            case _:
                pass  # an effect is under way; its report goes over the new link

    @override
    def handle_timeout(self, now: float) -> None:
        """Fail if the worker has not answered; nothing happens before `deadline`."""
        if self._deadline is None or now < self._deadline:
            return
        probing = self.state is SharedState.PROBING
        self._move(_T.TIMEOUT)
        self.failure = (
            "The worker did not find the probe file in time"
            if probing
            else "The worker did not check the paths in time"
        )

    @override
    def deadline(self) -> float | None:
        return self._deadline

    @override
    def next_output(self) -> SharedOutput | None:
        return self._outputs.popleft() if self._outputs else None

    def _ask_for_probe(self, probe: messages.MountProbe, now: float) -> None:
        self._send(probe)
        self._deadline = now + PROBE_TIMEOUT

    def _ask_for_paths(self, now: float) -> None:
        self._send(messages.JobIdentity(self._paths.job_id))
        self._send(messages.SharedInputPath(self._copied_path))
        self._deadline = now + PATH_TIMEOUT

    def _send(self, message: messages.ClientJobMessage) -> None:
        self._outputs.append(SendMessage(message))

    def _move(self, trigger: SharedTrigger) -> None:
        self.state = move(TRANSITIONS, self.state, trigger)
        self._deadline = None

    def _move_untrusted(self, trigger: SharedTrigger | type[SharedAnswer]) -> None:
        self.state = move_untrusted(TRANSITIONS, self.state, trigger)
        self._deadline = None
