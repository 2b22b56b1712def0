"""Statistics of a model's lookups on text: active neurons, attended keys, and how close the scores are to a Gaussian.

`observe` intercepts the method that turns scores into activations (`activate`) and sums over tokens; `report` reads the sums.

Statistical, exact and approximate top-k all keep the entries above a threshold of the same scores, so their sets are nested: if n
entries are kept, min(n, k) of them are among the k largest. Recall and precision then follow from n, without a sort.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import ndtr

from spark.config import ModelConfig
from spark.nn.attention import Attention
from spark.nn.ffn import FFN
from spark.nn.layers import METRICS, sow
from spark.nn.transformer import Transformer, by_layer

EDGES = np.linspace(-8, 8, 1025)  # bins of standardised scores; scores outside count in the outer bins


def observe(model: Transformer, params: dict, batch: dict) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Runs the forward pass on a batch of `data.rows`: (the hidden states (B, L, D), sums over the tokens without padding).

    The sums are int32 or float32. Each has a leading axis of n_layers, except `positions`; the rest of its shape is:
      'active' (F + 1): tokens by their number of active neurons; 'fired' (F): tokens for which each neuron was active;
      'attended' (L + 1): queries of all heads by their number of attended keys;
      'by_position' (L): attended keys, mean over heads, by position in the document; 'positions' (L): tokens by position;
      'long' (4): over the queries that see more than k keys: their number, Σ attended keys, Σ recall, Σ precision;
      'ffn_scores', 'attention_scores' (bins): histograms of standardised scores; in attention, of those long queries.
    """
    cfg = model.cfg
    # Only with all scores at once is `activate` called.
    update = lambda half, impl: getattr(cfg, half).model_copy(update={'impl': impl})
    whole = model.clone(cfg=cfg.model_copy(update={'attention': update('attention', 'full'), 'ffn': update('ffn', 'masked')}))
    real_BxL = batch['segments'] > 0
    with nn.intercept_methods(_statistics(cfg.attention.k, real_BxL)):
        hidden, state = whole.apply(params, batch['tokens'], batch['positions'], batch['segments'], mutable=[METRICS])
    layer = lambda half, name: by_layer(cfg, state[METRICS], half, name)
    n, (B, L), H = cfg.n_layers, real_BxL.shape, cfg.attention.n_heads
    sums = {name: layer('attention', name) for name in ('long', 'attention_scores')}
    sums['ffn_scores'] = layer('ffn', 'ffn_scores')
    attended = layer('attention', 'attended').reshape(n, B, H, L)
    sums['attended'] = _tally(attended, jnp.broadcast_to(real_BxL[:, None], (B, H, L)), L)
    sums['positions'] = jnp.zeros(L, jnp.int32).at[batch['positions']].add(real_BxL)
    mean = jnp.mean(attended, axis=2) * real_BxL
    sums['by_position'] = jnp.zeros((n, L), jnp.float32).at[:, batch['positions']].add(mean)
    if cfg.ffn.traits.sparse:
        sums['active'] = _tally(layer('ffn', 'active').reshape(n, B, L), real_BxL, cfg.ffn.d_ff)
        sums['fired'] = layer('ffn', 'fired')
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


def _statistics(k, real_BxL):
    """An interceptor that sows the statistics of every lookup; k is that of attention, 0 if it is dense."""

    def interceptor(method, args, kwargs, context):
        out = method(*args, **kwargs)
        module = context.module
        if context.method_name != 'activate':
            return out
        if isinstance(module, FFN):
            (s_TxF,) = args
            real_Tx1 = real_BxL.reshape(-1, 1)
            sow(module, 'ffn_scores', _histogram(s_TxF, jnp.broadcast_to(real_Tx1, s_TxF.shape)))
            sow(module, 'fired', jnp.sum((out != 0) & real_Tx1, axis=0, dtype=jnp.int32))
        elif isinstance(module, Attention):
            s, visible = args  # (B, N, G·L, S), (B, 1, G·L, S)
            n = module.get_variable(METRICS, 'attended')  # (B, N, G·L)
            real = jnp.tile(real_BxL, (1, n.shape[-1] // real_BxL.shape[1]))[:, None]
            long = jnp.broadcast_to(real & (jnp.sum(visible, axis=-1) > k), n.shape)
            both = jnp.minimum(n, k)
            totals = [long, long * n, long * both / max(k, 1), long * both / jnp.maximum(n, 1)]
            sow(module, 'long', jnp.stack([jnp.sum(x, dtype=jnp.float32) for x in totals]))
            sow(module, 'attention_scores', _histogram(s, visible & long[..., None]))
        return out

    return interceptor


def _histogram(s, where):
    """A histogram over EDGES of the scores s where `where`, standardised along the last axis (variance over n − 1)."""
    s = s.astype(jnp.float32)
    n = jnp.sum(where, axis=-1, keepdims=True)
    mean = jnp.sum(jnp.where(where, s, 0), axis=-1, keepdims=True) / jnp.maximum(n, 1)
    centred = jnp.where(where, s - mean, 0)
    std = jnp.sqrt(jnp.sum(centred**2, axis=-1, keepdims=True) / jnp.maximum(n - 1, 1))
    bins = len(EDGES) - 1
    z = centred / jnp.where(std > 0, std, 1)
    bin_ = jnp.clip(jnp.floor((z - EDGES[0]) * (bins / (EDGES[-1] - EDGES[0]))), 0, bins - 1).astype(jnp.int32)
    return jnp.zeros(bins, jnp.int32).at[bin_.reshape(-1)].add(where.reshape(-1))


def _tally(counts, where, most):
    """(n_layers, most + 1) int32: how often each count from 0 to `most` occurs in each layer, where `where`."""
    n = counts.shape[0]
    index = counts.reshape(n, -1).astype(jnp.int32)
    return jnp.zeros((n, most + 1), jnp.int32).at[jnp.arange(n)[:, None], index].add(where.reshape(-1))


def _distribution(tally):
    """Mean, 95th percentile and maximum of counts, of which count i occurs tally[i] times."""
    n = np.arange(len(tally))
    share = np.cumsum(tally) / tally.sum()
    return {'mean': float(tally @ n / tally.sum()), 'p95': float(np.argmax(share >= 0.95)), 'max': float(np.max(n[tally > 0]))}
