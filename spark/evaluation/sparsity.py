"""Statistics of a model's lookups on text: active neurons, attended keys, and how close the scores are to a Gaussian.

`observe` intercepts the methods that score a table and sums over tokens; `report` reads the sums. Scores are binned a strip at a
time, and each device bins those of its own tokens, heads and neurons, so the statistics take memory that is linear in the length.

Statistical, exact and approximate top-k all keep the entries above a threshold of the same scores, so their sets are nested: if n
entries are kept, min(n, k) of them are among the k largest. Recall and precision then follow from n, without a sort.
"""

import functools
import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from scipy.special import ndtr

from spark.config import ModelConfig
from spark.nn.attention import Attention, Packed
from spark.nn.ffn import FFN
from spark.nn.layers import METRICS, mesh_axes, shards, sow
from spark.nn.transformer import Transformer, by_layer, observable

EDGES = np.linspace(-8, 8, 1025)  # bins of standardised scores; scores outside count in the outer bins
STRIP = 1 << 22  # scores that a device bins at a time


def observe(model: Transformer, params: dict, batch: dict) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Runs the forward pass on a batch of `data.rows`: (the hidden states (B, L, D), sums over the tokens without padding).

    The sums are int32 or float32. Each has a leading axis of n_layers, except `positions`; the rest of its shape is:
      'active' (F + 1): tokens by their number of active neurons; 'fired' (F): tokens for which each neuron was active;
      'attended' (L + 1): queries of all heads by their number of attended keys;
      'by_position' (L): attended keys, mean over heads, by position in the document; 'positions' (L): tokens by position;
      'long' (4): over the queries that see more than k keys: their number, Σ attended keys, Σ recall, Σ precision;
      'ffn_scores', 'attention_scores' (bins): histograms of standardised scores; in attention, of those long queries.
    """
    cfg, positions_BxL, real_BxL = model.cfg, batch['positions'], batch['segments'] > 0

    def interceptor(method, args, kwargs, context):
        out, module = method(*args, **kwargs), context.module
        found = {}
        if isinstance(module, FFN) and context.method_name == 'activate':
            found = _of_ffn(module, *args, out, real_BxL)
        elif isinstance(module, Attention) and context.method_name == 'look_up':
            q, k, _, visible = args
            found = _of_attention(module, q, k, visible, positions_BxL, real_BxL)
        for name, sums in found.items():
            sow(module, f'sum_{name}', sums)
        return out

    with nn.intercept_methods(interceptor):
        hidden, state = observable(model).apply(params, batch['tokens'], positions_BxL, batch['segments'], mutable=[METRICS])
    halves = {'attention': ['long', 'attention_scores', 'attended', 'by_position'], 'ffn': ['ffn_scores']}
    halves['ffn'] += ['active', 'fired'] if cfg.ffn.traits.sparse else []
    sums = {name: by_layer(cfg, state[METRICS], half, f'sum_{name}') for half, names in halves.items() for name in names}
    per_token = (('batch', 'length'),) * 2
    sums['positions'] = _over_devices(_tally, (positions_BxL, real_BxL), per_token, most=positions_BxL.shape[1] - 1)
    return hidden, sums


def report(cfg: ModelConfig, sums: dict) -> list[dict]:
    """One dict per layer of the statistics that the sums of `observe`, added up over batches, give.

    `active_*` are shares of d_ff; `attended_*` are keys per query and head. `recall` and `precision` compare what top-k keeps
    with the k largest scores, means over tokens. `ks` is the Kolmogorov–Smirnov distance of the standardised scores to the
    normal distribution. `dead` counts neurons that were never active; `gini` is 0 if all are active equally often. Attention's
    recall, precision, ks and `attended_long` are over the queries that see more than k keys.
    """
    f, a = cfg.ffn, cfg.attention
    layers = []
    for i in range(cfg.n_layers):
        layer = {'layer': i, 'span': cfg.pattern[i % len(cfg.pattern)]}
        if 'active' in sums:
            tokens = sums['active'][i]
            layer |= {f'active_{name}': value / f.d_ff for name, value in _distribution(tokens).items()}
            if f.traits.topk:
                n = np.arange(f.d_ff + 1)
                layer['recall'] = float(tokens @ (np.minimum(n, f.k) / f.k) / tokens.sum())
                layer['precision'] = float(tokens @ (np.minimum(n, f.k) / np.maximum(n, 1)) / tokens.sum())
            layer |= {'dead': int(np.sum(sums['fired'][i] == 0)), 'gini': gini(sums['fired'][i])}
        layer['ks'] = kolmogorov_smirnov(sums['ffn_scores'][i])
        layer |= {f'attended_{name}': value for name, value in _distribution(sums['attended'][i]).items()}
        count, attended, recall, precision = sums['long'][i]
        if count:
            layer['attended_long'] = float(attended / count)
            layer['attention_ks'] = kolmogorov_smirnov(sums['attention_scores'][i])
            if a.traits.topk:
                layer |= {'attention_recall': float(recall / count), 'attention_precision': float(precision / count)}
        layers.append(layer)
    return layers


def kolmogorov_smirnov(histogram: np.ndarray) -> float:
    """max |F(z) − Φ(z)| over the inner EDGES, where F is the distribution of a histogram over EDGES; NaN if it is empty."""
    if not (total := histogram.sum()):
        return float('nan')
    return float(np.max(np.abs(np.cumsum(histogram)[:-1] / total - ndtr(EDGES[1:-1]))))


def gini(counts: Sequence[int] | np.ndarray) -> float:
    """The Gini coefficient of non-negative counts; NaN if all are 0."""
    x, n = np.sort(np.asarray(counts, float)), len(counts)
    return float(2 * np.arange(1, n + 1) @ x / (n * x.sum()) - (n + 1) / n) if x.sum() else float('nan')


def _of_ffn(module, s_TxF, out_TxF, real_BxL):
    """The sums of a layer's FFN; tokens are one axis, or the two of `real_BxL`."""
    real_T = real_BxL.reshape(s_TxF.shape[:-1])
    tokens = ('batch', 'length')[: real_T.ndim]
    mean_Tx1, std_Tx1 = _mean_and_std(s_TxF, True)

    def histogram(s, mean, std, real):
        s, mean, std, real = (x.reshape(real.size, -1) for x in (s, mean, std, real))
        count = lambda rows, own: _histogram(rows(s), rows(mean), rows(std), rows(real) & own[:, None])
        return _by_strips(count, *s.shape)

    axes = (*tokens, 'ffn'), (*tokens, None), (*tokens, None), tokens
    sums = {'ffn_scores': _over_devices(histogram, (s_TxF, mean_Tx1, std_Tx1, real_T), axes)}
    if module.cfg.traits.sparse:
        active_T = module.get_variable(METRICS, 'active')
        sums['active'] = _over_devices(_tally, (active_T, real_T), (tokens, tokens), most=module.cfg.d_ff)
        fired = (out_TxF != 0) & real_T[..., None]
        sums['fired'] = jnp.sum(fired, axis=range(real_T.ndim), dtype=jnp.int32)
    return sums


