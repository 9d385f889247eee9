"""The worker's side of a start over shared storage.

The client may ask for a probe file to be read. Then it names its job, and asks the
worker to check the paths of the package and of the models, without waiting for the
answers.
"""

from collections import deque
from enum import Enum, auto
from typing import assert_never

from typing_extensions import override

from sleap_rtc.proto import messages
from sleap_rtc.proto.errors import RemoteProtocolError
from sleap_rtc.proto.job.results import clean_text
from sleap_rtc.proto.job.worker_outputs import (
    CheckInput,
    MakeOutput,
    ReadProbe,
    SendMessage,
)
from sleap_rtc.proto.machine import Ignored, Machine, Table, move, move_untrusted

SharedRequest = (
    messages.MountProbe
    | messages.JobIdentity
    | messages.SharedInputPath
    | messages.SharedOutputPath
    | messages.SharedStorageJob
)

IntakeOutput = SendMessage | ReadProbe | CheckInput | MakeOutput


class IntakeState(Enum):
    """Step on the way to a start over shared storage."""

    NEW = auto()
    PROBING = auto()  #         the owner reads the probe file
    IDENTIFIED = auto()
    CHECKING_INPUT = auto()  #  the owner looks at the package
    INPUT_VALID = auto()
    MAKING_OUTPUT = auto()  #   the owner makes the folder for the models
    READY = auto()
    REFUSED = auto()  #         a path was refused; another one may follow
    STARTED = auto()


class Report(Enum):
    """Reports of the owner on the effects that it ran."""

    PROBED = auto()
    INPUT_VALID = auto()
    OUTPUT_MADE = auto()
    PATH_REFUSED = auto()


_M, _S, _R = messages, IntakeState, Report

TRANSITIONS: Table[IntakeState] = {
    _S.NEW: {_M.MountProbe: _S.PROBING, _M.JobIdentity: _S.IDENTIFIED},
    _S.PROBING: {_R.PROBED: _S.NEW},
    _S.IDENTIFIED: {_M.SharedInputPath: _S.CHECKING_INPUT},
    _S.CHECKING_INPUT: {
        _R.INPUT_VALID: _S.INPUT_VALID,
        _R.PATH_REFUSED: _S.REFUSED,
    },
    _S.INPUT_VALID: {_M.SharedOutputPath: _S.MAKING_OUTPUT},
    _S.MAKING_OUTPUT: {_R.OUTPUT_MADE: _S.READY, _R.PATH_REFUSED: _S.REFUSED},
    _S.READY: {_M.SharedStorageJob: _S.STARTED},
    _S.REFUSED: {_M.SharedInputPath: _S.CHECKING_INPUT},
    _S.STARTED: {},
}

EARLY: dict[IntakeState, tuple[type[SharedRequest], ...]] = {
    _S.PROBING: (
        _M.JobIdentity,
        _M.SharedInputPath,
        _M.SharedOutputPath,
        _M.SharedStorageJob,
    ),
    _S.CHECKING_INPUT: (_M.SharedOutputPath, _M.SharedStorageJob),
    _S.MAKING_OUTPUT: (_M.SharedStorageJob,),
}
"""The requests that a state accepts and keeps until the owner has reported, in the
order in which they must come."""

IGNORED: Ignored[IntakeState] = {
    **dict.fromkeys(IntakeState, frozenset()),
    _S.REFUSED: frozenset({_M.SharedOutputPath, _M.SharedStorageJob}),
}
"""The requests that the client sent before it saw the refusal."""


class SharedIntake(Machine[SharedRequest, IntakeOutput]):
    """Checks the requests of a client, until the job is `STARTED`."""

    def __init__(self) -> None:
        self.state = IntakeState.NEW
        self.package = ""
        """Path of the package, once it was named."""

        self.output_path = ""
        """Path of the folder for the models, once it was named."""

        self._job_id = ""
        self._early: deque[SharedRequest] = deque()
        self._outputs: deque[IntakeOutput] = deque()

    @override
    def receive_message(self, message: SharedRequest, now: float) -> None:
        kind = type(message)
        if kind in IGNORED[self.state]:
            return
        expected = EARLY.get(self.state)
        if expected is None:
            self.state = move_untrusted(TRANSITIONS, self.state, kind)
            self._handle(message)
        elif kind in expected[len(self._early) :][:1]:
            self._early.append(message)
        else:
            raise RemoteProtocolError(f"{kind.__name__} came out of turn")

    def probe_read(self, content: str) -> None:
        """Handle a report: the BLAKE3 hash (hexadecimal) of the probe file."""
        self._report(Report.PROBED, messages.MountProbed(self._job_id, content))

    def probe_failed(self, reason: str) -> None:
        """Handle a report: the probe file cannot be read."""
        answer = messages.MountProbeFailed(self._job_id, clean_text(reason))
        self._report(Report.PROBED, answer)

    def input_valid(self) -> None:
        """Handle a report: the package exists beneath the root, and can be read."""
        self._report(Report.INPUT_VALID, messages.PathValidated("input"))

    def output_made(self) -> None:
        """Handle a report: the folder for the models exists beneath the root."""
        self._report(Report.OUTPUT_MADE, messages.PathValidated("output"))

    def path_refused(self, reason: str) -> None:
        """Handle a report: the path in question is not acceptable."""
        move(TRANSITIONS, self.state, Report.PATH_REFUSED)
        self._early.clear()
        self._report(Report.PATH_REFUSED, messages.PathError(clean_text(reason)))

    @override
    def next_output(self) -> IntakeOutput | None:
        return self._outputs.popleft() if self._outputs else None

    def _report(self, report: Report, answer: messages.WorkerJobMessage) -> None:
        self.state = move(TRANSITIONS, self.state, report)
        self._outputs.append(SendMessage(answer))
        while self._early and self.state not in EARLY:
            message = self._early.popleft()
            self.state = move(TRANSITIONS, self.state, type(message))
            self._handle(message)

    def _handle(self, message: SharedRequest) -> None:
        match message:
            case messages.MountProbe(job_id=job_id, path=path):
                self._job_id = job_id
                self._outputs.append(ReadProbe(path))
            case messages.JobIdentity(job_id=job_id):
                self._job_id = job_id
            case messages.SharedInputPath(path=path):
                self.package = path
                self._outputs.append(CheckInput(path))
            case messages.SharedOutputPath(path=path):
                self.output_path = path
                if _is_beside(path, self.package):
                    self._outputs.append(MakeOutput(path))
                else:
                    self.path_refused(
                        f"{path} is not in the job directory, beside the package"
                    )
            case messages.SharedStorageJob():
                pass
            case _:
                assert_never(message)


def _is_beside(path: str, package: str) -> bool:
    """Return True for the directory of the package, and for a path directly in it."""
    directory = _parent(package)
    return directory in (path, _parent(path))


def _parent(path: str) -> str:
    return path.rpartition("/")[0]
