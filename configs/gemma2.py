"""What gemma2_2b.py, gemma2_9b.py and gemma2_27b.py share: Gemma-2 (arXiv 2408.00118) and Spark Gemma-2 (arXiv 2506.06644).

A variant is MODEL[,CHIPSxKIND]: dense | spark | spark_ffn | spark_attention, and the chips that it runs on, such as spark,64xv5p.
All of them train the same function: only mesh and train.accumulate differ.
"""

from spark.config import template
from spark.errors import ConfigError

VARIANTS = ('dense', 'spark', 'spark_ffn', 'spark_attention')
POD = {'v5e': 256, 'v6e': 256}  # chips of the largest slice; more chips are several slices
WHERE = [f'{chips}x{kind}' for kind in ('v5e', 'v6e', 'v5p') for chips in (64, 256, 1024)] + ['64xh100']


def make(variant, rows, *, d_model, n_layers, n_heads, n_kv_heads, head_dim, d_ff, query_dim, lr):
    """The config of a variant. d_ff is the width of the gated FFN; a Spark FFN of equal size has 1.5 times as many neurons.

    `rows` says how many rows a chip's memory takes at a time, by kind of chip or by CHIPSxKIND; ½: two chips share a row; 0: the
    model does not fit.
    """
    variant, _, where = variant.partition(',')
    if variant not in VARIANTS:
        raise ConfigError(f'--config: variant {variant!r}: want one of {", ".join(VARIANTS)}')
    fitting = [w for w in WHERE if rows.get(w, 1)]
    if where and where not in fitting:
        raise ConfigError(f'--config: {where!r}: want one of {", ".join(fitting)} after the variant')
    c = template()
    m, f, a = c.model, c.model.ffn, c.model.attention
    m.vocab_size = 256_128
    m.d_model, m.n_layers = d_model, n_layers
    m.logit_cap = 30.0
    m.remat = 'full'
    a.n_heads, a.n_kv_heads, a.head_dim = n_heads, n_kv_heads, head_dim
    a.window, a.logit_cap, a.query_dim = 4096, 50.0, query_dim
    f.d_ff = d_ff
    if variant in ('spark', 'spark_ffn'):
        f.kind = 'spark'
        f.d_ff = d_ff * 3 // 2
        f.k = round(0.08 * f.d_ff)
        f.r = round(d_model / 2 / 256) * 256
    if variant in ('spark', 'spark_attention'):
        a.kind = 'spark'
        a.k, a.r = 256, head_dim // 2

    c.data.source = 'tfds:c4/en'
    c.data.tokenizer = 'sentencepiece:gemma2.model'  # the tokenizer file of Gemma-2's release; on a cluster gs://BUCKET/…
    c.data.seq_len = 8192
    c.data.batch_size = 512  # 4.2M tokens per step; 480k steps are 2T tokens
    c.data.holdout = 0.01
    c.optimizer.lr = lr  # our choice: the papers give no learning rate
    c.optimizer.warmup_steps = 2000
    c.optimizer.z_loss = 1e-4
    c.train.steps = 480_000
    c.train.loss_pieces = 16
    c.train.eval_every, c.train.eval_batches, c.train.final_eval = 2000, 16, 256
    c.train.save_every, c.train.keep, c.train.keep_every = 1000, 3, 50_000
    c.sample.prompt = 'The'
    divide(c, where or '256xv5e', rows)
    return c


def divide(c, where, rows):
    """Divides the rows of a step over chips: over `model` what a chip cannot hold, else over `fsdp`, and `data` takes the rest.

    fsdp is at most 256, since d_model 2304 is 9 · 256.
    """
    chips, kind = where.split('x')
    chips = int(chips)
    at_a_time = min(rows.get(where, rows.get(kind)), c.data.batch_size / chips)
    c.mesh.model = max(round(1 / at_a_time), 1)
    c.mesh.slices = max(chips // POD.get(kind, chips), 1)
    c.mesh.fsdp = min(chips // c.mesh.model // c.mesh.slices, 256)
    c.train.accumulate = round(c.data.batch_size / chips / at_a_time)
