"""A thread that ends a run that hangs: in a step, in reading data, or in a collective that another process does not join."""

import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import deque

from spark.errors import StalledError

STEP_FACTOR = 20  # a step may take this many times the median step
SLOW_FACTOR = 10  # starting, compiling, evaluating, reading or writing a checkpoint may take this many times longer


class Watchdog:
    """Prints the stack of every thread and exits with `StalledError`'s code if `alive` is not called in time.

    In time is within `seconds`, or within STEP_FACTOR times the usual step if that is longer; 0 seconds: no watchdog. Time in
    which the process itself is suspended, as by Ctrl-Z, does not count.
    """

    def __init__(self, seconds: float):
        self._seconds, self._tick = seconds, min(1.0, seconds / 4)
        self._activity, self._factor, self._waited = 'starting', SLOW_FACTOR, 0.0
        self._step_times, self._last_call = deque(maxlen=64), None
        self._done = threading.Event()

    def __enter__(self):
        if self._seconds:
            threading.Thread(target=self._watch, name='watchdog', daemon=True).start()
        return self

    def __exit__(self, *_):
        self._done.set()

    def alive(self, activity: str = 'stepping', slow: bool = False) -> None:
        """Reports that the run makes progress, and what it does now. A `slow` activity may take SLOW_FACTOR times longer."""
        now = time.monotonic()
        if self._last_call is not None and not slow:
            self._step_times.append(now - self._last_call)
        self._last_call = None if slow else now
        self._waited, self._factor, self._activity = 0.0, SLOW_FACTOR if slow else 1, activity

    def deadline(self) -> float:
        """Seconds that the current activity may take."""
        usual = statistics.median(self._step_times) if self._step_times else 0.0
        return max(self._seconds, STEP_FACTOR * usual) * self._factor

    def _watch(self):
        last = time.monotonic()
        while not self._done.wait(self._tick):
            now = time.monotonic()
            self._waited += min(now - last, 2 * self._tick)
            last = now
            if self._waited > self.deadline() and not self._done.is_set():
                faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
                print(f'StalledError: nothing has moved for {self._waited:.0f} s while {self._activity} (train.stall_seconds); '
                      'the stacks of all threads are above', file=sys.__stderr__, flush=True)  # fmt: skip
                os._exit(StalledError.exit_code)
