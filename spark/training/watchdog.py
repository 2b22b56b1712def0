"""A thread that ends a run that hangs: in a step, in the data, in a collective that another process does not join."""

import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import deque

from spark.errors import StalledError

SLOWER = 20  # times the usual step is no stall
PATIENT = 10  # times as long may that take which is rare: starting, compiling, reading or writing a checkpoint


class Watchdog:
    """Prints the stack of every thread and exits with `StalledError`'s code if `alive` is not called in time.

    The time is `seconds`, or SLOWER times the usual step if that is more; 0 for no watchdog. Time in which this process itself is
    stopped does not count, so that Ctrl-Z and fg are fine.
    """

    def __init__(self, seconds):
        self._seconds, self._tick = seconds, min(1.0, seconds / 4)
        self._gaps, self._waited, self._patience, self._doing, self._since = deque(maxlen=64), 0.0, PATIENT, 'starting', None
        self._done = threading.Event()

    def __enter__(self):
        if self._seconds:
            threading.Thread(target=self._watch, name='watchdog', daemon=True).start()
        return self

    def __exit__(self, *_):
        self._done.set()

    def alive(self, doing='stepping', rare=False):
        """The run moved, and does this now; `rare` things may take longer."""
        now = time.monotonic()
        if self._since is not None and not rare:
            self._gaps.append(now - self._since)
        self._since = None if rare else now
        self._waited, self._patience, self._doing = 0.0, PATIENT if rare else 1, doing

    def deadline(self):
        """Seconds that what is done now may take."""
        usual = statistics.median(self._gaps) if self._gaps else 0.0
        return max(self._seconds, SLOWER * usual) * self._patience

    def _watch(self):
        last = time.monotonic()
        while not self._done.wait(self._tick):
            now = time.monotonic()
            self._waited += min(now - last, 2 * self._tick)
            last = now
            if self._waited > self.deadline() and not self._done.is_set():
                faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
                print(f'StalledError: nothing has moved for {self._waited:.0f} s while {self._doing} (train.stall_seconds); '
                      'the stacks of all threads are above', file=sys.__stderr__, flush=True)  # fmt: skip
                os._exit(StalledError.exit_code)
