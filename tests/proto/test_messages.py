"""Control messages: every message survives the wire, and all other text is refused."""

from types import UnionType
from typing import get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sleap_rtc.proto.errors import LocalProtocolError, RemoteProtocolError
from sleap_rtc.proto.messages import (
    MAX_JOB_RESULTS,
    MAX_MESSAGE_BYTES,
    TABLE,
    ChunkGrant,
    ClientMessage,
    Error,
    Hello,
    JobComplete,
    JobIdentity,
    JobLog,
    JobResults,
    Message,
    PathError,
    PathValidated,
    ResultFile,
    ResultPage,
    SharedInputPath,
    SharedOutputPath,
    SharedStorageJob,
    TrainingComplete,
    Unknown,
    WorkerMessage,
    decode_client_message_untrusted,
    decode_message_untrusted,
    decode_worker_message_untrusted,
    encode_message,
)

ID = "job_f3a8b2c1"
NONCE = "0123456789abcdef" * 2
DIGEST = NONCE * 2
GREETING = '{"protocol":1,"version":"1.0","role":"worker"}'

# One valid text of every message.
GOOD = {
    "AUTH": f"AUTH::{NONCE}::{DIGEST}",
    "HELLO": f"HELLO::{GREETING}",
    "ERROR": "ERROR::the daemon stops",
    "JOB_ID": f"JOB_ID::{ID}",
    "MOUNT_PROBE": f"MOUNT_PROBE::{ID}::jobs/{ID}/probe",
    "MOUNT_PROBED": f"MOUNT_PROBED::{ID}::{DIGEST}",
    "MOUNT_PROBE_FAILED": f"MOUNT_PROBE_FAILED::{ID}::no shared root",
    "SHARED_INPUT_PATH": f"SHARED_INPUT_PATH::jobs/{ID}/training.zip",
    "SHARED_OUTPUT_PATH": f"SHARED_OUTPUT_PATH::jobs/{ID}/models",
    "PATH_VALIDATED": "PATH_VALIDATED::input",
    "PATH_ERROR": "PATH_ERROR::Path outside shared storage: ../x",
    "SHARED_STORAGE_JOB": "SHARED_STORAGE_JOB::start",
    "JOB_RESUME": f'JOB_RESUME::{ID}::{{"next_sequence":17}}',
    "JOB_RESUMED": f'JOB_RESUMED::{ID}::{{"state":"RUNNING"}}',
    "JOB_UNKNOWN": f"JOB_UNKNOWN::{ID}",
    "JOB_SUBMIT": f'JOB_SUBMIT::{ID}::{{"name":"a.zip","size":1}}',
    "JOB_ACCEPTED": f"JOB_ACCEPTED::{ID}",
    "JOB_REJECTED": f"JOB_REJECTED::{ID}::the disk is full",
    "FILE_OFFER": 'FILE_OFFER::1::{"name":"a.zip","size":1,"chunk_size":4096}',
    "FILE_REQUEST": f"FILE_REQUEST::1::{ID}::models/best.ckpt",
    "CHUNK_GRANT": "CHUNK_GRANT::1::2::3",
    "FILE_RECEIVED": f"FILE_RECEIVED::1::{DIGEST}",
    "FILE_VERIFIED": "FILE_VERIFIED::1",
    "FILE_ERROR": "FILE_ERROR::1::cancelled",
    "JOB_STATE": f'JOB_STATE::{ID}::{{"state":"QUEUED","position":2}}',
    "JOB_LOG": f"JOB_LOG::{ID}::7::3::epoch 1",
    "JOB_CANCEL": f"JOB_CANCEL::{ID}",
    "TRAINING_COMPLETE": "TRAINING_COMPLETE",
    "INFERENCE_COMPLETE": "INFERENCE_COMPLETE",
    "JOB_RESULTS": f'JOB_RESULTS::{ID}::{{"files":[{{"path":"a","size":1}}]}}',
    "JOB_COMPLETE": f"JOB_COMPLETE::{ID}::jobs/{ID}/models",
    "JOB_FAILED": f"JOB_FAILED::{ID}::the command failed",
    "RESULTS_RECEIVED": f"RESULTS_RECEIVED::{ID}",
}


