"""The codec of the signaling messages."""

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sleap_rtc.proto.errors import LocalProtocolError, RemoteProtocolError
from sleap_rtc.proto.rendezvous.messages import (
    MAX_METADATA_BYTES,
    MAX_SIGNAL_BYTES,
    TABLE,
    AnswerSignal,
    Challenge,
    Comparison,
    DiscoverPeers,
    ErrorSignal,
    Filters,
    Metadata,
    MetadataChange,
    MetadataUpdated,
    OfferSignal,
    PeerInfo,
    PeerList,
    PeerMessage,
    Register,
    RegisteredAuth,
    Signal,
    UnknownSignal,
    UpdateMetadata,
    decode_peer_signal_untrusted,
    decode_server_signal_untrusted,
    decode_signal_untrusted,
    encode_signal,
    metadata_fits,
)

ROOM = "0" * 32
METADATA = Metadata(("t",), {"a": 1, "b": [True, None, "x", 0.5]})

EXAMPLES: list[tuple[Signal, dict[str, object]]] = [
    (Challenge(b"n" * 16), {"nonce": "bm5ubm5ubm5ubm5ubm5ubg=="}),
    (
        Register("me", ROOM, "worker", b"p", b"s", METADATA),
        {"peer_id": "me", "room_id": ROOM, "role": "worker", "public_key": "cA=="},
    ),
    (RegisteredAuth(ROOM, "me"), {"room_id": ROOM, "peer_id": "me"}),
    (
        DiscoverPeers(
            "me", Filters("worker", ("t",), {"a": Comparison(1, 2, 1), "b": False})
        ),
        {
            "from_peer_id": "me",
            "filters": {
                "role": "worker",
                "tags": ["t"],
                "properties": {"a": {"$gte": 1, "$lte": 2, "$eq": 1}, "b": False},
            },
        },
    ),
    (
        PeerList("me", (PeerInfo("you", "worker", METADATA),), 1),
        {"to_peer_id": "me", "count": 1},
    ),
    (OfferSignal("me", "you", "..."), {"sender": "me", "target": "you", "sdp": "..."}),
    (AnswerSignal("me", "you", "..."), {"sender": "me", "target": "you", "sdp": "..."}),
    (
        PeerMessage("me", "you", msgspec.Raw(b'{"x":[1]}')),
        {"from_peer_id": "me", "to_peer_id": "you", "payload": {"x": [1]}},
    ),
    (
        UpdateMetadata("me", MetadataChange({"a": 2})),
        {"peer_id": "me", "metadata": {"properties": {"a": 2}}},
    ),
    (MetadataUpdated("me", METADATA), {"peer_id": "me"}),
    (ErrorSignal("CODE", "why"), {"code": "CODE", "reason": "why"}),
]


def test_every_message_has_an_example() -> None:
    assert {type(signal) for signal, _ in EXAMPLES} == set(TABLE.values())


@pytest.mark.parametrize(("signal", "fields"), EXAMPLES)
def test_a_message_survives_the_trip(signal: Signal, fields: dict[str, object]) -> None:
    text = encode_signal(signal)
    assert decode_signal_untrusted(text) == signal
    content = json.loads(text)
    assert TABLE[content["type"]] is type(signal)
    assert fields.items() <= content.items()


@pytest.mark.parametrize(("signal", "fields"), EXAMPLES)
def test_unknown_keys_are_ignored(signal: Signal, fields: dict[str, object]) -> None:
    content = json.loads(encode_signal(signal))
    longer = json.dumps(content | {"of_tomorrow": [1, {"x": 2}]})
    assert json.loads(encode_signal(decode_signal_untrusted(longer))) == content


@pytest.mark.parametrize(("signal", "fields"), EXAMPLES)
def test_a_missing_field_is_named(signal: Signal, fields: dict[str, object]) -> None:
    content = json.loads(encode_signal(signal))
    optional = (
        {"metadata", "filters"}
        if not isinstance(signal, UpdateMetadata | MetadataUpdated)
        else set()
    )
    for key in content.keys() - {"type"} - optional:
        rest = json.dumps({k: v for k, v in content.items() if k != key})
        with pytest.raises(RemoteProtocolError, match=key):
            decode_signal_untrusted(rest)


