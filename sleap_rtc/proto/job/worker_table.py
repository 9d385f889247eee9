"""The states of a worker's job, and the messages that each of them expects."""

from enum import Enum, auto

from sleap_rtc.proto import messages as m


class State(Enum):
    """How far a job has come."""

    NEW = auto()
    PROBING = auto()
    IDENTIFIED = auto()
    CHECKING_INPUT = auto()
    INPUT_VALID = auto()
    MAKING_OUTPUT = auto()
    READY = auto()
    REFUSED = auto()
    ADMITTING = auto()
    ADMITTED = auto()
    RECEIVING = auto()
    SUSPENDED = auto()
    QUEUED = auto()
    RUNNING = auto()
    ENDED = auto()
    DISCARDED = auto()


# In every state: Error counts as a lost link, and Unknown changes nothing, as nothing
# does that comes after the end of the link.
EXPECTED: dict[State, frozenset[type[m.Message]]] = {
    #                          message                -> next state
    State.NEW: frozenset(
        {
            m.MountProbe,  #       PROBING
            m.JobIdentity,  #      IDENTIFIED
            m.JobSubmit,  #        ADMITTING
        }
    ),
    State.PROBING: frozenset(
        {
            m.JobIdentity,  #      kept until the probe is read, as all of these:
            m.SharedInputPath,
            m.SharedOutputPath,
            m.SharedStorageJob,
            m.JobSubmit,  #        ADMITTING: the client did not want to wait
            m.JobCancel,  #        DISCARDED
        }
    ),
    State.IDENTIFIED: frozenset(
        {
            m.SharedInputPath,  #  CHECKING_INPUT
            m.JobSubmit,  #        ADMITTING: the client fell back
            m.JobCancel,  #        DISCARDED
        }
    ),
    State.CHECKING_INPUT: frozenset(
        {
            m.SharedOutputPath,  # kept until the path is checked
            m.SharedStorageJob,  # kept after it
            m.JobSubmit,  #        ADMITTING: the client did not want to wait
            m.JobCancel,  #        DISCARDED
        }
    ),
    State.INPUT_VALID: frozenset(
        {
            m.SharedOutputPath,  # MAKING_OUTPUT
            m.JobSubmit,  #        ADMITTING: the client fell back
            m.JobCancel,  #        DISCARDED
        }
    ),
    State.MAKING_OUTPUT: frozenset(
        {
            m.SharedStorageJob,  # kept until the directory is made
            m.JobSubmit,  #        ADMITTING: the client did not want to wait
            m.JobCancel,  #        DISCARDED
        }
    ),
    State.READY: frozenset(
        {
            m.SharedStorageJob,  # QUEUED
            m.JobSubmit,  #        ADMITTING: the client fell back
            m.JobCancel,  #        DISCARDED
        }
    ),
    State.REFUSED: frozenset(
        {
            m.SharedInputPath,  #  CHECKING_INPUT: another path
            m.SharedOutputPath,  # REFUSED: it was sent before the refusal came
            m.SharedStorageJob,  # REFUSED, too
            m.JobSubmit,  #        ADMITTING: the client fell back
            m.JobCancel,  #        DISCARDED
        }
    ),
    State.ADMITTING: frozenset({m.JobCancel}),  # DISCARDED
    State.ADMITTED: frozenset(
        {
            m.FileOffer,  #        RECEIVING
            m.JobCancel,  #        DISCARDED
        }
    ),
    State.RECEIVING: frozenset({m.JobCancel}),  # DISCARDED
    State.SUSPENDED: frozenset(),  # ADMITTED, once it has a link again
    State.QUEUED: frozenset({m.JobCancel}),  # ENDED, when it has left the queue
    State.RUNNING: frozenset({m.JobCancel}),  # ENDED, when the commands have stopped
    State.ENDED: frozenset(
        {
            m.JobCancel,  #        ENDED: it crossed the end of the job
            m.FileRequest,  #      ENDED
            m.ResultsReceived,  #  DISCARDED
        }
    ),
    State.DISCARDED: frozenset(  # DISCARDED: these crossed the end of the job
        {
            m.JobIdentity,
            m.SharedInputPath,
            m.SharedOutputPath,
            m.SharedStorageJob,
            m.JobSubmit,
            m.FileOffer,
            m.JobCancel,
            m.ResultsReceived,
        }
    ),
}

_SHARED_FLOW = (
    m.JobIdentity,
    m.SharedInputPath,
    m.SharedOutputPath,
    m.SharedStorageJob,
)

EARLY: dict[State, tuple[type[m.Message], ...]] = {
    State.PROBING: _SHARED_FLOW,
    State.CHECKING_INPUT: _SHARED_FLOW[2:],
    State.MAKING_OUTPUT: _SHARED_FLOW[3:],
}
"""What a client may send without waiting for an answer, in this order."""