def test_every_message_has_an_example() -> None:
    assert list(GOOD) == list(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_a_good_text_is_decoded_and_encoded_again(name: str) -> None:
    message = decode_message_untrusted(GOOD[name])
    assert type(message) is TABLE[name]
    assert encode_message(message) == GOOD[name]
    assert decode_message_untrusted(GOOD[name].encode()) == message


LETTERS = st.characters(exclude_categories=["Cs"])
TEXT = st.text(LETTERS)


def messages_of(cls: type[Message]) -> st.SearchStrategy[Message]:
    """Return a strategy for messages with any values that their fields allow."""
    fields = msgspec.structs.fields(cls)
    strategies = {field.name: values_of(field.type) for field in fields}
    return st.builds(cls, **strategies)


def values_of(annotation: object) -> st.SearchStrategy[object]:
    """Return a strategy for the values of a field type, by its msgspec description."""
    return _values(msgspec.inspect.type_info(annotation))


def _values(info: msgspec.inspect.Type) -> st.SearchStrategy[object]:
    match info:
        case msgspec.inspect.IntType(ge=least, le=most):
            return st.integers(least, most)
        case msgspec.inspect.StrType(pattern=str(pattern)):
            return st.from_regex(pattern)
        case msgspec.inspect.StrType(min_length=least, max_length=most):
            return st.text(LETTERS, min_size=least or 0, max_size=min(most or 50, 50))
        case msgspec.inspect.LiteralType(values=values):
            return st.sampled_from(values)
        case msgspec.inspect.BoolType():
            return st.booleans()
        case msgspec.inspect.VarTupleType(item_type=item):
            return st.lists(_values(item), max_size=4).map(tuple)
        case msgspec.inspect.StructType(cls=cls, fields=fields):
            strategies = {field.name: _values(field.type) for field in fields}
            return st.builds(cls, **strategies)
        case _:
            raise AssertionError(f"no values for {info}")


ANY_MESSAGE = st.one_of([messages_of(cls) for cls in TABLE.values()])


@given(ANY_MESSAGE)
def test_every_message_survives_the_wire(message: Message) -> None:
    text = encode_message(message)
    assert decode_message_untrusted(text) == message
    assert decode_message_untrusted(text.encode()) == message


def test_the_flow_of_other_implementations_is_kept_byte_for_byte() -> None:
    job = "job_f3a8b2c1"
    flow: list[tuple[Message, bytes]] = [
        (JobIdentity(job), b"JOB_ID::job_f3a8b2c1"),
        (
            SharedInputPath("jobs/job_f3a8b2c1/training.zip"),
            b"SHARED_INPUT_PATH::jobs/job_f3a8b2c1/training.zip",
        ),
        (PathValidated("input"), b"PATH_VALIDATED::input"),
        (
            SharedOutputPath("jobs/job_f3a8b2c1/models"),
            b"SHARED_OUTPUT_PATH::jobs/job_f3a8b2c1/models",
        ),
        (PathValidated("output"), b"PATH_VALIDATED::output"),
        (SharedStorageJob(), b"SHARED_STORAGE_JOB::start"),
        (TrainingComplete(), b"TRAINING_COMPLETE"),
        (
            JobComplete(job, "jobs/job_f3a8b2c1/models"),
            b"JOB_COMPLETE::job_f3a8b2c1::jobs/job_f3a8b2c1/models",
        ),
    ]
    for message, data in flow:
        assert encode_message(message).encode() == data
        assert decode_message_untrusted(data) == message


# ------------------------------------------------------------------- bad messages


@pytest.mark.parametrize("name", TABLE)
def test_an_error_about_a_missing_field_names_the_message_and_its_fields(
    name: str,
) -> None:
    keys = TABLE[name].__struct_fields__
    text = GOOD[name].rpartition("::")[0] if keys else f"{name}::"
    with pytest.raises(RemoteProtocolError) as caught:
        decode_message_untrusted(text)
    assert caught.value.reason == f"{name} has {len(keys)} fields: {', '.join(keys)}"


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("AUTH::0123::" + DIGEST, "session"),
        (f"AUTH::{NONCE}::{DIGEST.upper()}", "proof"),
        (f"AUTH::{NONCE}::{DIGEST}\n", "proof"),
        ("JOB_ID::job_../../x", "job_id"),
        (f"JOB_ID::{ID}\n", "job_id"),
        (f"JOB_ID::{ID}::more", "job_id"),
        (f"MOUNT_PROBE::{ID}::", "path"),
        (f"MOUNT_PROBE::{ID}::{'x' * 4097}", "path"),
        ("PATH_VALIDATED::INPUT", "which"),
        ("SHARED_STORAGE_JOB::stop", "action"),
        ("CHUNK_GRANT::-1::2::3", "transfer_id"),
        (f"CHUNK_GRANT::{2**32}::2::3", "transfer_id"),
        (f"CHUNK_GRANT::{'9' * 6000}::2::3", "transfer_id"),
        ("CHUNK_GRANT::1_0::2::3", "transfer_id"),
        ("CHUNK_GRANT::1:: 2::3", "first"),
        ("CHUNK_GRANT::1::two::3", "first"),
        ("CHUNK_GRANT::1::2::0", "count"),
        ("CHUNK_GRANT::1::2::3::4", "count"),
        ("CHUNK_GRANT::1::2::", "count"),
        ('FILE_OFFER::1::{"name":"a","size":1}', "chunk_size"),
        ('FILE_OFFER::1::{"name":"a","size":1,"chunk_size":4095}', "file.chunk_size"),
        ('FILE_OFFER::1::{"name":"","size":1,"chunk_size":4096}', "file.name"),
        ('FILE_OFFER::1::{"name":1,"size":1,"chunk_size":4096}', "file.name"),
        ('FILE_OFFER::1::{"name":"a","size":true,"chunk_size":4096}', "file.size"),
        ('FILE_OFFER::1::{"name":"a","size":-1,"chunk_size":4096}', "file.size"),
        ("FILE_OFFER::1::null", "file"),
        ("FILE_OFFER::1::[1]", "file"),
        (f'JOB_STATE::{ID}::{{"state":"SLEEPING"}}', "progress.state"),
        (f'JOB_RESULTS::{ID}::{{"files":[{{"path":""}}]}}', "page.files[0].path"),
    ],
)
def test_a_bad_field_is_named(text: str, field: str) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        decode_message_untrusted(text)
    name = text.partition("::")[0]
    assert caught.value.reason.startswith(f"{name}: ")
    assert field in caught.value.reason


