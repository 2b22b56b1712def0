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
FACTORED = {'v_row': -1, 'v_col': -2}  # which axis of a parameter, in the order of their sizes, moments of these names lack


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

    What lacks one of the parameter's axes, as Adafactor's moments do, is split along the others. It is replicated where its shape
    leaves open which axis that is; all else is replicated, too.
    """
    logical = dict(jax.tree_util.tree_leaves_with_path(nn.get_partition_spec(boxed)))
    shapes = {path: x.shape for path, x in jax.tree_util.tree_leaves_with_path(meta.unbox(boxed))}

    def one(path, x):
        start = next((i for i in range(len(path)) if path[i:] in shapes), len(path))
        shape = shapes.get(path[start:], ())
        axes = [*logical.get(path[start:], ()), *[None] * len(shape)][: len(shape)]
        # optax: v_row is a mean over the largest axis, v_col over the one before it in np.argsort.
        lacks = FACTORED.get(getattr(path[start - 1], 'name', None)) if start else None
        removed = range(len(shape)) if lacks is None or len(shape) < 2 else [int(np.argsort(shape)[lacks])]
        without = lambda values, i: (*values[:i], *values[i + 1 :])
        lacking = {spec(without(axes, i)) for i in removed if without(shape, i) == x.shape}
        ways = {spec(axes)} if shape == x.shape else lacking
        return NamedSharding(mesh, ways.pop() if len(ways) == 1 else PartitionSpec())

    return jax.tree_util.tree_map_with_path(one, tree)


def logical_rules() -> AbstractContextManager:
    """A context in which modules map the logical axes of activations by the table. It needs the mesh to be set, too."""
    return nn.logical_axis_rules(list(LOGICAL_AXES.items()))
