"""How fast the sparse model decodes against the dense one, at the paper's Gemma-2 2B shape, and against what memory can give.

Random weights, uniform, so that scores are Gaussian as sums are; both sides in one run; the weights of a figure together are far
larger than the last-level cache. On CPUs the kernels of `kernels.cpu`, elsewhere those of the platform.
"""

import functools
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from spark.benchmarks.timing import interleaved, row
from spark.inference import layout, model
from spark.kernels import cpu
from spark.nn.block import rms_norm
from spark.nn.transformer import abstract_params


def bandwidth(repeats=9):
    """GB/s at which memory is read by the plainest kernel there is, from two arrays of 256 MiB by turns; the median."""
    arrays = itertools.cycle([jnp.ones(1 << 26) + i for i in range(2)])
    read = jax.jit(cpu.read if cpu.available() and jax.default_backend() == 'cpu' else jnp.sum)
    ms = interleaved({'read': lambda: read(next(arrays))}, repeats)['read']
    return (1 << 28) / ms / 1e6


def random_leaf(cfg):
    """A function of a parameter's path to random values of its shape, as `layout.lay_out` wants one."""
    shapes, key = abstract_params(cfg), itertools.count()

    def leaf(*path):
        shape = functools.reduce(lambda tree, name: tree[name], ('params', *path), shapes).shape
        if path[-1] == 'scale':
            return jnp.zeros(shape)
        fan_in = shape[-1] if path == ('embedding',) else np.prod(shape[1:-1]) if path[-1] == 'out' else shape[1]
        draw = jax.jit(lambda key: jax.random.uniform(key, shape, jnp.float32, -1, 1) * (3 / fan_in) ** 0.5)
        return draw(jax.random.key(next(key), impl='rbg'))

    return leaf


def here(cfg, dtype):
    """The `Serving` of a ModelConfig on the first device."""
    return layout.serving_for(cfg, dtype, jax.devices()[0].platform)


_whole, _headless = (jax.jit(f, static_argnums=0, donate_argnums=2) for f in (model.forward, model.hidden))


class Decoder:
    """A model of random weights behind a context of random keys and values; `step` decodes one token, `chunk` prefills some.

    Args:
      cfg: a ModelConfig; dtype: of the weights; context: places that are filled; size: places there is room for.
    """

    def __init__(self, cfg, dtype, context, size, batch=1, weights=None, chunk=64):
        self.serving = here(cfg, dtype)
        self.weights = layout.lay_out(self.serving, random_leaf(cfg)) if weights is None else weights
        key = jax.random.key(1, impl='rbg')
        fill = lambda x: jax.random.uniform(key, x.shape, jnp.float32, -1.7, 1.7).astype(x.dtype)
        empty = jax.jit(lambda: model.init_cache(self.serving, batch, size, chunk))()
        self.cache = empty.replace(layers=jax.tree.map(jax.jit(fill), empty.layers), length=jnp.asarray(context, jnp.int32))
        self.first, self.counts, self._batch = jnp.zeros(batch, jnp.int32), None, batch

    def _run(self, f, tokens, *wanted):
        self.cache, y, self.counts = f(self.serving, self.weights, self.cache, tokens, self.first, *wanted)
        return y

    def step(self, head=True):
        """Decodes a token; the logits, or without `head` the hidden states."""
        return self._run(_whole if head else _headless, jnp.ones((self._batch, 1), jnp.int32))

    def chunk(self, size, last):
        """Prefills `size` tokens, different ones; the logits behind them, if they are the prompt's last."""
        tokens = (jnp.arange(size) * 7919 % self.serving.cfg.vocab_size)[None].repeat(self._batch, 0).astype(jnp.int32)
        return self._run(_whole, tokens, np.bool_(last))

    def activity(self):
        """{'active', 'attended'}: means per token and layer of the last step."""
        return {name: float(jnp.mean(x)) for name, x in self.counts.items() if name != 'overflow'}

    def bytes(self, head=True):
        """Bytes that a step has to read, by what was active in the last one."""
        return model.bytes_per_step(self.serving, self.weights, self.cache, self.activity(), self._batch, head)


