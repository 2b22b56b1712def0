"""The process and its machine: huge pages, atomic file writes, requests to stop."""

import contextlib
import ctypes
import importlib.util
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Collection, Iterator
from typing import Any

from etils import epath

from spark.errors import ConfigError

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
    accelerator = os.path.exists('/dev/nvidiactl') or is_tpu_host()
    if sys.platform != 'linux' or tunables is not None or (accelerator and os.environ.get('JAX_PLATFORMS') != 'cpu'):
        return
    os.environ['GLIBC_TUNABLES'] = huge_pages
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # a signal that comes now waits for the restarted program's handlers
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def is_tpu_host() -> bool:
    """Has this machine TPUs?"""
    return any(map(os.path.exists, ('/dev/accel0', '/dev/vfio/0')))


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


def revision() -> dict[str, str | bool | None]:
    """{'revision': the commit that runs, 'dirty': do files differ from it?}; both are None where that is not known."""
    root = pathlib.Path(__file__).resolve().parent.parent
    git = lambda *words: subprocess.run(['git', '-C', root, *words], capture_output=True, text=True, check=True).stdout.strip()
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if (root / '.git').exists():
            return {'revision': git('rev-parse', 'HEAD'), 'dirty': bool(git('status', '--porcelain'))}
    launched = os.environ.get('SPARK_REVISION')  # the commit that scripts/launch.py has copied to this machine
    return {'revision': launched, 'dirty': False if launched else None}


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
    if str(flag).startswith('s3://'):  # Orbax lacks it
        raise ConfigError(f'--workdir={flag}: checkpoints cannot be saved to s3://; want a directory or gs://BUCKET/…')
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


def is_complete(checkpoint: Path) -> bool:
    """Is the checkpoint in a directory complete? A local one has its name then; in a bucket Orbax writes a file last."""
    return not in_bucket(checkpoint) or (checkpoint / 'commit_success.txt').exists()


def locate(path: Path, step: int | None = None) -> tuple[str, int | None]:
    """(run directory, step) that RUN, RUN/STEP, RUN/checkpoints or RUN/checkpoints/STEP names; None: its newest step."""
    if (path / 'config.json').exists():
        return str(path), step
    if path.name.isdigit() and step is None:
        return locate(path.parent, int(path.name))
    return str(path.parent if path.name == 'checkpoints' else path), step


def installed(module: str) -> bool:
    """Can a module be imported? A mere directory of its name, such as the wandb/ of earlier runs, is none."""
    spec = importlib.util.find_spec(module)
    return bool(spec and spec.origin)


def check_bucket(name: str, path: epath.PathLike) -> None:
    """Raises a ConfigError that starts with `name` if `path` is in a bucket and support for its kind is not installed.

    Also if it looks like a bucket but for a slash, and would be taken for a local directory.
    """
    scheme, _, rest = str(path).partition(':')
    if scheme in BUCKETS and not rest.startswith('//'):
        raise ConfigError(f'{name}: want {scheme}://BUCKET/…, with two slashes')
    extra, module = BUCKETS.get(scheme, ('', ''))
    if module and not installed(module):
        raise ConfigError(f"{name}: buckets need pip install 'spark-transformer[{extra}]'")


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
