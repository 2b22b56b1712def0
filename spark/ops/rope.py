"""Rotary position embedding (arXiv 2104.09864)."""

import jax.numpy as jnp


def rope(x, positions, base=10_000.0):
    """Rotates each pair (x[i], x[i + d/2]) of the last axis by positions · base^(−2i/d), in float32.

    Args:
      x: (B, L, H, d) with d even. Spark calls this on the predictor and on the rest of a query or key separately.
      positions: (B, L) int: place of each token in its document.
      base: the longest wavelength over 2π.

    Returns:
      x rotated, in its own dtype.
    """
    d = x.shape[-1]
    if d % 2:
        raise ValueError(f'rope rotates pairs: the last axis must be even, not {d}')
    frequency = base ** (-jnp.arange(0, d, 2, dtype=jnp.float32) / d)
    angle_BxLx1xf = positions[:, :, None, None].astype(jnp.float32) * frequency
    sin, cos = jnp.sin(angle_BxLx1xf), jnp.cos(angle_BxLx1xf)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)
