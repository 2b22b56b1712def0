"""The mesh, and the one table that maps the logical axes of modules to mesh axes."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.core import meta
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from spark.config import ExperimentConfig, check_devices
from spark.errors import ConfigError

MESH_AXES = ('data', 'fsdp', 'context', 'model')
LOGICAL_AXES = {
    'batch': ('data', 'fsdp'),
    'replicas': 'data',
    'length': 'context',
    'layers': None,
    'embed': ('fsdp', 'context'),
    'norm': None,
    'vocab': 'model',
    'ffn': 'model',
    'heads': 'model',
    'kv_heads': 'model',
    'head_dim': None,
}


def make_mesh(cfg: ExperimentConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a config over some devices (None: all). Slices split `data` only: only gradient sums travel between them."""
    devices = jax.devices() if devices is None else devices
    sizes = check_devices(cfg, len(devices))
    slices = _slices(devices, cfg.mesh.slices)
    shape = (sizes['data'] // len(slices), *(sizes[axis] for axis in MESH_AXES[1:]))
    parts = [mesh_utils.create_device_mesh(shape, part, allow_split_physical_axes=True) for part in slices]
    return Mesh(np.concatenate(parts), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _slices(devices, n):
    """The devices of each slice. Where there are none, the devices are divided evenly, in the order of their processes."""
    found = {}
    for device in devices:
        # Only TPUs have slices: GPUs have a slice_index too, which is that of their host.
        found.setdefault(getattr(device, 'slice_index', None) if device.platform == 'tpu' else None, []).append(device)
    if n > 1 and len(found) == 1:
        return np.split(np.array(devices), n)
    if len(found) != n:
        raise ConfigError(f'mesh.slices = {n}: want {len(found)}, the slices of the devices')
    return list(found.values())


def spec(logical: Sequence[str | None] | PartitionSpec) -> PartitionSpec:
    """The PartitionSpec of logical axes (None: not split); a ValueError if one is unknown or two map to the same mesh axis."""
    if unknown := [name for name in logical if name is not None and name not in LOGICAL_AXES]:
        raise ValueError(f'logical axes {tuple(logical)}: {unknown[0]!r} is not in LOGICAL_AXES')
    mesh_axes = [None if name is None else LOGICAL_AXES[name] for name in logical]
    used = [a for axes in mesh_axes if axes for a in ((axes,) if isinstance(axes, str) else axes)]
    if twice := {a for a in used if used.count(a) > 1}:
        raise ValueError(f'logical axes {tuple(logical)}: two of them map to the mesh axis {min(twice)!r}')
    return PartitionSpec(*mesh_axes)


def shardings(mesh: Mesh, boxed: Any) -> Any:
    """NamedShardings for a tree of Flax variables boxed with their logical axes; those without are replicated."""
    return jax.tree.map(lambda s: NamedSharding(mesh, spec(s)), nn.get_partition_spec(boxed))


def like_params(mesh: Mesh, boxed: Any, tree: Any) -> Any:
    """NamedShardings for a tree of shapes: what lies at the path of a parameter (`boxed` as above) is split as that is.

    What lacks one of the parameter's axes, as Adafactor's moments do, is split along the others. All else is replicated.
    """
    logical = dict(jax.tree_util.tree_leaves_with_path(nn.get_partition_spec(boxed)))
    shapes = {path: x.shape for path, x in jax.tree_util.tree_leaves_with_path(meta.unbox(boxed))}

    def one(path, x):
        parameter = next((path[i:] for i in range(len(path)) if path[i:] in shapes), None)
        shape = shapes.get(parameter, ())
        axes = [*logical.get(parameter, ()), *[None] * len(shape)][: len(shape)]
        without = lambda values, i: (*values[:i], *values[i + 1 :])
        ways = [(shape, axes), *((without(shape, i), without(axes, i)) for i in range(len(shape)))]
        return NamedSharding(mesh, spec(next((axes for shape, axes in ways if shape == x.shape), ())))

    return jax.tree_util.tree_map_with_path(one, tree)


def logical_rules() -> AbstractContextManager:
    """A context in which modules map the logical axes of activations by the table. It needs the mesh to be set, too."""
    return nn.logical_axis_rules(list(LOGICAL_AXES.items()))
