"""The states of a client's job, and the transitions between them."""

from enum import Enum, auto
from typing import get_args

from sleap_rtc.proto import messages
from sleap_rtc.proto.job.shared_route import SharedAnswer
from sleap_rtc.proto.machine import Table


class ClientState(Enum):
    """Phase of a client's job."""

    IDLE = auto()  #        not submitted
    SHARING = auto()  #     `SharedRoute` brings the package to the worker
    SUBMITTING = auto()  #  the worker decides whether it takes the package
    SENDING = auto()  #     the package goes through the channel
    WAITING = auto()  #     the job is queued or runs
    CANCELLING = auto()  #  the worker has been asked to stop the job
    FETCHING = auto()  # the job has ended, and its results are fetched
    RESUMING = auto()  #    the worker has been asked about the job over a new link
    ENDED = auto()


class ClientTrigger(Enum):
    """Causes of a transition besides the messages of the worker."""

    SHARED = auto()  #   the shared route is tried
    CHANNEL = auto()  #  the package is offered through the channel
    STARTED = auto()  #  the worker has started the job over the shared route
    SEND = auto()  #     the worker lacks the package, or a part of it
    SENT = auto()  #     the worker has the whole package
    CANCEL = auto()  #   the worker is asked to stop the job
    RESUME = auto()  #   the worker is asked about the job over a new link
    END = auto()  #      nothing is left to do, or nothing more can be done


_M, _S, _T = messages, ClientState, ClientTrigger

# The owner of a worker may stop a job as soon as the worker has its id. A message that
# changes no state is in the table as well: any other one is a fault of the worker.
TRANSITIONS: Table[ClientState] = {
    _S.IDLE: {
        _T.SHARED: _S.SHARING,
        _T.CHANNEL: _S.SUBMITTING,
        _T.RESUME: _S.RESUMING,
        _T.END: _S.ENDED,
    },
    _S.SHARING: {
        **dict.fromkeys(get_args(SharedAnswer), _S.SHARING),
        _M.JobState: _S.SHARING,
        _M.JobFailed: _S.FETCHING,
        _T.STARTED: _S.WAITING,
        _T.CHANNEL: _S.SUBMITTING,
        _T.END: _S.ENDED,
    },
    _S.SUBMITTING: {
        _M.JobState: _S.SUBMITTING,
        _M.JobAccepted: _S.SENDING,
        _M.JobRejected: _S.ENDED,
        _M.JobFailed: _S.FETCHING,
        _T.CANCEL: _S.CANCELLING,
        _T.RESUME: _S.RESUMING,
        _T.END: _S.ENDED,
    },
    _S.SENDING: {
        _M.JobState: _S.SENDING,
        _M.JobFailed: _S.FETCHING,
        _T.SENT: _S.WAITING,
        _T.CANCEL: _S.CANCELLING,
        _T.RESUME: _S.RESUMING,
        _T.END: _S.ENDED,
    },
    _S.WAITING: {
        **dict.fromkeys(get_args(_M.JobReport), _S.WAITING),
        _M.JobResults: _S.WAITING,
        _M.JobComplete: _S.FETCHING,
        _M.JobFailed: _S.FETCHING,
        _T.CANCEL: _S.CANCELLING,
        _T.RESUME: _S.RESUMING,
        _T.END: _S.ENDED,
    },
    _S.CANCELLING: {
        **dict.fromkeys(get_args(_M.JobReport), _S.CANCELLING),
        _M.JobAccepted: _S.CANCELLING,
        _M.JobRejected: _S.ENDED,
        _M.JobResults: _S.CANCELLING,
        _M.JobComplete: _S.FETCHING,
        _M.JobFailed: _S.FETCHING,
        _T.RESUME: _S.RESUMING,
        _T.END: _S.ENDED,
    },
    _S.FETCHING: {_T.RESUME: _S.RESUMING, _T.END: _S.ENDED},
    _S.RESUMING: {
        _M.JobState: _S.RESUMING,
        _M.JobRejected: _S.ENDED,
        _M.JobFailed: _S.FETCHING,
        _M.ResumeAccepted: _S.WAITING,
        _M.JobUnknown: _S.ENDED,
        _T.SEND: _S.SENDING,
        _T.CANCEL: _S.CANCELLING,
        _T.CHANNEL: _S.SUBMITTING,
        _T.SHARED: _S.SHARING,
        _T.RESUME: _S.RESUMING,
        _T.END: _S.ENDED,
    },
    _S.ENDED: {},
}
