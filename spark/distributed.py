"""Joins the processes of a job into one JAX program, and compares the devices that it asked for with those that it sees."""

import importlib.util
import os
import re

from spark.errors import ConfigError, StalledError
from spark.runtime import is_tpu_host

# JAX ends all processes of a job when one has been silent for so long. The watchdog should act first: it prints the stacks.
HEARTBEAT_SECONDS = 900
DEVICES = 'SPARK_DEVICES'  # scripts/launch.py says here how many devices the job has asked for
JAX = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
# What jax reads of srun and of mpirun; the first is the number of processes. SLURM_NTASKS is also set in the shell of an
# allocation, where no other process joins.
SLURM = ('SLURM_STEP_NUM_TASKS', 'SLURM_NTASKS', 'SLURM_PROCID', 'SLURM_LOCALID', 'SLURM_JOB_ID', 'SLURM_STEP_NODELIST')
OPEN_MPI = ('OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_LOCAL_RANK', 'OMPI_MCA_orte_hnp_uri')
OR_ELSE = f'or set {JAX[0]}=host:port, {JAX[1]} and {JAX[2]} for each process'


def initialize() -> None:
    """Joins the processes of a job. Call it before JAX is used; it joins nothing in a job of a single process.

    A job is described by JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID, or by the environment of
    SLURM, Open MPI, Kubernetes (an indexed job or JobSet) or Cloud TPU. Under SLURM the tasks of a node share its GPUs evenly.
    Raises a ConfigError if that is incomplete, or if the job does not see the devices that it asked for, and a StalledError if
    the other processes do not come.
    """
    import jax

    if (described := _description()) is not None:
        timeouts = {'heartbeat_timeout_seconds': HEARTBEAT_SECONDS, 'shutdown_timeout_seconds': 30}
        try:
            jax.distributed.initialize(**described, **timeouts)
        except jax.errors.JaxRuntimeError as e:
            raise StalledError(f'the processes of the job do not find each other: {str(e).splitlines()[0]}') from e
        except (ValueError, TypeError, KeyError, OSError, RuntimeError) as e:
            line = f'{e}'.strip().partition('\n')[0]
            raise ConfigError(f'the processes of the job cannot be told from the environment: {line}; {OR_ELSE}') from e
    _check_devices(jax)


def _description():
    """What jax.distributed.initialize cannot find out itself; None if there is nothing to join."""
    given = [name for name in JAX if name in os.environ]
    found = {name: os.environ.get(name, '') for name in JAX}
    told = 'want host:port, the number of processes, and the index of this one, from 0'
    scheduled = _scheduled()
    # A scheduler may say the rest, also that there is a single process.
    is_scheduled = scheduled is not None or OPEN_MPI[0] in os.environ or SLURM[0] in os.environ
    if given and (given != [JAX[0]] or not is_scheduled):
        address, count, index = found.values()
        if not (count.isdecimal() and index.isdecimal() and int(index) < int(count) and re.fullmatch(r'.+:\d+', address)):
            raise ConfigError(f'{_shown(found)}: {told}')
        return {'coordinator_address': address, 'num_processes': int(count), 'process_id': int(index)} if int(count) > 1 else None
    if given and not re.fullmatch(r'.+:\d+', found[JAX[0]]):
        raise ConfigError(f'{JAX[0]}={found[JAX[0]]}: want host:port')
    return scheduled


def _scheduled():
    """The same for a job that a scheduler started."""
    for names, program in [(OPEN_MPI, 'mpirun'), (SLURM, 'srun')]:
        if names[0] in os.environ and _number(names[0]) > 1:
            found = {name: os.environ.get(name, '') for name in names}
            if not all(value.isdecimal() for value in list(found.values())[:-1]) or not found[names[-1]]:
                raise ConfigError(f'{_shown(found)}: want what {program} sets, numbers but for the last; {OR_ELSE}')
            return {'local_device_ids': _local_gpus()} if names is SLURM else {}
    platforms = os.environ.get('JAX_PLATFORMS', '')  # such as tpu,cpu; '': jax decides
    tpu = is_tpu_host() and (not platforms or 'tpu' in platforms.split(','))
    index = os.environ.get('JOB_COMPLETION_INDEX')
    if index is not None and not tpu and not ('KUBERNETES_SERVICE_HOST' in os.environ and importlib.util.find_spec('kubernetes')):
        raise ConfigError(
            f"JOB_COMPLETION_INDEX={index}: want KUBERNETES_SERVICE_HOST, and pip install 'jax[k8s]'; {OR_ELSE}"
        )
    return {} if tpu or index is not None else None


def _local_gpus():
    """Which of the GPUs that this task sees are its own, as indices; []: all. None: jax decides.

    jax would take one per task, so that seven of eight GPUs lie idle where a node has a single task.
    """
    if 'JAX_LOCAL_DEVICE_IDS' in os.environ:
        return None
    tasks, visible = _tasks_on_node(), len(list(filter(None, os.environ.get('CUDA_VISIBLE_DEVICES', '').split(','))))
    if tasks == 1 or visible < _number('SLURM_GPUS_ON_NODE', 0):  # SLURM has divided them, as by --gpus-per-task
        return []
    if not visible:
        return None
    if visible % tasks:
        raise ConfigError(f'CUDA_VISIBLE_DEVICES has {visible} GPUs for {tasks} tasks of this node: want a multiple, or one task')
    share, first = visible // tasks, _number('SLURM_LOCALID') * (visible // tasks)
    return list(range(first, first + share))


def _tasks_on_node():
    """The number of this node in SLURM_STEP_TASKS_PER_NODE, such as '2(x3),1'."""
    text, counts = os.environ.get('SLURM_STEP_TASKS_PER_NODE', '1'), []
    for part in text.split(','):
        if not (match := re.fullmatch(r'(\d+)(?:\(x(\d+)\))?', part)):
            raise ConfigError(f'SLURM_STEP_TASKS_PER_NODE={text}: want what srun sets, such as 2(x3),1')
        counts += [int(match[1])] * int(match[2] or 1)
    node = _number('SLURM_NODEID', 0)
    return counts[node] if node < len(counts) else counts[0]


def _check_devices(jax):
    """Raises a ConfigError if devices that the job asked for lie idle: GPUs without their plugin, say, or too few processes."""
    want = 'want all of them in use: is jax installed for them, and does every host or task run?'
    if asked := _number(DEVICES, 0):
        if asked != (seen := jax.device_count()):
            raise ConfigError(f'the job asked for {asked} devices ({DEVICES}), and sees {seen} × {_kind(jax)}; {want}')
    elif 'SLURM_STEP_NUM_TASKS' in os.environ and os.environ.get('JAX_PLATFORMS') != 'cpu':
        asked, seen = _number('SLURM_GPUS_ON_NODE', 0), jax.local_device_count() * _tasks_on_node()
        if asked and asked != seen:
            raise ConfigError(f'SLURM_GPUS_ON_NODE={asked}, and the tasks of this node see {seen} × {_kind(jax)}; {want}')


def _kind(jax):
    return jax.devices()[0].device_kind


def _number(name, default=None):
    """The number that an environment variable holds."""
    value = os.environ.get(name)
    if value is None and default is not None:
        return default
    if not (value or '').isdecimal():
        raise ConfigError(f'{name}={value or ""}: want a number')
    return int(value)


def _shown(found):
    return ', '.join(f'{name}={value}' for name, value in found.items())
