"""What a process of a job is told by its environment, and whether the job has the devices that it asked for."""

import os
import subprocess
import sys

import jax
import pytest

from spark import distributed
from spark.errors import ConfigError
from tests.helpers import ROOT

SRUN = {
    'SLURM_STEP_NUM_TASKS': '4', 'SLURM_NTASKS': '4', 'SLURM_PROCID': '3', 'SLURM_LOCALID': '1', 'SLURM_JOB_ID': '7',
    'SLURM_STEP_NODELIST': 'n[1-2]', 'SLURM_STEP_TASKS_PER_NODE': '2(x2)', 'SLURM_NODEID': '1',
}  # fmt: skip


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in list(os.environ):
        if name.startswith(('SLURM_', 'OMPI_', 'JAX_COORD', 'JAX_NUM_P', 'JAX_PROC', 'JAX_LOCAL_D', 'SPARK_DEVICES', 'CUDA_')):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ('told', 'message'),
    [
        ({'SLURM_STEP_NUM_TASKS': ''}, 'SLURM_STEP_NUM_TASKS=: want a number'),
        ({'SLURM_STEP_NUM_TASKS': 'abc'}, 'SLURM_STEP_NUM_TASKS=abc: want a number'),
        ({'SLURM_STEP_NUM_TASKS': '2'}, 'SLURM_STEP_NUM_TASKS=2, SLURM_NTASKS=, SLURM_PROCID=, .*: want what srun sets'),
        (SRUN | {'SLURM_JOB_ID': 'x'}, 'SLURM_JOB_ID=x, SLURM_STEP_NODELIST=.*: want what srun sets'),
        (SRUN | {'SLURM_STEP_TASKS_PER_NODE': '2(y)'}, r'SLURM_STEP_TASKS_PER_NODE=2\(y\): want what srun sets'),
        (SRUN | {'SLURM_STEP_TASKS_PER_NODE': '3', 'CUDA_VISIBLE_DEVICES': '0,1'}, 'CUDA_VISIBLE_DEVICES has 2 GPUs for 3 tasks'),
        (SRUN | {'SLURM_GPUS_ON_NODE': 'all', 'SLURM_STEP_TASKS_PER_NODE': '2'}, 'SLURM_GPUS_ON_NODE=all: want a number'),
        ({'OMPI_COMM_WORLD_SIZE': 'two'}, 'OMPI_COMM_WORLD_SIZE=two: want a number'),
        ({'OMPI_COMM_WORLD_SIZE': '2'}, 'OMPI_MCA_orte_hnp_uri=: want what mpirun sets'),
        ({'JOB_COMPLETION_INDEX': '0'}, 'JOB_COMPLETION_INDEX=0: want KUBERNETES_SERVICE_HOST'),
        ({'JAX_NUM_PROCESSES': '2'}, 'JAX_COORDINATOR_ADDRESS=, JAX_NUM_PROCESSES=2, JAX_PROCESS_ID=: want host:port'),
        ({'JAX_COORDINATOR_ADDRESS': 'localhost:1'}, 'JAX_NUM_PROCESSES=, JAX_PROCESS_ID=: want host:port'),
        (
            {'JAX_COORDINATOR_ADDRESS': 'localhost:x', 'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '0'},
            'JAX_COORDINATOR_ADDRESS=localhost:x, .*: want host:port',
        ),
        (SRUN | {'JAX_COORDINATOR_ADDRESS': 'localhost'}, 'JAX_COORDINATOR_ADDRESS=localhost: want host:port'),
        ({'SPARK_DEVICES': 'many'}, 'SPARK_DEVICES=many: want a number'),
    ],
)
def test_an_environment_that_is_malformed(monkeypatch, told, message):
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        distributed.initialize()


