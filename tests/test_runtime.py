"""What every script does before it begins."""

import os
import subprocess
import sys

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
