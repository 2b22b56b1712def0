"""Measure what this project claims, both sides in one run, medians of interleaved repeats.

    python scripts/benchmark.py topk|ffn|attention|train_step|faults|compile|ffn_decode|decode|prefill [--repeats=N]
        [--topology=v5e:2x2] [--json=FILE]

topk        statistical top-k against exact, approximate and GELU, forward + backward, [4096, 13824], k 1106
ffn         a Spark FFN against the gated FFN of equal parameters, forward + backward, D 2304, 1024 tokens
            with --topology: the compiler's own estimate of cycles on a TPU that need not be there, 8192 tokens, bfloat16
attention   Spark attention in blocks against dense attention in blocks, forward + backward, 2k and 8k tokens; and the memory
train_step  a training step of configs/tiny.py, Spark against dense; fails if a step after the first compiles anything
faults      what surviving them costs: steps of configs/tiny.py with and without a checkpoint, the watchdog, the guard's select
compile     compiling the step of a 26-layer model against that of 4 layers, at small widths
ffn_decode  the FFN of a few tokens, bfloat16, Spark against dense at the paper's 2B shape; the dense product against the memory
decode      whole 2B models of random weights, token by token: Spark against dense, int8 against bfloat16. Takes 16 GB
prefill     the same models on a prompt of 4096 tokens in chunks of 64. Takes 14 GB

JSON: a list of rows {name, backend, ours_ms, baseline_ms, speedup = baseline / ours, …}.
"""

import functools
import itertools
import pathlib
import re
import statistics
import sys
import tempfile
import time
from unittest import mock

if __name__ == '__main__':
    from spark.runtime import use_huge_pages

    use_huge_pages()

import jax
import jax.numpy as jnp
from absl import flags
from flax.core import meta

from spark import config, errors, ops
from spark.benchmarks.timing import interleaved, row
from spark.config import FFNConfig
from spark.nn.ffn import FFN
from spark.runtime import write_json

REPEATS = flags.DEFINE_integer('repeats', None, 'Interleaved repeats of each side; default 11, or 5 of slow ones.', lower_bound=1)
TOPOLOGY = flags.DEFINE_string('topology', None, 'Of ffn: estimate for this slice, such as v5e:2x2.')
JSON = flags.DEFINE_string('json', None, 'Also write the rows to this file.')
CONFIGS = pathlib.Path(__file__).parent.parent / 'configs'


def forward_backward(f, cotangent):
    """A jitted function of f's arguments that gives f's value and the gradients of all of them."""

    def both(*args):
        y, backward = jax.vjp(f, *args)
        return y, backward(cotangent)

    return jax.jit(both)


def topk(repeats):
    """The operator by itself, and as the activation GELU ∘ TopK, against the other ways to find the k and plain GELU."""
    tokens, d, k = 4096, 13824, 1106
    x, cotangent = jax.random.normal(jax.random.key(0), (2, tokens, d))
    ways = {'statistical': ops.statistical_topk, 'exact': ops.exact_topk, 'approx, recall 0.95': ops.approx_topk}
    sides = {name: lambda x, f=f: f(x, k) for name, f in ways.items()}
    sides |= {f'GELU ∘ {name}': lambda x, f=f: jax.nn.gelu(f(x, k)) for name, f in ways.items()}
    sides['GELU'] = jax.nn.gelu
    compiled = {name: forward_backward(f, cotangent) for name, f in sides.items()}
    ms = interleaved({name: lambda f=f: f(x) for name, f in compiled.items()}, repeats or 5)
    active = float(jnp.mean(ops.statistical_topk(x, k) > 0))
    details = {'shape': [tokens, d], 'k': k, 'active': active, 'approx_is_a_sort': jax.default_backend() != 'tpu'}
    pairs = [('statistical', name) for name in list(ways)[1:]]
    pairs += [(f'GELU ∘ {ours}', f'GELU ∘ {theirs}') for ours, theirs in pairs] + [('GELU ∘ statistical', 'GELU')]
    return [row(f'topk: {ours} against {theirs}', ms[ours], ms[theirs], **details) for ours, theirs in pairs]


