"""Small parts shared by the modules: parameters with named axes, normalisation, soft-cap, per-token metrics."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

METRICS = 'metrics'  # the collection that per-token counts are sown into; costs nothing unless made mutable


def matrix(module, name, shape, axes, fan_in, dtype):
    """A float32 parameter N(0, 1/fan_in), cast to `dtype`; `axes` names its logical axes, see training/sharding.py."""
    init = nn.with_logical_partitioning(nn.initializers.normal(fan_in**-0.5), axes)
    return module.param(name, init, shape, jnp.float32).astype(dtype)


def mesh_axes(axis):
    """The mesh axes (a tuple) that a logical axis is split over; none without a mesh or a table of axes."""
    if jax.sharding.get_abstract_mesh().empty or not nn.get_logical_axis_rules():
        return ()
    [axes] = nn.logical_to_mesh_axes((axis,))
    return (axes,) if isinstance(axes, str) else axes or ()


def shards(axis):
    """Into how many parts a logical axis is split over devices."""
    return math.prod(jax.sharding.get_abstract_mesh().shape[a] for a in mesh_axes(axis))


def by_token(x_BxLxD):
    """(T, D), one row per token; as it is where the length is split, for which that would gather it.

    XLA:CPU takes half the time for the gradients of a matmul's matrix than with two leading axes.
    """
    return x_BxLxD if shards('length') > 1 else x_BxLxD.reshape(-1, x_BxLxD.shape[-1])


def softcap(x, cap):
    """cap · tanh(x / cap): bounds logits smoothly; cap 0 leaves them alone."""
    return cap * jnp.tanh(x / cap) if cap else x


def count(module, name, entries):
    """Sows how many entries of the last axis are true, per token, under `name`."""
    sow(module, name, jnp.sum(entries, axis=-1, dtype=jnp.float32))


def sow(module, name, x):
    """Adds an array to METRICS, where that is asked for, to be found by `transformer.by_layer`."""
    if not module.is_initializing() and module.is_mutable_collection(METRICS):
        module.sow(METRICS, name, x, reduce_fn=lambda _, new: new, init_fn=lambda: None)


def rms_norm(x, scale, epsilon=1e-6):
    """x / rms(x) · (1 + scale) over the last axis, in float32 (arXiv 1910.07467, with Gemma's zero-centred scale)."""
    y = x.astype(jnp.float32)
    y = y * jnp.reciprocal(jnp.sqrt(jnp.mean(y * y, axis=-1, keepdims=True) + epsilon))
    return (y * (1 + scale)).astype(x.dtype)


class RMSNorm(nn.Module):
    """`rms_norm` with its scale."""

    @nn.compact
    def __call__(self, x):
        init = nn.with_logical_partitioning(nn.initializers.zeros, ('norm',))
        return rms_norm(x, self.param('scale', init, (x.shape[-1],), jnp.float32))
