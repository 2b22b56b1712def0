"""The run directory: whose it is, and what may change in its config."""

import contextlib
from collections.abc import Callable

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from spark import config
from spark.errors import CheckpointError, ConfigError, SparkError, root_cause
from spark.runtime import in_bucket, write_text
from spark.training import lease

WRITTEN = ('checkpoints', 'metrics.jsonl', 'summary.json', 'tensorboard')  # by a run, which has a config.json beside them


def check(workdir: epath.Path, cfg: config.ExperimentConfig) -> str:
    """What differs from the config of the run in a directory: only `config.RESUMABLE` may. Raises a ConfigError otherwise.

    Also if the directory holds what a run writes, but no config.json: it would be overwritten.
    """
    if str(workdir).startswith('s3://'):  # Orbax lacks it
        raise ConfigError(f'--workdir={workdir}: checkpoints cannot be saved to s3://; want a directory or gs://BUCKET/…')
    with _named(workdir):
        if (workdir / 'config.json').exists():
            previous = config.load(workdir / 'config.json')
            if different := config.differences(previous, cfg, ignore=config.RESUMABLE):
                raise ConfigError(f'--workdir={workdir} belongs to a run with {different}: choose another directory')
            return config.differences(previous, cfg)
        # A start that failed leaves an empty checkpoints/.
        there = lambda path: path.exists() and not (path.name == 'checkpoints' and _is_empty(path))
        if others := [name for name in WRITTEN if there(workdir / name)]:
            raise ConfigError(f'--workdir={workdir} holds {others[0]!r} but no config.json: choose another directory')
    return ''


def claim(workdir: epath.Path, cfg: config.ExperimentConfig) -> None:
    """Writes config.json: to a new run directory, or where fields that may change did. Raises as `check` does."""
    changed, path = check(workdir, cfg), workdir / 'config.json'
    if changed or not path.exists():
        make(workdir)
        if changed:
            print(f'This run had {changed}', flush=True)
        write_text(path, cfg.model_dump_json(indent=2) + '\n')


def hold(workdir: epath.Path, stack: contextlib.ExitStack) -> None:
    """Creates the directory, of which no other job may make use before `stack` is closed. Raises a ConfigError if one does."""

    def first():
        make(workdir)
        stack.enter_context(lease.held(workdir))

    by_first_process(first)


def by_first_process(function: Callable[[], None]) -> None:
    """Calls a function in the first process of a job, for which the others wait. If it raises, all do, with its message."""
    error, text = None, np.zeros(2000, np.uint8)
    if jax.process_index() == 0:
        try:
            function()
        except Exception as e:
            error, found = e, np.frombuffer(f'{type(e).__name__} {e}'.encode()[: text.size], np.uint8)
            text[: found.size] = found
    if jax.process_count() > 1:
        text = np.asarray(multihost_utils.broadcast_one_to_all(text))
        if text.any() and not error:
            kind, _, words = text.tobytes().rstrip(b'\0').decode(errors='replace').partition(' ')
            error = {'CheckpointError': CheckpointError}.get(kind, ConfigError)(words)
    if error:
        raise error


def make(workdir: epath.Path) -> None:
    """Creates the directory. Raises a ConfigError if that cannot be done."""
    if not in_bucket(workdir):
        with _named(workdir):
            workdir.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def _named(workdir):
    """Turns what filesystems and the clients of buckets raise into a ConfigError that names the directory."""
    try:
        yield
    except SparkError:
        raise
    except Exception as e:
        raise ConfigError(f'--workdir={workdir}: {getattr(e, "strerror", None) or root_cause(e)}') from None


def _is_empty(path):
    return not path.is_dir() or next(iter(path.iterdir()), None) is None
