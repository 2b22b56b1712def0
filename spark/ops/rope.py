"""Rotary position embedding (arXiv 2104.09864)."""

import jax.numpy as jnp


def rotation(positions, d, base=10_000.0):
    """(sin, cos) of the angles positions · base^(−2i/d), i < d/2: float32, each (*positions.shape, d/2).

    Args:
      positions: int: place of each token in its document.
      d: even, the width of what is to be rotated. Spark rotates the predictor and the rest of a query or key separately.
      base: the longest wavelength over 2π.
    """
    if d % 2:
        raise ValueError(f'rope rotates pairs: the last axis must be even, not {d}')
    angle = positions[..., None].astype(jnp.float32) * base ** (-jnp.arange(0, d, 2, dtype=jnp.float32) / d)
    return jnp.sin(angle), jnp.cos(angle)


def rope(x, rotation):
    """Turns each pair (x[i], x[i + d/2]) of the last axis by its angle, in float32.

    Args:
      x: (B, L, H, d).
      rotation: of (B, L) positions and d.

    Returns:
      x rotated, in its own dtype.
    """
    sin, cos = (part_BxLxf[:, :, None] for part_BxLxf in rotation)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)
