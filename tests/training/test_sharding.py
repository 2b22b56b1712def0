"""The mesh over devices of other kinds than those of this machine."""

import re
from unittest import mock

import jax
import numpy as np
import optax
import pytest
from flax.core import meta
from jax.sharding import Mesh, PartitionSpec

from spark.errors import ConfigError
from spark.training import sharding
from spark.training.step import Trainer
from tests.helpers import small


def fake(platform, i, per_host, per_slice):
    """As jax shows a device of a job of several hosts; on GPUs slice_index is that of the host."""
    where = {'process_index': i // per_host, 'slice_index': i // per_slice, 'coords': (i % per_slice, 0, 0), 'core_on_chip': 0}
    return mock.Mock(spec=jax.Device, platform=platform, device_kind=f'fake {platform}', id=i, **where)


def mesh(devices, **axes):
    made = sharding.make_mesh(small(**{'data.batch_size': 32, **axes}), devices)
    return np.vectorize(lambda device: device.id)(made.devices)


def test_gpu_hosts_are_no_slices():
    gpus = [fake('gpu', i, per_host=8, per_slice=8) for i in range(32)]
    assert mesh(gpus, **{'mesh.fsdp': 8}).shape == (4, 8, 1, 1)
    assert mesh(gpus, **{'mesh.fsdp': 16}).shape == (2, 16, 1, 1)
    # Groups that are asked for hold whole hosts, and `data` alone is split over them.
    grouped = mesh(gpus, **{'mesh.fsdp': 8, 'mesh.slices': 2})
    assert [set(part.flat) for part in np.split(grouped, 2)] == [set(range(16)), set(range(16, 32))]


def test_tpu_slices_are():
    tpus = [fake('tpu', i, per_host=4, per_slice=8) for i in range(32)]
    slices = mesh(tpus, **{'mesh.fsdp': 8, 'mesh.slices': 4})
    assert [set(row.flat) for row in slices] == [set(range(8 * i, 8 * i + 8)) for i in range(4)]
    for n in (1, 2):
        with pytest.raises(ConfigError, match=re.escape(f'mesh.slices = {n}: want 4, the slices of the devices')):
            mesh(tpus, **{'mesh.fsdp': 8, 'mesh.slices': n})


def test_cpus_have_no_slice_but_can_be_divided():
    assert mesh(jax.devices(), **{'mesh.slices': 2, 'mesh.fsdp': 4}).shape == (2, 4, 1, 1)


def test_moments_are_split_as_the_axes_that_they_keep():
    """A factored moment of a square matrix: its shape does not tell which axis it is a mean over, a gradient does."""
    cfg = small(**{
        'model.d_model': 128, 'model.ffn.d_ff': 128, 'model.n_layers': 2, 'optimizer.name': 'adafactor',
        'mesh.data': 2, 'mesh.fsdp': 2, 'mesh.model': 2,
    })  # fmt: skip
    trainer = Trainer(cfg, jax.devices())
    leaves = jax.tree_util.tree_leaves_with_path(trainer.state_shardings.opt_state)
    flat = {jax.tree_util.keystr(path): s.spec for path, s in leaves}
    found = {name: next(s for path, s in flat.items() if f'.{name}' in path and "['V']" in path) for name in ('v_row', 'v_col')}

    V, factored = np.zeros((1, 128, 128), np.float32), optax.scale_by_factored_rms()
    of_neuron = np.broadcast_to(np.arange(128, dtype=np.float32)[:, None], V.shape)
    _, state = factored.update({'V': of_neuron}, factored.init({'V': V}), {'V': V})
    for name, spec in found.items():
        keeps = 'ffn' if np.ptp(getattr(state, name)['V']) else 'embed'
        assert spec == sharding.spec(('layers', keeps)), name


def test_what_lacks_an_axis_that_its_shape_does_not_tell_is_replicated():
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 1, 2), sharding.MESH_AXES)
    boxed = {'w': meta.Partitioned(jax.ShapeDtypeStruct((8, 8), np.float32), ('embed', 'ffn')),
             'u': meta.Partitioned(jax.ShapeDtypeStruct((8, 4), np.float32), ('embed', 'ffn'))}  # fmt: skip
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, np.float32)
    found = sharding.like_params(mesh, boxed, {'mean': {'w': shape(8), 'u': shape(4)}, 'w': shape(8, 8), 'other': shape(8)})
    specs = jax.tree.map(lambda s: s.spec, found)
    assert specs['mean'] == {'w': PartitionSpec(), 'u': PartitionSpec('model')}
    assert specs['w'] == PartitionSpec(('fsdp', 'context'), 'model') and specs['other'] == PartitionSpec()
