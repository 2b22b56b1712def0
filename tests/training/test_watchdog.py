"""The watchdog ends what hangs, says where, and lets be what is only slow or stopped."""

import signal
import subprocess
import sys
import time

import pytest

from spark.training.watchdog import SLOW_FACTOR, STEP_FACTOR, Watchdog
from tests.helpers import ROOT


def hang(code, **more):
    """Runs code in which `dog = Watchdog(…)` may be used; its process."""
    code = f'import time\nfrom spark.training.watchdog import Watchdog\n{code}'
    return subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, stderr=subprocess.PIPE, text=True, **more)


def test_a_stall_ends_with_the_stacks_of_all_threads():
    process = hang('''
import threading
def stuck_in_a_thread(): time.sleep(60)
def stuck_here(): time.sleep(60)
threading.Thread(target=stuck_in_a_thread, daemon=True).start()
with Watchdog(0.4) as dog:
    for _ in range(3):
        dog.alive('reading')
        time.sleep(0.2)
    stuck_here()
''')
    start = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 124 and time.monotonic() - start < 30
    assert 'in stuck_here' in said and 'in stuck_in_a_thread' in said
    assert 'while reading (train.stall_seconds)' in said.splitlines()[-1] and said.splitlines()[-1].startswith('StalledError: ')


@pytest.mark.parametrize('code', [
    "with Watchdog(0.3) as dog:\n    dog.alive('compiling', slow=True)\n    time.sleep(1.5)",
    'with Watchdog(0.3) as dog:\n    for _ in range(30): dog.alive(); time.sleep(0.05)',
    'with Watchdog(0.3) as dog: dog.alive()\ntime.sleep(1)',
    'with Watchdog(0) as dog: dog.alive(); time.sleep(1)',
])  # fmt: skip
def test_what_is_no_stall(code):
    process = hang(code)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said


def test_a_process_that_is_stopped_and_goes_on():
    """Ctrl-Z and fg: only time in which the process could have moved counts."""
    process = hang("with Watchdog(1) as dog:\n    dog.alive()\n    print('up', flush=True)\n    time.sleep(0.2)",
                   stdout=subprocess.PIPE)  # fmt: skip
    assert process.stdout.readline() == 'up\n'
    process.send_signal(signal.SIGSTOP)
    time.sleep(2.5)
    process.send_signal(signal.SIGCONT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said


def test_the_deadline_follows_the_usual_step(monkeypatch):
    now = iter(range(0, 10**6, 100))
    monkeypatch.setattr(time, 'monotonic', lambda: next(now))
    dog = Watchdog(300)
    assert dog.deadline() == 300 * SLOW_FACTOR  # starting
    for _ in range(9):
        dog.alive()
    assert dog.deadline() == STEP_FACTOR * 100
    dog.alive('saving', slow=True)
    assert dog.deadline() == STEP_FACTOR * 100 * SLOW_FACTOR
    dog.alive()
    assert dog.deadline() == STEP_FACTOR * 100  # a slow activity is no usual step
