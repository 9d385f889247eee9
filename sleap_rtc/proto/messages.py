"""All control messages, in one table, and their text codec.

A control message is one UTF-8 text of at most 64 KiB, ``NAME::field::field``. Only the
last field may contain ``::``; it is free text, or JSON where it is structured. The
order of a message's fields on the wire is the order of the attributes of its class.
"""

from typing import Annotated, Literal, get_args, get_origin

import msgspec
from msgspec import Meta

from sleap_rtc.proto.errors import LocalProtocolError, RemoteProtocolError

PROTOCOL_VERSION = 1

MAX_MESSAGE_BYTES = 64 * 1024
"""Bytes of the longest message: data channels of older peers advertise 65536."""

MAX_DETAIL = 1024
"""Characters of the longest `JobProgress.detail`."""

MAX_PATH = 4096
"""Characters of the longest path, as on Linux."""

MAX_JOB_RESULTS = 200
"""Files listed in one `JobResults`: 200 paths of 255 bytes fit into a message."""

MAX_RESULT_FILES = 20_000
"""Files listed in all `JobResults` of a job; a training run makes about ten."""

MAX_RESULT_PATHS = 4 * 1024 * 1024
"""Characters of the paths in all `JobResults` of a job: 200 for each file."""

SEPARATOR = "::"

# ------------------------------------------------------------------- field types

JobId = Annotated[str, Meta(pattern=r"\Ajob_[0-9a-f]{8,32}\Z")]
"""``job_`` and 8 to 32 hexadecimal digits."""

Hash = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
"""32 bytes (a BLAKE3 hash, a MAC) as lower-case hexadecimal digits."""

Nonce = Annotated[str, Meta(pattern=r"\A[0-9a-f]{32}\Z")]
"""16 random bytes as lower-case hexadecimal digits."""

TransferId = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Size = Annotated[int, Meta(ge=0, le=2**50)]
"""Bytes, up to one pebibyte, which is more than the storage of any worker."""

ChunkIndex = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Count = Annotated[int, Meta(ge=1, le=2**32 - 1)]
Number = Annotated[int, Meta(ge=0, le=2**53)]
WirePath = Annotated[str, Meta(min_length=1, max_length=MAX_PATH)]
"""A relative POSIX path; `sleap_rtc.proto.paths` checks that it is harmless."""

FileName = Annotated[str, Meta(min_length=1, max_length=255)]
Text = str
Route = Literal["shared", "channel"]
JobStateName = Literal[
    "RECEIVING", "QUEUED", "RUNNING", "COMPLETE", "FAILED", "CANCELLED"
]


class Message(msgspec.Struct, frozen=True):
    """One control message; its attributes are the fields, in wire order."""


class JobMessage(Message, frozen=True):
    """A message that begins with the id of the job that it belongs to."""

    job_id: JobId


class Json(msgspec.Struct, frozen=True, omit_defaults=True):
    """A structured last field. Unknown keys are ignored, so that it can grow."""


# --------------------------------------------------------------- structured fields


class Gpu(Json, frozen=True):
    """One GPU of a worker."""

    model: Annotated[str, Meta(max_length=128)]
    memory_mb: Number


class Greeting(Json, frozen=True):
    """The role, the version and the abilities of a peer."""

    protocol: Annotated[int, Meta(ge=1, le=2**16)]
    version: Annotated[str, Meta(max_length=64)]
    role: Literal["client", "worker"]
    hostname: Annotated[str, Meta(max_length=255)] = ""
    shared_storage: bool = False
    disk_free: Size = 0
    slots: Annotated[int, Meta(ge=0, le=1024)] = 0
    gpus: Annotated[tuple[Gpu, ...], Meta(max_length=64)] = ()
    sleap_nn: Annotated[str, Meta(max_length=64)] = ""


class Submission(Json, frozen=True):
    """Name and size of a package that the client will send through the channel."""

    name: FileName
    size: Size


class OfferedFile(Json, frozen=True):
    """A file that the sender of the message is ready to send."""

    name: FileName
    size: Size
    chunk_size: Annotated[int, Meta(ge=4096, le=16 * 1024 * 1024)]


class JobProgress(Json, frozen=True):
    """State of a job, with its place in the queue or the reason of its end."""

    state: JobStateName
    position: Number = 0
    """Number of jobs ahead of it while it is QUEUED."""

    detail: Annotated[str, Meta(max_length=MAX_DETAIL)] = ""
    """Text for people: why the job ended, or a remark on its results."""

    received: Size = 0
    """Bytes of the package that earlier links delivered, while it is RECEIVING."""


