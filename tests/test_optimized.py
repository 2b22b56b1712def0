"""The oracle against code as it is compiled for a user: conftest.py turns optimizations off for all other tests of a process."""

import os
import subprocess
import sys

import pytest

from tests.helpers import ROOT

TESTS = (
    'kernels/test_blockwise.py', 'nn/test_ffn.py',
    'inference/test_decoder.py::test_greedy_generation_is_the_argmax_of_the_forward_pass',
)  # fmt: skip


@pytest.mark.slow
def test_kernels_and_served_models_with_optimizations():
    env = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'} | {'JAX_DISABLE_MOST_OPTIMIZATIONS': '0'}
    command = [sys.executable, '-m', 'pytest', '-m', 'not slow', '-p', 'no:cacheprovider', *(f'tests/{name}' for name in TESTS)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout
