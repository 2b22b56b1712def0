"""A small model on the Python standard library's source, to try things out. Variants: spark (default) | dense.

    python scripts/train.py --config=configs/tiny.py --workdir=runs/tiny

Cost: 2 minutes of training on two CPU cores (AVX-512), 3,886,464 parameters.
Expected result on the test split: loss 2.89, 1.532 bits per byte, 7.1 % active neurons; `:dense` reaches 1.484 bits per byte.
"""

from spark.config import template
from spark.errors import ConfigError


def get_config(variant='spark'):
    """The config of a variant. Both have the same number of parameters."""
    if variant not in ('spark', 'dense'):
        raise ConfigError(f'--config: variant {variant!r}: want spark or dense')
    c = template()
    m, f, a = c.model, c.model.ffn, c.model.attention
    m.d_model, m.n_layers = 384, 2
    m.dtype = 'float32'
    a.n_heads, a.n_kv_heads, a.head_dim, a.window = 2, 1, 96, 128
    f.d_ff = 1152
    if variant == 'spark':
        f.kind, f.d_ff, f.k, f.r = 'spark', 1728, 138, 192
        a.kind, a.k, a.r = 'spark', 32, 48

    c.data.source = 'stdlib'
    c.data.tokenizer = 'sentencepiece:stdlib_2048.model'
    c.data.seq_len, c.data.batch_size = 256, 16
    c.optimizer.lr, c.optimizer.warmup_steps = 4e-3, 50
    c.train.steps = 300
    c.train.eval_every, c.train.eval_batches = 100, 20
    c.train.save_every = 100
    c.train.activity = False  # evaluation reports it anyway; counting at every step costs 3 %
    c.sample.prompt = 'def read_file(path):\n'
    c.sample.tokens, c.sample.temperature = 120, 0.5
    return c
