"""Step 0: nothing must be lost by starting there, and the parameters may be those of another run."""

from etils import epath

from spark import config
from spark.checkpoints.manager import DAMAGED_DIR, open_checkpoint
from spark.data.tokenizer import of_config
from spark.errors import CheckpointError, SparkError
from spark.training import trackers
from spark.training.step import Trainer, TrainState


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
    """The state at step 0: random, or with the weights of train.restore_from: RUN, RUN/checkpoints or RUN/checkpoints/STEP."""
    state, source = trainer.init_state(trainer.cfg.seed), trainer.cfg.train.restore_from
    if not source:
        return state
    path, step = epath.Path(source), None
    if path.parent.name == 'checkpoints' and path.name.isdigit():
        path, step = path.parent, int(path.name)
    workdir = path.parent if path.name == 'checkpoints' else path
    try:
        checkpoints, step = open_checkpoint(workdir, step)
    except CheckpointError as e:
        raise CheckpointError(
            f'train.restore_from = {source!r}: want a run directory, or a checkpoints/STEP of one; {e}'
        ) from None
    print(f'Starting from the parameters of {workdir}/checkpoints/{step}', flush=True)
    params = checkpoints.restore_params(step, trainer.abstract_state.params)
    checkpoints.close()
    if different := _other_tokenizer(workdir, trainer.cfg.data):
        print(f'Warning: {different}', flush=True)
    return state.replace(params=params)


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
