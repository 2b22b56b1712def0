"""What top-k selects, against what it is for: the entries that contribute most to the output of a lookup.

With the top-k taken out, entry j of a table adds σ1(s_j)·σ2(s2_j)·v_j to the output, or σ1(s_j + s2_j)·v_j in a kind that adds
its scores, and the length of that is its contribution.
A selection is good if it holds the k entries of largest contribution (recall), or most of the sum of all contributions. Entries
drawn by chance would hold as large a share of the k as of the table.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

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
from spark.nn.runs import K

WINDOWS = (2, 4, 8, 16, 32, 64)  # consecutive tokens whose active neurons are united
FITTED = 'fitted'  # where what `predictor.solve` returns for a layer stands among the parameters of its FFN


def of_ffn(module: FFN, x_BxLxD: Hidden, k: K, segments_BxL: Integers) -> dict[str, Float[Array, '...']]:
    """The sums over the tokens of one layer that `sparsity.observe` lists, from the arguments of its FFN."""
    cfg, tokens = module.cfg, ('batch', 'length')
    fitted = module.get_variable('params', FITTED) if module.has_variable('params', FITTED) else None
    tables = (*tables_of(module), fitted, k)

    def count(x_BxLxD, segments_BxL, *leaves):
        K, norms_F, fitted, k = jax.tree.unflatten(jax.tree.structure(tables), leaves)
        k = cfg.k if k is None else k
        x_NxWxD, segments_NxW = windows(x_BxLxD), windows(segments_BxL)

        def strip(rows, own):
            x, segments = rows(x_NxWxD), rows(segments_NxW) * own[:, None]
            s, real = predicted(cfg, K, x), segments > 0
            sample = lambda x: x[:, :: strips.STRIDE].reshape(-1, *x.shape[2:])
            x_TxD, s_TxF, real_T = sample(x), sample(s), sample(real)
            sums = dict(zip(('ffn_scores', 'ffn_ks'), gaussianity(s_TxF, True, real_T), strict=True))
            if cfg.traits.sparse:
                active = nn_ffn.select(cfg, s, k) != 0 if cfg.traits.topk else nn_ffn.activations(cfg, s)[1]
                active &= real[..., None]
                sums |= {'active': tally(jnp.sum(active, axis=-1), real, cfg.d_ff), 'fired': jnp.sum(active, axis=(0, 1))}
                sums['union'] = unions(active, segments)
            if cfg.traits.topk:
                c = contributions(cfg, K, norms_F, x_TxD, s_TxF)
                found = [real_T, *skill(sample(active), c, cfg.k, k)]
                if fitted is not None:
                    guess = fitted['constant'] + (x_TxD.astype(jnp.float32) @ fitted['down']) @ fitted['up']
                    found += skill(guess >= least_of_largest(guess, cfg.k, k)[0], c, cfg.k, k)[:2]
                sums['selection'] = jnp.stack([jnp.sum(jnp.where(real_T, x, 0), dtype=jnp.float32) for x in found])
            return sums

        return by_strips(strip, len(x_NxWxD), x_NxWxD.shape[1] * cfg.d_ff)

    leaves = jax.tree.leaves(tables)
    return over_devices(count, (x_BxLxD, segments_BxL, *leaves), (tokens, tokens, *[()] * len(leaves)))


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


def windows(x_BxL: Array) -> Array:
    """The tokens of rows (B, L, …) as (N, W, …), in windows of as many as WINDOWS need, filled up with zeros."""
    W = min(WINDOWS[-1], 1 << (x_BxL.shape[1] - 1).bit_length())
    x_BxL = jnp.pad(x_BxL, [(0, 0), (0, -x_BxL.shape[1] % W), *[(0, 0)] * (x_BxL.ndim - 2)])
    return x_BxL.reshape(-1, W, *x_BxL.shape[2:])


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


def skill(kept: Bool[Array, '*rows n'], c: Float[Array, '*rows n'], most: int, k: K = None) -> list[Float[Array, '*rows']]:
    """(The share of the k largest contributions c that the kept entries hold, the share of Σ c that they hold, that of the k).

    k is at most `most`, or that.
    """
    k = jnp.minimum(most if k is None else k, c.shape[-1])
    least, sum_of_largest = least_of_largest(c, most, k)
    total = jnp.maximum(jnp.sum(c, axis=-1), jnp.finfo(c.dtype).tiny)
    hits = jnp.sum(kept & (c >= least), axis=-1) / k
    return [jnp.minimum(hits, 1), jnp.sum(jnp.where(kept, c, 0), axis=-1) / total, sum_of_largest / total]


def least_of_largest(
    x: Float[Array, '*rows n'], most: int, k: K = None
) -> tuple[Float[Array, '*rows 1'], Float[Array, '*rows']]:  # fmt: skip
    """The k-th largest entry of each row, and the sum of the k largest; k is at most `most`, or that."""
    largest = jax.lax.top_k(x, min(most, x.shape[-1]))[0]
    counts = jnp.arange(largest.shape[-1]) < (most if k is None else k)
    least = jnp.min(jnp.where(counts, largest, jnp.inf), axis=-1, keepdims=True)
    return least, jnp.sum(jnp.where(counts, largest, 0), axis=-1)


def of_attention(
    module: Attention, q: Queries, k: Keys, v: Keys, starts_BxL: Integers, place_BxL: Integers, long_BxL: Bool[Array, 'B L'],
    kept: K = None,
) -> dict[str, Float[Array, '...']]:
    """The sums over `long` queries of one layer: 'attention_scores', 'attention_ks', and with a top-k 'attention_selection'.

    A query sees the keys from its start to its own place.
    """
    cfg = module.cfg

    def count(q, k, v, starts, place, long, kept):
        q = q[:, :, :, :: strips.STRIDE]
        starts, place, long = (x[:, :: strips.STRIDE] for x in (starts, place, long))
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
            if cfg.traits.topk:
                keep, s2 = nn_attention.select(cfg, s, visible, kept), dots(slice(cfg.r, None)) if cfg.traits.second else 0
                w = nn_attention.activated(cfg, s + s2 if cfg.traits.adds else s, visible)
                gate = ops.ACTIVATIONS[cfg.traits.gate](s2) if cfg.traits.gated else 1
                found = [counted, *skill(keep, jnp.abs(w * gate) * norms, cfg.k, kept)]
                sums['attention_selection'] = jnp.stack([jnp.sum(jnp.where(counted, x, 0), dtype=jnp.float32) for x in found])
            return sums

        return by_strips(strip, q.shape[3], q[..., 0, 0].size * k.shape[2])

    by_query, by_key, by_token = ('batch', 'kv_heads', None, 'length'), ('batch', 'kv_heads'), ('batch', 'length')
    axes = by_query, by_key, by_key, by_token, by_token, by_token, ()
    return over_devices(count, (q, k, v, starts_BxL, place_BxL, long_BxL, kept), axes)
