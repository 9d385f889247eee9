"""The states of a client's job, and the messages that each of them expects."""

from enum import Enum, auto

from sleap_rtc.proto import messages as m


class State(Enum):
    """What the client is busy with."""

    IDLE = auto()
    PREPARING = auto()
    PROBING = auto()
    COPYING = auto()
    CHECKING_INPUT = auto()
    CHECKING_OUTPUT = auto()
    SUBMITTING = auto()
    SENDING = auto()
    WAITING = auto()
    CANCELLING = auto()
    FETCHING = auto()
    RESUMING = auto()
    ENDED = auto()


_LIFE: frozenset[type[m.Message]] = frozenset(
    {
        m.JobState,
        m.JobLog,
        m.TrainingComplete,
        m.InferenceComplete,
        m.JobResults,
        m.JobComplete,
        m.JobFailed,
    }
)

_STOPPED: frozenset[type[m.Message]] = frozenset(
    {
        m.JobState,  #              no change
        m.JobFailed,  #             ENDED
    }
)
"""The worker's owner may stop a job as soon as the worker knows its id."""

_NOTHING: frozenset[type[m.Message]] = frozenset()

# In every state: Error ends the job, and Unknown changes nothing. Nothing that comes
# after the end of the link changes anything.
EXPECTED: dict[State, frozenset[type[m.Message]]] = {
    #                       message                   -> next state
    State.IDLE: _NOTHING,
    State.PREPARING: _NOTHING,
    State.PROBING: _STOPPED
    | {
        m.MountProbed,  #           COPYING, or as MountProbeFailed
        m.MountProbeFailed,  #      SUBMITTING, or ENDED if shared was asked for
    },
    State.COPYING: _STOPPED,
    State.CHECKING_INPUT: _STOPPED
    | {
        m.PathValidated,  #         CHECKING_OUTPUT
        m.PathError,  #             SUBMITTING, or ENDED if shared was asked for
    },
    State.CHECKING_OUTPUT: _STOPPED
    | {
        m.PathValidated,  #         WAITING
        m.PathError,  #             SUBMITTING, or ENDED if shared was asked for
    },
    State.SUBMITTING: _STOPPED
    | {
        m.JobAccepted,  #           SENDING
        m.JobRejected,  #           ENDED
    },
    State.SENDING: _STOPPED,  #     also WAITING, by a JobState that says QUEUED
    State.WAITING: _LIFE,  #        WAITING; FETCHING or ENDED after the last one
    State.CANCELLING: _LIFE | {m.JobAccepted, m.JobRejected},  # as WAITING
    State.FETCHING: _NOTHING,
    State.RESUMING: _STOPPED
    | frozenset(
        {
            m.JobRejected,  #       ENDED
            m.JobResumed,  #        SENDING or WAITING; CANCELLING if that was asked for
            m.JobUnknown,  #        SUBMITTING, CHECKING_INPUT, PREPARING, or ENDED
        }
    ),
    State.ENDED: _NOTHING,  #       whatever still comes is ignored
}

STALE = frozenset({m.MountProbed, m.MountProbeFailed, m.PathValidated, m.PathError})
"""Late answers to questions of the shared route, after it was given up."""

SHARED_STATES = frozenset(
    {
        State.PREPARING,
        State.PROBING,
        State.COPYING,
        State.CHECKING_INPUT,
        State.CHECKING_OUTPUT,
    }
)
