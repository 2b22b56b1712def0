"""What a user is told when XLA fails, and where tracebacks are."""

import os
import subprocess
import sys

import jax
import pytest

from spark import errors
from tests.helpers import ROOT

MOSAIC = 'INTERNAL: Mosaic failed to compile TPU kernel: cannot slice'
GONE = 'a collective failed, as when another process has ended'


@pytest.mark.parametrize(
    ('message', 'kind', 'said'),
    [
        (MOSAIC, errors.ProgramError, MOSAIC),
        ('INVALID_ARGUMENT: dynamic slice of a peerless barrier', errors.ProgramError, 'dynamic slice'),
        ('UNKNOWN: Gloo all-reduce failed: Connection closed by peer [127.0.0.1]:1', errors.StalledError, GONE),
        ('UNAVAILABLE: task 3 is gone', errors.StalledError, GONE),
        ('INTERNAL: NCCL operation failed: unhandled system error', errors.StalledError, GONE),
        ('RESOURCE_EXHAUSTED: Out of memory allocating 3 bytes.', errors.ConfigError, 'raise train.accumulate'),
        ('RESOURCE_EXHAUSTED: Attempting to allocate 1G. That was not possible.', errors.ConfigError, 'raise train.accumulate'),
        ('RESOURCE_EXHAUSTED: Received message larger than max', errors.ProgramError, 'Received message'),
    ],
)
@pytest.mark.parametrize('processes', [1, 2])
def test_an_error_of_xla_says_what_it_was(monkeypatch, message, kind, said, processes):
    """Only one of a collective is told as that; in a job of several processes the process ends without closing anything."""
    ended = []

    def exit_now(error):
        ended.append(error)
        raise error

    monkeypatch.setattr(errors, 'exit_now', exit_now)
    monkeypatch.setattr(jax, 'process_count', lambda: processes)
    with pytest.raises(kind if processes > 1 or kind is errors.ConfigError else errors.ProgramError) as e:
        with errors.translated_xla_errors():
            raise jax.errors.JaxRuntimeError(f'{message}\nmore of it')
    assert (said if processes > 1 or said != GONE else message) in str(e.value) and e.value.__cause__
    assert bool(ended) == (processes > 1)
    assert (GONE in str(e.value)) == (processes > 1 and said == GONE)


CODE = """
from spark import errors
def main():
    try:
        the_cause()
    except ZeroDivisionError:
        raise errors.DataError('a.txt: cannot be read') from None
def the_cause():
    1 / 0
errors.run(main)
"""


@pytest.mark.parametrize('asked', ['0', '1'])
def test_tracebacks_are_shown_on_request(asked):
    env = os.environ | {'PYTHONPATH': str(ROOT), 'SPARK_TRACEBACK': asked}
    ended = subprocess.run([sys.executable, '-c', CODE], env=env, timeout=60, capture_output=True, text=True)
    line = 'DataError: a.txt: cannot be read\n'
    assert ended.returncode == 4 and ended.stderr.endswith(line)
    assert (ended.stderr == line) == (asked == '0') and ('in the_cause' in ended.stderr) == (asked == '1')


def test_a_report_that_cannot_be_written_is_told_before_the_work():
    words = [sys.executable, str(ROOT / 'scripts/evaluate.py'), '--workdir=/nowhere', '--json=/nor/there/e.json']
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {'PYTHONPATH': str(ROOT)})
    assert done.returncode == 2
    assert done.stderr == 'ConfigError: --json=/nor/there/e.json: there is no directory /nor/there\n'