class ResumePoint(Json, frozen=True):
    """Position in the output of a job at which the client resumes."""

    next_sequence: Number = 0
    """Sequence number of the first `JobLog` that the client lacks."""


class ResultFile(Json, frozen=True):
    """One file that a job made, relative to the job directory."""

    path: WirePath
    size: Size


class ResultPage(Json, frozen=True):
    """Some of the files that a job made."""

    files: Annotated[tuple[ResultFile, ...], Meta(max_length=MAX_JOB_RESULTS)] = ()
    last: bool = True
    """False while more pages follow."""


# -------------------------------------------------------------- opening of a link


class Auth(Message, frozen=True):
    """Client to worker, first on each link: proof that it has the room secret."""

    session: Nonce
    proof: Hash


class Hello(Message, frozen=True):
    """Both sides, once, after the proof was accepted."""

    greeting: Greeting


class Error(Message, frozen=True):
    """Both sides: the link ends for this reason."""

    reason: Text


# ----------------------------------------------------------------- shared storage


class JobIdentity(JobMessage, frozen=True):
    """Client to worker: the following paths belong to this job."""


class MountProbe(JobMessage, frozen=True):
    """Client to worker: read this small file through your own root."""

    path: WirePath


class MountProbed(JobMessage, frozen=True):
    """Worker to client: the BLAKE3 hash of the content of the probe file."""

    content: Hash


class MountProbeFailed(JobMessage, frozen=True):
    """Worker to client: the probe file was not found, or no root is configured."""

    reason: Text


class SharedInputPath(Message, frozen=True):
    """Client to worker: path of the package beneath the shared root."""

    path: WirePath


class SharedOutputPath(Message, frozen=True):
    """Client to worker: path of the folder for the models beneath the shared root."""

    path: WirePath


class PathValidated(Message, frozen=True):
    """Worker to client: the path is valid."""

    which: Literal["input", "output"]


class PathError(Message, frozen=True):
    """Worker to client: the path is refused; the client takes the channel route."""

    reason: Text


class SharedStorageJob(Message, frozen=True):
    """Client to worker: run the job whose paths were validated."""

    action: Literal["start"] = "start"


# ---------------------------------------------------------- after a link was lost


class JobResume(JobMessage, frozen=True):
    """Client to worker, first on a new link: resume this job."""

    point: ResumePoint


class ResumeAccepted(JobMessage, frozen=True):
    """Worker to client: the job is in this state; the messages it lacks follow."""

    progress: JobProgress


class JobUnknown(JobMessage, frozen=True):
    """Worker to client: the job does not exist here; it may be submitted."""


# ------------------------------------------------------------------ channel route


class JobSubmit(JobMessage, frozen=True):
    """Client to worker: a package will come through the channel."""

    submission: Submission


class JobAccepted(JobMessage, frozen=True):
    """Worker to client: the package may be sent."""


class JobRejected(JobMessage, frozen=True):
    """Worker to client: the job is refused."""

    reason: Text


class FileOffer(Message, frozen=True):
    """Sender to receiver: this file can be sent under this transfer id."""

    transfer_id: TransferId
    file: OfferedFile


class FileRequest(Message, frozen=True):
    """Client to worker: offer this result file under this transfer id."""

    transfer_id: TransferId
    job_id: JobId
    path: WirePath


class ChunkGrant(Message, frozen=True):
    """Receiver to sender: send these chunks, each of them once."""

    transfer_id: TransferId
    first: ChunkIndex
    count: Count


class FileReceived(Message, frozen=True):
    """Receiver to sender: every chunk is stored; this is the hash of their hashes."""

    transfer_id: TransferId
    root: Hash


class FileVerified(Message, frozen=True):
    """Sender to receiver: the hash is correct; the file may get its name."""

    transfer_id: TransferId


class FileError(Message, frozen=True):
    """Both sides: the transfer ends for this reason."""

    transfer_id: TransferId
    reason: Text


# ---------------------------------------------------------------- life of a job


class JobState(JobMessage, frozen=True):
    """Worker to client: the state of the job, or its place in the queue, changed."""

    progress: JobProgress


class JobLog(JobMessage, frozen=True):
    """Worker to client: a line of the output.

    ``sequence`` grows by one with each message of a job. ``line`` is the number of the
    line; a message with the number of an earlier line redraws that line.
    """

    sequence: Number
    line: Number
    text: Text


