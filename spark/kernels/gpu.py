"""Attention on GPU by cuDNN, for what cuDNN can compute; all else goes through `kernels/blockwise.py`, compiled by XLA."""

import jax
import jax.numpy as jnp

from spark.kernels import blockwise


def covers(q, spec):
    """Is q (B, N, G, L, d) of a `blockwise.Spec` such that cuDNN has its attention on this machine's GPU?

    Dense and without a soft-cap, 16-bit, heads of at most 256 dimensions, or 128 on GPUs older than Hopper.
    """
    widest = 256 if float(jax.devices('gpu')[0].compute_capability) >= 9 else 128
    return not spec.k and not spec.logit_cap and q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] <= widest


def attention(q, k, v, window=0, *, implementation='cudnn'):
    """Dense causal attention over rows that are one document each; arguments, y and counts as in `blockwise.attention`.

    Args:
      q: (B, N, G, L, d), scaled.
      k, v: (B, N, L, d).
      window: tokens that a query sees, itself included; 0 for all.
      implementation: of `jax.nn.dot_product_attention`; 'xla' computes the same anywhere, in n × n memory.
    """
    B, L, d = k.shape[0], *q.shape[3:]
    by_row = lambda x: x.reshape(B, -1, L, d).swapaxes(1, 2)
    y_BxLxHxd = jax.nn.dot_product_attention(
        by_row(q), by_row(k), by_row(v), scale=1.0, is_causal=True, implementation=implementation,
        local_window_size=(window - 1, 0) if window else None,
    )  # fmt: skip
    starts = blockwise.visible_starts(jnp.ones((1, L), jnp.int32), window)
    attended = (jnp.arange(L) - starts + 1).astype(jnp.float32)
    return y_BxLxHxd.swapaxes(1, 2).reshape(q.shape), jnp.broadcast_to(attended[:, None, None], q.shape[:4])
