"""Calls to storage that may hang: the one way from async code to a job directory.

Storage that does not answer holds a thread inside the kernel, where nothing can end
it. So each call can be abandoned: the task continues, and the thread stays behind. It
is a daemon thread, which does not keep the process from ending.
"""

import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar, TypeVarTuple

import trio

from sleap_rtc.io.storage.folder import StorageError

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

STORAGE_TIMEOUT = 20.0
"""Seconds for one access to shared storage; a client waits for 30 for its worker."""

GRACE_TIMEOUT = 2.0
"""Seconds that a cancelled call may take to end before its thread is left behind.

Storage that works answers sooner, so its threads are not left behind."""

MAX_THREADS = 40
"""Threads that may be inside storage at once.

They are counted apart from all others: calls that hang must not use up the threads of
calls that have nothing to do with storage."""

_limiter = trio.lowlevel.RunVar[trio.CapacityLimiter]("storage_limiter")


async def call_storage(
    function: Callable[[*Ts], T],
    *args: *Ts,
    root: Path | None = None,
    timeout: float | None = None,
    grace: float = GRACE_TIMEOUT,
    shield: bool = False,
    discard: Callable[[T], object] | None = None,
    limiter: trio.CapacityLimiter | None = None,
) -> T:
    """Call a function that touches storage in a worker thread.

    On cancellation the function gets the grace period to end; it may ask
    ``trio.from_thread.check_cancelled`` whether it should. A result that comes in that
    time is returned. Otherwise the thread is left behind.

    Args:
        function: The function, which may block.
        args: Its arguments.
        root: The storage, for the error message.
        timeout: Seconds for the call; None waits until the task is cancelled.
        grace: Seconds to wait for the function after a cancellation.
        shield: Ignore cancellation until the timeout, which is required then.
        discard: Called in the thread with a result that came too late, to close it.
        limiter: Limits the threads, instead of the limiter of all storage calls.

    Returns:
        The result of the function.

    Raises:
        StorageError: If the call takes longer than the timeout.
    """
    if timeout is None and shield:
        raise ValueError("a shield requires a timeout")
    call = _Call(function, args, discard)
    deadline = math.inf if timeout is None else trio.current_time() + timeout
    with trio.CancelScope(deadline=deadline, shield=shield) as scope:
        try:
            await trio.to_thread.run_sync(
                call.run, abandon_on_cancel=True, limiter=limiter or _storage_limiter()
            )
        except trio.Cancelled:
            if trio.current_time() < deadline:
                with trio.move_on_after(grace, shield=True):
                    await call.wait_ended()
            if not call.end_or_abandon():
                raise
    if scope.cancelled_caught:
        where = "Storage" if root is None else f"Storage at {root}"
        raise StorageError(f"{where} did not answer within {timeout:g} seconds")
    return call.result()


def _storage_limiter() -> trio.CapacityLimiter:
    try:
        return _limiter.get()
    except LookupError:
        _limiter.set(trio.CapacityLimiter(MAX_THREADS))
        return _limiter.get()


class _Call(Generic[*Ts, T]):
    """One call. Its thread and its task agree which of them has the result."""

    def __init__(
        self,
        function: Callable[[*Ts], T],
        args: tuple[*Ts],
        discard: Callable[[T], object] | None,
    ) -> None:
        self._function = function
        self._args = args
        self._discard = discard
        self._token = trio.lowlevel.current_trio_token()
        self._lock = threading.Lock()
        self._is_running = False
        self._is_abandoned = False
        self._results: list[T] = []
        self._error: BaseException | None = None
        self._ended: trio.Event | None = None

    # ----------------------------------------------------------------- in the thread

    def run(self) -> None:
        """Call the function, and keep its result or error for the task."""
        with self._lock:
            if self._is_abandoned:
                return
            self._is_running = True
        try:
            result = self._function(*self._args)
        except trio.Cancelled:
            self._end()
            raise  # of `check_cancelled`: the call has neither a result nor an error
        except BaseException as error:
            self._end(error=error)
        else:
            if not self._end(result) and self._discard is not None:
                self._discard(result)

    def _end(self, *results: T, error: BaseException | None = None) -> bool:
        """Record the end; return False if the task no longer waits for it."""
        with self._lock:
            self._is_running = False
            if self._is_abandoned:
                return False
            self._results.extend(results)
            self._error = error
            if self._ended is not None:
                try:
                    self._token.run_sync_soon(self._ended.set)
                except trio.RunFinishedError:
                    pass  # the thread hung for longer than the event loop lived
            return True

    # ------------------------------------------------------------------- in the task

    async def wait_ended(self) -> None:
        """Wait until the thread is no longer inside the function."""
        with self._lock:
            if not self._is_running:
                return
            self._ended = trio.Event()
        await self._ended.wait()

    def end_or_abandon(self) -> bool:
        """Return True if the function has ended; otherwise abandon the call."""
        with self._lock:
            self._is_abandoned = not self._results and self._error is None
            return not self._is_abandoned

    def result(self) -> T:
        """Return the result of the function, or raise its error."""
        if self._error is not None:
            raise self._error
        return self._results[0]
