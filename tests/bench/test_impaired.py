"""The sweep over paths with delay and loss, once and short."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.impaired import warm_rate
from bench.link_end import Span
from bench.processes import python_module

COMMAND = python_module("bench.impaired")
DEADLINE = 100.0


def sweep(*options: str) -> "subprocess.CompletedProcess[str]":
    command = [*COMMAND, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)


@pytest.mark.skipif(sys.platform == "win32", reason="the proxy needs recvmsg(2)")
def test_each_link_is_measured_on_each_path(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    found = sweep(
        *("--kinds", "tcp,quic:reno", "--rtt", "20", "--loss", "0,0.5"),
        *("--seconds", "1.5", "--warm", "0.5", "--json", str(report)),
    )
    assert found.returncode == 0, found.stderr
    cells = {
        (cell["way"]["kind"], cell["rtt"], cell["loss"]): cell
        for cell in json.loads(report.read_bytes())
    }
    assert set(cells) == {
        ("tcp", 0.0, 0.0),
        ("tcp", 0.02, 0.0),
        ("quic", 0.0, 0.0),
        ("quic", 0.02, 0.0),
        ("quic", 0.02, 0.005),
    }
    assert all(cell["rate"] > 0 for cell in cells.values())
    # A slow machine may send too few datagrams to lose one.
    assert not any(cell["lost"] for (_, _, loss), cell in cells.items() if not loss)
    assert "quic reno" in found.stdout
    assert "20 ms" in found.stdout


def test_unknown_links_are_refused() -> None:
    found = sweep("--kinds", "carrier-pigeon")
    assert found.returncode == 2
    assert "is not a kind of link" in found.stderr


@pytest.mark.parametrize(
    ("arrivals", "rate"),
    [
        ([(0.5, 100), (1.0, 200), (2.0, 500), (3.0, 700)], 250.0),
        ([(0.5, 100), (1.0, 200)], 0.0),
        ([(0.5, 100)], 0.0),
        ([(1.0, 100), (1.0, 200)], 0.0),
        ([], 0.0),
    ],
)
def test_only_late_arrivals_count(
    arrivals: list[tuple[float, int]], rate: float
) -> None:
    assert warm_rate(arrivals, warm=1.0) == rate


@pytest.mark.parametrize(
    ("arrivals", "is_over"),
    [
        ([], False),
        ([(2.5, 100)], False),
        ([(0.5, 100), (2.5, 200)], False),
        ([(1.0, 100), (1.5, 200)], False),
        ([(1.0, 100), (2.0, 200)], True),
        ([(2.5, 100), (2.5, 200)], False),
        ([(2.5, 100), (9.5, 200)], True),
    ],
)
def test_a_link_is_measured_until_there_is_a_rate(
    arrivals: list[tuple[float, int]], is_over: bool
) -> None:
    span = Span(seconds=2.0, warm=1.0)
    assert span.is_over(arrivals) is is_over
    assert not is_over or warm_rate(arrivals, span.warm) > 0