@pytest.mark.parametrize(
    "text",
    [
        "HELLO::",
        "HELLO::{",
        "HELLO::" + GREETING + "x",
        'HELLO::{"protocol":NaN}',
        "HELLO::" + "[" * 60_000,
        'HELLO::{"unknown":' + "[" * 30_000 + "]" * 30_000 + "}",
        "HELLO::" + '{"a":' * 12_000,
    ],
)
def test_broken_or_deep_json_names_the_message(text: str) -> None:
    with pytest.raises(RemoteProtocolError, match=r"^HELLO: "):
        decode_message_untrusted(text)


def test_keys_of_a_newer_peer_are_ignored() -> None:
    newer = GREETING.replace("}", ',"new":{"deeper":[1,2]}}')
    message = decode_message_untrusted(f"HELLO::{newer}")
    assert message == decode_message_untrusted(f"HELLO::{GREETING}")


@pytest.mark.parametrize("name", ["A", "NEW_MESSAGE", "V2_HELLO", "X" * 64])
def test_a_message_of_a_newer_peer_is_unknown_and_not_an_error(name: str) -> None:
    assert decode_message_untrusted(name) == Unknown(name)
    assert decode_message_untrusted(f"{name}::with::fields") == Unknown(name)


@pytest.mark.parametrize(
    "text",
    ["", "::", "::x", "hello::x", "A B::x", "2A", "_A", "É", "A\n", "X" * 65, " ERROR"],
)
def test_a_text_without_a_name_is_not_a_message(text: str) -> None:
    with pytest.raises(RemoteProtocolError, match="no NAME"):
        decode_message_untrusted(text)


@pytest.mark.parametrize(
    "data", [b"ERROR::\xff", b"\x80", b"ERROR::\xed\xa0\x80", "ERROR::\ud800"]
)
def test_bytes_that_are_not_utf_8_are_not_a_message(data: bytes | str) -> None:
    with pytest.raises(RemoteProtocolError, match="UTF-8"):
        decode_message_untrusted(data)


@given(st.one_of(st.text(), st.binary()))
def test_garbage_is_refused_or_unknown(data: str | bytes) -> None:
    try:
        message = decode_message_untrusted(data)
    except RemoteProtocolError:
        return
    assert isinstance(message, Message)


