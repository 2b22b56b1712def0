"""Next-token cross-entropy, with z-loss (arXiv 2204.02311), and the sums that training and evaluation share."""

import math

import jax
import jax.numpy as jnp

from spark.nn.layers import METRICS
from spark.nn.transformer import activity


def cross_entropy(logits_fn, hidden_BxLxD, targets_BxL, chunk=0):
    """Per token (B, L): −log p(target) and log Z, both float32 (nats), and whether the target is the likeliest token.

    Args:
      logits_fn: hidden states (B, l, D) → logits (B, l, V) in float32.
      hidden_BxLxD, targets_BxL: hidden states and int32 ids.
      chunk: positions whose logits exist at a time, forward and backward; 0 for all L.
    """

    def per_token(hidden, targets):
        logits = logits_fn(hidden)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return log_z - target, log_z, target >= jnp.max(logits, axis=-1)

    B, L = targets_BxL.shape
    if not chunk or chunk == L:
        return per_token(hidden_BxLxD, targets_BxL)
    cut = lambda x: x.reshape(B, L // chunk, chunk, *x.shape[2:]).swapaxes(0, 1)
    join = lambda x: x.swapaxes(0, 1).reshape(B, L)
    step = lambda _, xs: (None, jax.checkpoint(per_token)(*xs))
    return jax.tree.map(join, jax.lax.scan(step, None, (cut(hidden_BxLxD), cut(targets_BxL)))[1])


def forward(model, params, batch, *, chunk=0, count=True):
    """One forward pass over a batch (see spark.data.pipeline); sums over its tokens, padding excluded.

    Returns:
      {'nll', 'log_z2', 'tokens', 'bytes': () float32; 'active', 'attended': (n_layers,) float32 if `count`}.
    """
    rows = batch['tokens'], batch['positions'], batch['segments']
    (hidden, _), state = model.apply(params, *rows, mutable=[METRICS] if count else [])
    weights = (batch['segments'] > 0).astype(jnp.float32)
    logits_fn = lambda hidden: model.apply(params, hidden, method='logits')
    nll_BxL, log_z_BxL, _ = cross_entropy(logits_fn, hidden, batch['targets'], chunk)
    sums = {
        'nll': jnp.sum(weights * nll_BxL),
        'log_z2': jnp.sum(weights * log_z_BxL**2),
        'tokens': jnp.sum(weights),
        'bytes': jnp.sum(batch['bytes'], dtype=jnp.float32),
    }
    if count:
        sums |= {name: jnp.einsum('nBL,BL->n', n, weights) for name, n in activity(model.cfg, state[METRICS]).items()}
    return sums


def per_token(cfg, sums):
    """Host-side figures of (summed) `forward` results: loss, perplexity, bits_per_byte, shares and counts per layer.

    Args:
      cfg: a ModelConfig.
      sums: numpy, as from `forward`.

    Returns:
      A dict of floats, and lists of n_layers floats: `active_by_layer` (share of neurons), `attended_by_layer` (keys).
    """
    loss = float(sums['nll'] / sums['tokens'])
    report = {'loss': loss, 'perplexity': math.exp(min(loss, 700.0))}
    if sums['bytes']:
        report['bits_per_byte'] = float(sums['nll'] / sums['bytes'] / math.log(2))
    for name, scale in [('active', cfg.ffn.d_ff), ('attended', 1)]:
        if name in sums:
            by_layer = sums[name] / sums['tokens'] / scale
            report |= {name: float(by_layer.mean()), f'{name}_by_layer': [float(x) for x in by_layer]}
    return report