def _of_attention(module, q_BxNxGxLxd, k_BxNxSxd, visible, positions_BxL, real_BxL):
    """The sums of a layer's attention. A query sees the keys from its start to its own place."""
    cfg, (B, N, G, L, d) = module.cfg, q_BxNxGxLxd.shape
    attended = module.get_variable(METRICS, 'attended').reshape(B, N, G, L)
    starts_BxL = visible.starts if isinstance(visible, Packed) else jnp.argmax(visible, axis=-1)
    starts_BxL, place_BxL = jnp.broadcast_to(starts_BxL, (B, L)), jnp.broadcast_to(jnp.arange(L), (B, L))
    long_BxL = real_BxL & (place_BxL - starts_BxL >= cfg.k)
    long, both = long_BxL[:, None, None], jnp.minimum(attended, cfg.k)
    totals = [jnp.broadcast_to(long, attended.shape), long * attended, long * both / max(cfg.k, 1)]
    totals.append(long * both / jnp.maximum(attended, 1))

    def histogram(q, k, starts, place, long):
        def count(rows, own):
            s = jnp.einsum('BNGLr,BNSr->BNGLS', rows(q, 3), k, preferred_element_type=jnp.float32)
            keys, rows_of = jnp.arange(k.shape[2]), lambda x: rows(x, 1)[..., None]
            where = (rows_of(starts) <= keys) & (keys <= rows_of(place)) & rows_of(long) & own[:, None]
            return _histogram(s, *_mean_and_std(s, where[:, None, None]), where[:, None, None])

        return _by_strips(count, q.shape[3], math.prod(q.shape[:3]) * k.shape[2])

    def by_position(attended, positions, real):
        sum_BxL = jnp.sum(attended, axis=(1, 2)) * real / (N * G)  # over the heads of one device
        return jnp.zeros(L, jnp.float32).at[positions].add(sum_BxL)

    tally = lambda attended, real: _tally(attended, jnp.broadcast_to(real[:, None, None], attended.shape), L)
    scores = tuple(x[..., : cfg.r or d] for x in (q_BxNxGxLxd, k_BxNxSxd))
    by_query, by_key, by_token = ('batch', 'kv_heads', None, 'length'), ('batch', 'kv_heads'), ('batch', 'length')
    return {
        'long': jnp.stack([jnp.sum(x, dtype=jnp.float32) for x in totals]),
        'attended': _over_devices(tally, (attended, real_BxL), (by_query, by_token)),
        'by_position': _over_devices(by_position, (attended, positions_BxL, real_BxL), (by_query, by_token, by_token)),
        'attention_scores': _over_devices(
            histogram, (*scores, starts_BxL, place_BxL, long_BxL), (by_query, by_key, by_token, by_token, by_token)
        ),
    }


