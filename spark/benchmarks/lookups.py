"""Statistical top-k, the Spark FFN and Spark attention by themselves, forward and backward."""

import functools
import re

import jax
import jax.numpy as jnp
from flax.core import meta
from jax.sharding import SingleDeviceSharding

from spark import ops
from spark.benchmarks.timing import Rows, interleaved, peak_mb, row
from spark.compiling import aot
from spark.config import AttentionConfig, FFNConfig
from spark.kernels import blockwise
from spark.nn.attention import Packed, in_blocks
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
    """Top-k alone and as the activation GELU ∘ TopK: statistical against exact, approximate, plain GELU and ReLU."""
    tokens, d, k = 4096, 13824, 1106
    x, cotangent = jax.random.normal(jax.random.key(0), (2, tokens, d))
    kinds = {'statistical': ops.statistical_topk, 'exact': ops.exact_topk, 'approx, recall 0.95': ops.approx_topk}
    functions = {name: lambda x, f=f: f(x, k) for name, f in kinds.items()}
    functions |= {f'GELU ∘ {name}': lambda x, f=f: jax.nn.gelu(f(x, k)) for name, f in kinds.items()}
    functions |= {'GELU': jax.nn.gelu, 'ReLU, the least that memory allows': jax.nn.relu}
    ms = interleaved({name: functools.partial(_forward_backward(f), x, cotangent) for name, f in functions.items()}, repeats)
    active = float(jnp.mean(ops.statistical_topk(x, k) > 0))
    details = {'shape': [tokens, d], 'k': k, 'active': active, 'approx_is_a_sort': jax.default_backend() != 'tpu'}
    pairs = [('statistical', name) for name in list(kinds)[1:]]
    pairs += [(f'GELU ∘ {ours}', f'GELU ∘ {baseline}') for ours, baseline in pairs]
    pairs += [('GELU ∘ statistical', 'GELU'), ('statistical', 'ReLU, the least that memory allows')]
    return [row(f'topk: {ours} against {baseline}', ms[ours], ms[baseline], **details) for ours, baseline in pairs]


def _ffn_step(name, tokens):
    """Forward and backward of an FFN, ready to be called."""
    x, cotangent = jax.random.normal(jax.random.key(0), (2, 1, tokens, D))
    module = FFN(FFNS[name], jnp.float32, jax.default_backend())
    variables = jax.jit(lambda key: module.init(key, x))(jax.random.key(1))
    return functools.partial(_forward_backward(module.apply), variables, x, cotangent)


def ffn(repeats: int = 7) -> Rows:
    """A Spark FFN against the gated FFN of equal parameters."""
    rows = []
    for tokens in (1024, 4096):
        ms = interleaved({name: _ffn_step(name, tokens) for name in FFNS}, repeats)
        flops = 3 * 2 * tokens * 3 * D * F
        details = {'tokens': tokens, 'time_ratio': ms['spark'] / ms['gated'], 'gated_gflops_per_s': flops / ms['gated'] / 1e6}
        details |= _peaks(_ffn_step, FFNS, tokens)
        rows.append(row(f'ffn: Spark against gated, {tokens} tokens', ms['spark'], ms['gated'], **details))
    return rows


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


ATTENTIONS = {  # one layer of 2B with half the heads
    'spark': AttentionConfig(kind='spark', n_heads=4, n_kv_heads=2, head_dim=256, r=128, k=256, logit_cap=50.0),
    'dense': AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=256, logit_cap=50.0),
}


def _attend(cfg, *qkv):
    segments = jnp.ones((1, qkv[0].shape[3]), jnp.int32)
    return in_blocks(cfg, jax.default_backend(), *qkv, Packed(blockwise.visible_starts(segments), segments, 0))[0]


def _shapes(L):
    """Of q, k, v and a cotangent, batch 1."""
    return [(1, 2, 2, L, 256), (1, 2, L, 256), (1, 2, L, 256), (1, 2, 2, L, 256)]


def _attention_step(name, L):
    """Forward and backward of the lookup, ready to be called."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, cotangent = (jax.random.normal(key, shape) for key, shape in zip(keys, _shapes(L), strict=True))
    return functools.partial(_forward_backward(functools.partial(_attend, ATTENTIONS[name])), q / 16, k, v, cotangent)


def attention(repeats: int = 3) -> Rows:
    """Attention in linear memory, Spark against dense."""
    rows = []
    for L in (2048, 8192):
        ms = interleaved({name: _attention_step(name, L) for name in ATTENTIONS}, repeats)
        details = {'time_ratio': ms['spark'] / ms['dense'], **_peaks(_attention_step, ATTENTIONS, L)}
        rows.append(row(f'attention: Spark against dense, {L} tokens', ms['spark'], ms['dense'], **details))
    return rows


def _peaks(build, names, *args):
    return {f'{name}_peak_mb': peak_mb(build, name, *args) for name in names}
