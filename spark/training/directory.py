"""The run directory: whose it is, and what may change in its config."""

import contextlib

from etils import epath

from spark import config
from spark.checkpoints.reading import by_first_process
from spark.errors import ConfigError
from spark.runtime import in_bucket, run_directory, write_text
from spark.storage import accessed
from spark.training import lease

WRITTEN = ('checkpoints', 'metrics.jsonl', 'summary.json', 'tensorboard')  # by a run, which has a config.json beside them


def check(workdir: epath.Path, cfg: config.ExperimentConfig, extend: bool = False) -> str:
    """What differs from the config of the run in a directory: only `config.RESUMABLE` may, and `config.SCHEDULE` to extend it.

    Raises a ConfigError otherwise, and if the directory holds what a run writes, but no config.json: it would be overwritten.
    """
    run_directory(str(workdir))
    return accessed(lambda: _check(workdir, cfg, extend), f'--workdir={workdir}')


def _check(workdir, cfg, extend):
    if (workdir / 'config.json').exists():
        previous = config.load(workdir / 'config.json')
        differences = lambda *ignore: config.differences(previous, cfg, ignore=ignore)
        beyond_schedule = differences(*config.RESUMABLE, *config.SCHEDULE)
        if different := beyond_schedule if extend else differences(*config.RESUMABLE):
            hint = '' if beyond_schedule else 'add --extend to go on so, or '
            raise ConfigError(f'--workdir={workdir} belongs to a run with {different}: {hint}choose another directory')
        return config.differences(previous, cfg)
    if extend:
        raise ConfigError(f'--workdir={workdir}: holds no run that --extend could extend')
    # A start that failed leaves an empty checkpoints/.
    there = lambda path: path.exists() and not (path.name == 'checkpoints' and _is_empty(path))
    if others := [name for name in WRITTEN if there(workdir / name)]:
        raise ConfigError(f'--workdir={workdir} holds {others[0]!r} but no config.json: choose another directory')
    return ''


def claim(workdir: epath.Path, cfg: config.ExperimentConfig, extend: bool = False) -> None:
    """Writes config.json: to a new run directory, or where fields that may change did. Raises as `check` does."""
    changed, path = check(workdir, cfg, extend), workdir / 'config.json'
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

    by_first_process(first, f'--workdir={workdir}')


def make(workdir: epath.Path) -> None:
    """Creates the directory. Raises a ConfigError if that cannot be done."""
    if not in_bucket(workdir):
        accessed(lambda: workdir.mkdir(parents=True, exist_ok=True), f'--workdir={workdir}')


def _is_empty(path):
    return not path.is_dir() or next(iter(path.iterdir()), None) is None
