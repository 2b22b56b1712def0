"""The mesh over devices of other kinds than those of this machine."""

import re
from unittest import mock

import jax
import numpy as np
import pytest

from spark.errors import ConfigError
from spark.training import sharding
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
