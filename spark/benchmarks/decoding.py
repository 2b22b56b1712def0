"""Decoding and prefill: the sparse model against the dense one, and both against the bandwidth of memory.

Weights are random and uniform; scores, being sums of many products, come out Gaussian. Both models run in turn in one process,
and the weights that one measurement reads are far larger than the last-level cache.
"""

import functools
import itertools
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from spark.benchmarks.timing import Rows, interleaved, memory, reset_peak, row
from spark.config import ExperimentConfig, ModelConfig
from spark.inference import layout, model
from spark.kernels import cpu
from spark.nn.block import rms_norm
from spark.nn.transformer import abstract_params
from spark.progress import tqdm


def bandwidth(repeats: int = 9) -> float:
    """GB/s at which the simplest kernel reads memory, from two arrays of 256 MiB in turn; the median."""
    arrays = itertools.cycle([jnp.ones(1 << 26) + i for i in range(2)])
    read = jax.jit(cpu.read if cpu.available() and jax.default_backend() == 'cpu' else jnp.sum)
    ms = interleaved({'read': lambda: read(next(arrays))}, repeats)['read']
    return (1 << 28) / ms / 1e6


def random_leaf(cfg: ModelConfig) -> Callable[..., jax.Array]:
    """A function from a parameter's path to random values of its shape, for `layout.lay_out`."""
    shapes, key = abstract_params(cfg), itertools.count()

    def leaf(*path):
        shape = functools.reduce(lambda tree, name: tree[name], ('params', *path), shapes).shape
        if path[-1] == 'scale':
            return jnp.zeros(shape)
        fan_in = shape[-1] if path == ('embedding',) else np.prod(shape[1:-1]) if path[-1] == 'out' else shape[1]
        draw = jax.jit(lambda key: jax.random.uniform(key, shape, jnp.float32, -1, 1) * (3 / fan_in) ** 0.5)
        return draw(jax.random.key(next(key), impl='rbg'))

    return leaf


_forward, _hidden = (jax.jit(f, static_argnums=0, donate_argnums=2) for f in (model.forward, model.hidden))


class Decoder:
    """A model of random weights on the first device."""

    def __init__(self, cfg: ModelConfig, dtype: str = 'bfloat16'):
        self.serving = layout.serving_for(cfg, dtype, jax.devices()[0].platform)
        self.weights = layout.lay_out(self.serving, random_leaf(cfg))

    def begin(self, context: int, size: int, chunk: int = 64) -> None:
        """Makes a cache of `size` positions that holds `context` random keys and values."""
        key = jax.random.key(1, impl='rbg')
        fill = lambda x: jax.random.uniform(key, x.shape, jnp.float32, -1.7, 1.7).astype(x.dtype)
        empty = jax.jit(lambda: model.init_cache(self.serving, 1, size, chunk))()
        self.cache = empty.replace(layers=jax.tree.map(jax.jit(fill), empty.layers), length=jnp.asarray(context, jnp.int32))
        self.first, self.counts = jnp.zeros(1, jnp.int32), None

    def _run(self, f, tokens, *wanted):
        self.cache, y, self.counts = f(self.serving, self.weights, self.cache, tokens, self.first, *wanted)
        return y

    def step(self, head: bool = True) -> jax.Array:
        """Decodes one token; returns the logits, or without the output head the hidden states."""
        return self._run(_forward if head else _hidden, jnp.ones((1, 1), jnp.int32))

    def chunk(self, size: int, last: bool) -> jax.Array:
        """Prefills `size` different tokens; returns their logits, computed only for the prompt's last chunk."""
        tokens = jnp.arange(size, dtype=jnp.int32) * 7919 % self.serving.cfg.vocab_size
        return self._run(_forward, tokens[None], np.bool_(last))

    def activity(self) -> dict[str, float]:
        """Active neurons and attended keys of the last step, means per token and layer."""
        return {name: float(jnp.mean(x)) for name, x in self.counts.items() if name != 'overflow'}

    def bytes(self, head: bool = True) -> int | float:
        """Bytes that a step has to read, given what was active in the last step."""
        means = {name: np.mean(x.reshape(len(x), -1), axis=1) for name, x in self.counts.items()}
        return model.bytes_per_step(self.serving, self.weights, self.cache, means, head)


def ffn_decode(spark: ExperimentConfig, dense: ExperimentConfig, repeats: int = 15, layers: int = 8) -> Rows:
    """The FFN alone, time per layer, bfloat16, at batch 1, 4 and 16; and dense matrix-vector products against reading.

    One program runs several layers in a row, so that weights do not stay in the cache and dispatch does not count.
    """

    def stack(serving, tables, x):
        for w in tables:
            y, counts = model.ffn(serving, w, x)
            x = rms_norm(y, 0)
        return x, counts

    spark, dense = spark.model, dense.model
    rows, sides = [], {}
    for name, cfg in {'spark': spark, 'dense': dense}.items():
        attention = cfg.attention.model_copy(update={'window': 0})
        some = {'n_layers': layers, 'layers': '', 'vocab_size': 8, 'pattern': ('global',), 'attention': attention}
        side = Decoder(cfg.model_copy(update=some))
        tables = [{k: w[k] for k in ('K1', 'records', 'keys', 'VT') if k in w} for w in side.weights['layers']]
        sides[name] = side.serving, tables
    for batch in (1, 4, 16):
        x = jax.random.normal(jax.random.key(0), (batch, spark.d_model), sides['spark'][0].compute)
        runs = {name: functools.partial(jax.jit(functools.partial(stack, side[0])), side[1], x) for name, side in sides.items()}
        counts = runs['spark']()[1]
        active, records = float(jnp.mean(counts['active'])), float(counts['records_read'])
        gigabytes = bandwidth()
        ms = {name: t / layers for name, t in interleaved(runs, repeats).items()}
        D, F, r = spark.d_model, spark.ffn.d_ff, spark.ffn.r
        read = {'spark': 2 * (F * r + records * (2 * D - r)), 'dense': 2 * 3 * D * dense.ffn.d_ff}
        details = {'batch': batch, 'active': active, 'records_read': records, 'read_bandwidth_gb_per_s': gigabytes}
        details |= {'limit_by_bytes': read['dense'] / read['spark']}
        details |= {f'{name}_gb_per_s': read[name] / t / 1e6 for name, t in ms.items()}
        rows.append(row(f'ffn_decode: Spark against dense, batch {batch}', ms['spark'], ms['dense'], **details))
    if jax.default_backend() == 'cpu' and cpu.available():
        rows.append(_matvecs([w['keys'].values for w in sides['dense'][1]], dense.d_model, repeats))
    return rows