@given(
    name=st.sampled_from(list(TABLE)),
    fields=st.lists(
        st.one_of(TEXT, st.just(ID), st.just("1"), st.just(GREETING)), max_size=5
    ),
)
def test_a_known_name_with_any_fields_is_refused_or_of_that_name(
    name: str, fields: list[str]
) -> None:
    try:
        message = decode_message_untrusted("::".join([name, *fields]))
    except RemoteProtocolError as error:
        reason = error.reason
    else:
        reason = name
        assert type(message) is TABLE[name]
    assert reason.startswith(name)


# ----------------------------------------------------------------------- writing


def test_the_last_field_may_contain_separators() -> None:
    message = JobLog(ID, 1, 2, "::a::b:::")
    assert encode_message(message) == f"JOB_LOG::{ID}::1::2::::a::b:::"
    assert decode_message_untrusted(encode_message(message)) == message


@pytest.mark.parametrize("bad", ["a::b", "::", "a:", ":"])
def test_a_field_that_would_move_a_separator_is_not_encoded(bad: str) -> None:
    with pytest.raises(LocalProtocolError, match="a field of JOB_LOG"):
        encode_message(JobLog(bad, 1, 2, "text"))


def test_the_length_limit_counts_bytes_on_both_sides() -> None:
    longest = MAX_MESSAGE_BYTES - len("ERROR::")
    for letter in ("x", "é"):
        size = len(letter.encode())
        text = letter * (longest // size) + "x" * (longest % size)
        wire = encode_message(Error(text))
        assert len(wire.encode()) == MAX_MESSAGE_BYTES
        assert decode_message_untrusted(wire) == Error(text)
        with pytest.raises(LocalProtocolError, match="over the limit"):
            encode_message(Error(text + "x"))
        for data in (wire + "x", (wire + "x").encode()):
            with pytest.raises(RemoteProtocolError, match="65537 bytes is too long"):
                decode_message_untrusted(data)


def test_a_full_page_of_results_with_long_paths_fits() -> None:
    files = tuple(ResultFile("p" * 255, 2**50) for _ in range(MAX_JOB_RESULTS))
    page = JobResults(ID, ResultPage(files))
    assert decode_message_untrusted(encode_message(page)) == page
    too_many = encode_message(
        JobResults(ID, ResultPage(tuple(ResultFile("p", 1) for _ in range(201))))
    )
    with pytest.raises(RemoteProtocolError, match=r"page\.files"):
        decode_message_untrusted(too_many)


@pytest.mark.parametrize("message", [Unknown("NEW"), Message()])
def test_a_message_outside_the_table_is_not_encoded(message: Message) -> None:
    with pytest.raises(LocalProtocolError, match="is not a wire message"):
        encode_message(message)


def test_text_that_is_not_unicode_is_not_encoded() -> None:
    hello = decode_message_untrusted(GOOD["HELLO"])
    assert isinstance(hello, Hello)
    bad_greeting = msgspec.structs.replace(hello.greeting, hostname="\udcff")
    for message in (PathError("\udcff"), Hello(bad_greeting)):
        with pytest.raises(LocalProtocolError, match="not valid Unicode"):
            encode_message(message)


def test_numbers_are_encoded_in_decimal() -> None:
    assert (
        encode_message(ChunkGrant(2**32 - 1, 0, 1)) == "CHUNK_GRANT::4294967295::0::1"
    )


DECODERS = {
    ClientMessage: decode_client_message_untrusted,
    WorkerMessage: decode_worker_message_untrusted,
}


@pytest.mark.parametrize("direction", DECODERS)
@pytest.mark.parametrize("name", TABLE)
def test_a_message_of_the_wrong_direction_is_refused(
    name: str, direction: UnionType
) -> None:
    decode = DECODERS[direction]
    if TABLE[name] in get_args(direction):
        assert decode(GOOD[name]) == decode_message_untrusted(GOOD[name])
    else:
        with pytest.raises(RemoteProtocolError, match=f"{name} is not sent by"):
            decode(GOOD[name])


def test_every_message_has_a_direction() -> None:
    sent = {*get_args(ClientMessage), *get_args(WorkerMessage)}
    assert sent == {*TABLE.values(), Unknown}
