"""Attention on GPU by cuDNN, where cuDNN has it; everything else goes through `kernels/blockwise.py`, compiled by XLA."""

import jax
import jax.numpy as jnp

from spark.kernels.blockwise import Keys, PerQuery, Queries, Spec, count_visible


def covers(q: Queries, spec: Spec) -> bool:
    """Whether cuDNN has this attention on this machine's GPU.

    It must be dense, without a soft-cap, in 16 bits, with heads of at most 256 dimensions (128 on GPUs older than Hopper).
    """
    max_head_dim = 256 if float(jax.devices('gpu')[0].compute_capability) >= 9 else 128
    return not spec.k and not spec.logit_cap and q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] <= max_head_dim


def attention(q: Queries, k: Keys, v: Keys, window: int = 0, *, implementation: str = 'cudnn') -> tuple[Queries, PerQuery]:
    """`blockwise.attention`, dense and causal, over rows of one document each; window 0: a query sees all tokens before it.

    implementation: of `jax.nn.dot_product_attention`; 'xla' computes the same on any platform, in L × L memory.
    """
    B, L, d = k.shape[0], *q.shape[3:]
    by_token = lambda x: x.reshape(B, -1, L, d).swapaxes(1, 2)
    y_BxLxHxd = jax.nn.dot_product_attention(
        by_token(q), by_token(k), by_token(v), scale=1.0, is_causal=True, implementation=implementation,
        local_window_size=(window - 1, 0) if window else None,
    )  # fmt: skip
    return y_BxLxHxd.swapaxes(1, 2).reshape(q.shape), count_visible(q, jnp.ones((1, L), jnp.int32), window)
