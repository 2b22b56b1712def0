"""What top-k selects, against what it is for: the entries that contribute most to the output of a lookup.

With the top-k taken out, entry j of a table adds σ1(s_j)·σ2(s2_j)·v_j to the output, or σ1(s_j + s2_j)·v_j in a kind that adds
its scores, and the length of that is its contribution. A selection is good if it holds the k entries of largest contribution
(recall), or most of the sum of all contributions. It is compared with others of as many entries, token by token: the largest
contributions, which no selection can surpass, and those of fitted predictors. Entries drawn by chance would hold as large a share
of the k as of the table.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from spark import ops
from spark.config import FFNConfig
from spark.evaluation import strips
from spark.evaluation.strips import by_strips, gaussianity, over_devices, tally
from spark.kernels.blockwise import Keys, Queries
from spark.nn import attention as nn_attention
from spark.nn import ffn as nn_ffn
from spark.nn.attention import Attention
from spark.nn.block import Hidden, Integers
from spark.nn.ffn import FFN
from spark.nn.layers import shards
from spark.nn.runs import K

WINDOWS = (2, 4, 8, 16, 32, 64)  # consecutive tokens whose active neurons are united
FITTED = 'fitted'  # where what `predictor.solve` returns for a layer stands among the parameters of its FFN


def of_ffn(module: FFN, x_BxLxD: Hidden, k: K, segments_BxL: Integers) -> dict[str, Float[Array, '...']]:
    """The sums over the tokens of one layer that `sparsity.observe` lists, from the arguments of its FFN."""
    cfg, tokens = module.cfg, ('batch', 'length')
    fitted = module.get_variable('params', FITTED) if module.has_variable('params', FITTED) else None
    tables = (*tables_of(module), fitted, k)

    def count(x_BxNxWxD, segments_BxNxW, *leaves):
        K, norms_F, fitted, k = jax.tree.unflatten(jax.tree.structure(tables), leaves)
        k = cfg.k if k is None else k
        x_NxWxD, segments_NxW = (x.reshape(-1, *x.shape[2:]) for x in (x_BxNxWxD, segments_BxNxW))

        def strip(rows, own):
            x, segments = rows(x_NxWxD), rows(segments_NxW) * own[:, None]
            s, real = predicted(cfg, K, x), segments > 0
            sample = lambda x: (y := strips.sampled(x, 1)).reshape(-1, *y.shape[2:])
            x_TxD, s_TxF, real_T = sample(x), sample(s), sample(real)
            sums = dict(zip(('ffn_scores', 'ffn_ks'), gaussianity(s_TxF, True, real_T), strict=True))
            if cfg.traits.sparse:
                active = nn_ffn.select(cfg, s, k=k) != 0 if cfg.traits.topk else nn_ffn.activations(cfg, s)[1]
                active &= real[..., None]
                sums |= {'active': tally(jnp.sum(active, axis=-1), real, cfg.d_ff), 'fired': jnp.sum(active, axis=(0, 1))}
                sums['union'] = unions(active, segments)
            if cfg.traits.topk:
                c = contributions(cfg, K, norms_F, x_TxD, s_TxF)
                guesses = fitted and (guess(fitted, x_TxD), jnp.broadcast_to(fitted['mean'], c.shape))
                found = [real_T, *skill(sample(active), c, k, guesses or ())]
                sums['selection'] = jnp.stack([jnp.sum(jnp.where(real_T, x, 0), dtype=jnp.float32) for x in found])
            return sums

        return by_strips(strip, len(x_NxWxD), x_NxWxD.shape[1] * cfg.d_ff)

    leaves = jax.tree.leaves(tables)
    n = shards('length')
    return over_devices(count, (windows(x_BxLxD, n), windows(segments_BxL, n), *leaves), (tokens, tokens, *[()] * len(leaves)))


def tables_of(module: FFN) -> tuple[dict[str, Array], Float[Array, ' F']]:
    """(The keys of an FFN by name, in the dtype of the computation; the lengths of its neurons' values)."""
    names = [name for name in ('P', 'K1', 'K2', 'K') if module.has_variable('params', name)]
    keys = {name: module.get_variable('params', name).astype(module.dtype) for name in names}
    return keys, jnp.linalg.norm(module.get_variable('params', 'V').astype(module.dtype).astype(jnp.float32), axis=-1)


def predicted(cfg: FFNConfig, K: dict[str, Array], x: Float[Array, '*tokens D']) -> Float[Array, '*tokens F']:
    """The scores by which top-k selects: s of all neurons."""
    return (x @ K['P'] if cfg.traits.projected else x[..., : cfg.r or None]) @ (K['K1'] if cfg.traits.second else K['K'])


def contributions(
    cfg: FFNConfig, K: dict[str, Array], norms_F: Float[Array, ' F'], x: Float[Array, 'T D'], s: Float[Array, 'T F']
) -> Float[Array, 'T F']:
    """|σ1(s)·σ2(s2)|·‖V‖ of every neuron, or |σ1(s + s2)|·‖V‖, in float32."""
    s2 = x[:, cfg.r :] @ K['K2'] if cfg.traits.second else 0
    a = ops.ACTIVATIONS[cfg.traits.activation](s + s2 if cfg.traits.adds else s)
    if cfg.traits.gated:
        a = a * ops.ACTIVATIONS[cfg.traits.gate](s2)
    return jnp.abs(a.astype(jnp.float32)) * norms_F


def guess(fitted: dict[str, Array], x: Float[Array, 'T D']) -> Float[Array, 'T F']:
    """The contributions that the predictor of `predictor.solve` expects."""
    return fitted['constant'] + (x.astype(jnp.float32) @ fitted['down']) @ fitted['up']


def windows(x_BxL: Array, shards: int) -> Array:
    """The tokens of rows (B, L, …) as (B, N, W, …), in windows of as many as WINDOWS need, filled up with zeros.

    They begin at the start of a row, however its length is sharded, and N is a multiple of the shards.
    """
    W = min(WINDOWS[-1], 1 << (x_BxL.shape[1] - 1).bit_length())
    x_BxL = strips.filled_up(x_BxL, 1, W * shards)
    return x_BxL.reshape(len(x_BxL), -1, W, *x_BxL.shape[2:])


def unions(active_NxWxF: Bool[Array, 'N W F'], segments_NxW: Integers) -> Float[Array, '2 windows']:
    """For 2, 4, … consecutive tokens of a document: Σ of the share of neurons that any of them activates; how many there are."""
    N, W, _ = active_NxWxF.shape
    sums = []
    for size in WINDOWS:
        if size > W:
            sums.append(jnp.zeros(2))
            continue
        active_NxWxF = active_NxWxF[:, ::2] | active_NxWxF[:, 1::2]
        parts = segments_NxW.reshape(N, -1, size)
        whole = (parts[..., 0] > 0) & (parts == parts[..., :1]).all(-1)
        sums.append(jnp.stack([jnp.sum(jnp.mean(active_NxWxF, axis=-1) * whole), jnp.sum(whole)]))
    return jnp.stack(sums, axis=1)


def skill(
    kept: Bool[Array, '*rows n'], c: Float[Array, '*rows n'], k: K, guesses: Sequence[Float[Array, '*rows n']] = ()
) -> list[Float[Array, '*rows']]:
    """What a selection holds of the contributions c, by row.

    (The share of the k largest c that it holds; its share of Σ c; that of as many largest c as it has entries). Then follow the
    first two of as many entries by each of the `guesses`, the largest.
    """
    k, n = jnp.minimum(k, c.shape[-1]), jnp.sum(kept, axis=-1, keepdims=True)
    total = jnp.maximum(jnp.sum(c, axis=-1), jnp.finfo(c.dtype).tiny)
    ordered = jnp.sort(c, axis=-1, descending=True)
    share = lambda on: jnp.sum(jnp.where(on, c, 0), axis=-1) / total
    least = jax.lax.dynamic_slice_in_dim(ordered, k - 1, 1, axis=-1)
    recall = lambda on: jnp.minimum(jnp.sum(on & (c >= least), axis=-1) / k, 1)
    best = jnp.sum(jnp.where(jnp.arange(c.shape[-1]) < n, ordered, 0), axis=-1) / total
    chosen = [largest(guess, n) for guess in guesses]
    return [recall(kept), share(kept), best, *(f(on) for on in chosen for f in (recall, share))]


def largest(x: Float[Array, '*rows m'], n: Int[Array, '*rows 1']) -> Bool[Array, '*rows m']:
    """The n largest entries of each row, with a number n (…, 1) for each."""
    ordered = jnp.sort(x, axis=-1, descending=True)
    return (n > 0) & (x >= jnp.take_along_axis(ordered, jnp.maximum(n - 1, 0), axis=-1))


def of_attention(
    module: Attention, q: Queries, k: Keys, v: Keys, starts_BxL: Integers, place_BxL: Integers, long_BxL: Bool[Array, 'B L'],
    kept: K = None,
) -> dict[str, Float[Array, '...']]:
    """The sums over `long` queries of one layer: 'attention_scores', '_ks', '_seen', and with a top-k 'attention_selection'.

    A query sees the keys from its start to its own place.
    """
    cfg = module.cfg

    def count(q, k, v, starts, place, long, kept):
        norms = jnp.linalg.norm(v.astype(jnp.float32), axis=-1)[:, :, None, None]

        def strip(rows, own):
            q_, keys, of = rows(q, 3), jnp.arange(k.shape[2]), lambda x: rows(x, 1)[..., None]
            visible = ((of(starts) <= keys) & (keys <= of(place)))[:, None, None]
            counted = jnp.broadcast_to((rows(long, 1) & own)[:, None, None], q_.shape[:-1])
            dots = lambda part: jnp.einsum('BNGLr,BNSr->BNGLS', q_[..., part], k[..., part], preferred_element_type=jnp.float32)
            first = slice(cfg.r or None)
            s = dots(first)
            compared = ops.softcap(s, cfg.logit_cap) if cfg.traits.cap_first else s  # with the threshold
            sums = dict(zip(('attention_scores', 'attention_ks'), gaussianity(compared, visible, counted), strict=True))
            seen = jnp.broadcast_to(jnp.sum(visible, axis=-1), counted.shape)
            sums['attention_seen'] = tally(seen, counted, k.shape[2])
            if cfg.traits.topk:
                keep, s2 = nn_attention.select(cfg, s, visible, k=kept), dots(slice(cfg.r, None)) if cfg.traits.second else 0
                w = nn_attention.activated(cfg, s + s2 if cfg.traits.adds else s, visible)
                gate = ops.ACTIVATIONS[cfg.traits.gate](s2) if cfg.traits.gated else 1
                found = [counted, *skill(keep, jnp.abs(w * gate) * norms, cfg.k if kept is None else kept)]
                sums['attention_selection'] = jnp.stack([jnp.sum(jnp.where(counted, x, 0), dtype=jnp.float32) for x in found])
            return sums

        return by_strips(strip, q.shape[3], q[..., 0, 0].size * k.shape[2])

    by_query, by_key, by_token = ('batch', 'kv_heads', None, 'length'), ('batch', 'kv_heads'), ('batch', 'length')
    axes = by_query, by_key, by_key, by_token, by_token, by_token, ()
    sample = lambda x, axis: strips.sampled(x, axis, shards('length'))
    tokens = (sample(x, 1) for x in (starts_BxL, place_BxL, long_BxL))
    return over_devices(count, (sample(q, 3), k, v, *tokens, kept), axes)
