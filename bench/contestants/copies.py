"""Plain copies on one file system, each followed by an fsync.

The shared route also ends with an fsync, so all of them promise the same.
"""

import os
import shutil
import time
from collections.abc import Callable
from functools import partial

from bench.files import take_away
from bench.measures import MEBIBYTE, Absent, Contestant, Load, Sample, Usage
from bench.processes import patience, run_tool


def copies(load: Load) -> list[Contestant | Absent]:
    """Make a contestant of every program that copies files, and of `shutil.copy2`."""
    source, target = str(load.path), str(load.arrived)
    commands = {
        "cp": ("cp", source, target),
        "dd": ("dd", f"if={source}", f"of={target}", f"bs={MEBIBYTE}"),
        # Without --whole-file it would compare the file with an older one.
        "rsync": ("rsync", "--whole-file", source, target),
    }
    return [
        *(_tool(load, name, command) for name, command in commands.items()),
        Contestant("shutil.copy2 + fsync", partial(_measure, load, _copy2)),
    ]


def _tool(load: Load, name: str, command: tuple[str, ...]) -> Contestant | Absent:
    shown = f"{name} + fsync"
    if shutil.which(name) is None:
        return Absent(shown, f"{name} is not installed")

    def copy(load: Load) -> Usage:
        return run_tool(command, timeout=patience(load.size))[1]

    return Contestant(shown, partial(_measure, load, copy))


def _copy2(load: Load) -> Usage:
    began = sum(os.times()[:2])
    shutil.copy2(load.path, load.arrived)
    return Usage(round(sum(os.times()[:2]) - began, 3))


def _measure(load: Load, copy: Callable[[Load], Usage]) -> Sample:
    began = time.monotonic()
    usage = copy(load)
    with load.arrived.open("rb") as file:
        os.fsync(file.fileno())
    seconds = time.monotonic() - began
    return Sample(round(seconds, 4), is_intact=take_away(load), sender=usage)