def ffn(repeats):
    """Forward + backward of both FFNs: the same parameters, so the same matmul FLOPs."""
    tokens, D, F = 1024, 2304, 9216
    x, cotangent = jax.random.normal(jax.random.key(0), (2, 1, tokens, D))
    kinds = {
        'spark': FFNConfig(kind='spark', d_ff=F * 3 // 2, k=1106, r=1024),
        'gated': FFNConfig(kind='gated', d_ff=F),
    }

    def both(cfg):
        module = FFN(cfg, jnp.float32)
        variables = jax.jit(lambda key: module.init(key, x))(jax.random.key(1))
        step = forward_backward(module.apply, cotangent)
        return lambda: step(variables, x)

    ms = interleaved({name: both(cfg) for name, cfg in kinds.items()}, repeats or 11)
    flops = 3 * 2 * tokens * 3 * D * F
    details = {'tokens': tokens, 'd_model': D, 'time_ratio': ms['spark'] / ms['gated'], 'gflops_per_s': flops / ms['spark'] / 1e6}
    return [row('ffn: Spark against gated', ms['spark'], ms['gated'], **details)]


def ffn_cycles(topology):
    """The sum of estimated_cycles over the operations that the compiler makes of both FFNs, forward + backward."""
    from jax.sharding import SingleDeviceSharding

    from spark.compiling import aot

    tokens, D, F = 8192, 2304, 9216
    device = aot.devices(topology)[0]
    there = lambda tree: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device)), tree
    )  # fmt: skip
    x = jax.ShapeDtypeStruct((1, tokens, D), jnp.bfloat16)
    cycles = {}
    for kind, cfg in {
        'spark': FFNConfig(kind='spark', d_ff=F * 3 // 2, k=1106, r=1024),
        'gated': FFNConfig(kind='gated', d_ff=F),
    }.items():
        module = FFN(cfg, jnp.bfloat16)
        variables = meta.unbox(jax.eval_shape(module.init, jax.random.key(0), x))

        def step(variables, x, cotangent, module=module):
            y, backward = jax.vjp(module.apply, variables, x)
            return y, backward(cotangent)

        text = jax.jit(step).lower(*there((variables, x, x))).compile().as_text()
        cycles[kind] = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text)))
    return [{
        'name': f'ffn: estimated cycles on {topology}, Spark against gated', 'backend': f'{device.device_kind}, not there',
        'ours_ms': cycles['spark'] / 1e6, 'baseline_ms': cycles['gated'] / 1e6, 'speedup': cycles['gated'] / cycles['spark'],
        'unit': 'million cycles, an estimate of the compiler, not a time', 'ratio': cycles['spark'] / cycles['gated'],
    }]  # fmt: skip


def attention(repeats):
    """One layer's lookups, the paper's heads halved in number, B 1; temporary memory as compiled."""
    from spark.kernels import blockwise

    N, G, d = 2, 2, 256
    kinds = {'spark': blockwise.Spec(r=128, k=256, logit_cap=50.0), 'dense': blockwise.Spec(logit_cap=50.0)}

    def step(spec, q, k, v, c):
        starts = blockwise.visible_starts(jnp.ones((1, q.shape[3]), jnp.int32))
        y, backward = jax.vjp(lambda *x: blockwise.attention(*x, starts, spec)[0], q, k, v)
        return y, backward(c)

    shapes = lambda L: [(1, N, G, L, d), (1, N, L, d), (1, N, L, d), (1, N, G, L, d)]
    memory = {}
    for L in (2048, 8192, 32768):
        structs = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes(L)]
        compiled = jax.jit(functools.partial(step, kinds['spark'])).lower(*structs).compile()
        memory[f'temporary_mb_at_{L}'] = compiled.memory_analysis().temp_size_in_bytes / 1e6
    rows = []
    for L in (2048, 8192):
        x = [jax.random.normal(key, s) for key, s in zip(jax.random.split(jax.random.key(0), 4), shapes(L), strict=True)]
        x[0] = x[0] / d**0.5
        sides = {name: functools.partial(jax.jit(functools.partial(step, spec)), *x) for name, spec in kinds.items()}
        ms = interleaved(sides, repeats or 3)
        rows.append(row(f'attention: Spark against dense, {L} tokens', ms['spark'], ms['dense'], **memory))
    return rows


