"""What a model's lookups do with text: who fires, who is attended, and how near to a Gaussian the scores are.

The statistics are taken where a module turns scores into activations (its `sigma1`), without a line in the model; they are
sums over tokens, made on the device, and `report` reads them.

Statistical, exact and approximate top-k all keep the entries above some level of the same scores. So the sets are nested: of n
kept entries and the k largest, min(n, k) are in both, and recall and precision follow from counts alone, without a sort.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from scipy.special import ndtr

from spark.nn.attention import Attention
from spark.nn.ffn import FFN
from spark.nn.layers import METRICS, sow
from spark.nn.transformer import by_layer

EDGES = np.linspace(-8, 8, 1025)  # of the histograms of standardised scores; what lies outside counts in the outer bins


def observe(model, params, batch):
    """Forward pass of a batch (see spark.data.pipeline); hidden states (B, L, D), and sums over its tokens, padding excluded.

    Returns:
      (hidden, sums); `sums` is a dict of int32 and float32 arrays that start with n_layers, but for `positions` (L,):
        'active' (F + 1): tokens by the number of neurons that fired; 'fired' (F): tokens that a neuron fired for;
        'attended' (L + 1): queries, over all heads, by the number of keys attended;
        'by_position' (L): Σ attended keys by place in the document, mean over heads; 'positions' (L): tokens there;
        'long' (4): over the queries that see more than k keys: how many, Σ attended, Σ recall, Σ precision;
        'ffn_scores', 'attention_scores' (bins): standardised scores; in attention, of the long queries.
    """
    cfg = model.cfg
    # Blocks do not go through sigma1.
    whole = model.clone(cfg=cfg.model_copy(update={'attention': cfg.attention.model_copy(update={'impl': 'full'})}))
    rows = batch['tokens'], batch['positions'], batch['segments']
    real_BxL = batch['segments'] > 0
    with nn.intercept_methods(_statistics(cfg.attention.k, real_BxL)):
        hidden, state = whole.apply(params, *rows, mutable=[METRICS])
    layer = lambda half, name: by_layer(cfg, state[METRICS], half, name)
    B, L = real_BxL.shape
    n, H = cfg.n_layers, cfg.attention.n_heads
    sums = {name: layer('attention', name) for name in ('long', 'attention_scores')}
    sums['ffn_scores'] = layer('ffn', 'ffn_scores')
    attended = layer('attention', 'attended').reshape(n, B, H, L)
    real_BxHxL = jnp.broadcast_to(real_BxL[:, None], (B, H, L))
    sums['attended'] = _tally(attended, real_BxHxL, L)
    place = batch['positions']
    sums['positions'] = jnp.zeros(L, jnp.int32).at[place].add(real_BxL)
    mean = jnp.mean(attended, axis=2) * real_BxL
    sums['by_position'] = jnp.zeros((n, L), jnp.float32).at[:, place].add(mean)
    if cfg.ffn.traits.sparse:
        sums['active'] = _tally(layer('ffn', 'active').reshape(n, B, L), real_BxL, cfg.ffn.d_ff)
        sums['fired'] = layer('ffn', 'fired')
    return hidden, sums


def report(cfg, sums):
    """Per layer, what summed `sums` of `observe` (numpy) say; a list of n_layers dicts of floats.

    `active_*` are shares of d_ff, `attended_*` keys per query and head. `recall` and `precision` are means over tokens of what
    top-k keeps against the k largest; `ks` is the Kolmogorov–Smirnov distance of all tokens' standardised scores to the normal
    distribution, on the bins' edges. `dead` counts neurons that never fired; `gini` is 0 where all fire equally often and 1
    where one does all. Attention's recall, precision, scores and `attended_long` are over queries that see more than k keys.
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


def kolmogorov_smirnov(histogram):
    """sup |F(z) − Φ(z)| over the inner EDGES, for a histogram over them."""
    total = histogram.sum()
    if not total:
        return float('nan')
    return float(np.max(np.abs(np.cumsum(histogram)[:-1] / total - ndtr(EDGES[1:-1]))))


def gini(counts):
    """Gini coefficient of non-negative counts: 0 if all are equal, → 1 if one has everything; NaN if there is none."""
    x, n = np.sort(np.asarray(counts, float)), len(counts)
    return float(2 * np.arange(1, n + 1) @ x / (n * x.sum()) - (n + 1) / n) if x.sum() else float('nan')


def _statistics(k, real_BxL):
    """An interceptor that sows what the scores and activations of every lookup tell; k: of attention, 0 if it is dense."""

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
    """Counts over EDGES of the scores s, standardised along the last axis over the valid entries, with 1/(n − 1)."""
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
    """(n_layers, most + 1) int32: how often each count occurs per layer, where `where`."""
    n = counts.shape[0]
    index = counts.reshape(n, -1).astype(jnp.int32)
    return jnp.zeros((n, most + 1), jnp.int32).at[jnp.arange(n)[:, None], index].add(where.reshape(-1))


def _distribution(tally):
    """Mean, 95th percentile and maximum of counts 0, 1, … that occur tally[i] times."""
    n = np.arange(len(tally))
    share = np.cumsum(tally) / tally.sum()
    return {'mean': float(tally @ n / tally.sum()), 'p95': float(np.argmax(share >= 0.95)), 'max': float(np.max(n[tally > 0]))}
