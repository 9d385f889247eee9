from hypothesis import given
from hypothesis import strategies as st

from sleap_rtc.proto.job.log_history import MAX_HISTORY, LogHistory
from sleap_rtc.proto.messages import JobLog
from tests.proto.job.examples import JOB

LONG = "x" * (MAX_HISTORY // 3 - 200)
"""A text of which the history keeps three, with their overhead."""


def log(sequence: int, line: int, text: str = "epoch") -> JobLog:
    return JobLog(JOB, sequence, line, text)


def test_a_redrawn_line_is_kept_in_its_last_version_and_place() -> None:
    history = LogHistory()
    for message in (log(0, 0, "10%"), log(1, 1), log(2, 0, "20%")):
        history.add(message)
    assert list(history.since(0)) == [log(1, 1), log(2, 0, "20%")]
    assert list(history.since(2)) == [log(2, 0, "20%")]
    assert list(history.since(3)) == []


def test_the_oldest_lines_are_dropped() -> None:
    history = LogHistory()
    for number in range(10):
        history.add(log(number, number, LONG))
    assert [each.line for each in history.since(0)] == [7, 8, 9]


def test_a_line_that_is_redrawn_often_counts_once() -> None:
    history = LogHistory()
    history.add(log(0, 0, "saved"))
    for number in range(1, 100):
        history.add(log(number, 1, LONG))
    assert list(history.since(0)) == [log(0, 0, "saved"), log(99, 1, LONG)]


def test_a_line_over_the_limit_empties_the_history() -> None:
    history = LogHistory()
    history.add(log(0, 0))
    history.add(log(1, 1, "x" * MAX_HISTORY))
    assert list(history.since(0)) == []
    history.add(log(2, 2))
    assert list(history.since(0)) == [log(2, 2)]


def test_many_empty_lines_stay_within_the_limit() -> None:
    history = LogHistory()
    for number in range(20_000):
        history.add(log(number, number, ""))
    assert len(list(history.since(0))) == MAX_HISTORY // 200


@given(st.lists(st.tuples(st.integers(0, 5), st.text(max_size=9)), max_size=40))
def test_a_history_without_its_limit_forgets_old_versions_only(
    lines: list[tuple[int, str]],
) -> None:
    history = LogHistory()
    last: dict[int, str] = {}
    for sequence, (line, text) in enumerate(lines):
        history.add(log(sequence, line, text))
        last[line] = text
    kept = list(history.since(0))
    assert {each.line: each.text for each in kept} == last
    assert [each.sequence for each in kept] == sorted(each.sequence for each in kept)
