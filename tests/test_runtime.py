"""What every script does before it begins, and as it ends."""

import os
import signal
import subprocess
import sys

import pytest

from tests.helpers import ROOT


def test_a_signal_that_comes_while_the_program_starts_anew_is_heard():
    """Between two programs of one process nobody has handlers: it must neither kill nor get lost."""
    code = """
import os, signal
from spark import runtime
anew = 'GLIBC_TUNABLES' in os.environ
signal.signal(signal.SIGTERM, lambda *_: os._exit(75) if anew else None)
execv = os.execv
def stopped(*args):
    os.kill(os.getpid(), signal.SIGTERM)
    execv(*args)
os.execv = stopped
runtime.use_huge_pages()
"""
    env = {name: value for name, value in os.environ.items() if name != 'GLIBC_TUNABLES'}
    env |= {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
    assert subprocess.run([sys.executable, '-c', code], env=env, timeout=60).returncode == (75 if sys.platform == 'linux' else 0)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_comes_while_python_takes_itself_down_changes_no_exit_code(tmp_path, number):
    """By then Python has dropped the handlers: only what it does not handle at all stays as it was set."""
    (tmp_path / 'sitecustomize.py').write_text(f"""
import builtins, os
class Late:
    def __del__(self, kill=os.kill, pid=os.getpid()):
        kill(pid, {number.value})
builtins.late = Late()
""")
    env = os.environ | {'PYTHONPATH': f'{tmp_path}:{ROOT}', 'JAX_PLATFORMS': 'cpu'}
    ended = subprocess.run([sys.executable, ROOT / 'scripts/train.py'], env=env, timeout=60, capture_output=True, text=True)
    assert ended.returncode == 2 and '--config is missing' in ended.stderr, ended


def test_what_other_arrays_met_is_not_told_when_one_failed():
    """A write that fails takes others with it, whose exceptions nobody asks for: asyncio would print each, with its traceback."""
    code = """
import asyncio
from spark import errors
async def write():
    raise ValueError('File too large')
async def save():
    writes = asyncio.gather(write(), write())
    await asyncio.sleep(0.01)
def main():
    asyncio.run(save())
    raise errors.CheckpointError('step 1 cannot be saved')
errors.run(main)
"""
    env = os.environ | {'PYTHONPATH': str(ROOT)}
    ended = subprocess.run([sys.executable, '-c', code], env=env, timeout=60, capture_output=True, text=True)
    assert ended.returncode == 5 and ended.stderr == 'CheckpointError: step 1 cannot be saved\n', ended
