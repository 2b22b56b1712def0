"""The feed-forward half of a layer: a lookup in a table of neurons."""

import flax.linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from spark import ops
from spark.config import FFNConfig
from spark.nn.layers import by_token, count, matrix


class FFN(nn.Module):
    """The lookup of `cfg.kind`, with d_ff neurons, for each token.

    | kind          | σ1                | keys                                 | parameters |
    |---------------|-------------------|--------------------------------------|------------|
    | relu, relu2   | max(s, 0)^1 or 2  | K (D × F)                            | 2·D·F      |
    | topk          | GELU ∘ TopK_k     | K (D × F)                            | 2·D·F      |
    | gated         | GELU              | K1, K2 (D × F)                       | 3·D·F      |
    | gaussian_topk | GELU ∘ TopK_k     | K1, K2 (D × F)      (Gemma 3n)       | 3·D·F      |
    | spark         | GELU ∘ TopK_k     | K1 (r × F), K2 (D−r × F)             | 2·D·F      |
    """

    cfg: FFNConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x_BxLxD: Float[Array, 'B L D']) -> Float[Array, 'B L D']:
        D, F, r, kind = x_BxLxD.shape[-1], self.cfg.d_ff, self.cfg.r, self.cfg.traits
        x_TxD = by_token(x_BxLxD)
        keys = lambda name, width: matrix(self, name, (width, F), ('embed', 'ffn'), width, self.dtype)
        V_FxD = matrix(self, 'V', (F, D), ('ffn', 'embed'), F, self.dtype)
        if kind.gated:
            q1, q2 = (x_TxD[..., :r], x_TxD[..., r:]) if kind.predictor else (x_TxD, x_TxD)
            K1, K2 = keys('K1', q1.shape[-1]), keys('K2', q2.shape[-1])
            y_TxD = ops.spark_lookup(q1, q2, K1, K2, V_FxD, self.activate, ops.ACTIVATIONS[kind.gate])
        else:
            y_TxD = ops.dense_lookup(x_TxD, keys('K', D), V_FxD, self.activate)
        return y_TxD.reshape(x_BxLxD.shape)

    def activate(self, s_TxF: Float[Array, '*tokens F']) -> Float[Array, '*tokens F']:
        """σ1 of this layer's scores; sows the number of active neurons."""
        s_TxF = nn.with_logical_constraint(s_TxF, ('batch', *(['length'] if s_TxF.ndim == 3 else []), 'ffn'))
        a_TxF, active = activations(self.cfg, s_TxF)
        if active is not None:
            count(self, 'active', active)
        return a_TxF


def activations(
    cfg: FFNConfig, s: Float[Array, '*tokens F']
) -> tuple[Float[Array, '*tokens F'], Bool[Array, '*tokens F'] | None]:
    """(σ1 of the scores, top-k included; which entries are active, None for a kind that has no zeros)."""
    kind, sigma = cfg.traits, ops.ACTIVATIONS[cfg.traits.activation]
    if not kind.topk:
        a = sigma(s)
        return a, a != 0 if kind.zeros else None
    match cfg.topk:
        case 'statistical':
            # Tokens are normalised and keys have random directions, so no mean is large against the standard deviation.
            kept = ops.statistical_topk(s, cfg.k, ddof=kind.ddof, huber=cfg.huber, pivot=False)
        case 'exact':
            kept = ops.exact_topk(s, cfg.k)
        case 'approx':
            kept = ops.approx_topk(s, cfg.k)
    return sigma(kept), kept != 0
