"""Statistical top-k, the Spark FFN and Spark attention by themselves, forward and backward."""

import functools
import re

import jax
import jax.numpy as jnp
from flax.core import meta
from jax.sharding import SingleDeviceSharding

from spark import ops
from spark.benchmarks.timing import Rows, interleaved, row
from spark.compiling import aot
from spark.config import FFNConfig
from spark.kernels import blockwise
from spark.nn.ffn import FFN

# Equal parameters, and equal matmul FLOPs in training.
D, F = 2304, 9216
FFNS = {'spark': FFNConfig(kind='spark', d_ff=F * 3 // 2, k=1106, r=1024), 'gated': FFNConfig(kind='gated', d_ff=F)}


def _forward_backward(f, **options):
    """A jitted function of f's arguments and a cotangent: f's value, and the gradients of all of its arguments."""

    def both(*args):  # the compiler's estimate depends on their order
        y, backward = jax.vjp(f, *args[:-1])
        return y, backward(args[-1])

    return jax.jit(both, **options)


def topk(repeats: int = 5) -> Rows:
    """Top-k alone and as the activation GELU ∘ TopK: statistical against exact, approximate, and plain GELU."""
    tokens, d, k = 4096, 13824, 1106
    x, cotangent = jax.random.normal(jax.random.key(0), (2, tokens, d))
    kinds = {'statistical': ops.statistical_topk, 'exact': ops.exact_topk, 'approx, recall 0.95': ops.approx_topk}
    functions = {name: lambda x, f=f: f(x, k) for name, f in kinds.items()}
    functions |= {f'GELU ∘ {name}': lambda x, f=f: jax.nn.gelu(f(x, k)) for name, f in kinds.items()}
    functions['GELU'] = jax.nn.gelu
    ms = interleaved({name: functools.partial(_forward_backward(f), x, cotangent) for name, f in functions.items()}, repeats)
    active = float(jnp.mean(ops.statistical_topk(x, k) > 0))
    details = {'shape': [tokens, d], 'k': k, 'active': active, 'approx_is_a_sort': jax.default_backend() != 'tpu'}
    pairs = [('statistical', name) for name in list(kinds)[1:]]
    pairs += [(f'GELU ∘ {ours}', f'GELU ∘ {baseline}') for ours, baseline in pairs] + [('GELU ∘ statistical', 'GELU')]
    return [row(f'topk: {ours} against {baseline}', ms[ours], ms[baseline], **details) for ours, baseline in pairs]


def ffn(repeats: int = 11) -> Rows:
    """A Spark FFN against the gated FFN of equal parameters."""
    tokens = 1024
    x, cotangent = jax.random.normal(jax.random.key(0), (2, 1, tokens, D))
    steps = {}
    for name, cfg in FFNS.items():
        module = FFN(cfg, jnp.float32)
        variables = jax.jit(lambda key, module=module: module.init(key, x))(jax.random.key(1))
        steps[name] = functools.partial(_forward_backward(module.apply), variables, x, cotangent)
    ms = interleaved(steps, repeats)
    flops = 3 * 2 * tokens * 3 * D * F
    details = {'tokens': tokens, 'd_model': D, 'time_ratio': ms['spark'] / ms['gated'], 'gflops_per_s': flops / ms['spark'] / 1e6}
    return [row('ffn: Spark against gated', ms['spark'], ms['gated'], **details)]


def ffn_cycles(topology: str) -> Rows:
    """A row of the TPU compiler's own estimate, for 8192 tokens in bfloat16: cycles, summed over operations. Needs no TPU."""
    device = aot.devices(topology)[0]
    x = jax.ShapeDtypeStruct((1, 8192, D), jnp.bfloat16)
    cycles = {}
    for name, cfg in FFNS.items():
        module = FFN(cfg, jnp.bfloat16)
        variables = meta.unbox(jax.eval_shape(module.init, jax.random.key(0), x))
        step = _forward_backward(module.apply, in_shardings=SingleDeviceSharding(device))
        text = step.lower(variables, x, x).compile().as_text()
        cycles[name] = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text)))
    return [{
        'name': f'ffn: estimated cycles on {topology}, Spark against gated',
        'backend': f'compiled for {device.device_kind}, not run',
        'ours_ms': cycles['spark'] / 1e6, 'baseline_ms': cycles['gated'] / 1e6, 'speedup': cycles['gated'] / cycles['spark'],
        'unit': 'million cycles, an estimate of the compiler, not a time', 'ratio': cycles['spark'] / cycles['gated'],
    }]  # fmt: skip


def attention(repeats: int = 3) -> Rows:
    """Blockwise attention of one layer of 2B with half the heads, batch 1; and its temporary memory as compiled."""
    N, G, d = 2, 2, 256
    specs = {'spark': blockwise.Spec(r=128, k=256, logit_cap=50.0), 'dense': blockwise.Spec(logit_cap=50.0)}

    def attend(spec, q, k, v):
        starts = blockwise.visible_starts(jnp.ones((1, q.shape[3]), jnp.int32))
        return blockwise.attention(q, k, v, starts, spec)[0]

    steps = {name: _forward_backward(functools.partial(attend, spec)) for name, spec in specs.items()}
    shapes = lambda L: [(1, N, G, L, d), (1, N, L, d), (1, N, L, d), (1, N, G, L, d)]
    memory = {}
    for L in (2048, 8192, 32768):
        structs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes(L)]
        analysis = steps['spark'].lower(*structs).compile().memory_analysis()
        memory[f'temporary_mb_at_{L}'] = analysis.temp_size_in_bytes / 1e6
    rows = []
    for L in (2048, 8192):
        keys = jax.random.split(jax.random.key(0), 4)
        q, k, v, cotangent = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes(L), strict=True))
        ms = interleaved({name: functools.partial(step, q / d**0.5, k, v, cotangent) for name, step in steps.items()}, repeats)
        rows.append(row(f'attention: Spark against dense, {L} tokens', ms['spark'], ms['dense'], **memory))
    return rows