def _matvecs(matrices, width, repeats):
    """The row of CPU matrix-vector products against reading as many bytes."""
    arrays = [jnp.ones(W.size // 2) + i for i, W in enumerate(matrices)]
    x = jax.random.normal(jax.random.key(0), (1, width))
    products, reads = jax.jit(lambda x, Ws: [cpu.matmul(x, W) for W in Ws]), jax.jit(lambda xs: [cpu.read(x) for x in xs])
    ms = interleaved({'matvec': lambda: products(x, matrices), 'read': lambda: reads(arrays)}, repeats)
    size = sum(W.nbytes for W in matrices)
    rates = {f'{name}_gb_per_s': size / t / 1e6 for name, t in ms.items()}
    return row(f'ffn_decode: {len(matrices)} dense matvecs against reading as much', ms['matvec'], ms['read'], **rates)


def decode(spark: ExperimentConfig, dense: ExperimentConfig, repeats: int = 9, contexts: Sequence[int] = (512, 8192)) -> Rows:
    """Whole models token by token, batch 1: Spark against dense with and without the output head, int8 against bfloat16."""
    rows, memory_before = [], memory('VmRSS')
    sides = {'spark': Decoder(spark.model), 'dense': Decoder(dense.model)}
    for context in contexts:
        for side in sides.values():
            side.begin(context, context + 4 * repeats + 16)
        rows.append(_compare(f'Spark against dense, context {context}', sides, repeats))
        rows.append(_compare(f'the same without the output head, context {context}', sides, repeats, head=False))
        held = sum(x.nbytes for x in jax.tree.leaves([(side.weights, side.cache) for side in sides.values()]))
        reset_peak()
        for side in sides.values():
            jax.block_until_ready(side.step())
        peak = (memory('VmHWM') - memory_before) / held
        rows[-2] |= {'weights_and_caches_gb': held / 1e9, 'peak_memory_over_that': peak}
    for name, side in sides.items():
        pair = {'int8': Decoder(side.serving.cfg, 'int8'), 'bfloat16': side}
        for one in pair.values():
            one.begin(contexts[0], contexts[0] + 4 * repeats + 16)
        rows.append(_compare(f'{name}, int8 against bfloat16, context {contexts[0]}', pair, repeats))
        del pair  # before the next model is made
    return rows


def _compare(title, sides, repeats, head=True):
    """The row of two Decoders' steps, the second of which is the baseline."""
    gigabytes = bandwidth()
    ms = interleaved({name: functools.partial(side.step, head) for name, side in sides.items()}, repeats)
    (ours, a), (baseline, b) = sides.items()
    details = {'read_bandwidth_gb_per_s': gigabytes, 'limit_by_bytes': b.bytes(head) / a.bytes(head)}
    for name, side in sides.items():
        details |= {f'{name}_gb_per_s': side.bytes(head) / ms[name] / 1e6, f'{name}_gb_read': side.bytes(head) / 1e9}
        details |= {f'{name}_{what}': x for what, x in side.activity().items()}
    return row(f'decode: {title}', ms[ours], ms[baseline], **details)


def prefill(spark: ExperimentConfig, dense: ExperimentConfig, repeats: int = 1, length: int = 4096, chunk: int = 64) -> Rows:
    """A prompt in chunks, batch 1, bfloat16; the two models take turns chunk by chunk."""
    sides = {'spark': Decoder(spark.model), 'dense': Decoder(dense.model)}
    totals = {name: [] for name in sides}
    for i in tqdm(range(1 + repeats), desc='prompts', leave=False):
        for side in sides.values():
            side.begin(0, length, chunk)
        spent = dict.fromkeys(sides, 0.0)
        chunks = 2 if i == 0 else length // chunk  # the first prompt is for compiling
        for j in tqdm(range(chunks), desc='chunks', leave=False):
            for name, side in sides.items():
                start = time.perf_counter()
                jax.block_until_ready(side.chunk(chunk, j + 1 == chunks))
                spent[name] += 1e3 * (time.perf_counter() - start)
        if i:
            for name, ms in spent.items():
                totals[name].append(ms)
    ms = {name: float(np.median(t)) for name, t in totals.items()}
    details = {f'{name}_ms_per_token': t / length for name, t in ms.items()}
    details |= {f'spark_{name}': x for name, x in sides['spark'].activity().items()}
    return [row(f'prefill: Spark against dense, {length} tokens in chunks of {chunk}', ms['spark'], ms['dense'], **details)]