class JobCancel(JobMessage, frozen=True):
    """Client to worker: stop this job."""


class TrainingComplete(Message, frozen=True):
    """Worker to client: all training commands of the package succeeded."""


class InferenceComplete(Message, frozen=True):
    """Worker to client: all inference commands of the package succeeded."""


class JobResults(JobMessage, frozen=True):
    """Worker to client, before the end of the job: files that it made."""

    page: ResultPage


class JobComplete(JobMessage, frozen=True):
    """Worker to client: the job succeeded, and this is the path of its models."""

    path: WirePath


class JobFailed(JobMessage, frozen=True):
    """Worker to client: the job failed or was cancelled, for this reason."""

    reason: Text


class ResultsReceived(JobMessage, frozen=True):
    """Client to worker: all results arrived; the worker may remove its copy."""


class Unknown(Message, frozen=True):
    """A message of a newer peer, which is counted and ignored, and never sent."""

    name: str


# ------------------------------------------------------------------- who sends what

JobReport = JobState | JobLog | TrainingComplete | InferenceComplete
"""Messages about the progress of a job; they only lead to events."""

WorkerJobMessage = (
    MountProbed
    | MountProbeFailed
    | PathValidated
    | PathError
    | JobAccepted
    | JobRejected
    | ResumeAccepted
    | JobUnknown
    | JobReport
    | JobResults
    | JobComplete
    | JobFailed
)
"""Messages of a worker that `ClientJob` handles."""

ClientJobMessage = (
    MountProbe
    | JobIdentity
    | SharedInputPath
    | SharedOutputPath
    | SharedStorageJob
    | JobSubmit
    | JobResume
    | FileOffer
    | FileRequest
    | JobCancel
    | ResultsReceived
)
"""Messages of a client that `WorkerJob` handles."""

_EitherMessage = (
    Hello | Error | FileOffer | ChunkGrant | FileReceived | FileVerified | FileError
)

WorkerMessage = WorkerJobMessage | _EitherMessage | Unknown
"""Messages that a worker sends."""

ClientMessage = ClientJobMessage | Auth | _EitherMessage | Unknown
"""Messages that a client sends."""

# ----------------------------------------------------------------------- the table

TABLE: dict[str, type[Message]] = {
    "AUTH": Auth,
    "HELLO": Hello,
    "ERROR": Error,
    "JOB_ID": JobIdentity,
    "MOUNT_PROBE": MountProbe,
    "MOUNT_PROBED": MountProbed,
    "MOUNT_PROBE_FAILED": MountProbeFailed,
    "SHARED_INPUT_PATH": SharedInputPath,
    "SHARED_OUTPUT_PATH": SharedOutputPath,
    "PATH_VALIDATED": PathValidated,
    "PATH_ERROR": PathError,
    "SHARED_STORAGE_JOB": SharedStorageJob,
    "JOB_RESUME": JobResume,
    "JOB_RESUMED": ResumeAccepted,
    "JOB_UNKNOWN": JobUnknown,
    "JOB_SUBMIT": JobSubmit,
    "JOB_ACCEPTED": JobAccepted,
    "JOB_REJECTED": JobRejected,
    "FILE_OFFER": FileOffer,
    "FILE_REQUEST": FileRequest,
    "CHUNK_GRANT": ChunkGrant,
    "FILE_RECEIVED": FileReceived,
    "FILE_VERIFIED": FileVerified,
    "FILE_ERROR": FileError,
    "JOB_STATE": JobState,
    "JOB_LOG": JobLog,
    "JOB_CANCEL": JobCancel,
    "TRAINING_COMPLETE": TrainingComplete,
    "INFERENCE_COMPLETE": InferenceComplete,
    "JOB_RESULTS": JobResults,
    "JOB_COMPLETE": JobComplete,
    "JOB_FAILED": JobFailed,
    "RESULTS_RECEIVED": ResultsReceived,
}

_NAMES = {cls: name for name, cls in TABLE.items()}
_MAX_NAME = 64


def _is_json(cls: type[Message]) -> bool:
    """Return whether the last field of a message is structured."""
    fields = msgspec.structs.fields(cls)
    if not fields:
        return False
    last = fields[-1].type
    if get_origin(last) is Annotated:
        last = get_args(last)[0]
    return isinstance(last, type) and issubclass(last, Json)


_JSON_LAST = frozenset(cls for cls in TABLE.values() if _is_json(cls))


