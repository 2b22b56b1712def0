"""docs/extending.md: its diffs apply, and the kinds they add train, count their FLOPs and are served as they were trained."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.helpers import ROOT


@pytest.mark.slow
def test_the_worked_diffs(tmp_path):
    for folder in ('spark', 'tests', 'configs'):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copy(ROOT / 'pyproject.toml', tmp_path)
    diffs = re.findall(r'```diff\n(.*?)```', (ROOT / 'docs' / 'extending.md').read_text(), re.DOTALL)
    assert len(diffs) == 4
    for diff in diffs:
        subprocess.run(['patch', '-p1', '--fuzz=0'], cwd=tmp_path, input=diff, text=True, check=True)
    kinds = ('swiglu', 'spark_relu', 'spark_sigmoid', 'sigmoid')
    test = 'tests/inference/test_model.py::test_every_kind_is_served_as_it_was_trained'
    halves = ['ffn', 'ffn', 'attention', 'attention']
    named = [f'{half}-{kind}' for half, kind in zip(halves, kinds, strict=True)]
    cases = [f'{test}[{name}-{kernels}]' for name in named for kernels in ('masked', 'gather', 'cpu')]
    cases += [f'tests/nn/test_ffn.py::test_kind_is_its_equation[{kind}-statistical-True]' for kind in kinds[:2]]
    cases += ['tests/nn/test_ffn.py::test_gradient_reaches_every_parameter']
    cases += [f'tests/test_flops.py::test_parameters_are_counted_and_matched[{kind}]' for kind in kinds[:2]]
    command = [sys.executable, '-m', 'pytest', '-p', 'no:cacheprovider', '-q', *cases]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    train = 'import sys; sys.path.insert(0, ".")\n' + TRAIN
    done = subprocess.run([sys.executable, '-c', train], cwd=tmp_path, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


TRAIN = """
import jax, numpy as np
from spark import flops
from tests.helpers import small
from tests.training.test_step import random_batch
from spark.training.step import Trainer

for ffn, attention in [('swiglu', 'dense'), ('spark_relu', 'spark_sigmoid'), ('gated', 'sigmoid')]:
    sparse = 'spark' in ffn
    fields = {'model.ffn.kind': ffn, 'model.ffn.k': 8 * sparse, 'model.ffn.r': 16 * sparse, 'model.attention.kind': attention,
              'model.attention.k': 4 * sparse, 'model.attention.r': 4 * sparse, 'model.n_layers': 2}
    cfg = small('dense', **fields)
    trainer = Trainer(cfg, jax.devices()[:1])
    with trainer.context():
        state, losses, batch = trainer.init_state(0), [], trainer.put(random_batch(cfg))
        for _ in range(6):
            state, sums = trainer.train_step(state, batch)
            losses.append(float(sums['nll'] / sums['tokens']))
    assert losses[-1] < losses[0] and np.isfinite(losses).all(), losses
    assert trainer.n_params == flops.parameters(cfg.model)
"""
