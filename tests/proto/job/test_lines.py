"""The output of a program, as numbered lines."""

import random
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sleap_rtc.proto.job.lines import (
    CUT_MARK,
    MAX_LINE_BYTES,
    REACH,
    REDRAW_INTERVAL,
    LineAssembler,
    LineEvent,
)
from sleap_rtc.proto.terminal import printable

# The caching bars and the training loop of a real run of sleap-nn 0.3.5.
RECORDING = Path(__file__).parents[2] / "data" / "train_output.raw"


def feed(chunks: Iterable[bytes], step: float = 0.0) -> list[LineEvent]:
    """Assemble chunks that come `step` seconds apart."""
    assembler = LineAssembler()
    events: list[LineEvent] = []
    last_versions: list[str] = []
    now = 0.0
    for chunk in chunks:
        events += assembler.receive_data(chunk, now)
        last_versions += assembler.take_final()
        now += step
    events += assembler.finish(now)
    last_versions += assembler.take_final()
    assert last_versions == list(final(events).values())
    return events


def final(events: Iterable[LineEvent]) -> dict[int, str]:
    """Return the last text of each line."""
    return {event.line: event.text for event in events}


def texts(data: bytes) -> list[str]:
    lines = final(feed([data]))
    assert list(lines) == sorted(lines)
    return list(lines.values())


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", []),
        (b"one\ntwo\n", ["one", "two"]),
        (b"one\r\ntwo\r\n", ["one", "two"]),
        (b"no end", ["no end"]),
        (b"\n\nthird", ["", "", "third"]),
        (b"10%\r20%\r30%\ndone\n", ["30%", "done"]),
        (b"\r10%\r20%", ["20%"]),
        (b"long text\rab\n", ["ab"]),
        (b"text\r\x1b[2Kother\n", ["other"]),
        (b"text\x1b[K\n", ["text"]),
        (b"text\r\x1b[K\n", [""]),
        (b"\x1b[32mgreen\x1b[0m\tand tab\n", ["green\tand tab"]),
        (b"\x1b]0;title\x07text\x1b]8;;http://x\x1b\\link\n", ["textlink"]),
        (b"\x1b]0;never ended\nnext\n", ["", "next"]),
        (b"a\x00b\x07c\x08\x7f\n", ["abc"]),
        ("\x9b31mred \x85é\n".encode(), ["red é"]),
        (b"padding   \n", ["padding"]),
        (b"\xff\xfe bytes\n", ["\ufffd\ufffd bytes"]),
        (b"cut \xe2\x96", ["cut \ufffd"]),
        (b"up\nover\x1b[A\rnew\n", ["new", "over"]),
        (b"a\nb\nc\x1b[2Atop\n", ["top", "b", "c"]),
        (b"one\x1b[99A\rtwo", ["two"]),
    ],
)
def test_output_becomes_the_lines_that_a_terminal_would_show(
    data: bytes, expected: list[str]
) -> None:
    assert texts(data) == expected


def test_nested_bars_redraw_their_own_lines() -> None:
    output = [
        b"log\n",
        b"Epoch 1\nvalidate 1\x1b[A\rEpoch 1 50%",
        b"\n\rvalidate 2\x1b[A\rEpoch 1 100%",
        b"\n          \x1b[A\r",
    ]
    assert feed(output, step=1.0) == [
        LineEvent(1, "log"),
        LineEvent(2, "Epoch 1"),
        LineEvent(2, "Epoch 1 100%"),
        LineEvent(3, "validate 2"),
        LineEvent(3, ""),
    ]


def test_a_recording_of_sleap_nn_gives_the_text_of_its_terminal() -> None:
    lines = texts(RECORDING.read_bytes())
    assert [line for line in lines if "Cach" in line or "Epoch" in line] == [
        "2026-11-23 12:56:13 | Caching 1 images to memory...",
        "2026-11-23 12:56:13 | Caching complete.",
        "2026-11-23 12:56:13 | Caching 1 images to memory...",
        "2026-11-23 12:56:13 | Caching complete.",
        "Epoch 2: 100%|██████████| 10/10 "
        "[00:00<00:00, 27.38it/s, loss=0.0073, val/loss=0.0072]",
    ]
    assert not [line for line in lines if "Validation" in line]
    assert lines[-1].startswith("2026-11-23 12:56:15 | Total training time: 1.57")


def test_the_cuts_of_a_recording_never_matter() -> None:
    data = RECORDING.read_bytes()
    whole = final(feed([data]))
    assert final(feed(data[i : i + 1] for i in range(len(data)))) == whole
    for seed in range(20):
        assert final(feed(cut(data, random.Random(seed)), step=0.03)) == whole


def cut(data: bytes, rng: random.Random) -> Iterable[bytes]:
    while data:
        size = rng.choice((1, 2, 7, 60, 500, 5000))
        yield data[:size]
        data = data[size:]


PIECES = st.sampled_from(
    [
        b"a",
        b"text",
        b" ",
        b"\r",
        b"\n",
        b"\t",
        b"\x1b",
        b"[",
        b"A",
        b"2K",
        b"\x1b[A",
        b"\x1b]",
        b"\\",
        b"\x07",
        b";0",
        b"\xc2",
        b"\x9b",
        b"\xe2\x96\x88",
        b"\xff",
    ]
)


@settings(max_examples=300, deadline=None)
@given(
    data=st.one_of(st.lists(PIECES, max_size=60).map(b"".join), st.binary()),
    seed=st.integers(0, 2**32),
)
def test_cuts_never_matter_and_no_control_gets_through(data: bytes, seed: int) -> None:
    whole = feed([data])
    cuts = cut(data, random.Random(seed))
    assert final(feed(cuts)) == final(whole)
    assert sorted(final(whole)) == list(range(1, len(final(whole)) + 1))
    for event in whole:
        assert printable(event.text) == event.text


def test_line_numbers_have_no_gaps_and_continue_after_the_end() -> None:
    assembler = LineAssembler()
    events = assembler.receive_data(b"one\ntwo", 0.0)
    events += assembler.finish(0.0)
    assert assembler.next_line == 3
    # Later output cannot redraw the lines of the program before.
    events += assembler.receive_data(b"\x1b[Athree\n", 0.0)
    assert events == [LineEvent(1, "one"), LineEvent(2, "two"), LineEvent(3, "three")]
    assert assembler.finish(0.0) == []
    assert assembler.next_line == 4


def test_redraws_are_delivered_ten_times_a_second_and_the_last_one_always() -> None:
    assembler = LineAssembler()
    events: list[LineEvent] = []
    for i in range(1000):
        events += assembler.receive_data(f"\rstep {i}".encode(), i / 1000)
    assert 8 <= len(events) <= 10
    deadline = assembler.deadline()
    assert deadline is not None
    assert 0.999 < deadline <= 0.999 + REDRAW_INTERVAL
    assert assembler.handle_timeout(deadline - 0.001) == []
    assert assembler.handle_timeout(deadline) == [LineEvent(1, "step 999")]
    assert assembler.deadline() is None
    assert assembler.handle_timeout(deadline + 9) == []


def test_a_finished_line_comes_at_once_and_a_redrawn_one_later() -> None:
    assembler = LineAssembler()
    assert assembler.receive_data(b"old\n", 0.0) == [LineEvent(1, "old")]
    assert assembler.receive_data(b"\x1b[Anew\n", 0.0) == []
    assert assembler.deadline() == REDRAW_INTERVAL
    assert assembler.handle_timeout(REDRAW_INTERVAL) == [LineEvent(1, "new")]


def test_a_line_that_was_erased_is_delivered_again_as_empty() -> None:
    assembler = LineAssembler()
    assert assembler.receive_data(b"text\n", 0.0) == [LineEvent(1, "text")]
    assert assembler.receive_data(b"\x1b[A\r\x1b[K", 1.0) == []
    assert assembler.deadline() == 1.0 + REDRAW_INTERVAL
    assert assembler.handle_timeout(1.0 + REDRAW_INTERVAL) == [LineEvent(1, "")]


def test_an_unchanged_redraw_is_not_delivered() -> None:
    assembler = LineAssembler()
    assembler.receive_data(b"same\n", 0.0)
    assembler.receive_data(b"\x1b[Asame\n", 0.0)
    assert assembler.finish(1.0) == []


def test_a_line_out_of_reach_is_delivered_and_stays() -> None:
    assembler = LineAssembler()
    assembler.receive_data(b"old\n\x1b[Anew\n", 0.0)
    events = assembler.receive_data(b"x\n" * REACH, 0.0)
    assert LineEvent(1, "new") in events
    climbed = assembler.receive_data(b"\x1b[500Atop", 0.0) + assembler.finish(0.0)
    assert climbed == [LineEvent(3, "top")]


def test_a_long_line_is_cut_and_marked() -> None:
    size = MAX_LINE_BYTES
    assert texts(b"a" * size + b"\nb") == ["a" * size, "b"]
    assert texts(b"a" * (size + 1) + b"\nb") == ["a" * size + CUT_MARK, "b"]
    block = "█".encode()
    (line,) = texts(block * size)
    assert line == "█" * (size // 3) + CUT_MARK


def test_a_long_line_has_room_again_after_it_was_erased() -> None:
    size = MAX_LINE_BYTES
    assert texts(b"a" * (size + 1) + b"\r" + b"b" * size + b"\n") == ["b" * size]


def test_an_endless_line_takes_no_memory() -> None:
    assembler = LineAssembler()
    events = [
        event
        for i in range(200)
        for event in assembler.receive_data(b"x" * 65536, i * 0.05)
    ]
    assert events == [LineEvent(1, "x" * MAX_LINE_BYTES + CUT_MARK)]
    for opening in (b"\x1b]", b"\x1bP", b"\x1b["):
        assembler = LineAssembler()
        for _ in range(200):
            assembler.receive_data(opening + b"1" * 5000, 0.0)
            assert len(assembler._held) < 5200


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain, é and 日本語", "plain, é and 日本語"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;owned\x07safe", "safe"),
        ("\x1bcreset", "reset"),
        ("two\r\nlines\x85and\u2028more", "two lines and more"),
        ("tab\there", "tab\there"),
        ("gnp.\u202egpj.exe", "gnp.gpj.exe"),
        ("half \ud800", "half \ufffd"),
        ("\x00\x08\x7f\x9b2Jx", "x"),
    ],
)
def test_text_of_a_peer_is_safe_to_print(text: str, expected: str) -> None:
    assert printable(text) == expected


@given(st.text())
def test_printable_text_stays_unchanged(text: str) -> None:
    once = printable(text)
    assert printable(once) == once
    once.encode()
    assert not any(char != "\t" and not char.strip("\x1b\r\n\x9b") for char in once)


def test_a_line_is_final_once_it_is_out_of_reach() -> None:
    assembler = LineAssembler()
    assembler.receive_data(b"drawn\n" + b"\n" * (REACH - 2), 0.0)
    assert assembler.take_final() == []
    up = b"\x1b[%dA" % (REACH - 1)
    assembler.receive_data(up + b"\rdrawn again\n" + b"\n" * (REACH - 2), 0.0)
    assert assembler.take_final() == []
    assembler.receive_data(b"\n", 0.0)
    assert assembler.take_final() == ["drawn again"]