def _tiny_step(variant):
    """(a step of configs/tiny.py on one device and a batch of its corpus, its Trainer, [state]); the state goes round."""
    from spark.data import pipeline
    from spark.training.step import Trainer

    tokenizer, cfg = pipeline.tokenizer_for(config.validate(config.from_file(CONFIGS / 'tiny.py', variant)))
    trainer = Trainer(cfg, jax.devices()[:1])
    batches = iter(pipeline.train_dataset(cfg.data, cfg.seed, tokenizer))
    with trainer.context():
        state, batch = [trainer.init_state(cfg.seed)], trainer.put(next(batches))
    batches.close()

    def step():
        with trainer.context():
            state[0], sums = trainer.train_step(state[0], batch)
        return sums

    return step, trainer, state


def train_step(repeats):
    """The tiny config's step, Spark against dense."""
    steps, cfgs = {}, {}
    for variant in ('spark', 'dense'):
        step, trainer, _ = _tiny_step(variant)
        steps[variant], cfgs[variant] = (step, trainer), trainer.cfg
    ms = interleaved({name: step for name, (step, _) in steps.items()}, repeats or 11)
    compiled = {name: trainer.train_step._cache_size() for name, (_, trainer) in steps.items()}
    assert set(compiled.values()) == {1}, f'a step after the first was compiled again: {compiled}'
    tokens = cfgs['spark'].data.batch_size * cfgs['spark'].data.seq_len
    details = {f'{name}_tokens_per_second': 1e3 * tokens / t for name, t in ms.items()}
    details |= {'time_ratio': ms['spark'] / ms['dense'], 'compilations': compiled}
    return [row('train_step: Spark against dense', ms['spark'], ms['dense'], **details)]


def faults(repeats):
    """Ten steps with a checkpoint, to its end, against ten without; steps under the watchdog, and without the guard's select."""
    from spark.checkpoints.manager import Checkpoints
    from spark.training import step as module
    from spark.training.watchdog import Watchdog

    step, _, state = _tiny_step('spark')
    with mock.patch.object(module, 'judge', lambda cfg, guard, *_: (True, guard)):
        unguarded = _tiny_step('spark')[0]
        unguarded()  # compiled here
    saved, blocked = itertools.count(), []

    def steps(n=10):
        for _ in range(n):
            sums = step()
        return sums

    with tempfile.TemporaryDirectory() as directory, Watchdog(300) as dog:
        (pathlib.Path(directory) / 'config.json').touch()
        checkpoints = Checkpoints(pathlib.Path(directory) / 'checkpoints', keep=1)

        def saving():
            jax.block_until_ready(steps(1))
            start = time.perf_counter()
            checkpoints.save(next(saved), state[0], {})
            blocked.append(1e3 * (time.perf_counter() - start))
            sums = steps(9)
            checkpoints.wait()
            return sums

        def watched():
            dog.alive()
            return step()

        ms = interleaved({'plain': steps, 'saving': saving}, repeats or 11)
        ms |= interleaved({'step': step, 'watched': watched, 'unguarded': unguarded}, repeats or 11)
        checkpoints.close()
    cost = ms['saving'] - ms['plain']
    size = sum(x.nbytes for x in jax.tree.leaves(state[0])) / 1e6
    details = {'state_mb': size, 'blocked_ms': statistics.median(blocked), 'cost_ms': cost, 'share_at_one_in_300_s': cost / 300e3}
    return [
        row('ten steps: one checkpoint against none', ms['saving'], ms['plain'], **details),
        row('a step: watchdog against none', ms['watched'], ms['step']),
        row('a step: an update that can be left out against one that cannot', ms['step'], ms['unguarded']),
    ]


