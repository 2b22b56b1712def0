"""Distillation (arXiv 1503.02531): which model teaches a run, where its parameters come from, and what it costs."""

from spark import config, flops
from spark.checkpoints.checksums import checksums, json_crc
from spark.checkpoints.reading import by_first_process
from spark.data.tokenizer import of_config, tokenizer_for
from spark.errors import CheckpointError, ConfigError
from spark.nn.runs import at_step, ks, scheduled
from spark.nn.transformer import with_impl
from spark.runtime import absolute, locate, path_of
from spark.training.start import open_source
from spark.training.step import Trainer


def model_of(cfg: config.ExperimentConfig, n_devices: int) -> config.ModelConfig | None:
    """The model of train.teacher, computed as this machine does it fastest; None if a run learns from none.

    `cfg` has model.vocab_size filled in. A ConfigError if its tokens are others, or it does not divide over the devices.
    """
    source = cfg.train.teacher
    if not source or not cfg.train.kd_weight:
        return None
    what = f'train.teacher = {source!r}'
    path = path_of(source, what)
    text = by_first_process(lambda: _config_of(path, what), what)
    tokenizer, theirs = tokenizer_for(config.ExperimentConfig.model_validate_json(text))
    model, ours = at_step(theirs.model, theirs.train.steps), cfg.data.tokenizer
    if tokenizer.fingerprint != of_config(cfg.data).fingerprint:
        want = f'want one with data.tokenizer = {ours!r}, and the same data.bos and data.eos'
        raise ConfigError(f'{what}: data.tokenizer = {theirs.data.tokenizer!r} of that run gives other ids: {want}')
    if model.vocab_size != cfg.model.vocab_size:
        raise ConfigError(f'{what}: that run has model.vocab_size = {model.vocab_size}: want {cfg.model.vocab_size}, as here')
    block = {'attention': model.attention.model_copy(update={'block': cfg.model.attention.block}), 'remat': 'none'}
    model = with_impl(model.model_copy(update=block), ffn='auto', attention='auto')
    try:
        config.check_devices(cfg.model_copy(update={'model': model}), n_devices)
    except ConfigError as e:
        raise ConfigError(f'{what}: {e}') from None
    return model


def _config_of(path, what):
    try:
        return config.load(type(path)(locate(path)[0]) / 'config.json').model_dump_json()
    except ConfigError as e:
        raise ConfigError(f'{what}: want a run directory, or a checkpoints/STEP of one; {e}') from None


def load(trainer: Trainer, saved: dict) -> tuple[list[dict], dict | None]:
    """([the parameters of the teacher], what a checkpoint remembers of it); ([], None) without one.

    `saved` is what was saved with the state from which the run goes on, {} at a start: the teacher is the same, though it may lie
    elsewhere, and its run may have gone on.
    """
    source, goes_on, saved = trainer.cfg.train.teacher, bool(saved), saved.get('teacher')
    if goes_on and bool(saved) != bool(trainer.teacher):
        want = f'step {saved["step"]} of its teacher, wherever that lies' if saved else 'none, from which this run has learnt'
        raise CheckpointError(f'train.teacher = {source!r}: want {want}; or start anew in another directory')
    if trainer.teacher is None:
        if source:
            print(f'train.kd_weight = 0: nothing is learnt from {source}, which is not read', flush=True)
        return [], None
    workdir, checkpoints, step = open_source('train.teacher', source)
    what = f'train.teacher = {source!r}'
    if saved and saved['step'] not in checkpoints.steps():
        raise CheckpointError(f'{what}: step {saved["step"]} is gone, from which this run has learnt: restore it, or start anew')
    step = saved['step'] if saved else step
    theirs = config.load(workdir / 'config.json')
    falls = lambda half: (ks(theirs.model, half, step) != ks(theirs.model, half, theirs.train.steps)).any()
    if any(map(falls, scheduled(theirs.model))):
        raise ConfigError(f'{what}: k still falls at step {step} of that run: want a later checkpoint')
    params = checkpoints.restore_params(step, trainer.abstract_teacher)
    checkpoints.close()
    found = {'step': step, 'digest': json_crc(checksums(params))}
    if saved and saved != found:
        raise CheckpointError(f'{what}: step {step} is not what this run has learnt from: want the same parameters')
    print(f'Learning from {absolute(workdir)}/checkpoints/{step}', flush=True)
    return [params], found


def flops_per_token(cfg: config.ExperimentConfig, teacher: config.ModelConfig) -> float:
    """FLOPs of the teacher per trained token: forward, all entries of a lookup; its logits twice with train.kd_top."""
    parts = flops.flops_per_token(teacher, cfg.data.seq_len, 'training')
    return (sum(parts.values()) + parts['head'] * bool(cfg.train.kd_top)) / 3
