"""When a checkpoint is due by time."""

import time

import numpy as np
from jax.experimental import multihost_utils


class Period:
    """Tells at which step so many minutes have passed since the last save; 0: never.

    All processes of a job get the same answers. They ask the first process, at steps that it named the last time: few steps
    after a save it names the next ones at doubling distances, then those at half of the time that is left. So a period costs
    about twenty broadcasts, and if steps become slower, the save is late by less than its half.
    """

    def __init__(self, minutes: float, step: int):
        self._seconds = 60 * minutes
        self.restart(step)

    def restart(self, step: int) -> None:
        """Begins a period."""
        self._step, self._time, self._ask_at = step, time.monotonic(), step + 1

    def due(self, step: int) -> bool:
        """Whether the period is over. Every process must call it at every step."""
        if not self._seconds or step < self._ask_at:
            return False
        done, elapsed = step - self._step, time.monotonic() - self._time
        left = self._seconds - elapsed
        # The first steps are dispatched faster than they run, so that only the steps done bound their number.
        wait = max(1, min(done, int(done * left / max(elapsed, 1e-9) / 2))) if left > 0 else 0
        wait = int(multihost_utils.broadcast_one_to_all(np.int32(wait)))
        self._ask_at = step + wait
        return wait == 0