def compile_time(repeats):
    """Lowering and compiling the training step anew, without any cache."""
    from spark.training.step import Trainer

    jax.config.update('jax_enable_compilation_cache', False)

    def compile_layers(n):
        c = config.from_file(CONFIGS / 'gemma2_2b.py', 'spark')
        m, f, a = c.model, c.model.ffn, c.model.attention
        m.n_layers, m.d_model, m.vocab_size = n, 64, 512
        f.d_ff, f.k, f.r = 192, 16, 32
        a.n_heads, a.n_kv_heads, a.head_dim, a.k, a.r, a.window = 4, 2, 16, 16, 8, 32
        c.data.seq_len, c.data.batch_size, c.train.loss_pieces, c.mesh.fsdp = 64, 4, 1, 1
        trainer = Trainer(config.validate(c), jax.devices()[:1])
        with trainer.context():
            trainer.train_step.lower(trainer.abstract_state, trainer.abstract_batch()).compile()

    sides = {f'{n} layers': lambda n=n: compile_layers(n) for n in (26, 4)}
    ms = interleaved(sides, repeats or 5)
    return [row('compile: 26 layers against 4', ms['26 layers'], ms['4 layers'], time_ratio=ms['26 layers'] / ms['4 layers'])]


def _gemma2_2b(run):
    """run(spark, dense, repeats) of `benchmarks.decoding` on the ModelConfigs of the paper's 2B models."""

    def measure(repeats):
        from spark.benchmarks import decoding

        cfgs = (config.validate(config.from_file(CONFIGS / 'gemma2_2b.py', variant)).model for variant in ('spark', 'dense'))
        return getattr(decoding, run)(*cfgs, repeats)

    return measure


BENCHMARKS = {'topk': topk, 'ffn': ffn, 'attention': attention, 'train_step': train_step, 'faults': faults}
BENCHMARKS |= {'compile': compile_time} | {name: _gemma2_2b(name) for name in ('ffn_decode', 'decode', 'prefill')}


def table(rows):
    """The rows in Markdown."""
    lines = [f'Backend: {rows[0]["backend"]}', '', '| benchmark | ours, ms | baseline, ms | speed-up |', '|---|---|---|---|']
    lines += [f'| {r["name"]} | {r["ours_ms"]:.1f} | {r["baseline_ms"]:.1f} | {r["speedup"]:.2f}× |' for r in rows]
    known = {'name', 'backend', 'ours_ms', 'baseline_ms', 'speedup'}
    details = {k: round(v, 4) if isinstance(v, float) else v for k, v in rows[0].items() if k not in known}
    return '\n'.join([*lines, '', ', '.join(f'{k} {v}' for k, v in details.items())])


def main(name):
    if TOPOLOGY.value and name != 'ffn':
        raise errors.ConfigError(f'--topology={TOPOLOGY.value}: only ffn has an estimate')
    rows = ffn_cycles(TOPOLOGY.value) if TOPOLOGY.value else BENCHMARKS[name](REPEATS.value)
    print(table(rows))
    if JSON.value:
        write_json(JSON.value, rows)


if __name__ == '__main__':
    chosen = [arg for arg in sys.argv[1:] if not arg.startswith('-')]

    def check(argv):
        if len(chosen) != 1 or chosen[0] not in BENCHMARKS:
            raise errors.ConfigError(f'benchmark {" ".join(chosen) or "missing"}: want one of {", ".join(BENCHMARKS)}')
        sys.argv.remove(chosen[0])

    errors.run(lambda: main(chosen[0]), check=check)
