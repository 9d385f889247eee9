"""The states of a client's job, and the transitions between them."""

from enum import Enum, auto
from typing import get_args

from sleap_rtc.proto import messages
from sleap_rtc.proto.job.shared_route import SharedAnswer
from sleap_rtc.proto.machine import Accepted, Ignored, Table, Trigger


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
    CONTINUE = auto()  # the worker has the package, and goes on with the job
    SENT = auto()  #     the worker has the whole package
    CANCEL = auto()  #   the worker is asked to stop the job
    RESUME = auto()  #   the worker is asked about the job over a new link
    END = auto()  #      nothing is left to do, or nothing more can be done
    FETCHED = auto()  #  the results are where the user asked for them
    TRANSFER_FAILED = auto()  # the package was not sent, or the results not fetched
    SHARED_REPORT = auto()  # the owner reports on the shared storage


_M, _S, _T = messages, ClientState, ClientTrigger

# The owner of a worker may stop a job as soon as the worker has its id.
TRANSITIONS: Table[ClientState] = {
    _S.IDLE: {
        _T.SHARED: _S.SHARING,
        _T.CHANNEL: _S.SUBMITTING,
        _T.RESUME: _S.RESUMING,
        _T.END: _S.ENDED,
    },
    _S.SHARING: {
        _M.JobFailed: _S.FETCHING,
        _T.STARTED: _S.WAITING,
        _T.CHANNEL: _S.SUBMITTING,
        _T.END: _S.ENDED,
    },
    _S.SUBMITTING: {
        _M.JobAccepted: _S.SENDING,
        _M.JobRejected: _S.ENDED,
        _M.JobFailed: _S.FETCHING,
        _T.CANCEL: _S.CANCELLING,
        _T.RESUME: _S.RESUMING,
        _T.END: _S.ENDED,
    },
    _S.SENDING: {
        _M.JobFailed: _S.FETCHING,
        _T.SENT: _S.WAITING,
        _T.TRANSFER_FAILED: _S.ENDED,
        _T.CANCEL: _S.CANCELLING,
        _T.RESUME: _S.RESUMING,
        _T.END: _S.ENDED,
    },
    _S.WAITING: {
        _M.JobComplete: _S.FETCHING,
        _M.JobFailed: _S.FETCHING,
        _T.SENT: _S.WAITING,  # the worker has reported already that it has the package
        _T.TRANSFER_FAILED: _S.WAITING,
        _T.CANCEL: _S.CANCELLING,
        _T.RESUME: _S.RESUMING,
        _T.END: _S.ENDED,
    },
    _S.CANCELLING: {
        _M.JobRejected: _S.ENDED,
        _M.JobComplete: _S.FETCHING,
        _M.JobFailed: _S.FETCHING,
        _T.RESUME: _S.RESUMING,
        _T.END: _S.ENDED,
    },
    _S.FETCHING: {
        _T.FETCHED: _S.ENDED,
        _T.TRANSFER_FAILED: _S.ENDED,
        _T.RESUME: _S.RESUMING,
        _T.END: _S.ENDED,
    },
    _S.RESUMING: {
        _M.JobRejected: _S.ENDED,
        _M.JobFailed: _S.FETCHING,
        _T.CONTINUE: _S.WAITING,
        _T.SEND: _S.SENDING,
        _T.CANCEL: _S.CANCELLING,
        _T.CHANNEL: _S.SUBMITTING,
        _T.SHARED: _S.SHARING,
        _T.RESUME: _S.RESUMING,
        _T.END: _S.ENDED,
    },
    _S.ENDED: {},
}

_NEWS: frozenset[Trigger] = frozenset({*get_args(_M.JobReport), _M.JobResults})

ACCEPTED: Accepted[ClientState] = {
    _S.IDLE: frozenset(),
    _S.SHARING: frozenset({*get_args(SharedAnswer), _M.JobState}),
    _S.SUBMITTING: frozenset({_M.JobState}),
    _S.SENDING: frozenset({_M.JobState}),
    _S.WAITING: _NEWS,
    _S.CANCELLING: _NEWS,
    _S.FETCHING: frozenset(),
    _S.RESUMING: frozenset({_M.JobState, _M.ResumeAccepted, _M.JobUnknown}),
    _S.ENDED: frozenset(),
}
"""`SharedRoute` checks the answers about shared storage. A `JobState` can mean `SENT`.
The answers to a question after a lost link mean `CONTINUE`, `SEND`, `CANCEL` or `END`,
or the start of the job from the beginning."""

_LATE: frozenset[Trigger] = frozenset(
    {_T.SHARED_REPORT, _T.SENT, _T.FETCHED, _T.TRANSFER_FAILED}
)

IGNORED: Ignored[ClientState] = {
    **dict.fromkeys(ClientState, frozenset()),
    _S.CANCELLING: _LATE | {_M.JobAccepted},
    _S.FETCHING: frozenset({_T.SENT}),
    _S.RESUMING: _LATE,
    _S.ENDED: _LATE,
}
"""The reports on an effect that was stopped, and an answer that crossed the request to
stop the job. After the end, every message is ignored."""
