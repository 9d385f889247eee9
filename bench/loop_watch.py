"""An instrument of Trio's that finds calls that block the event loop.

The loop can switch to another task between two steps, but not within one. On a shared
machine, wall time does not measure a step: the thread may just have waited for a core.
So a step is `busy` for the time that its thread computed plus the time that it slept in
a call that blocks. Waiting for a core, waiting for the lock of the interpreter, and
garbage collection do not count.
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
from typing_extensions import override

LIMIT = 0.010
"""Seconds for which a step may block the loop."""

KEPT = 12
"""Steps that are kept: those that were busy longest."""

SWITCH_INTERVAL = 0.0005
"""Seconds for which a thread waits in one piece for the lock of the interpreter. It
separates short naps, which are such waits, from a long one, which is a call that
blocks."""

_SAMPLE = 0.005
"""Seconds between two samples of the loop's place in the code."""


class Step(msgspec.Struct, frozen=True):
    """One step of a task; times are in seconds.

    Args:
        busy: Time for which it blocked the loop: it computed, or slept.
        computed: Processor time of the thread, without garbage collection.
        slept: Time in calls that block.
        naps: Number of times that the thread went to sleep.
        wall: Time on the clock.
        task: The name of the task.
        place: Its place in the code after it had taken long, or at its end.
    """

    busy: float
    computed: float
    slept: float
    naps: int
    wall: float
    task: str
    place: str


class Findings(msgspec.Struct, frozen=True):
    """Findings of an instrument; times are in seconds.

    Args:
        steps: Number of steps.
        p999: Busy time that 99.9 % of the steps did not exceed.
        worst: The steps that were busy longest, the longest first.
        collection: The longest garbage collection in one piece, by any thread.
        lock_wait: The longest wait of one step for the lock of the interpreter.
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

    Pass it to `trio.run`, and read the findings after that has returned.

    Args:
        switch_interval: Argument of `sys.setswitchinterval` during the run.
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
        """Return the findings."""
        ordered = sorted(self._busy)
        return Findings(
            steps=len(ordered),
            p999=ordered[len(ordered) * 999 // 1000] if ordered else 0.0,
            worst=[step for _, _, step in sorted(self._worst, reverse=True)],
            collection=self._collection,
            lock_wait=self._lock_wait,
        )

    # ------------------------------------------------------------- what Trio calls

    @override
    def before_run(self) -> None:
        """Start to watch the thread of the loop."""
        self._loop_thread = threading.get_ident()
        self._account = _Account()
        self._switch_interval_before = sys.getswitchinterval()
        sys.setswitchinterval(self._switch_interval)
        gc.callbacks.append(self._collects)
        self._sampler.start()

    @override
    def after_run(self) -> None:
        """Stop watching, and restore the settings."""
        self._over.set()
        self._sampler.join()
        gc.callbacks.remove(self._collects)
        sys.setswitchinterval(self._switch_interval_before)
        if self._account is not None:
            self._account.close()

    @override
    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        """Record the start of a step."""
        if self._account is not None:
            self._place, self._collected = "", 0.0
            self._before = self._account.now()
            self._stepping = True

    @override
    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        """Record the time that a step has used."""
        self._stepping = False
        if self._account is None:
            return
        before, now = self._before, self._account.now()
        wall = now.wall - before.wall
        computed = max(0.0, now.computed - before.computed - self._collected)
        off_core = wall - (now.computed - before.computed)
        # A thread that never gave up its core can still lose it to another machine.
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
        """Subtract the time of a garbage collection from its step."""
        if phase == "start":
            self._collecting_since = time.thread_time()
            return
        took = time.thread_time() - self._collecting_since
        self._collection = max(self._collection, took)
        if threading.get_ident() == self._loop_thread:
            self._collected += took

    def _sample(self) -> None:
        """Record the place of a step that has taken long already."""
        while not self._over.wait(_SAMPLE):
            began = self._before.wall
            if self._stepping and time.perf_counter() - began > LIMIT / 2:
                frame = sys._current_frames().get(self._loop_thread)
                if frame is not None and self._before.wall == began:
                    self._place = self._place or _place_of(frame)


class _Moment(msgspec.Struct, frozen=True):
    """Counters of a thread until now: seconds, and the times that it went to sleep."""

    wall: float
    computed: float
    queued: float
    naps: int


class _Account:
    """The kernel's counters of the thread that creates it."""

    def __init__(self) -> None:
        import resource  # it does not exist on Windows

        self._usage: Callable[[int], resource.struct_rusage] = resource.getrusage
        self._thread = resource.RUSAGE_THREAD
        path = f"/proc/self/task/{threading.get_native_id()}/schedstat"
        self._statistics = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def now(self) -> _Moment:
        """Return the present counters."""
        # The second number is nanoseconds of waiting for a core.
        queued = int(os.pread(self._statistics, 64, 0).split()[1]) / 1e9
        naps = self._usage(self._thread).ru_nvcsw
        return _Moment(time.perf_counter(), time.thread_time(), queued, naps)

    def close(self) -> None:
        """Close the file of the kernel."""
        os.close(self._statistics)


def _place_of(frame: FrameType) -> str:
    """Name the innermost function of a stack, and its callers."""
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
