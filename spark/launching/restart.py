"""Starts a run again after what can pass: a stall, a dead peer, a signal, a crash; as long as it makes new checkpoints.

    python -m spark.launching.restart --workdir=DIR [--restarts=N] [--requeued=FILE] COMMAND …

Exit codes 0, 2, 3, 4 and 5 end a run, since it would meet the same again. After any other the command is started again, at most
N times without a new checkpoint in DIR. A SIGTERM is passed on to the command; then nothing is started again, and the exit code
is 75, since the run can go on. With --requeued a preemption ends with 75, too, and who started this runs it again. FILE counts
how often that made no new checkpoint; after N times the exit code is 1. The engines of launch.py start their jobs with it.
"""

import argparse
import json
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection

from etils import epath

from spark.errors import ConfigError, Preempted
from spark.runtime import entries, is_complete, received_signals, write_json

ENDS = (0, 2, 3, 4, 5)
LONGEST = 60  # seconds before another start
# srun tells the highest code of its tasks: they add this to one that ends a run, so that it is above those of signals. srun's own
# failures have other codes, such as 255.
SRUN = 240


def until_done(
    start: Callable[[], tuple[int, bool]], workdir: epath.PathLike, restarts: int, pass_on: Collection[int] = ()
) -> tuple[int, bool]:
    """Calls `start` until the run has ended; returns what it then returned: (exit code, was it asked to stop).

    `restarts` is how often it is called again without a new checkpoint; the wait before that grows, from a second to LONGEST.
    """
    with received_signals() as signals:  # those that come while nothing runs
        return _until_done(start, workdir, restarts, pass_on, signals)


def _until_done(start, workdir, restarts, pass_on, signals):
    newest, without = newest_step(workdir), 0
    while True:
        code, stopped = start()
        if stopped or signals or code in ENDS or code in pass_on:
            return code, bool(stopped or signals)
        before, newest = newest, max(newest, newest_step(workdir))
        without = 0 if newest > before else without
        place = f'step {newest}' if newest >= 0 else 'the start'
        if without == restarts:
            print(f'Exit code {code}; not started again: {without} restarts from {place} made no checkpoint', flush=True)
            return code, stopped
        without += 1
        print(f'Exit code {code}; starting again from {place} ({without} of {restarts} without a new checkpoint)', flush=True)
        until = time.monotonic() + min(4 ** (without - 1), LONGEST)
        while time.monotonic() < until and not signals:
            time.sleep(0.1)
        if signals:
            return code, True


def newest_step(workdir: epath.PathLike) -> int:
    """The step of the newest checkpoint; -1 if there is none, or if they cannot be listed."""
    directory = epath.Path(workdir) / 'checkpoints'
    try:
        steps = sorted((int(path.name) for path in entries(directory) if path.name.isdecimal()), reverse=True)
        return next((n for n in steps if is_complete(directory / str(n))), -1)
    except Exception:  # clients of buckets raise exceptions of their own
        return -1


def run(command: list[str]) -> tuple[int, bool]:
    """Runs a command: (its exit code, 128 + the number of a signal; was this process asked to stop)."""
    process = None
    # SLURM itself signals the tasks of a step, and srun kills them if it is signalled, too.
    stop = lambda n=0: process.terminate() if process and command[0] != 'srun' else None
    with received_signals(stop, (signal.SIGTERM,)) as signals:
        process = subprocess.Popen(command)
        if signals:  # it came before there was a process
            stop()
        code = process.wait()
    if command[0] == 'srun' and code - SRUN in ENDS[1:]:
        code -= SRUN
    return code if code >= 0 else 128 - code, bool(signals)


def may_go_on(file: pathlib.Path, workdir: epath.PathLike, restarts: int) -> bool:
    """Has a job that would be requeued made a new checkpoint, now or at most `restarts` lives ago? `file` counts the lives."""
    try:
        step, lives = map(int, json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):  # there is none, or one that nobody can read: counted anew
        step, lives = -1, 0
    newest = newest_step(workdir)
    lives = 0 if newest > step else lives + 1
    try:
        write_json(file, [max(newest, step), lives])
    except ConfigError as e:
        print(f'Warning: this life of the job is not counted: {e}', flush=True)
    if lives > restarts:
        print(f'Not requeued: {lives} lives in a row made no new checkpoint', flush=True)
    return lives <= restarts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--workdir', required=True)
    parser.add_argument('--restarts', type=int, default=5)
    parser.add_argument('--requeued', type=pathlib.Path)
    parser.add_argument('command', nargs=argparse.REMAINDER)
    given = parser.parse_args()
    preempted = Preempted.exit_code
    pass_on = (preempted,) if given.requeued else ()
    code, stopped = until_done(lambda: run(given.command), given.workdir, given.restarts, pass_on)
    if stopped and code not in ENDS:
        code = preempted
    if code == preempted and given.requeued and not may_go_on(given.requeued, given.workdir, given.restarts):
        code = 1
    sys.exit(1 if code > 126 else code)  # GKE would start a job again that ended by a signal


if __name__ == '__main__':
    main()
