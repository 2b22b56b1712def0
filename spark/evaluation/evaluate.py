"""A checkpoint on a whole split: loss, what its lookups do, and the FLOPs that follow."""

import contextlib
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from spark import config, flops
from spark.checkpoints.manager import open_checkpoint
from spark.config import MeshConfig
from spark.data import pipeline
from spark.errors import ConfigError, DataError
from spark.evaluation import sparsity
from spark.training.loss import cross_entropy
from spark.training.step import Trainer

DRAIN = 64  # batches whose int32 sums stay on the device before they are added up in 64 bits


@dataclasses.dataclass(frozen=True)
class Model:
    """A trained model, ready to run inside `trainer.context()`."""

    cfg: config.ExperimentConfig
    step: int
    tokenizer: object
    trainer: Trainer
    params: dict


def load(workdir, step=None, source='', batch_size=0):
    """The Model of a run directory.

    The run's own mesh is used if it fits the devices that are here, else all devices or one. Parameters alone are read.

    Args:
      workdir: a pathlib.Path.
      step: of the checkpoint; None for the newest.
      source: held-out text instead of the run's own, as in DataConfig.eval_source.
      batch_size: rows at a time instead of the run's own.

    Raises:
      ConfigError: no run is there. CheckpointError: no such checkpoint, or it cannot be read.
    """
    cfg = config.load(workdir / 'config.json')
    data = {name: value for name, value in [('eval_source', source), ('batch_size', batch_size)] if value}
    cfg = cfg.model_copy(update={
        'data': cfg.data.model_copy(update=data), 'train': cfg.train.model_copy(update={'accumulate': 1}),
    })  # fmt: skip
    tokenizer, cfg = pipeline.tokenizer_for(cfg)
    checkpoints, step = open_checkpoint(workdir, step)
    cfg, devices = _fit(cfg, jax.devices())
    trainer = Trainer(cfg, devices)
    params = checkpoints.restore_params(step, trainer.abstract_state.params)
    checkpoints.close()
    return Model(cfg, step, tokenizer, trainer, params)


def evaluate(model, split):
    """A report of the whole split, 'train', 'validation' or 'test': no token dropped, none counted twice.

    Returns:
      (report, sums): a dict for JSON, and the numpy sums of `sparsity.observe`, for plots. `loss` is in nats per token;
      `without_ends` leaves out the end of each document, as evaluation harnesses do.
    """
    cfg, trainer = model.cfg, model.trainer
    dataset = pipeline.eval_dataset(cfg.data, split, model.tokenizer)
    with trainer.context(), contextlib.closing(iter(dataset)) as batches:
        sums = accumulate(trainer, model.params, model.tokenizer.eos, tqdm(batches, desc=split, unit='batch', leave=False))
    if sums is None:
        raise DataError(f'{split}: no text to evaluate on')
    report = {'step': model.step, 'split': split, 'tokens': int(sums['tokens']), 'documents': int(sums['ends'])}
    report |= {'bytes': int(sums['bytes']), **_losses(sums['nll'], sums['tokens'], sums['bytes'])}
    texts = sums['nll'] - sums['nll_ends'], sums['tokens'] - sums['ends']
    report['without_ends'] = _losses(*texts, sums['bytes'])
    layers = sparsity.report(cfg.model, sums)
    for name in ('active', 'attended'):
        if f'{name}_mean' in layers[0]:
            report[name] = float(np.mean([layer[f'{name}_mean'] for layer in layers]))
    return report | {'layers': layers}, sums


