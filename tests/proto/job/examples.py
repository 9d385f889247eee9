"""One message of every kind, for the tests of both sides of a job."""

import copy
from enum import Enum
from typing import Any, Protocol, TypeVar

from sleap_rtc.proto import messages

OutputT = TypeVar("OutputT", covariant=True)

JOB = "job_f3a8b2c1"
OTHER_JOB = "job_00000000"
CONTENT = "ab" * 32
NAME = "training.zip"
SIZE = 1000

_FILE = messages.OfferedFile(NAME, SIZE, 4096)
RESULT = messages.ResultFile("models/best.ckpt", 7)

_ALL: list[messages.Message] = [
    messages.Auth("0" * 32, CONTENT),
    messages.Hello(messages.Greeting(1, "1.0", "worker")),
    messages.Error("no more room"),
    messages.JobIdentity(JOB),
    messages.MountProbe(JOB, f"jobs/{JOB}/.probe"),
    messages.MountProbed(JOB, CONTENT),
    messages.MountProbeFailed(JOB, "not there"),
    messages.SharedInputPath(f"jobs/{JOB}/{NAME}"),
    messages.SharedOutputPath(f"jobs/{JOB}/models"),
    messages.PathValidated("input"),
    messages.PathError("not there"),
    messages.SharedStorageJob(),
    messages.JobResume(JOB, messages.ResumePoint(3)),
    messages.ResumeAccepted(JOB, messages.JobProgress("RUNNING")),
    messages.JobUnknown(JOB),
    messages.JobSubmit(JOB, messages.Submission(NAME, SIZE)),
    messages.JobAccepted(JOB),
    messages.JobRejected(JOB, "disk full"),
    messages.FileOffer(0, _FILE),
    messages.FileRequest(1, JOB, RESULT.path),
    messages.ChunkGrant(0, 0, 1),
    messages.FileReceived(0, CONTENT),
    messages.FileVerified(0),
    messages.FileError(0, "disk full"),
    messages.JobState(JOB, messages.JobProgress("RUNNING")),
    messages.JobLog(JOB, 0, 0, "epoch 1"),
    messages.JobCancel(JOB),
    messages.TrainingComplete(),
    messages.InferenceComplete(),
    messages.JobResults(JOB, messages.ResultPage((RESULT,))),
    messages.JobComplete(JOB, "models"),
    messages.JobFailed(JOB, "exit status 1"),
    messages.ResultsReceived(JOB),
    messages.Unknown("NEWS"),
]

EXAMPLES: dict[type[messages.Message], messages.Message] = {
    type(each): each for each in _ALL
}


def snapshot(machine: object) -> Any:
    """Return all state of a machine, outputs included, to compare it later."""
    if hasattr(machine, "__dict__") and not isinstance(machine, Enum | type):
        return {key: snapshot(value) for key, value in vars(machine).items()}
    return copy.copy(machine)


class Draining(Protocol[OutputT]):
    """A machine whose outputs a test looks at."""

    def next_output(self) -> OutputT | None: ...


def drain(machine: Draining[OutputT]) -> list[OutputT]:
    """Return all outputs that wait."""
    outputs: list[OutputT] = []
    while (output := machine.next_output()) is not None:
        outputs.append(output)
    return outputs