def test_it_is_one_line_of_the_script(tmp_path):
    env = os.environ | {'PYTHONPATH': str(ROOT), 'SLURM_STEP_NUM_TASKS': '2'}
    words = [sys.executable, f'{ROOT}/scripts/train.py', f'--config={ROOT}/configs/tiny.py', f'--workdir={tmp_path}/run']
    ended = subprocess.run(words, env=env, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2 and ended.stderr.startswith('ConfigError: SLURM_STEP_NUM_TASKS=2, SLURM_NTASKS='), ended
    assert ended.stderr.count('\n') == 1


@pytest.mark.parametrize(
    ('tasks', 'local', 'visible', 'on_node', 'ids'),
    [
        ('1(x2)', '0', '0,1,2,3', '4', []),  # all of the node's GPUs for its task
        ('4(x2)', '3', '0,1,2,3', '4', [3]),  # a task per GPU
        ('2,2', '1', '0,1,2,3', '4', [2, 3]),
        ('4(x2)', '3', '0', '4', []),  # divided by SLURM
        ('2(x2)', '1', '', '0', None),  # no GPUs
    ],
)
def test_the_tasks_of_a_node_share_its_gpus(monkeypatch, tasks, local, visible, on_node, ids):
    gpus = {'CUDA_VISIBLE_DEVICES': visible, 'SLURM_GPUS_ON_NODE': on_node}
    for name, value in (SRUN | gpus | {'SLURM_STEP_TASKS_PER_NODE': tasks, 'SLURM_LOCALID': local}).items():
        monkeypatch.setenv(name, value)
    joined = []
    monkeypatch.setattr(jax.distributed, 'initialize', lambda **described: joined.append(described))
    monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
    monkeypatch.setenv('JAX_COORDINATOR_ADDRESS', 'node1:1234')  # SLURM says the rest
    distributed.initialize()
    assert joined[0]['local_device_ids'] == ids
    monkeypatch.setenv('SLURM_STEP_NUM_TASKS', '1')
    distributed.initialize()
    assert len(joined) == 1


@pytest.mark.parametrize(('platforms', 'is_tpu'), [(None, True), ('', True), ('tpu', True), ('tpu,cpu', True), ('cpu', False)])
def test_the_hosts_of_a_pod_are_one_job_wherever_tpus_may_be_used(monkeypatch, platforms, is_tpu):
    joined = []
    monkeypatch.setattr(jax.distributed, 'initialize', lambda **described: joined.append(described))
    monkeypatch.setattr(distributed, 'is_tpu_host', lambda: True)
    monkeypatch.delenv('JAX_PLATFORMS')
    if platforms is not None:
        monkeypatch.setenv('JAX_PLATFORMS', platforms)
    distributed.initialize()
    assert len(joined) == is_tpu
    monkeypatch.setenv('JOB_COMPLETION_INDEX', '0')  # of GKE, where jax asks the TPU for the rest
    if is_tpu:
        distributed.initialize()
        assert len(joined) == 2
    else:
        with pytest.raises(ConfigError, match='JOB_COMPLETION_INDEX=0: want KUBERNETES_SERVICE_HOST'):
            distributed.initialize()


def test_devices_that_lie_idle(monkeypatch):
    monkeypatch.setenv('SPARK_DEVICES', str(jax.device_count()))
    distributed.initialize()
    monkeypatch.setenv('SPARK_DEVICES', '32')
    with pytest.raises(ConfigError, match=rf'asked for 32 devices \(SPARK_DEVICES\), and sees {jax.device_count()} × cpu'):
        distributed.initialize()
    monkeypatch.delenv('SPARK_DEVICES')
    for name, value in {'SLURM_STEP_NUM_TASKS': '1', 'SLURM_GPUS_ON_NODE': '2'}.items():
        monkeypatch.setenv(name, value)
    distributed.initialize()  # JAX_PLATFORMS says that the GPUs are not wanted
    monkeypatch.delenv('JAX_PLATFORMS')
    with pytest.raises(ConfigError, match=rf'SLURM_GPUS_ON_NODE=2, and the tasks of this node see {jax.device_count()} × cpu'):
        distributed.initialize()
