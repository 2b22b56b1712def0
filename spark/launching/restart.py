"""Starts a run again after what can pass: a stall, a dead peer, a signal, a crash; as long as it makes new checkpoints.

    python -m spark.launching.restart --workdir=DIR [--restarts=N] [--pass_on=CODE] COMMAND …

Exit codes 0, 2, 3, 4 and 5 end a run, since it would meet the same again. After any other the command is started again, at most N
times without a new checkpoint in DIR. With --pass_on=75 a preemption is left to who started this. A SIGTERM is passed on to the
command, and then nothing is started again. The engines of scripts/launch.py start their jobs with it.
"""

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection

from etils import epath

from spark.runtime import received_signals

ENDS = (0, 2, 3, 4, 5)
SRUN = 250  # srun tells the highest code of its tasks: they add this to one that ends a run, so that it is above those of signals


def until_done(
    start: Callable[[], tuple[int, bool]], workdir: epath.PathLike, restarts: int, pass_on: Collection[int] = ()
) -> tuple[int, bool]:
    """Calls `start` until the run has ended; returns what it then returned: (exit code, was it asked to stop).

    `restarts` is how often it is called again without a new checkpoint; the wait before that grows, from a second.
    """
    newest, without = newest_step(workdir), 0
    while True:
        code, stopped = start()
        if stopped or code in ENDS or code in pass_on:
            return code, stopped
        before, newest = newest, max(newest, newest_step(workdir))
        without = 0 if newest > before else without
        place = f'step {newest}' if newest >= 0 else 'the start'
        if without == restarts:
            print(f'Exit code {code}; not started again: {without} restarts from {place} made no checkpoint', flush=True)
            return code, stopped
        without += 1
        print(f'Exit code {code}; starting again from {place} ({without} of {restarts} without a new checkpoint)', flush=True)
        time.sleep(4 ** (without - 1))


def newest_step(workdir: epath.PathLike) -> int:
    """The step of the newest checkpoint; -1 if there is none, or if they cannot be listed."""
    directory, in_bucket = epath.Path(workdir) / 'checkpoints', '://' in str(workdir)
    try:
        steps = sorted((int(path.name) for path in directory.iterdir() if path.name.isdecimal()), reverse=True)
        # In a bucket nothing is renamed when it is complete: Orbax then writes this file.
        return next((n for n in steps if not in_bucket or (directory / str(n) / 'commit_success.txt').exists()), -1)
    except Exception:  # clients of buckets raise exceptions of their own
        return -1


def run(command: list[str]) -> tuple[int, bool]:
    """Runs a command: (its exit code, 128 + the number of a signal; was this process asked to stop)."""
    process = subprocess.Popen(command)
    # SLURM itself signals the tasks of a step, and srun kills them if it is signalled, too.
    stop = process.terminate if command[0] != 'srun' else lambda: None
    with received_signals(lambda n: stop() if process.poll() is None else None, (signal.SIGTERM,)) as signals:
        code = process.wait()
    code -= SRUN if code - SRUN in ENDS[1:] else 0
    return code if code >= 0 else 128 - code, bool(signals)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--workdir', required=True)
    parser.add_argument('--restarts', type=int, default=5)
    parser.add_argument('--pass_on', type=int, action='append', default=[])
    parser.add_argument('command', nargs=argparse.REMAINDER)
    given = parser.parse_args()
    code, stopped = until_done(lambda: run(given.command), given.workdir, given.restarts, given.pass_on)
    # GKE would start a job again that ended by a signal.
    sys.exit(1 if code > 126 and not stopped else code)


if __name__ == '__main__':
    main()
