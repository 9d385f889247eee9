"""An instrument of Trio's that finds what blocks the event loop.

Between two steps of a task the loop can serve anybody; within one it serves nobody
else. On a machine that others use, too, the time on a clock says little about a step:
the thread may just have had to wait for a core. So a step is `busy` for as long as its
thread computed, plus as long as it slept in a call that blocks. What does not count is
told apart: waiting for a core, for the lock of the interpreter, and collecting garbage.
"""

import gc
import heapq
import os
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

import msgspec
import trio

LIMIT = 0.010
"""Seconds for which a step may block the loop."""

KEPT = 12
"""Steps that are told about: those that were busy longest."""

SWITCH_INTERVAL = 0.0005
"""Seconds for which a thread waits in one piece for the lock of the interpreter. Short
naps are thereby known to be such waits, and a long one to be a call that blocks."""

_SAMPLE = 0.005
"""Seconds between two looks at where the loop is."""


class Step(msgspec.Struct, frozen=True):
    """One step of a task; times are in seconds.

    Args:
        busy: For how long it blocked the loop: it computed, or slept.
        computed: Processor time of the thread, without the collection of garbage.
        slept: In calls that block.
        naps: How often the thread went to sleep.
        wall: On the clock.
        task: The name of the task.
        place: Where it was when it had taken long, or where it stopped.
    """

    busy: float
    computed: float
    slept: float
    naps: int
    wall: float
    task: str
    place: str


class Findings(msgspec.Struct, frozen=True):
    """What an instrument has found; times are in seconds.

    Args:
        steps: How many there were.
        p999: 99.9 % of them were busy no longer.
        worst: Those that were busy longest, the longest first.
        collection: The longest that garbage was collected in one piece, by any thread.
        lock_wait: The longest that one step waited for the lock of the interpreter.
    """

    steps: int
    p999: float
    worst: list[Step]
    collection: float
    lock_wait: float

    def blocking(self, limit: float = LIMIT) -> list[Step]:
        """Return the steps that blocked the loop for too long."""
        return [step for step in self.worst if step.busy > limit]


class LoopWatch(trio.abc.Instrument):
    """Watches each step of each task of one run; Linux only.

    Give it to `trio.run`, and ask for the findings once that has returned.

    Args:
        switch_interval: What `sys.setswitchinterval` is set to for the run.
    """

    def __init__(self, switch_interval: float = SWITCH_INTERVAL) -> None:
        self._switch_interval = switch_interval
        self._switch_interval_before = switch_interval
        self._account: _Account | None = None
        self._before = _Moment(0.0, 0.0, 0.0, 0)
        self._stepping = False
        self._place = ""
        self._busy: list[float] = []
        self._worst: list[tuple[float, int, Step]] = []
        self._lock_wait = 0.0
        self._collecting_since = 0.0
        self._collected = 0.0
        self._collection = 0.0
        self._loop_thread = 0
        self._over = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    def findings(self) -> Findings:
        """Say what was found."""
        ordered = sorted(self._busy)
        return Findings(
            steps=len(ordered),
            p999=ordered[len(ordered) * 999 // 1000] if ordered else 0.0,
            worst=[step for _, _, step in sorted(self._worst, reverse=True)],
            collection=self._collection,
            lock_wait=self._lock_wait,
        )

    # ------------------------------------------------------------- what Trio tells

    def before_run(self) -> None:
        """Begin to watch the thread that the loop runs in."""
        self._loop_thread = threading.get_ident()
        self._account = _Account()
        self._switch_interval_before = sys.getswitchinterval()
        sys.setswitchinterval(self._switch_interval)
        gc.callbacks.append(self._collects)
        self._sampler.start()

    def after_run(self) -> None:
        """Leave everything as it was."""
        self._over.set()
        self._sampler.join()
        gc.callbacks.remove(self._collects)
        sys.setswitchinterval(self._switch_interval_before)
        if self._account is not None:
            self._account.close()

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        """Note when a step begins."""
        if self._account is not None:
            self._place, self._collected = "", 0.0
            self._before = self._account.now()
            self._stepping = True

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        """Find out what a step has used."""
        self._stepping = False
        if self._account is None:
            return
        before, now = self._before, self._account.now()
        wall = now.wall - before.wall
        computed = max(0.0, now.computed - before.computed - self._collected)
        off_core = wall - (now.computed - before.computed)
        # A thread that never let go of its core can still lose it to another machine.
        naps = now.naps - before.naps
        asleep = max(0.0, off_core - (now.queued - before.queued)) if naps else 0.0
        # Each nap for the lock wakes up after an interval, or a little later.
        slept = max(0.0, asleep - naps * 2 * self._switch_interval)
        self._lock_wait = max(self._lock_wait, asleep - slept)
        busy = computed + slept
        self._busy.append(busy)
        if len(self._worst) < KEPT or busy > self._worst[0][0]:
            place = self._place or _end_of(task)
            step = Step(busy, computed, slept, naps, wall, task.name, place)
            heapq.heappush(self._worst, (busy, len(self._busy), step))
            if len(self._worst) > KEPT:
                heapq.heappop(self._worst)

    # ------------------------------------------------------------------- the rest

    def _collects(self, phase: str, _details: dict[str, int]) -> None:
        """Take off a step what the collection of garbage takes."""
        if phase == "start":
            self._collecting_since = time.thread_time()
            return
        took = time.thread_time() - self._collecting_since
        self._collection = max(self._collection, took)
        if threading.get_ident() == self._loop_thread:
            self._collected += took

    def _sample(self) -> None:
        """Note where a step is that has taken long already."""
        while not self._over.wait(_SAMPLE):
            began = self._before.wall
            if self._stepping and time.perf_counter() - began > LIMIT / 2:
                frame = sys._current_frames().get(self._loop_thread)
                if frame is not None and self._before.wall == began:
                    self._place = self._place or _place_of(frame)


class _Moment(msgspec.Struct, frozen=True):
    """What a thread has used until now: seconds, and how often it went to sleep."""

    wall: float
    computed: float
    queued: float
    naps: int


class _Account:
    """What the kernel knows of the thread that makes it."""

    def __init__(self) -> None:
        import resource  # it is not there on Windows

        self._usage: Callable[[int], resource.struct_rusage] = resource.getrusage
        self._thread = resource.RUSAGE_THREAD
        path = f"/proc/self/task/{threading.get_native_id()}/schedstat"
        self._statistics = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def now(self) -> _Moment:
        """Ask it."""
        # Its second number: nanoseconds of waiting for a core.
        queued = int(os.pread(self._statistics, 64, 0).split()[1]) / 1e9
        naps = self._usage(self._thread).ru_nvcsw
        return _Moment(time.perf_counter(), time.thread_time(), queued, naps)

    def close(self) -> None:
        """Ask it no more."""
        os.close(self._statistics)


def _place_of(frame: FrameType) -> str:
    """Name the innermost function of a stack, and who called it."""
    names: list[str] = []
    caller: FrameType | None = frame
    while caller is not None and len(names) < 4:
        code = caller.f_code
        file = os.path.basename(code.co_filename)
        names.append(f"{file}:{caller.f_lineno} {code.co_name}")
        caller = caller.f_back
    return " < ".join(names)


def _end_of(task: trio.lowlevel.Task) -> str:
    """Name the functions in which a task waits now."""
    frames = list(task.iter_await_frames())[-4:]
    return "until " + " < ".join(
        f"{os.path.basename(frame.f_code.co_filename)}:{line} {frame.f_code.co_name}"
        for frame, line in reversed(frames)
    )
