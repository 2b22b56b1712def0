"""The mesh, and the one table from the logical axes that modules name to mesh axes."""

import flax.linen as nn
import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from spark.config import check_devices

MESH_AXES = ('data', 'fsdp', 'model')
LOGICAL_AXES = {
    'batch': ('data', 'fsdp'),
    'length': None,
    'layers': None,
    'embed': 'fsdp',
    'norm': None,
    'vocab': 'model',
    'ffn': 'model',
    'heads': 'model',
    'kv_heads': 'model',
    'head_dim': None,
}


def make_mesh(cfg, devices=None):
    """The `jax.sharding.Mesh` of an ExperimentConfig over `devices` (all, if None)."""
    devices = jax.devices() if devices is None else devices
    sizes = check_devices(cfg, len(devices))
    shape = tuple(sizes[axis] for axis in MESH_AXES)
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def spec(logical):
    """The PartitionSpec over mesh axes of a sequence of logical axes (None: not split).

    Raises:
      ValueError: a name that is not in the table, or two axes of one array that map to the same mesh axis.
    """
    unknown = [name for name in logical if name is not None and name not in LOGICAL_AXES]
    if unknown:
        raise ValueError(f'logical axes {tuple(logical)}: {unknown[0]!r} is not in LOGICAL_AXES')
    mesh_axes = [None if name is None else LOGICAL_AXES[name] for name in logical]
    used = [a for axes in mesh_axes if axes for a in ((axes,) if isinstance(axes, str) else axes)]
    twice = {a for a in used if used.count(a) > 1}
    if twice:
        raise ValueError(f'logical axes {tuple(logical)}: two of them map to the mesh axis {min(twice)!r}')
    return PartitionSpec(*mesh_axes)


def shardings(mesh, boxed):
    """NamedShardings for a tree of variables that carry their logical axes (abstract will do); unnamed ones are replicated."""
    is_spec = lambda x: isinstance(x, PartitionSpec)
    return jax.tree.map(lambda s: NamedSharding(mesh, spec(s)), nn.get_partition_spec(boxed), is_leaf=is_spec)


def batch_sharding(mesh):
    """How the rows of a batch are spread."""
    return NamedSharding(mesh, spec(('batch', 'length')))


def logical_rules():
    """Context in which modules resolve the logical axes of activations by the table; use it together with the mesh."""
    return nn.logical_axis_rules(list(LOGICAL_AXES.items()))
