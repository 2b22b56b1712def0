"""Loading a run to generate with: the weights that were trained, and little memory besides."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from flax.core import meta
from tqdm import tqdm

from spark.checkpoints.manager import Checkpoints
from spark.evaluation import evaluate
from spark.inference import load as loading
from spark.inference.layout import DTYPES, from_params
from spark.nn.transformer import Transformer
from tests.helpers import BOTH, small
from tests.processes import environment


@BOTH
@pytest.mark.parametrize('dtype', DTYPES)
def test_the_weights_to_serve_are_those_that_were_trained(run, dtype, monkeypatch):
    """Read layer by layer and laid out on the way, to the bit what parameters that are in memory give."""
    workdir, _ = run
    bars, model = [], evaluate.load(workdir)
    monkeypatch.setattr(loading, 'tqdm', lambda **options: bars.append(tqdm(**options)) or bars[-1])
    served = loading.load(workdir, dtype=dtype, serve={'kernels': 'masked'})
    jax.tree.map(np.testing.assert_array_equal, served.weights, from_params(served.serving, model.params))
    assert [(bar.n, bar.total) for bar in bars] == [(model.trainer.n_params,) * 2]


MEASURE = """
import pathlib, sys
import jax
from spark.benchmarks import decoding
from spark.inference.load import load

load(pathlib.Path(sys.argv[1]), dtype='bfloat16')  # compiles
before = decoding.memory('VmRSS')
decoding.reset_peak()
served = load(pathlib.Path(sys.argv[1]), dtype='bfloat16')
print(sum(x.nbytes for x in jax.tree.leaves(served.weights)), decoding.memory('VmHWM') - before)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='memory is what Linux tells')
def test_loading_takes_little_more_than_the_weights(tmp_path):
    """Of 210 MB in float32, stacks of layers and an embedding, some chunks and the layer that is laid out."""
    cfg = small(**{
        'model.d_model': 512, 'model.n_layers': 8, 'model.vocab_size': 40_000, 'model.ffn.d_ff': 4096, 'model.ffn.r': 256,
    })  # fmt: skip
    token = np.zeros((1, 1), np.int32)
    shapes = meta.unbox(jax.eval_shape(Transformer(cfg.model).init, jax.random.key(0), token, token, token))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.random(x.shape, np.float32), shapes)
    (tmp_path / 'config.json').write_text(cfg.model_dump_json())
    checkpoints = Checkpoints(tmp_path / 'checkpoints')
    checkpoints.save(1, {'params': params}, {})
    checkpoints.close()
    words = [sys.executable, '-c', MEASURE, str(tmp_path)]
    found = subprocess.run(words, env=environment(tmp_path), capture_output=True, text=True)
    assert not found.returncode, found.stderr
    weights, peak = map(int, found.stdout.split()[-2:])
    assert sum(x.nbytes for x in jax.tree.leaves(params)) > 200e6 and 100e6 < weights < 110e6
    assert peak < weights + 80e6, (peak, weights)
