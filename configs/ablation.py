"""The base config for ablations of k, r and the FFN kind: four Spark layers, on the Python standard library's source.

    python scripts/sweep.py --config=configs/ablation.py --axis=model.ffn.k=17,69,276 --axis=model.ffn.r=48,96,144 --out=runs/k_r

The base has the paper's ratios: k is 8 % of the neurons, r is half of d_model.
Cost: a minute per run on two CPU cores, 2,018,496 parameters.
Expected result of the base: test loss 3.02 ± 0.04 over three seeds, 1.603 bits per byte. docs/ablations.md has what changes do.
"""

from spark.config import template
from spark.errors import ConfigError


def get_config(variant='spark'):
    """The config. A sweep over model.ffn.kind makes the other kinds from it."""
    if variant != 'spark':
        raise ConfigError(f'--config: variant {variant!r}: want spark')
    c = template()
    m, f, a = c.model, c.model.ffn, c.model.attention
    m.d_model, m.n_layers = 192, 4
    m.dtype = 'float32'
    a.kind, a.n_heads, a.n_kv_heads, a.head_dim, a.window, a.k, a.r = 'spark', 2, 1, 64, 128, 32, 32
    f.kind, f.d_ff, f.k, f.r = 'spark', 864, 69, 96

    c.data.source = 'stdlib'
    c.data.tokenizer = 'sentencepiece:stdlib_2048.model'
    c.data.seq_len, c.data.batch_size = 256, 8
    c.optimizer.lr, c.optimizer.warmup_steps = 4e-3, 50
    c.train.steps = 400
    c.train.save_every = 200
    c.train.activity = False  # evaluation reports it anyway
    c.sample.tokens = 0
    return c