def accumulate(trainer, params, eos, batches):
    """The sums of `sparsity.observe` and of the losses over host batches, in 64 bits; None if there are no batches.

    One compiled step adds them up on the device, and they are fetched once in DRAIN batches.
    """
    model, pieces = trainer.model, trainer.cfg.train.loss_pieces

    def totals(params, batch):
        hidden, sums = sparsity.observe(model, params, batch)
        nll_BxL, _, _ = cross_entropy(model, params, hidden, batch['targets'], pieces)
        real = batch['segments'] > 0
        end = real & (batch['targets'] == eos)
        sums |= {'nll': jnp.sum(nll_BxL * real), 'nll_ends': jnp.sum(nll_BxL * end)}
        return sums | {'tokens': jnp.sum(real), 'ends': jnp.sum(end), 'bytes': jnp.sum(batch['bytes'])}

    everywhere = NamedSharding(trainer.mesh, PartitionSpec())
    shapes = jax.eval_shape(totals, trainer.abstract_state.params, trainer.abstract_batch())
    zero = jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), out_shardings=everywhere)

    @functools.partial(jax.jit, donate_argnums=2, out_shardings=everywhere)
    def step(params, batch, sums):
        return jax.tree.map(jnp.add, sums, totals(params, batch))

    total, sums, waiting = None, None, 0
    for batch in batches:
        sums = step(params, trainer.put(batch), sums if waiting else zero())
        waiting += 1
        if waiting == DRAIN:
            total, waiting = _add(total, sums), 0
    return _add(total, sums) if waiting else total


def flops_report(cfg, context, layers):
    """FLOPs per token at a context by phase and part, for k as configured, as measured, and for the dense twin.

    Args:
      cfg: a ModelConfig.
      context: tokens.
      layers: of `evaluate`'s report. The measured keys per query are the mean in prefill; in decoding at a context beyond k,
        those of the queries that saw more than k keys.

    Returns:
      {'context', 'training' | 'prefill' | 'decode': {'configured' | 'measured' | 'dense': {part or group: FLOPs}}}; training
      computes every entry, so nothing is measured there.
    """
    of = lambda name: [layer.get(name) for layer in layers]
    known = lambda values: None if any(v is None for v in values) else np.array(values)
    active = known(of('active_mean'))
    active = None if active is None else active * cfg.ffn.d_ff
    report = {'context': context}
    for phase in flops.PHASES:
        count = lambda cfg, phase=phase, **measured: flops.flops_per_token(cfg, context, phase, **measured)
        attended = known(of('attended_mean' if phase == 'prefill' else 'attended_long'))
        if not cfg.attention.traits.topk or (phase == 'decode' and context <= cfg.attention.k):
            attended = None
        ways = {'dense': count(flops.dense_twin(cfg)), 'configured': count(cfg)}
        if phase != 'training':
            ways['measured'] = count(cfg, active=active, attended=attended)
        report[phase] = {way: parts | flops.group(parts) for way, parts in ways.items()}
    return report


def _losses(nll, tokens, size):
    loss = float(nll / tokens) if tokens else float('nan')
    report = {'loss': loss, 'perplexity': math.exp(min(loss, 700.0))}
    return report | ({'bits_per_byte': float(nll / size / math.log(2))} if size else {})


def _add(total, sums):
    wide = lambda x: np.asarray(x, np.int64 if np.issubdtype(x.dtype, np.integer) else np.float64)
    sums = jax.tree.map(wide, jax.device_get(sums))
    return sums if total is None else jax.tree.map(np.add, total, sums)


def _fit(cfg, devices):
    """The config on a mesh that fits, and the devices: the run's own, else all of them by fsdp, else one."""
    n = len(devices)
    rows = -(-cfg.data.batch_size // n) * n
    ways = [(cfg.mesh, cfg.data.batch_size, n), (MeshConfig(data=1, fsdp=n), rows, n), (MeshConfig(), cfg.data.batch_size, 1)]
    for mesh, batch_size, count in ways:
        data = cfg.data.model_copy(update={'batch_size': batch_size})
        fitted = cfg.model_copy(update={'mesh': mesh, 'data': data})
        try:
            config.check_devices(fitted, count)
        except ConfigError:
            continue
        return fitted, devices[:count]
    raise ConfigError(f'mesh: {n} devices fit neither the run nor its evaluation')
