"""Several processes of one JAX program on this machine."""

import os
import signal
import socket
import subprocess
import time

from spark.errors import Preempted
from spark.runtime import received_signals


def run(words: list[str], processes: int, revision: str, restarts: int) -> int:
    """Runs a command in several processes of one JAX program, and again while they exit with 75; returns the exit code.

    If one process fails, the others are killed. Raises Preempted if a SIGTERM or Ctrl-C was forwarded, and the state is saved.
    """
    for restart in range(restarts + 1):
        if restart:
            print(f'Preempted, starting again ({restart} of {restarts})', flush=True)
        started = _start(words, processes, revision)
        send = lambda number, started=started: [p.send_signal(number) for p in started if p.poll() is None]
        with received_signals(lambda n, send=send: send(signal.SIGTERM if n == 1 else signal.SIGKILL)) as signals:
            while None in (codes := [p.poll() for p in started]):
                if any(code not in (None, 0, Preempted.exit_code) for code in codes):
                    time.sleep(5)  # the others may fail with a more helpful message
                    send(signal.SIGKILL)
                time.sleep(0.2)
        code = next((code for code in codes if code not in (0, Preempted.exit_code)), max(codes))
        if signals and code == Preempted.exit_code:
            raise Preempted('stopped, state saved; run the same command to go on')
        if code != Preempted.exit_code:
            return code if code >= 0 else 128 - code
    raise Preempted(f'preempted {restarts + 1} times, state saved; run the same command to go on')


def _start(words, processes, revision):
    with socket.socket() as s:
        s.bind(('localhost', 0))
        address = f'localhost:{s.getsockname()[1]}'
    shared = os.environ | {'JAX_COORDINATOR_ADDRESS': address, 'JAX_NUM_PROCESSES': str(processes), 'SPARK_REVISION': revision}
    # In sessions of their own, so that a Ctrl-C reaches them once, through this process.
    return [subprocess.Popen(words, env=shared | {'JAX_PROCESS_ID': str(i)}, start_new_session=True) for i in range(processes)]
