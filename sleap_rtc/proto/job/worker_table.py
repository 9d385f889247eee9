"""The states of a worker's job, and the transitions between them."""

from enum import Enum, auto
from typing import get_args

from sleap_rtc.proto import messages
from sleap_rtc.proto.job.shared_intake import SharedRequest
from sleap_rtc.proto.machine import Accepted, Ignored, Table, Trigger


class WorkerState(Enum):
    """Phase of a worker's job."""

    NEW = auto()  #        a link without a job
    SHARING = auto()  # `SharedIntake` checks the files on the shared storage
    ADMITTING = auto()  #  the owner decides whether it takes a package
    ADMITTED = auto()  #   the package may come
    RECEIVING = auto()  #  the package comes through the channel
    SUSPENDED = auto()  #  the client went away before the package was complete
    QUEUED = auto()  #     the job waits for a slot
    RUNNING = auto()
    ENDED = auto()  #      the results wait for the client
    DISCARDED = auto()  #  nothing is left of the job


class WorkerTrigger(Enum):
    """Causes of a transition besides the messages of the client."""

    STARTED = auto()  #    the client starts a job whose paths were checked
    ADMITTED = auto()  #   reports of the owner, named as their methods
    REJECTED = auto()
    OPENED = auto()
    RECEIVED = auto()
    RECEIVE_FAILED = auto()
    QUEUE_MOVED = auto()
    SLOT_GRANTED = auto()
    PROGRESSED = auto()
    RUN_ENDED = auto()
    LOST = auto()  #       the connection
    DISCARD = auto()  #    the job ends before it ran


_M, _S, _T = messages, WorkerState, WorkerTrigger

TRANSITIONS: Table[WorkerState] = {
    _S.NEW: {
        _M.MountProbe: _S.SHARING,
        _M.JobIdentity: _S.SHARING,
        _M.JobSubmit: _S.ADMITTING,
        _T.LOST: _S.DISCARDED,
    },
    _S.SHARING: {
        _M.JobSubmit: _S.ADMITTING,  # the client fell back
        _T.STARTED: _S.QUEUED,
        _T.LOST: _S.DISCARDED,
        _T.DISCARD: _S.DISCARDED,
    },
    _S.ADMITTING: {
        _T.ADMITTED: _S.ADMITTED,
        _T.REJECTED: _S.DISCARDED,
        _T.LOST: _S.ADMITTING,
        _T.DISCARD: _S.DISCARDED,
    },
    _S.ADMITTED: {
        _M.FileOffer: _S.RECEIVING,
        _T.LOST: _S.SUSPENDED,
        _T.DISCARD: _S.DISCARDED,
    },
    _S.RECEIVING: {
        _T.OPENED: _S.RECEIVING,
        _T.RECEIVED: _S.QUEUED,
        _T.RECEIVE_FAILED: _S.DISCARDED,
        _T.LOST: _S.SUSPENDED,
        _T.DISCARD: _S.DISCARDED,
    },
    _S.SUSPENDED: {
        _M.JobResume: _S.ADMITTED,
        _T.RECEIVED: _S.QUEUED,  # the package was complete when the link was lost
        _T.LOST: _S.SUSPENDED,
        _T.DISCARD: _S.DISCARDED,
    },
    _S.QUEUED: {
        _T.QUEUE_MOVED: _S.QUEUED,
        _T.SLOT_GRANTED: _S.RUNNING,
        _T.RUN_ENDED: _S.ENDED,
        _T.LOST: _S.QUEUED,
    },
    _S.RUNNING: {
        _T.PROGRESSED: _S.RUNNING,
        _T.RUN_ENDED: _S.ENDED,
        _T.LOST: _S.RUNNING,
    },
    _S.ENDED: {_M.ResultsReceived: _S.DISCARDED, _T.LOST: _S.ENDED},
    _S.DISCARDED: {_T.LOST: _S.DISCARDED},
}

ACCEPTED: Accepted[WorkerState] = {
    _S.NEW: frozenset(),
    _S.SHARING: frozenset({*get_args(SharedRequest), _M.JobCancel}),
    _S.ADMITTING: frozenset({_M.JobCancel, _M.JobResume}),
    _S.ADMITTED: frozenset({_M.JobCancel}),
    _S.RECEIVING: frozenset({_M.JobCancel}),
    _S.SUSPENDED: frozenset(),
    _S.QUEUED: frozenset({_M.JobCancel, _M.JobResume}),
    _S.RUNNING: frozenset({_M.JobCancel, _M.JobResume}),
    _S.ENDED: frozenset({_M.JobResume, _M.FileRequest}),
    _S.DISCARDED: frozenset(),
}
"""`SharedIntake` checks the requests about shared storage. `JobCancel` discards a job
that has not been queued; a later one ends when its commands have stopped."""

_REPORTS: frozenset[Trigger] = frozenset(
    {
        _T.ADMITTED,
        _T.REJECTED,
        _T.OPENED,
        _T.RECEIVED,
        _T.RECEIVE_FAILED,
        _T.QUEUE_MOVED,
        _T.SLOT_GRANTED,
        _T.PROGRESSED,
        _T.RUN_ENDED,
    }
)

IGNORED: Ignored[WorkerState] = {
    **dict.fromkeys(WorkerState, frozenset()),
    _S.SUSPENDED: frozenset({_T.OPENED, _T.RECEIVE_FAILED}),
    _S.ENDED: _REPORTS | {_M.JobCancel},
    _S.DISCARDED: _REPORTS
    | {*get_args(SharedRequest)[1:], _M.JobSubmit, _M.FileOffer, _M.JobCancel}
    | {_M.ResultsReceived},
}
"""The reports that crossed the loss of the link or the end of the job, and the messages
that the client may send before it learns of the end."""
