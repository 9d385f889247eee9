"""The reports of a worker on a running job, as events for the user."""

from typing import assert_never

import msgspec

from sleap_rtc.proto import messages
from sleap_rtc.proto.job.script import ScriptKind


class StateChanged(msgspec.Struct, frozen=True):
    """Event: the state of the job at the worker changed."""

    progress: messages.JobProgress


class LinePrinted(msgspec.Struct, frozen=True):
    """Event: a line of the job's output, or a new version of an earlier one."""

    line: int
    text: str


class StageComplete(msgspec.Struct, frozen=True):
    """Event: all commands of one kind have succeeded."""

    stage: ScriptKind


ReportEvent = StateChanged | LinePrinted | StageComplete


class ReportReader:
    """Turns reports into events; a worker that resumes a job repeats some of them."""

    def __init__(self) -> None:
        self.next_sequence = 0
        """The first `JobLog` that has not been seen."""

        self._progress: messages.JobProgress | None = None
        self._stages: set[ScriptKind] = set()

    def read(self, report: messages.JobReport) -> ReportEvent | None:
        """Return the event for a report; None if it only repeats an earlier one."""
        match report:
            case messages.JobState(progress=progress):
                return self.read_progress(progress)
            case messages.JobLog(sequence=sequence, line=line, text=text):
                if sequence < self.next_sequence:
                    return None
                self.next_sequence = sequence + 1
                return LinePrinted(line, text)
            case messages.TrainingComplete():
                return self._read_stage("training")
            case messages.InferenceComplete():
                return self._read_stage("inference")
            case _:
                assert_never(report)

    def read_progress(self, progress: messages.JobProgress) -> StateChanged | None:
        """Return the event for a progress; None if it is the same as before."""
        if progress == self._progress:
            return None
        self._progress = progress
        return StateChanged(progress)

    def _read_stage(self, stage: ScriptKind) -> StageComplete | None:
        if stage in self._stages:
            return None
        self._stages.add(stage)
        return StageComplete(stage)