def _over_devices(f, arrays, axes, **options):
    """The sum over devices of f(*arrays, **options), each of its own part of the arrays, which have these logical axes.

    The compiler would gather what a scatter adds up.
    """
    mesh, f = jax.sharding.get_abstract_mesh(), functools.partial(f, **options)
    sizes = {(n, axis) for x, names in zip(arrays, axes, strict=True) for n, axis in zip(x.shape, names, strict=False) if axis}
    if mesh.empty or any(n % shards(axis) for n, axis in sizes):
        return f(*arrays)
    specs = tuple(PartitionSpec(*(axis and (mesh_axes(axis) or None) for axis in names)) for names in axes)
    split = tuple({name for _, axis in sizes for name in mesh_axes(axis)})
    total = lambda *parts: jax.lax.psum(f(*parts), split)
    return jax.shard_map(total, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)(*arrays)


def _by_strips(count, n, width):
    """The sum of count(rows, own) over strips of n rows of `width` scores; rows(x, axis) is a strip of x.

    The last strip may begin in the one before it; `own` tells which rows do not belong to that.
    """
    size = min(max(STRIP // width, 1), n)

    def add(i, total):
        start = jnp.minimum(i * size, n - size)
        rows = lambda x, axis=0: jax.lax.dynamic_slice_in_dim(x, start, size, axis)
        return total + count(rows, start + jnp.arange(size) >= i * size)

    return jax.lax.fori_loop(0, -(-n // size), add, jnp.zeros(len(EDGES) - 1, jnp.int32)).astype(jnp.float32)


def _mean_and_std(s, where):
    """Of the scores s where `where`, along the last axis, in float32; the variance is over n − 1."""
    s = s.astype(jnp.float32)
    n = jnp.sum(jnp.broadcast_to(where, s.shape), axis=-1, keepdims=True)
    mean = jnp.sum(jnp.where(where, s, 0), axis=-1, keepdims=True) / jnp.maximum(n, 1)
    squares = jnp.sum(jnp.where(where, s - mean, 0) ** 2, axis=-1, keepdims=True)
    return mean, jnp.sqrt(squares / jnp.maximum(n - 1, 1))


def _histogram(s, mean, std, where):
    """A histogram over EDGES of the standardised scores s where `where`."""
    bins = len(EDGES) - 1
    z = (s.astype(jnp.float32) - mean) / jnp.where(std > 0, std, 1)
    bin_ = jnp.clip(jnp.floor((z - EDGES[0]) * (bins / (EDGES[-1] - EDGES[0]))), 0, bins - 1).astype(jnp.int32)
    return jnp.zeros(bins, jnp.int32).at[bin_].add(jnp.broadcast_to(where, s.shape))


def _tally(counts, where, most):
    """(most + 1) int32: how often each count from 0 to `most` occurs where `where`."""
    return jnp.zeros(most + 1, jnp.int32).at[counts.astype(jnp.int32)].add(where)


def _distribution(tally):
    """Mean, 95th percentile and maximum of counts, of which count i occurs tally[i] times."""
    n = np.arange(len(tally))
    share = np.cumsum(tally) / tally.sum()
    return {'mean': float(tally @ n / tally.sum()), 'p95': float(np.argmax(share >= 0.95)), 'max': float(np.max(n[tally > 0]))}