def ffn_decode(spark, dense, repeats, layers=8):
    """FFNs alone, bfloat16, batch 1, 4 and 16, per layer; and the dense matrix-vector product against reading.

    Args:
      spark, dense: ModelConfigs.
      layers: that run one after the other in a program, so that neither the cache nor XLA's dispatch tells.
    """

    def stack(serving, tables, x):
        for w in tables:
            y, did = model.ffn(serving, w, x)
            x = rms_norm(y, 0)
        return x, did

    rows_, sides = [], {}
    for name, cfg in {'spark': spark, 'dense': dense}.items():
        one = cfg.model_copy(update={'n_layers': layers, 'vocab_size': 8, 'pattern': ('global',)})
        one = one.model_copy(update={'attention': one.attention.model_copy(update={'window': 0})})
        serving = here(one, 'bfloat16')
        tables = layout.lay_out(serving, random_leaf(one))['layers']
        sides[name] = serving, [{k: w[k] for k in ('K1', 'records', 'keys', 'VT') if k in w} for w in tables]
    for batch in (1, 4, 16):
        x = jax.random.normal(jax.random.key(0), (batch, spark.d_model), sides['spark'][0].compute)
        runs, found = {}, {}
        for name, (serving, tables) in sides.items():
            run = functools.partial(jax.jit(functools.partial(stack, serving)), tables, x)
            found[name], runs[name] = run()[1], lambda run=run: run()[0]
        gigabytes = bandwidth()
        ms = {name: t / layers for name, t in interleaved(runs, repeats or 15).items()}
        active = float(jnp.mean(found['spark']['active']))
        D, F, r = spark.d_model, spark.ffn.d_ff, spark.ffn.r
        records = F * model.union(active / F, batch)
        read = {'spark': 2 * (F * r + records * (2 * D - r)), 'dense': 2 * 3 * D * dense.ffn.d_ff}
        details = {'batch': batch, 'active': active, 'records_read': records, 'read_bandwidth_gb_per_s': gigabytes}
        details |= {'limit_by_bytes': read['dense'] / read['spark']}
        details |= {f'{name}_gb_per_s': read[name] / t / 1e6 for name, t in ms.items()}
        rows_.append(row(f'ffn_decode: Spark against dense, batch {batch}', ms['spark'], ms['dense'], **details))
    if jax.default_backend() == 'cpu' and cpu.available():
        keys = [w['keys'].values for w in sides['dense'][1]]
        arrays = [jnp.ones(k.size // 2) + i for i, k in enumerate(keys)]
        x = jax.random.normal(jax.random.key(0), (1, dense.d_model))
        products, reads = jax.jit(lambda x, Ws: [cpu.matmul(x, W) for W in Ws]), jax.jit(lambda xs: [cpu.read(x) for x in xs])
        ms = interleaved({'matvec': lambda: products(x, keys), 'read': lambda: reads(arrays)}, repeats or 15)
        size = sum(k.nbytes for k in keys)
        rates = {f'{name}_gb_per_s': size / t / 1e6 for name, t in ms.items()}
        rows_.append(row(f'ffn_decode: {layers} dense matvecs against reading as much', ms['matvec'], ms['read'], **rates))
    return rows_


def decode(spark, dense, repeats, contexts=(512, 8192)):
    """Whole models, token by token, batch 1: Spark against dense with and without the output head, and int8 against bfloat16."""
    rows_, repeats, cfgs, before = [], repeats or 9, (('spark', spark), ('dense', dense)), memory('VmRSS')
    weights = {name: layout.lay_out(here(cfg, 'bfloat16'), random_leaf(cfg)) for name, cfg in cfgs}

    def compare(title, sides, head=True):
        gigabytes = bandwidth()
        ms = interleaved({name: functools.partial(side.step, head) for name, side in sides.items()}, repeats)
        (ours, a), (theirs, b) = sides.items()
        details = {'read_bandwidth_gb_per_s': gigabytes, 'limit_by_bytes': b.bytes(head) / a.bytes(head)}
        for name, side in sides.items():
            key = name.replace(' ', '_')
            details |= {f'{key}_gb_per_s': side.bytes(head) / ms[name] / 1e6, f'{key}_gb_read': side.bytes(head) / 1e9}
            details |= {f'{key}_{what}': x for what, x in side.activity().items()}
        rows_.append(row(f'decode: {title}', ms[ours], ms[theirs], **details))

    for context in contexts:
        size = context + 4 * repeats + 16
        sides = {name: Decoder(cfg, 'bfloat16', context, size, weights=weights[name]) for name, cfg in cfgs}
        compare(f'Spark against dense, context {context}', sides)
        compare(f'the same without the output head, context {context}', sides, head=False)
        held = sum(x.nbytes for x in jax.tree.leaves([weights, [side.cache for side in sides.values()]]))
        rows_[-2] |= {'weights_and_caches_gb': held / 1e9, 'peak_memory_over_that': (peak_memory(sides) - before) / held}
    context = contexts[0]
    for name, cfg in cfgs:
        place = context, context + 4 * repeats + 16
        sides = {'int8': Decoder(cfg, 'int8', *place), 'bfloat16': Decoder(cfg, 'bfloat16', *place, weights=weights[name])}
        compare(f'{name}, int8 against bfloat16, context {context}', sides)
        del sides
    return rows_


def prefill(spark, dense, repeats, length=4096, chunk=64):
    """A prompt in chunks, batch 1, bfloat16; the two sides take turns chunk by chunk."""
    cfgs = ('spark', spark), ('dense', dense)
    weights = {name: layout.lay_out(here(cfg, 'bfloat16'), random_leaf(cfg)) for name, cfg in cfgs}
    totals = {name: [] for name in weights}
    for i in tqdm(range(1 + (repeats or 1)), desc='prompts', leave=False):
        sides = {name: Decoder(cfg, 'bfloat16', 0, length, weights=weights[name], chunk=chunk) for name, cfg in cfgs}
        spent = dict.fromkeys(sides, 0.0)
        chunks = 2 if i == 0 else length // chunk  # the first compiles
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


def peak_memory(sides):
    """The most bytes that this process held while each of some Decoders took a step; what Linux says, elsewhere 0."""
    if not forget_peak():
        return 0
    for side in sides.values():
        jax.block_until_ready(side.step())
    return memory('VmHWM')


def forget_peak():
    """From here on `memory('VmHWM')` is of what comes; False where there is no such thing."""
    try:
        with open('/proc/self/clear_refs', 'w') as f:
            f.write('5')
    except OSError:
        return False
    return True


def memory(what):
    """Bytes of this process: 'VmRSS' that it has, 'VmHWM' at its peak; what Linux says, elsewhere 0."""
    try:
        with open('/proc/self/status') as f:
            return next(int(line.split()[1]) for line in f if line.startswith(what)) * 1024
    except (OSError, StopIteration):
        return 0