def test_each_direction_has_its_messages() -> None:
    for signal, _ in EXAMPLES:
        text = encode_signal(signal)
        ignored = UnknownSignal(json.loads(text)["type"])
        received: list[Signal] = [
            decode_peer_signal_untrusted(text),
            decode_server_signal_untrusted(text),
        ]
        if isinstance(signal, OfferSignal | AnswerSignal | PeerMessage):
            assert received == [signal, signal]
        else:
            assert received in ([signal, ignored], [ignored, signal])


def test_a_message_of_a_newer_version_is_unknown() -> None:
    assert decode_signal_untrusted('{"type":"ping"}') == UnknownSignal("ping")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{}",
        '{"type":3}',
        '{"type":""}',
        '{"type":"offer"}',
        '{"type":"offer","sender":"a b","target":"c","sdp":""}',
        '{"type":"offer","sender":"../x","target":"c","sdp":""}',
        '{"type":"challenge","nonce":"AAAA"}',
        '{"type":"challenge","nonce":"?"}',
        '{"type":"update_metadata","peer_id":"a","metadata":{"properties":{"x":{}}}}',
        '{"type":"update_metadata","peer_id":"a","metadata":{"properties":{"x":[[]]}}}',
        '{"type":"update_metadata","peer_id":"a","metadata":{"properties":{"x":1e999}}}',
        '{"type":"update_metadata","peer_id":"a",'
        '"metadata":{"properties":{"x":' + "9" * 5000 + "}}}",
        '{"type":"discover_peers","from_peer_id":"a",'
        '"filters":{"properties":{"x":{"$regex":"a"}}}}',
        '{"type":"peer_message","from_peer_id":"a","to_peer_id":"b","payload":'
        + "[" * 20_000
        + "]" * 20_000
        + "}",
        "[" * 60_000,
        '{"type":"offer","sender":"a","target":"b","sdp":"\\ud800"}',
        "\ud800",
    ],
)
def test_a_bad_message_is_the_peers_fault(text: str) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        decode_signal_untrusted(text)
    assert len(caught.value.reason) <= 300


@given(
    st.text()
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner)
        | st.dictionaries(
            st.sampled_from(["type", "sender", "metadata", "peer_id", "x"]), inner
        ),
    ).map(json.dumps)
)
def test_garbage_is_the_peers_fault(text: str) -> None:
    try:
        decode_signal_untrusted(text)
    except RemoteProtocolError:
        pass


def test_the_longest_message_is_accepted_and_a_longer_one_is_not() -> None:
    frame = '{"type":"of_tomorrow","x":""}'
    full = frame.replace('""', '"' + "x" * (MAX_SIGNAL_BYTES - len(frame)) + '"')
    assert decode_signal_untrusted(full) == UnknownSignal("of_tomorrow")
    with pytest.raises(RemoteProtocolError, match="too long"):
        decode_signal_untrusted(full + " ")
    # The limit is in bytes, whatever a character takes.
    with pytest.raises(RemoteProtocolError, match="too long"):
        decode_signal_untrusted("é" * (MAX_SIGNAL_BYTES // 2 + 1))


def test_a_value_that_json_lacks_is_our_own_fault() -> None:
    with pytest.raises(LocalProtocolError):
        encode_signal(ErrorSignal("X", "\ud800"))


def test_metadata_has_a_limit() -> None:
    empty = len(msgspec.json.encode(Metadata((), {"x": ""})))
    assert metadata_fits(Metadata((), {"x": "y" * (MAX_METADATA_BYTES - empty)}))
    assert not metadata_fits(
        Metadata((), {"x": "y" * (MAX_METADATA_BYTES - empty + 1)})
    )
