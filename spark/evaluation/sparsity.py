"""Statistics of a model's lookups on text: active neurons, attended keys, what top-k selects, and how Gaussian the scores are.

`observe` intercepts the lookups and sums over tokens; `report` reads the sums. Scores are computed again a strip at a time, and
each device takes those of its own tokens, so the statistics take memory that is linear in the length. What is selected and how
Gaussian the scores are needs sorting, and is measured of every STRIDE-th token.
"""

import itertools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import ndtr

from spark.config import ModelConfig
from spark.evaluation import selection
from spark.evaluation.strips import DISTANCES, EDGES, chance_distance, normal_distances, over_devices, tally
from spark.nn.attention import Attention, Packed
from spark.nn.ffn import FFN
from spark.nn.layers import METRICS, sow
from spark.nn.transformer import Transformer, by_layer

PIECES = 16  # parts of a row, by whose positions attended keys are counted


def observe(model: Transformer, params: dict, batch: dict) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Runs the forward pass on a batch of `data.rows`: (the hidden states (B, L, D), sums over the tokens without padding).

    The sums are int32 or float32. Each has a leading axis of n_layers; the rest of its shape is:
      'active' (F + 1): tokens by their number of active neurons; 'fired' (F): tokens for which each neuron was active;
      'union' (2, windows): for 2, 4, … consecutive tokens, Σ of the share of neurons that any activates, and their number;
      'selection': the number of sampled tokens, and Σ over them of `selection.skill` of active neurons, and of fitted predictors;
      'attended' (PIECES, L + 1): queries of all heads by their `places`, L / PIECES a piece, and attended keys;
      'by_position' (L): attended keys, mean over heads, by their `places`;
      'long' (3): over the queries that see more than k keys: their number, Σ attended keys, Σ min(attended, k) / k;
      'attention_selection': as 'selection', over sampled long queries and their keys;
      'ffn_scores', 'attention_scores' (bins): histograms of standardised scores of sampled tokens, and sampled long queries;
      'ffn_ks', 'attention_ks' (DISTANCES + 1): the same by the distance of their own scores to the normal;
      'attention_seen' (L + 1): sampled long queries by the number of keys that they see.
    """
    positions_BxL, segments_BxL = batch['positions'], batch['segments']
    places_BxL, real_BxL = places(model.cfg, batch), segments_BxL > 0

    def interceptor(method, args, kwargs, context):
        out, module = method(*args, **kwargs), context.module
        found = {}
        if isinstance(module, FFN) and context.method_name == '__call__':
            found = selection.of_ffn(module, *args, segments_BxL)
        elif isinstance(module, Attention) and context.method_name == 'look_up':
            found = _of_attention(module, *args, places_BxL, real_BxL)
        for name, sums in found.items():
            sow(module, f'sum_{name}', sums)
        return out

    with nn.intercept_methods(interceptor):
        hidden, state = model.apply(params, batch['tokens'], positions_BxL, segments_BxL, mutable=[METRICS])
    sown = {half: state[METRICS]['groups'][f'{half}_0'] for half in ('attention', 'ffn')}
    names = [(half, name.removeprefix('sum_')) for half, found in sown.items() for name in found if name.startswith('sum_')]
    return hidden, {name: by_layer(model.cfg, state[METRICS], half, f'sum_{name}') for half, name in names}


def report(cfg: ModelConfig, sums: dict) -> list[dict]:
    """One dict per layer of the statistics that the sums of `observe`, added up over batches, give.

    `active_*` are shares of d_ff, `attended_*` keys per query and head: mean, 5th, 50th and 95th percentile and maximum.
    `calibration` is the mean of min(n, k) / k of n active neurons. `recall` is the share of the k neurons of largest contribution
    that are active, `contribution_kept` the share of all contributions that active ones make, `contribution_best` that of as many
    largest (see `selection`). If the parameters have fitted predictors, `…_fitted` is of as many neurons that a linear one of the
    same rank chooses, `…_constant` of as many by one ranking for all tokens (see `predictor`). `union` is the share of
    neurons that any of 2, 4, … consecutive tokens activates, `union_rows` that of tokens drawn at random. `ks_*` is the distance
    of a token's scores to the normal distribution, `ks_chance` that of as many normal numbers, `ks_pooled` the distance of all
    standardised scores taken together.
    `dead` counts neurons that were never active; `gini` is 0 if all are active equally often. Names with `attention_`, and
    `attended_long`, are of the queries that see more than k keys.
    """
    a, layers = cfg.attention, []
    for i in range(cfg.n_layers):
        layer = {'layer': i, 'span': cfg.pattern[i % len(cfg.pattern)], **_ffn(cfg.ffn, sums, i)}
        layer |= {f'attended_{name}': value for name, value in spread(sums['attended'][i].sum(0)).items()}
        count, attended, calibration = sums['long'][i]
        if count:
            layer['attended_long'] = float(attended / count)
        if sums['attention_ks'][i].any():
            layer |= _gaussian('attention_ks', sums['attention_ks'][i], sums['attention_scores'][i])
            layer['attention_ks_chance'] = chance_distance(sums['attention_seen'][i])
        if count and a.traits.topk:
            layer['attention_calibration'] = float(calibration / count)
            names = ('attention_recall', 'attention_contribution_kept', 'attention_contribution_best')
            layer |= _means(names, sums['attention_selection'][i])
        layers.append(layer)
    return layers


def _ffn(f, sums, i):
    """What `report` says of the FFN of layer i."""
    names, found = ('active', 'fired', 'union', 'selection', 'ffn_ks', 'ffn_scores'), {}
    sums = {name: sums[name][i] for name in names if name in sums}
    if 'active' in sums:
        tokens, fired = sums['active'], sums['fired']
        found |= {f'active_{name}': value / f.d_ff for name, value in spread(tokens).items()}
        if f.traits.topk:
            found['calibration'] = float(tokens @ np.minimum(np.arange(f.d_ff + 1) / f.k, 1) / tokens.sum())
            names = [f'{name}{of}' for of in ('', '_fitted', '_constant') for name in ('recall', 'contribution_kept')]
            found |= _means([*names[:2], 'contribution_best', *names[2:]], sums['selection'])
        share, count = sums['union']
        found['union'] = {str(n): float(x / m) for n, x, m in zip(selection.WINDOWS, share, count, strict=True) if m}
        found['union_rows'] = {str(n): union_of_rows(fired, tokens.sum(), n) for n in selection.WINDOWS}
        found |= {'dead': int(np.sum(fired == 0)), 'gini': gini(fired)}
    if sums['ffn_ks'].any():
        found |= _gaussian('ks', sums['ffn_ks'], sums['ffn_scores']) | {'ks_chance': float(normal_distances((f.d_ff,))[0])}
    return found


def places(cfg: ModelConfig, batch: dict) -> jax.Array:
    """(B, L) how many tokens come before each in what attention sees: in the row, or in its document where those are apart."""
    positions_BxL = batch['positions']
    joined = cfg.attention.documents == 'joined'
    return jnp.broadcast_to(jnp.arange(positions_BxL.shape[1]), positions_BxL.shape) if joined else jnp.asarray(positions_BxL)


def by_position(cfg: ModelConfig, values_BxL: jax.Array, batch: dict) -> jax.Array:
    """(L) sums of the values of tokens without padding, by `places`."""
    add = lambda x, places: jnp.zeros(values_BxL.shape[1], x.dtype).at[places].add(x)
    return over_devices(add, (values_BxL * (batch['segments'] > 0), places(cfg, batch)), (('batch', 'length'),) * 2)


def positions(sums: dict) -> list[dict]:
    """Loss and attended keys by position, which is what `places` says.

    One dict for each of PIECES equal parts of a row that has tokens: the positions 'from' … 'to' − 1, 'tokens', 'loss', and with
    statistics 'attended_mean', '_p5', '_median', '_p95' and '_max' of each layer, over the queries of all heads.
    """
    L, found = len(sums['positions']), []
    edges = [-(-piece * L // PIECES) for piece in range(PIECES + 1)]
    for piece, (start, end) in enumerate(itertools.pairwise(edges)):
        tokens = int(sums['positions'][start:end].sum())
        if tokens:
            layers = [spread(layer[piece]) for layer in sums.get('attended', ())]
            attended = {f'attended_{name}': [layer[name] for layer in layers] for name in (layers[0] if layers else ())}
            loss = float(sums['nll_by_position'][start:end].sum() / tokens)
            found.append({'from': start, 'to': end, 'tokens': tokens, 'loss': loss, **attended})
    return found


def union_of_rows(fired: np.ndarray, tokens: int | np.integer | np.floating, n: int) -> float:
    """The share of neurons that any of n tokens activates, where `fired` of all `tokens` activate each neuron.

    It is the mean over n tokens drawn at random from all text, as in a batch of unrelated rows; nothing is assumed of the neurons
    of one token.
    """
    return float(np.mean(1 - (1 - np.asarray(fired) / tokens) ** n))


def _gaussian(name, distances, histogram):
    steps = {f'{name}_{which}': value / DISTANCES for which, value in spread(distances).items()}
    return steps | {f'{name}_pooled': kolmogorov_smirnov(histogram)}


def _means(names, sums):
    """The means by name, of a count and sums; there may be fewer sums than names."""
    return {name: float(x / sums[0]) for name, x in zip(names, sums[1:], strict=False)} if sums[0] else {}


def kolmogorov_smirnov(histogram: np.ndarray) -> float:
    """max |F(z) − Φ(z)| over the inner EDGES, where F is the distribution of a histogram over EDGES; NaN if it is empty."""
    if not (total := histogram.sum()):
        return float('nan')
    return float(np.max(np.abs(np.cumsum(histogram)[:-1] / total - ndtr(EDGES[1:-1]))))


def gini(counts: Sequence[int] | np.ndarray) -> float:
    """The Gini coefficient of non-negative counts; NaN if all are 0."""
    x, n = np.sort(np.asarray(counts, float)), len(counts)
    return float(2 * np.arange(1, n + 1) @ x / (n * x.sum()) - (n + 1) / n) if x.sum() else float('nan')


def spread(counts: np.ndarray) -> dict[str, float]:
    """Mean, percentiles and maximum of numbers, of which number i occurs counts[i] times."""
    n, share = np.arange(len(counts)), np.cumsum(counts) / counts.sum()
    quantiles = {name: float(np.argmax(share >= q)) for name, q in [('p5', 0.05), ('median', 0.5), ('p95', 0.95)]}
    return {'mean': float(counts @ n / counts.sum()), **quantiles, 'max': float(np.max(n[counts > 0]))}


def _of_attention(module, q_BxNxGxLxd, k_BxNxSxd, v_BxNxSxd, visible, places_BxL, real_BxL):
    """The sums of a layer's attention. A query sees the keys from its start to its own place."""
    cfg, (B, N, G, L, _) = module.cfg, q_BxNxGxLxd.shape
    attended = module.get_variable(METRICS, 'attended').reshape(B, N, G, L)
    starts_BxL = visible.starts if isinstance(visible, Packed) else jnp.argmax(visible, axis=-1)
    starts_BxL, place_BxL = jnp.broadcast_to(starts_BxL, (B, L)), jnp.broadcast_to(jnp.arange(L), (B, L))
    long_BxL = real_BxL & (place_BxL - starts_BxL >= cfg.k)
    long = jnp.broadcast_to(long_BxL[:, None, None], attended.shape)
    totals = [long, long * attended, long * jnp.minimum(attended / max(cfg.k, 1), 1)]

    def at_position(attended, places, real):
        sum_BxL = jnp.sum(attended, axis=(1, 2)) * real / (N * G)  # over the heads of one device
        return jnp.zeros(L, jnp.float32).at[places].add(sum_BxL)

    def by_piece(attended, places, real):
        piece, real = (jnp.broadcast_to(x[:, None, None], attended.shape) for x in (places * PIECES // L, real))
        return tally(piece * (L + 1) + attended, real, PIECES * (L + 1) - 1).reshape(PIECES, L + 1)

    by_query, by_token = ('batch', 'kv_heads', None, 'length'), ('batch', 'length')
    counted, axes = (attended, places_BxL, real_BxL), (by_query, by_token, by_token)
    return {
        'long': jnp.stack([jnp.sum(x, dtype=jnp.float32) for x in totals]),
        'attended': over_devices(by_piece, counted, axes),
        'by_position': over_devices(at_position, counted, axes),
        **selection.of_attention(module, q_BxNxGxLxd, k_BxNxSxd, v_BxNxSxd, starts_BxL, place_BxL, long_BxL),
    }
