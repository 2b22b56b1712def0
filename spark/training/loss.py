"""Next-token cross-entropy, with z-loss (arXiv 2204.02311), and the sums that training and evaluation share."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spark.config import ModelConfig
from spark.nn.layers import METRICS
from spark.nn.transformer import Transformer, activity

Sum = np.ndarray | np.generic  # on the host


def cross_entropy(
    model: Transformer, params: dict, hidden_BxLxD: jax.Array, targets_BxL: jax.Array, pieces: int = 1
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Per token (B, L): −log p(target) and log Z in nats (float32), and whether the target is the likeliest token.

    The vocabulary is cut into `pieces`, a divisor of its size. Logits exist for one piece at a time, forward and backward,
    and a sharded embedding is gathered piece by piece.
    """
    E_VxD = params['params']['embedding']
    rows = len(E_VxD) // pieces
    hidden_BxLxD = hidden_BxLxD.astype(jnp.float32)  # its gradient is then summed over the pieces in float32

    def step(carry, piece):
        top, total, target = carry
        E_RxD, c = piece
        z_BxLxR = model.apply(params, hidden_BxLxD.astype(model.dtype), E_RxD, method='logits')
        new_top = jax.lax.stop_gradient(jnp.maximum(top, jnp.max(z_BxLxR, axis=-1)))
        total = total * jnp.exp(top - new_top) + jnp.sum(jnp.exp(z_BxLxR - new_top[..., None]), axis=-1)
        is_target = (targets_BxL[..., None] // pieces == jnp.arange(rows)) & (targets_BxL[..., None] % pieces == c)
        return (new_top, total, target + jnp.sum(jnp.where(is_target, z_BxLxR, 0), axis=-1)), None

    zero = jnp.zeros(targets_BxL.shape, jnp.float32)
    start = zero - jnp.inf, zero, zero
    if pieces == 1:
        (top, total, target), _ = step(start, (E_VxD, 0))
    else:
        # Piece c holds the tokens i · pieces + c, so that every shard of the vocabulary holds a part of each piece.
        E_CxRxD = E_VxD.reshape(rows, pieces, -1).swapaxes(0, 1)
        (top, total, target), _ = jax.lax.scan(jax.checkpoint(step), start, (E_CxRxD, jnp.arange(pieces)))
    log_z = top + jnp.log(total)
    return log_z - target, log_z, target >= top


def forward(model: Transformer, params: dict, batch: dict, *, pieces: int = 1, count: bool = True) -> dict[str, jax.Array]:
    """Runs the model on a batch (see spark.data.rows) and sums over its tokens, without padding.

    Returns {'nll', 'log_z2', 'tokens', 'bytes': () float32; 'active', 'attended': (n_layers,) float32 if `count`}.
    """
    rows = batch['tokens'], batch['positions'], batch['segments']
    hidden, state = model.apply(params, *rows, mutable=[METRICS] if count else [])
    weights = (batch['segments'] > 0).astype(jnp.float32)
    nll_BxL, log_z_BxL, _ = cross_entropy(model, params, hidden, batch['targets'], pieces)
    sums = {
        'nll': jnp.sum(weights * nll_BxL),
        'log_z2': jnp.sum(weights * log_z_BxL**2),
        'tokens': jnp.sum(weights),
        'bytes': jnp.sum(batch['bytes'], dtype=jnp.float32),
    }
    if count:
        sums |= {name: jnp.einsum('nBL,BL->n', n, weights) for name, n in activity(model.cfg, state[METRICS]).items()}
    return sums


def losses(nll: Sum, tokens: Sum, size: Sum) -> dict[str, float]:
    """`loss` in nats per token and its `perplexity`; and `bits_per_byte`, unless the text has no bytes."""
    loss = float(nll / tokens) if tokens else math.nan
    report = {'loss': loss, 'perplexity': math.exp(min(loss, 700.0))}
    return report | ({'bits_per_byte': float(nll / size / math.log(2))} if size else {})


def per_token(cfg: ModelConfig, sums: dict[str, Sum]) -> dict[str, Any]:
    """Metrics from the sums of `forward` over one or more batches, on the host.

    `losses`; `active` (share of neurons) and `attended` (number of keys), each the mean over layers, and a list `…_by_layer`.
    """
    report = losses(sums['nll'], sums['tokens'], sums['bytes'])
    for name, scale in [('active', np.array([layer.ffn.d_ff for layer in cfg.per_layer], np.float32)), ('attended', 1)]:
        if name in sums:
            by_layer = sums[name] / sums['tokens'] / scale
            report |= {name: float(by_layer.mean()), f'{name}_by_layer': [float(x) for x in by_layer]}
    return report
