"""The process and its machine: huge pages, joining a job of several processes, atomic file writes, requests to stop."""

import contextlib
import ctypes
import importlib.util
import itertools
import json
import os
import pathlib
import signal
import sys
import uuid
from collections.abc import Callable, Collection, Iterator
from typing import Any

from etils import epath

from spark.errors import ConfigError

# JAX ends all processes of a job when one has been silent for so long. The watchdog should act first: it prints the stacks.
HEARTBEAT_SECONDS = 900
Path = epath.Path | pathlib.Path  # of a local file, or of one in a bucket
BUCKETS = {'gs': ('gcs', 'gcsfs'), 's3': ('s3', 's3fs')}  # the extra and the module that each kind needs


def use_huge_pages() -> None:
    """Restarts the program once with glibc's huge pages, on a Linux machine that computes on its CPU.

    XLA:CPU allocates its temporaries in every execution, and the kernel maps them page by page. With 2 MB pages a training
    step of the tiny model takes about two thirds of the time. The results are the same.
    """
    tunables, huge_pages, signals = os.environ.get('GLIBC_TUNABLES'), 'glibc.malloc.hugetlb=1', (signal.SIGTERM, signal.SIGINT)
    if tunables == huge_pages:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    accelerator = os.path.exists('/dev/nvidiactl') or _is_tpu_host()
    if sys.platform != 'linux' or tunables is not None or (accelerator and os.environ.get('JAX_PLATFORMS') != 'cpu'):
        return
    os.environ['GLIBC_TUNABLES'] = huge_pages
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # a signal that comes now waits for the restarted program's handlers
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


@contextlib.contextmanager
def freed_at_once() -> Iterator[None]:
    """Inside, glibc returns freed buffers of a megabyte and more to the system; by default only those of over 32 MB.

    Otherwise the buffers that reading a model frees, in its many threads, stay with the process: a third of the weights.
    """
    threshold = -3  # M_MMAP_THRESHOLD
    _glibc('mallopt', threshold, 1 << 20)
    try:
        yield
    finally:
        _glibc('mallopt', threshold, 32 << 20)
        trim()


def trim() -> None:
    """Makes glibc return its free memory to the system: the compiler leaves a tenth of a gigabyte behind."""
    _glibc('malloc_trim', 0)


def _glibc(name, *args):
    if sys.platform == 'linux' and (function := getattr(ctypes.CDLL(None), name, None)):
        function(*args)


def write_text(path: epath.PathLike, text: str, error: type[Exception] = ConfigError) -> None:
    """Writes a file atomically, locally or in a bucket (gs://…); raises `error` if it cannot be written."""
    write_bytes(path, text.encode(), error)


def write_bytes(path: epath.PathLike, data: bytes, error: type[Exception] = ConfigError) -> None:
    """Writes a file atomically, locally or in a bucket (gs://…); raises `error` if it cannot be written."""
    path = path_of(path)
    whole = in_bucket(path)
    # Two processes that write the same file do not write into each other's.
    scratch = path if whole else path.with_name(f'{path.name}.{uuid.uuid4().hex[:8]}.tmp')
    try:
        scratch.write_bytes(data)
        if not whole:
            scratch.replace(path)
    except OSError as e:
        if not whole:
            with contextlib.suppress(OSError):
                scratch.unlink()
        raise error(f'{path}: {e.strerror or e}') from None
    except Exception as e:  # clients of buckets raise exceptions of their own
        raise error(f'{path}: {type(e).__name__}: {e}') from e


def write_json(path: epath.PathLike, value: Any, error: type[Exception] = ConfigError) -> None:
    """Writes a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2) + '\n', error)


def path_of(text: epath.PathLike, name: str = '') -> epath.Path:
    """The path that a flag or a field names: a local one, in which ~ is the home directory, or one in a bucket.

    Raises a ConfigError that starts with `name` if it is neither, or if support for its kind of bucket is not installed.
    """
    check_bucket(name or str(text), text)
    scheme, colon, _ = str(text).partition('://')
    if colon and scheme not in BUCKETS:
        raise ConfigError(f'{name or text}: want a local path, gs://BUCKET/… or s3://BUCKET/…')
    return epath.Path(text) if colon else epath.Path(text).expanduser()


def run_directory(flag: str) -> epath.Path:
    """The path that --workdir names: a directory, or gs://BUCKET/…; a ConfigError if support for buckets is not installed."""
    return path_of(flag, f'--workdir={flag}')


