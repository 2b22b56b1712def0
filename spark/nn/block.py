"""The architecture, stated once for training (nn/transformer.py) and for decoding (inference/model.py): Gemma-2's block.

Each caller passes functions that hold its own parameters, caches and kernels.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from spark import ops

Hidden = Float[Array, 'B L D']
Half = Callable[[Hidden], Hidden]
Integers = Int[Array | np.ndarray, 'B L']  # ids, positions or segments


def embed(rows_BxLxD: Hidden, dtype: DTypeLike) -> Hidden:
    """The first hidden states, from the tokens' rows of the embedding: scaled by sqrt(D)."""
    return rows_BxLxD.astype(dtype) * jnp.asarray(rows_BxLxD.shape[-1] ** 0.5, dtype)


def block(x_BxLxD: Hidden, norm: Callable[[str, Hidden], Hidden], attention: Half, ffn: Half) -> Hidden:
    """One layer: attention, then FFN, each between two norms and with a residual connection.

    `norm(name, x)` normalises with the scale of that name.
    """
    x_BxLxD = x_BxLxD + norm('post_attention', attention(norm('pre_attention', x_BxLxD)))
    return x_BxLxD + norm('post_ffn', ffn(norm('pre_ffn', x_BxLxD)))


NORMS = ('pre_attention', 'post_attention', 'pre_ffn', 'post_ffn')  # of a block


def logits(h: Float[Array, '*tokens D'], unembed: Callable, cap: float) -> Float[Array, '*tokens V']:
    """Soft-capped float32 logits; `unembed` multiplies by the transposed embedding."""
    return ops.softcap(unembed(h).astype(jnp.float32), cap)


def rms_norm(x: Float[Array, '*tokens D'], scale: Float[Array, ' D'] | float) -> Float[Array, '*tokens D']:
    """x / rms(x) · (1 + scale) over the last axis, in float32 (arXiv 1910.07467, with Gemma's zero-centred scale)."""
    y = x.astype(jnp.float32)
    y = y * jnp.reciprocal(jnp.sqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-6))
    return (y * (1 + scale)).astype(x.dtype)
