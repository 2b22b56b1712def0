"""Small parts that the modules share: parameters with named axes, sharding queries, per-token metrics, the norm."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from spark.nn.block import Hidden, rms_norm

METRICS = 'metrics'  # the collection of per-token counts; sowing costs nothing unless the collection is mutable

CARRIED = 'carried'  # a collection that goes from one group of layers to the next, as METRICS are kept of each


def matrix(
    module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], fan_in: int, dtype: DTypeLike
) -> Float[Array, '...']:
    """A float32 parameter N(0, 1/fan_in), cast to `dtype`. training/sharding.py maps its logical `axes` to the mesh."""
    init = nn.with_logical_partitioning(nn.initializers.normal(fan_in**-0.5), axes)
    return module.param(name, init, shape, jnp.float32).astype(dtype)


def mesh_axes(axis: str) -> tuple[str, ...]:
    """The mesh axes that a logical axis is sharded over; none outside of a mesh."""
    if jax.sharding.get_abstract_mesh().empty or not nn.get_logical_axis_rules():
        return ()
    [axes] = nn.logical_to_mesh_axes((axis,))
    return (axes,) if isinstance(axes, str) else axes or ()


def shards(axis: str) -> int:
    """The number of shards of a logical axis."""
    return math.prod(jax.sharding.get_abstract_mesh().shape[a] for a in mesh_axes(axis))


def by_token(x_BxLxD: Hidden) -> Float[Array, '*tokens D']:
    """One row per token, (B·L, D): XLA:CPU then computes the gradient of a matrix in half the time.

    Where the length is sharded, x keeps its shape, since the reshape would gather it.
    """
    return x_BxLxD if shards('length') > 1 else x_BxLxD.reshape(-1, x_BxLxD.shape[-1])


def sow(module: nn.Module, name: str, x: Shaped[Array, '...']) -> None:
    """Adds an array to METRICS, if that collection is mutable; `transformer.by_layer` reads it."""
    if not module.is_initializing() and module.is_mutable_collection(METRICS):
        module.sow(METRICS, name, x, reduce_fn=lambda _, new: new, init_fn=lambda: None)


class RMSNorm(nn.Module):
    """`rms_norm` with its scale, which begins at `start`."""

    start: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, '*tokens D']) -> Float[Array, '*tokens D']:
        init = nn.with_logical_partitioning(nn.initializers.constant(self.start), ('norm',))
        return rms_norm(x, self.param('scale', init, (x.shape[-1],), jnp.float32))
