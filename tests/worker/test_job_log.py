"""The file with the output of a job."""

from pathlib import Path

import pytest

from sleap_rtc.proto.job.lines import LineAssembler, LineEvent
from sleap_rtc.worker.job_log import LOG_NAME, open_job_log


async def test_a_line_that_comes_during_a_write_is_written_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_final = LineAssembler.take_final
    events: list[LineEvent] = []
    async with open_job_log(tmp_path, events.append) as log:

        def take_while_a_thread_writes(assembler: LineAssembler) -> list[str]:
            lines = take_final(assembler)
            log._write()
            return lines

        monkeypatch.setattr(LineAssembler, "take_final", take_while_a_thread_writes)
        for number in range(100):  # only older lines can no longer be redrawn
            log.note(f"line {number}")
    written = (tmp_path / LOG_NAME).read_text().splitlines()
    assert written == [f"line {number}" for number in range(100)]
