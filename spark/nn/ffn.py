"""The feed-forward half of a layer: a lookup in a table of neurons."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from spark import ops
from spark.config import FFN_KINDS, FFNConfig
from spark.nn.layers import by_token, count, matrix


class FFN(nn.Module):
    """x (B, L, D) → (B, L, D), with d_ff neurons; `cfg.kind` names the lookup's σ1 and what it sees.

    | kind          | σ1                | keys                                 | parameters |
    |---------------|-------------------|--------------------------------------|------------|
    | relu, relu2   | max(s, 0)^1 or 2  | K (D × F)                            | 2·D·F      |
    | topk          | GELU ∘ TopK_k     | K (D × F)                            | 2·D·F      |
    | gated         | GELU              | K1, K2 (D × F)                       | 3·D·F      |
    | gaussian_topk | GELU ∘ TopK_k     | K1, K2 (D × F)      (Gemma 3n)       | 3·D·F      |
    | spark         | GELU ∘ TopK_k     | K1 (r × F), K2 (D−r × F)             | 2·D·F      |
    """

    cfg: FFNConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BxLxD):
        D, F, r = x_BxLxD.shape[-1], self.cfg.d_ff, self.cfg.r
        x_TxD = by_token(x_BxLxD)
        gated, _, has_predictor = FFN_KINDS[self.cfg.kind]
        keys = lambda name, width: matrix(self, name, (width, F), ('embed', 'ffn'), width, self.dtype)
        V_FxD = matrix(self, 'V', (F, D), ('ffn', 'embed'), F, self.dtype)
        if gated:
            q1, q2 = (x_TxD[..., :r], x_TxD[..., r:]) if has_predictor else (x_TxD, x_TxD)
            K1, K2 = keys('K1', q1.shape[-1]), keys('K2', q2.shape[-1])
            y_TxD = ops.spark_lookup(q1, q2, K1, K2, V_FxD, self.sigma1, lambda s: s)
        else:
            y_TxD = ops.dense_lookup(x_TxD, keys('K', D), V_FxD, self.sigma1)
        return y_TxD.reshape(x_BxLxD.shape)

    def sigma1(self, s_TxF):
        """`sigma1` of this layer, counted."""
        s_TxF = nn.with_logical_constraint(s_TxF, ('batch', *(['length'] if s_TxF.ndim == 3 else []), 'ffn'))
        a_TxF, active = sigma1(self.cfg, s_TxF)
        if active is not None:
            count(self, 'active', active)
        return a_TxF


def sigma1(cfg, s):
    """(σ1 of scores (…, F), top-k included; which entries are active, or None for kind 'gated', which has no zeros)."""
    match cfg.kind, cfg.topk:
        case 'gated', _:
            return jax.nn.gelu(s), None
        case 'relu' | 'relu2', _:
            above = jax.nn.relu(s)
            return (above if cfg.kind == 'relu' else above * above), s > 0
        case _, 'statistical':
            # Gemma 3n divides the variance by n, the paper by n − 1.
            ddof = 0 if cfg.kind == 'gaussian_topk' else 1
            # Tokens are normalised and keys point anywhere, so no mean is large against the spread.
            above = ops.statistical_topk(s, cfg.k, ddof=ddof, huber=cfg.huber, pivot=False)
        case _, 'exact':
            above = ops.exact_topk(s, cfg.k)
        case _, 'approx':
            above = ops.approx_topk(s, cfg.k)
    return jax.nn.gelu(above), above != 0
