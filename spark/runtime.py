"""A process and the machine it runs on: huge pages, its companions in other processes, whole files, how it is stopped."""

import contextlib
import ctypes
import importlib.util
import itertools
import json
import os
import signal
import sys

from etils import epath

from spark.errors import ConfigError

# Seconds after which jax ends all processes of a job because one is silent: the watchdog comes before it, and says more.
HEARTBEAT = 900


def use_huge_pages():
    """Starts the program anew with glibc's huge pages, once, on a Linux machine that computes on its CPU.

    XLA:CPU allocates its temporaries for every execution, and the kernel hands them out page by page: with 2 MB pages a
    training step of the tiny model takes about two thirds of the time. The results are the same.
    """
    tunables, ours, stops = os.environ.get('GLIBC_TUNABLES'), 'glibc.malloc.hugetlb=1', (signal.SIGTERM, signal.SIGINT)
    if tunables == ours:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stops)
    chip = os.path.exists('/dev/nvidiactl') or _chips()
    if sys.platform != 'linux' or tunables is not None or (chip and os.environ.get('JAX_PLATFORMS') != 'cpu'):
        return
    os.environ['GLIBC_TUNABLES'] = ours
    signal.pthread_sigmask(signal.SIG_BLOCK, stops)  # what comes meanwhile waits for the new program's handlers
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


@contextlib.contextmanager
def freed_at_once():
    """Inside, glibc gives freed buffers of a megabyte and more back to the system, as it does those of over 32 MB anyway.

    While a model is read, what its many threads leave free would otherwise stay with the process: a third of the weights.
    """
    threshold = -3  # M_MMAP_THRESHOLD
    _glibc('mallopt', threshold, 1 << 20)
    try:
        yield
    finally:
        _glibc('mallopt', threshold, 32 << 20)
        trim()


def trim():
    """glibc gives the system what it holds free: a compiler leaves behind a tenth of a gigabyte."""
    _glibc('malloc_trim', 0)


def _glibc(name, *args):
    if sys.platform == 'linux' and (function := getattr(ctypes.CDLL(None), name, None)):
        function(*args)


def write_text(path, text, error=ConfigError):
    """A file, here or in a bucket (gs://…), whole or not at all; an `error` if it cannot be written."""
    path = epath.Path(path)
    scratch = path.with_name(path.name + '.tmp')
    try:
        scratch.write_text(text)
        scratch.replace(path)
    except OSError as e:
        raise error(f'{path}: {e.strerror or e}') from None


def write_json(path, value):
    """`write_text` of a JSON value."""
    write_text(path, json.dumps(value, indent=2) + '\n')


def run_directory(flag):
    """The path that --workdir names: a directory, or gs://BUCKET/…; a ConfigError without what buckets want."""
    if flag.startswith('gs://') and not importlib.util.find_spec('gcsfs'):
        raise ConfigError(f"--workdir={flag}: a bucket wants pip install 'spark-transformer[gcs]'")
    return epath.Path(flag)


def join_processes():
    """Joins the processes of a job into one jax program; nothing to do in a job of one process. Before jax is used.

    A job is told by JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID, or by what SLURM, Open MPI,
    Kubernetes (an indexed job or JobSet) or Cloud TPU leave in the environment.

    Raises:
      ConfigError: the three variables do not go together.
    """
    import jax

    patience = {'heartbeat_timeout_seconds': HEARTBEAT, 'shutdown_timeout_seconds': 30}
    address = os.environ.get('JAX_COORDINATOR_ADDRESS')
    if address:
        numbers = [os.environ.get(name, '') for name in ('JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')]
        if not all(n.isdigit() for n in numbers) or not int(numbers[1]) < int(numbers[0]) or ':' not in address:
            raise ConfigError(
                f'JAX_COORDINATOR_ADDRESS={address}, JAX_NUM_PROCESSES={numbers[0]}, JAX_PROCESS_ID={numbers[1]}: '
                'want host:port, how many, and which, from 0'
            )
        if int(numbers[0]) > 1:
            jax.distributed.initialize(address, *map(int, numbers), **patience)
        return
    # Of the step that srun starts: SLURM_NTASKS stands in an allocation's own shell, too, where nobody else would join.
    several = [int(os.environ.get(name, '1')) for name in ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE')]
    pod = _chips() and os.environ.get('JAX_PLATFORMS') in (None, 'tpu')
    if max(several) > 1 or 'JOB_COMPLETION_INDEX' in os.environ or pod:
        jax.distributed.initialize(**patience)


def _chips():
    """Is this a Cloud TPU host?"""
    return any(map(os.path.exists, ('/dev/accel0', '/dev/vfio/0')))


@contextlib.contextmanager
def stopping():
    """Yields stop(): has this job been asked to stop, by SIGTERM or a first SIGINT?

    Of several processes, a SIGTERM to any is meant for all. All must ask equally often, and are told so at the same time
    (`jax.experimental.multihost_utils.reached_preemption_sync_point`); a SIGINT ends the process that gets it.
    """
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() > 1:
        asked = itertools.count()
        told = []

        def together():
            if not told and multihost_utils.reached_preemption_sync_point(next(asked)):
                told.append(True)
            return bool(told)

        yield together
        return
    # A second Ctrl-C is meant.
    with stop_signals(lambda n: signal.signal(signal.SIGINT, signal.default_int_handler)) as received:
        yield lambda: bool(received)


@contextlib.contextmanager
def stop_signals(handle):
    """Yields a list of the SIGTERM and SIGINT that came; `handle(n)` is called at the n-th. Outside of the main thread: never."""
    received = []

    def handler(number, frame):
        del frame
        received.append(number)
        handle(len(received))

    try:
        before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread: the caller handles signals
        before = {}
    try:
        yield received
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
