"""A branch: a new run that goes on where another one was."""

from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from spark import config
from spark.checkpoints.manager import Checkpoints, open_checkpoint
from spark.errors import CheckpointError, ConfigError
from spark.runtime import write_json
from spark.training.step import Trainer, TrainState

ORIGIN = 'origin.json'  # in the run directory of a branch


def branch(trainer: Trainer, cfg: config.ExperimentConfig) -> tuple[int, TrainState, Any, epath.Path]:
    """(step, state, what was saved with it, run directory) of train.branch_from, with which a run of config `cfg` goes on.

    Raises a ConfigError if more than `config.RESUMABLE` and `config.SCHEDULE` differs from the config of that run.
    """
    source = cfg.train.branch_from
    workdir, checkpoints, step = open_source('train.branch_from', source)
    ignored = (*config.RESUMABLE, *config.SCHEDULE, 'train.branch_from', 'train.restore_from')
    if different := config.differences(config.load(workdir / 'config.json'), cfg, ignore=ignored):
        want = f'want the same, or only the weights by --restore_from={source}'
        raise ConfigError(f'train.branch_from = {source!r}: that run has {different}: {want}')
    if step >= cfg.train.steps:
        raise ConfigError(f'train.steps = {cfg.train.steps}: want more than {step}, where the branch of {workdir} starts')
    state, data = checkpoints.restore(step, trainer.abstract_state)
    checkpoints.close()
    print(f'Branching from step {step} of {workdir}', flush=True)
    return step, state, data, workdir


def record(workdir: epath.Path, origin: epath.Path, step: int) -> None:
    """Writes where a branch comes from into its run directory."""
    if jax.process_index() == 0:
        origin = origin if '://' in str(origin) else origin.absolute()
        write_json(workdir / ORIGIN, {'branch_from': f'{origin}/checkpoints/{step}', 'step': step})


def open_source(field: str, source: str) -> tuple[epath.Path, Checkpoints, int]:
    """(run directory, its checkpoints, step) of RUN, RUN/STEP, RUN/checkpoints or RUN/checkpoints/STEP; default: its newest step.

    Raises a CheckpointError that names the field if there is none.
    """
    path, step = epath.Path(source).expanduser(), None
    is_run = lambda: (path / 'config.json').exists()
    if path.name.isdigit() and not is_run():
        path, step = path.parent, int(path.name)
    if path.name == 'checkpoints' and not is_run():
        path = path.parent
    try:
        checkpoints, step = open_checkpoint(path, step)
    except CheckpointError as e:
        raise CheckpointError(f'{field} = {source!r}: want a run directory, or a checkpoints/STEP of one; {e}') from None
    if jax.process_count() > 1:  # a run that still trains may have saved a step since
        step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
    return path, checkpoints, step
