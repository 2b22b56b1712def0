"""The run directory: whose it is, and what may change in its config."""

import jax
from etils import epath

from spark import config
from spark.errors import ConfigError
from spark.runtime import write_text


def check(workdir: epath.Path, cfg: config.ExperimentConfig, extend: bool = False) -> str:
    """What differs from the config of the run in a directory: only `config.RESUMABLE` may, and `config.SCHEDULE` to extend it.

    Raises a ConfigError otherwise, and if the directory holds files, but no run.
    """
    if (workdir / 'config.json').exists():
        previous = config.load(workdir / 'config.json')
        differences = lambda *ignore: config.differences(previous, cfg, ignore=ignore)
        beyond_schedule = differences(*config.RESUMABLE, *config.SCHEDULE)
        if different := beyond_schedule if extend else differences(*config.RESUMABLE):
            hint = '' if beyond_schedule else 'add --extend to go on so, or '
            raise ConfigError(f'--workdir={workdir} belongs to a run with {different}: {hint}choose another directory')
        return config.differences(previous, cfg)
    if jax.process_index() == 0 and workdir.exists():
        # What a start leaves that fails before it has a state is no other run.
        strangers = [path for path in workdir.iterdir() if not (path.name.endswith('.tmp') or path.name == 'xla_cache')]
        if others := sorted(p.name for p in strangers if p.name != 'checkpoints' or any(p.iterdir())):
            raise ConfigError(f'--workdir={workdir} holds {others[0]!r} but no config.json: choose another directory')
    return ''


def claim(workdir: epath.Path, cfg: config.ExperimentConfig, extend: bool = False) -> None:
    """Writes config.json: to a new run directory, or where fields that may change did. Raises as `check` does."""
    changed, path = check(workdir, cfg, extend), workdir / 'config.json'
    make(workdir)
    if jax.process_index() == 0 and (changed or not path.exists()):
        if changed:
            print(f'This run had {changed}', flush=True)
        write_text(path, cfg.model_dump_json(indent=2) + '\n')


def make(workdir: epath.Path) -> None:
    """Creates the directory. Raises a ConfigError if that cannot be done."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(f'--workdir={workdir}: {e.strerror or e}') from None
