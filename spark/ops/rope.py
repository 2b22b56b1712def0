"""Rotary position embedding (arXiv 2104.09864)."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Angles = Float[Array, '*positions half']


def rotation(positions: Int[Array | np.ndarray, '*positions'], d: int, base: float = 10_000.0) -> tuple[Angles, Angles]:
    """(sin, cos) of the angles positions · base^(−2i/d), i < d/2, in float32.

    d is the width of what is rotated, an even number (else a ValueError): Spark rotates the two parts of a query or key
    separately. base is the longest wavelength over 2π.
    """
    if d % 2:
        raise ValueError(f'rope rotates pairs: the last axis must be even, not {d}')
    angle = positions[..., None].astype(jnp.float32) * base ** (-jnp.arange(0, d, 2, dtype=jnp.float32) / d)
    return jnp.sin(angle), jnp.cos(angle)


def rope(
    x: Float[Array, 'B L H d'], rotation: tuple[Float[Array, '#B L half'], Float[Array, '#B L half']]
) -> Float[Array, 'B L H d']:
    """Turns each pair (x[i], x[i + d/2]) of the last axis by its angle, in float32; the result has the dtype of x."""
    sin, cos = (part_BxLxf[:, :, None] for part_BxLxf in rotation)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)