def in_bucket(path: epath.PathLike) -> bool:
    """Is the path in a bucket? There files appear whole or not at all, and directories are but the beginnings of names."""
    return '://' in str(path)


def absolute(path: Path) -> Path:
    """A local path from the root. One in a bucket stays as it is; its own `absolute` puts the working directory before it."""
    return path if in_bucket(path) else path.absolute()


def entries(directory: Path) -> list[Path]:
    """What is in a directory; nothing if there is no such directory, as in a bucket where nothing was written yet."""
    try:
        return list(directory.iterdir())
    except FileNotFoundError:
        return []


def check_bucket(name: str, path: epath.PathLike) -> None:
    """Raises a ConfigError that starts with `name` if `path` is in a bucket and support for its kind is not installed."""
    extra, module = BUCKETS.get(str(path).partition('://')[0], ('', ''))
    if module and not importlib.util.find_spec(module):
        raise ConfigError(f"{name}: buckets need pip install 'spark-transformer[{extra}]'")


def initialize_distributed() -> None:
    """Joins the processes of a job into one JAX program. Call it before JAX is used; it does nothing for a single process.

    A job is described by JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID, or by the environment of
    SLURM, Open MPI, Kubernetes (an indexed job or JobSet) or Cloud TPU.
    """
    import jax

    timeouts = {'heartbeat_timeout_seconds': HEARTBEAT_SECONDS, 'shutdown_timeout_seconds': 30}
    if address := os.environ.get('JAX_COORDINATOR_ADDRESS'):
        count, index = (os.environ.get(name, '') for name in ('JAX_NUM_PROCESSES', 'JAX_PROCESS_ID'))
        if not (count.isdigit() and index.isdigit()) or int(index) >= int(count) or ':' not in address:
            raise ConfigError(
                f'JAX_COORDINATOR_ADDRESS={address}, JAX_NUM_PROCESSES={count}, JAX_PROCESS_ID={index}: '
                'want host:port, the number of processes, and the index of this one, from 0'
            )
        if int(count) > 1:
            jax.distributed.initialize(address, int(count), int(index), **timeouts)
        return
    # The number of tasks of the srun step. SLURM_NTASKS is also set in the shell of an allocation, where no other process joins.
    counts = [int(os.environ.get(name, '1')) for name in ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE')]
    tpu = _is_tpu_host() and os.environ.get('JAX_PLATFORMS') in (None, 'tpu')
    if max(counts) > 1 or 'JOB_COMPLETION_INDEX' in os.environ or tpu:
        jax.distributed.initialize(**timeouts)


def _is_tpu_host():
    return any(map(os.path.exists, ('/dev/accel0', '/dev/vfio/0')))


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether SIGTERM or a first SIGINT has asked this job to stop.

    In a job of several processes, a SIGTERM to one of them stops all. Every process must call the function equally often, and
    all get the same answers (`jax.experimental.multihost_utils.reached_preemption_sync_point`). A SIGINT ends its process.
    """
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() > 1:
        calls, requested = itertools.count(), False

        def stop_requested():
            nonlocal requested
            requested = requested or multihost_utils.reached_preemption_sync_point(next(calls))
            return requested

        yield stop_requested
        return
    # A second Ctrl-C does not wait for the state to be saved.
    with received_signals(lambda n: signal.signal(signal.SIGINT, signal.default_int_handler)) as received:
        yield lambda: bool(received)


@contextlib.contextmanager
def received_signals(
    handle: Callable[[int], Any] = lambda n: None, numbers: Collection[int] = (signal.SIGTERM, signal.SIGINT)
) -> Iterator[list[int]]:
    """Yields the list of these signals received so far; the n-th one also calls `handle(n)`. Main thread only."""
    received = []

    def handler(number, frame):
        del frame
        received.append(number)
        handle(len(received))

    try:
        previous = {number: signal.signal(number, handler) for number in numbers}
    except ValueError:  # not the main thread: the caller handles signals
        previous = {}
    try:
        yield received
    finally:
        for number, old_handler in previous.items():
            signal.signal(number, old_handler)
