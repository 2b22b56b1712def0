"""Progress bars: tqdm's on a terminal; elsewhere, as in the log file of a job, plain lines."""

import sys
import time
from typing import Any

import tqdm as library


class tqdm(library.tqdm):
    """tqdm; where stderr is no terminal, a line without control characters about every `seconds`, so none of a short loop.

    With `seconds` = inf there are only the lines that `line` prints.
    """

    def __init__(self, *args: Any, seconds: float = 10.0, **options: Any):
        self._terminal, self._seconds, self._shown = sys.stderr.isatty(), seconds, time.monotonic()
        if not self._terminal:
            line = '{desc}: {n_fmt} of {total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]'
            options |= {'bar_format': line, 'leave': False}
        super().__init__(*args, **options)

    def line(self) -> None:
        """Prints a line now, where there is no terminal."""
        if not (self._terminal or self.disable):
            print(self, file=sys.stderr, flush=True)
            self._shown = time.monotonic()

    def display(self, msg: str | None = None, pos: int | None = None) -> bool | None:
        """Shows the bar, or a message in its place; tqdm calls it at most ten times a second."""
        if self._terminal:
            return super().display(msg, pos)
        if msg is None and time.monotonic() - self._shown >= self._seconds:
            self.line()
        return None

    def clear(self, nolock: bool = False) -> None:
        """Takes the bar from the terminal, so that something else can be printed."""
        if self._terminal:
            super().clear(nolock)