def encode_message(message: Message) -> str:
    """Return the text of a message on the wire.

    Args:
        message: Any message of `TABLE`.

    Returns:
        The text, at most `MAX_MESSAGE_BYTES` as UTF-8.

    Raises:
        LocalProtocolError: If it is too long, a field other than the last contains
            ``::``, or the class is not in the table.
    """
    name = _NAMES.get(type(message))
    if name is None:
        raise LocalProtocolError(f"{type(message).__name__} is not a wire message")
    values = msgspec.structs.astuple(message)
    fields = [str(value) for value in values]
    if type(message) in _JSON_LAST:
        try:
            fields[-1] = msgspec.json.encode(values[-1]).decode()
        except UnicodeEncodeError:
            raise LocalProtocolError(f"{name} is not valid Unicode") from None
    if any(SEPARATOR in field for field in fields[:-1]):
        raise LocalProtocolError(f"a field of {name} contains '{SEPARATOR}'")
    # A field that ends in ":" would move the border to the field after it.
    if any(field.endswith(":") for field in fields[:-1]):
        raise LocalProtocolError(f"a field of {name} ends in ':'")
    text = SEPARATOR.join([name, *fields])
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise LocalProtocolError(f"{name} is not valid Unicode") from None
    if size > MAX_MESSAGE_BYTES:
        raise LocalProtocolError(f"{name} of {size} bytes is over the limit")
    return text


def decode_worker_message_untrusted(data: bytes | str) -> WorkerMessage:
    """Parse a message that a worker sent.

    Args:
        data: The text as it arrived.

    Returns:
        The message, or `Unknown` for a well-formed name that is not in `TABLE`.

    Raises:
        RemoteProtocolError: For anything else, messages of clients included.
    """
    message = decode_message_untrusted(data)
    if not isinstance(message, WorkerMessage):
        raise RemoteProtocolError(f"{_NAMES[type(message)]} is not sent by workers")
    return message


def decode_client_message_untrusted(data: bytes | str) -> ClientMessage:
    """Parse a message that a client sent.

    Args:
        data: The text as it arrived.

    Returns:
        The message, or `Unknown` for a well-formed name that is not in `TABLE`.

    Raises:
        RemoteProtocolError: For anything else, messages of workers included.
    """
    message = decode_message_untrusted(data)
    if not isinstance(message, ClientMessage):
        raise RemoteProtocolError(f"{_NAMES[type(message)]} is not sent by clients")
    return message


def decode_message_untrusted(data: bytes | str) -> Message:
    """Parse a message whose sender may be a client or a worker.

    Args:
        data: The text as it arrived.

    Returns:
        The message, or `Unknown` for a well-formed name that is not in `TABLE`.

    Raises:
        RemoteProtocolError: For anything else; the reason names the message and the
            field.
    """
    text = _text_untrusted(data)
    name, separator, rest = text.partition(SEPARATOR)
    if not _is_name(name):
        raise RemoteProtocolError("not a control message: it has no NAME")
    cls = TABLE.get(name)
    if cls is None:
        return Unknown(name)
    keys = cls.__struct_fields__
    parts = rest.split(SEPARATOR, max(len(keys) - 1, 0)) if separator else []
    if len(parts) != len(keys):
        raise RemoteProtocolError(f"{name} has {len(keys)} fields: {', '.join(keys)}")
    values: dict[str, object] = dict(zip(keys, parts, strict=True))
    try:
        if cls in _JSON_LAST:
            values[keys[-1]] = msgspec.json.decode(parts[-1])
        return msgspec.convert(values, cls, strict=False)
    except (ValueError, RecursionError) as error:
        raise RemoteProtocolError(f"{name}: {error}") from None


def _text_untrusted(data: bytes | str) -> str:
    """Return the text after checking its length and encoding."""
    try:
        encoded = data.encode() if isinstance(data, str) else data
        if len(encoded) > MAX_MESSAGE_BYTES:
            raise RemoteProtocolError(
                f"a control message of {len(encoded)} bytes is too long"
            )
        return encoded.decode()
    except UnicodeError:
        raise RemoteProtocolError("a control message is not valid UTF-8") from None


def _is_name(name: str) -> bool:
    """Return whether this may be the name of a message, now or in the future."""
    return (
        0 < len(name) <= _MAX_NAME
        and name.isascii()
        and name.replace("_", "").isalnum()
        and name == name.upper()
        and name[0].isalpha()
    )
