"""One message of every kind, for the tests of both sides of a job."""

import copy
from typing import Any

from sleap_rtc.proto import messages as m
from sleap_rtc.proto.job.log_history import LogHistory

JOB = "job_f3a8b2c1"
OTHER_JOB = "job_00000000"
CONTENT = "ab" * 32
NAME = "training.zip"
SIZE = 1000

_FILE = m.OfferedFile(NAME, SIZE, 4096)
RESULT = m.ResultFile("models/best.ckpt", 7)

_ALL: list[m.Message] = [
    m.Auth("0" * 32, CONTENT),
    m.Hello(m.Greeting(1, "1.0", "worker")),
    m.Error("no more room"),
    m.JobIdentity(JOB),
    m.MountProbe(JOB, f"jobs/{JOB}/.probe"),
    m.MountProbed(JOB, CONTENT),
    m.MountProbeFailed(JOB, "not there"),
    m.SharedInputPath(f"jobs/{JOB}/{NAME}"),
    m.SharedOutputPath(f"jobs/{JOB}/models"),
    m.PathValidated("input"),
    m.PathError("not there"),
    m.SharedStorageJob(),
    m.JobResume(JOB, m.ResumePoint(3)),
    m.JobResumed(JOB, m.JobProgress("RUNNING")),
    m.JobUnknown(JOB),
    m.JobSubmit(JOB, m.Submission(NAME, SIZE)),
    m.JobAccepted(JOB),
    m.JobRejected(JOB, "disk full"),
    m.FileOffer(0, _FILE),
    m.FileRequest(1, JOB, RESULT.path),
    m.ChunkGrant(0, 0, 1),
    m.FileReceived(0, CONTENT),
    m.FileVerified(0),
    m.FileError(0, "disk full"),
    m.JobState(JOB, m.JobProgress("RUNNING")),
    m.JobLog(JOB, 0, 0, "epoch 1"),
    m.JobCancel(JOB),
    m.TrainingComplete(),
    m.InferenceComplete(),
    m.JobResults(JOB, m.ResultPage((RESULT,))),
    m.JobComplete(JOB, "models"),
    m.JobFailed(JOB, "exit status 1"),
    m.ResultsReceived(JOB),
    m.Unknown("NEWS"),
]

EXAMPLES: dict[type[m.Message], m.Message] = {type(each): each for each in _ALL}


def snapshot(machine: object) -> dict[str, Any]:
    """Everything that a machine knows, outputs included, to compare later."""
    return {
        key: snapshot(value) if isinstance(value, LogHistory) else copy.copy(value)
        for key, value in vars(machine).items()
    }
