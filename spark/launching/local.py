"""Several processes of one JAX program on this machine."""

import os
import signal
import socket
import subprocess
import time

from spark.errors import Preempted
from spark.launching.restart import ENDS, until_done
from spark.runtime import received_signals


def run(words: list[str], processes: int, revision: str, workdir: str, restarts: int) -> int:
    """Runs a command in several processes of one JAX program, and again as `restart.until_done` says; returns the exit code.

    If one process fails, the others are killed. Raises Preempted if a SIGTERM or Ctrl-C was forwarded, and the state is saved.
    """
    code, stopped = until_done(lambda: _run(words, processes, revision), workdir, restarts)
    if code == Preempted.exit_code:
        why = 'stopped' if stopped else 'preempted again and again'
        raise Preempted(f'{why}, state saved; run the same command to go on')
    return code


def _run(words, processes, revision):
    """(exit code of the job, whether this process was asked to stop)."""
    started = _start(words, processes, revision)
    send = lambda number: [p.send_signal(number) for p in started if p.poll() is None]
    with received_signals(lambda n: send(signal.SIGTERM if n == 1 else signal.SIGKILL)) as signals:
        while None in (codes := [p.poll() for p in started]):
            if any(code not in (None, 0, Preempted.exit_code) for code in codes):
                time.sleep(5)  # the others may fail with a more helpful message
                codes = [p.poll() for p in started]
                send(signal.SIGKILL)
                for p in started:
                    p.wait()
                break
            time.sleep(0.2)
    failed = [code for code in codes if code not in (None, 0, Preempted.exit_code)]
    # What ends a run counts more than what it did to the other processes.
    code = next((code for code in failed if code in ENDS), failed[0] if failed else max(codes))
    return code if code >= 0 else 128 - code, bool(signals)


def _start(words, processes, revision):
    with socket.socket() as s:
        s.bind(('localhost', 0))
        address = f'localhost:{s.getsockname()[1]}'
    shared = os.environ | {'JAX_COORDINATOR_ADDRESS': address, 'JAX_NUM_PROCESSES': str(processes), 'SPARK_REVISION': revision}
    # In sessions of their own, so that a Ctrl-C reaches them once, through this process.
    return [subprocess.Popen(words, env=shared | {'JAX_PROCESS_ID': str(i)}, start_new_session=True) for i in range(processes)]
