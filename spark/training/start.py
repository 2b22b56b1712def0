"""Where a run starts: at step 0, maybe with the weights of another run, or where another run was. Nothing is lost by it."""

from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from spark import config
from spark.checkpoints.manager import DAMAGED_DIR, Checkpoints, open_checkpoint
from spark.checkpoints.reading import by_first_process
from spark.data.tokenizer import of_config
from spark.errors import CheckpointError, ConfigError, SparkError
from spark.runtime import absolute, locate, path_of, write_json
from spark.training import trackers
from spark.training.step import Trainer, TrainState

ORIGIN = 'origin.json'  # in the run directory of a branch


def check_nothing_lost(workdir: epath.Path, last_saved: int | None, save_every: int) -> None:
    """Raises a CheckpointError if this run must have had checkpoints: it must not silently start from scratch."""
    if (workdir / DAMAGED_DIR).exists():
        raise CheckpointError(f'{workdir}/checkpoints: none is left, and damaged ones lie in {DAMAGED_DIR}/')
    advice = 'restore them, or start anew in another directory'
    if last_saved:
        raise CheckpointError(f'{workdir}/checkpoints: there is none, but the run has saved step {last_saved}: {advice}')
    # An older version did not record what it saved. When the second save starts, the first one is on disk.
    if last_saved is None and save_every and (reached := trackers.last_step(workdir)) > 2 * save_every:
        raise CheckpointError(f'{workdir}/checkpoints: there is none, but metrics.jsonl goes to step {reached}: {advice}')


def initial_state(trainer: Trainer) -> TrainState:
    """The state at step 0: random, or with the weights of train.restore_from."""
    state, source = trainer.init_state(trainer.cfg.seed), trainer.cfg.train.restore_from
    if not source:
        return state
    workdir, checkpoints, step = open_source('train.restore_from', source)
    print(f'Starting from the parameters of {workdir}/checkpoints/{step}', flush=True)
    params = checkpoints.restore_params(step, trainer.abstract_state.params)
    checkpoints.close()
    if different := _other_tokenizer(workdir, trainer.cfg.data):
        print(f'Warning: {different}', flush=True)
    return state.replace(params=params, **({'ema': jax.tree.map(jnp.copy, params)} if trainer.cfg.optimizer.ema else {}))


def branch(trainer: Trainer, cfg: config.ExperimentConfig) -> tuple[int, TrainState, Any, epath.Path]:
    """(step, state, what was saved with it, run directory) of train.branch_from, with which a run of config `cfg` goes on.

    Raises a ConfigError if more than `config.RESUMABLE` and `config.SCHEDULE` differs from the config of that run.
    """
    source = cfg.train.branch_from
    workdir, checkpoints, step = open_source('train.branch_from', source)
    by_first_process(lambda: _check_same(workdir, cfg, step), f'train.branch_from = {source!r}')
    state, data = checkpoints.restore(step, trainer.abstract_state)
    checkpoints.close()
    print(f'Branching from step {step} of {workdir}', flush=True)
    return step, state, data, workdir


def _check_same(workdir, cfg, step):
    source, ignored = cfg.train.branch_from, (*config.RESUMABLE, *config.SCHEDULE, 'train.branch_from', 'train.restore_from')
    if different := config.differences(config.load(workdir / 'config.json'), cfg, ignore=ignored):
        want = f'want the same, or only the weights by --restore_from={source}'
        raise ConfigError(f'train.branch_from = {source!r}: that run has {different}: {want}')
    if step >= cfg.train.steps:
        raise ConfigError(f'train.steps = {cfg.train.steps}: want more than {step}, where the branch of {workdir} starts')


def record(workdir: epath.Path, origin: epath.Path, step: int) -> None:
    """Writes where a branch comes from into its run directory, in the first process."""
    write_json(workdir / ORIGIN, {'branch_from': f'{absolute(origin)}/checkpoints/{step}', 'step': step})


def open_source(field: str, source: str) -> tuple[epath.Path, Checkpoints, int]:
    """(run directory, its checkpoints, step) of RUN, RUN/STEP, RUN/checkpoints or RUN/checkpoints/STEP; default: its newest step.

    Raises a CheckpointError that names the field if there is none.
    """
    named = path_of(source, f'{field} = {source!r}')
    path, step = by_first_process(lambda: locate(named), f'{field} = {source!r}')
    path = epath.Path(path)
    try:
        checkpoints, step = open_checkpoint(path, step)
    except CheckpointError as e:
        raise CheckpointError(f'{field} = {source!r}: want a run directory, or a checkpoints/STEP of one; {e}') from None
    return path, checkpoints, step


def _other_tokenizer(workdir, ours):
    """What tells that the ids of text may not be those that the run in `workdir` was trained on; '' if they are."""
    try:
        theirs = config.load(workdir / 'config.json').data
        if of_config(theirs).fingerprint == of_config(ours).fingerprint:
            return ''
    except SparkError as e:
        return f'whether the weights of {workdir} were trained with this tokenizer cannot be told: {e}'
    name = lambda data: f'{data.tokenizer!r}' + f' (bos {data.bos!r}, eos {data.eos!r})' * bool(data.bos or data.eos)
    return f'data.tokenizer = {name(ours)} gives other ids than {name(theirs)}, with which {workdir} was trained'
