"""The states of a worker's job, and the transitions between them."""

from enum import Enum, auto
from typing import get_args

from sleap_rtc.proto import messages
from sleap_rtc.proto.job.shared_intake import SharedRequest
from sleap_rtc.proto.machine import Table


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

# The client may send these before it learns that the job has ended.
_CROSSED = (*get_args(SharedRequest)[1:], _M.JobSubmit, _M.FileOffer, _M.JobCancel)

TRANSITIONS: Table[WorkerState] = {
    _S.NEW: {
        _M.MountProbe: _S.SHARING,
        _M.JobIdentity: _S.SHARING,
        _M.JobSubmit: _S.ADMITTING,
        _T.LOST: _S.DISCARDED,
    },
    _S.SHARING: {
        **dict.fromkeys(get_args(SharedRequest), _S.SHARING),
        _M.JobSubmit: _S.ADMITTING,  # the client fell back
        _M.JobCancel: _S.DISCARDED,
        _T.STARTED: _S.QUEUED,
        _T.LOST: _S.DISCARDED,
        _T.DISCARD: _S.DISCARDED,
    },
    _S.ADMITTING: {
        _M.JobCancel: _S.DISCARDED,
        _M.JobResume: _S.ADMITTING,
        _T.ADMITTED: _S.ADMITTED,
        _T.REJECTED: _S.DISCARDED,
        _T.LOST: _S.ADMITTING,
        _T.DISCARD: _S.DISCARDED,
    },
    _S.ADMITTED: {
        _M.FileOffer: _S.RECEIVING,
        _M.JobCancel: _S.DISCARDED,
        _T.LOST: _S.SUSPENDED,
        _T.DISCARD: _S.DISCARDED,
    },
    _S.RECEIVING: {
        _M.JobCancel: _S.DISCARDED,
        _T.OPENED: _S.RECEIVING,
        _T.RECEIVED: _S.QUEUED,
        _T.RECEIVE_FAILED: _S.DISCARDED,
        _T.LOST: _S.SUSPENDED,
        _T.DISCARD: _S.DISCARDED,
    },
    _S.SUSPENDED: {
        _M.JobResume: _S.ADMITTED,
        _T.OPENED: _S.SUSPENDED,  # these reports crossed the loss of the link
        _T.RECEIVED: _S.QUEUED,
        _T.RECEIVE_FAILED: _S.SUSPENDED,
        _T.LOST: _S.SUSPENDED,
        _T.DISCARD: _S.DISCARDED,
    },
    _S.QUEUED: {
        _M.JobCancel: _S.QUEUED,  # it ends when it has left the queue
        _M.JobResume: _S.QUEUED,
        _T.QUEUE_MOVED: _S.QUEUED,
        _T.SLOT_GRANTED: _S.RUNNING,
        _T.RUN_ENDED: _S.ENDED,
        _T.LOST: _S.QUEUED,
    },
    _S.RUNNING: {
        _M.JobCancel: _S.RUNNING,  # it ends when its commands have stopped
        _M.JobResume: _S.RUNNING,
        _T.PROGRESSED: _S.RUNNING,
        _T.RUN_ENDED: _S.ENDED,
        _T.LOST: _S.RUNNING,
    },
    _S.ENDED: {
        _M.JobCancel: _S.ENDED,
        _M.JobResume: _S.ENDED,
        _M.FileRequest: _S.ENDED,
        _M.ResultsReceived: _S.DISCARDED,
        _T.LOST: _S.ENDED,
    },
    _S.DISCARDED: {
        **dict.fromkeys(_CROSSED, _S.DISCARDED),
        _M.ResultsReceived: _S.DISCARDED,
        _T.LOST: _S.DISCARDED,
    },
}
