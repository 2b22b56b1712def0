"""A checkpoint on a whole split: loss, what its lookups do, and the FLOPs that follow."""

import contextlib
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tqdm import tqdm

from spark import config
from spark.analysis import flops, sparsity
from spark.config import MeshConfig
from spark.data import pipeline
from spark.errors import CheckpointError, ConfigError, DataError
from spark.inference.layout import Serving, lay_out, serving_for
from spark.nn.transformer import Transformer, compute_dtype
from spark.runtime import freed_at_once
from spark.training.checkpoint import Checkpoints
from spark.training.loss import cross_entropy
from spark.training.trainer import Trainer

DRAIN = 64  # batches whose int32 sums stay on the device before they are added up in 64 bits


@dataclasses.dataclass(frozen=True)
class Model:
    """A trained model, ready to run inside `trainer.context()`."""

    cfg: config.ExperimentConfig
    step: int
    tokenizer: object
    trainer: Trainer
    params: dict


@dataclasses.dataclass(frozen=True)
class Served:
    """A trained model laid out for generation, on the devices of `mesh`."""

    cfg: config.ExperimentConfig
    step: int
    tokenizer: object
    serving: Serving
    weights: dict
    mesh: jax.sharding.Mesh


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
    checkpoints, step = _checkpoint(workdir, step)
    cfg, devices = _fit(cfg, jax.devices())
    trainer = Trainer(cfg, devices)
    params = checkpoints.restore_params(step, trainer.abstract_state.params)
    checkpoints.close()
    return Model(cfg, step, tokenizer, trainer, params)


def load_to_serve(workdir, step=None, dtype='auto', serve=None, tick=lambda n, total: None):
    """The `Served` model of a run directory, its parameters read layer by layer straight into the layout that decoding wants.

    Args:
      workdir, step: as of `load`.
      dtype: of the weights, one of `inference.layout.DTYPES`, or 'auto': float32 on CPUs, else bfloat16.
      serve: changes to the run's ServeConfig, a dict.
      tick: called with the number of parameters of each piece that was read, and of all.

    Raises:
      ConfigError, CheckpointError: as of `load`; and ConfigError: the kernels asked for are not here.
    """
    cfg = config.load(workdir / 'config.json')
    tokenizer, cfg = pipeline.tokenizer_for(cfg.model_copy(update={'serve': cfg.serve.model_copy(update=serve or {})}))
    checkpoints, step = _checkpoint(workdir, step)
    devices = jax.devices()
    platform = devices[0].platform
    if dtype == 'auto':
        dtype = np.dtype(compute_dtype(cfg.model.model_copy(update={'dtype': 'auto'}), platform)).name
    serving = serving_for(cfg.model, dtype, platform, len(devices), cfg.serve)
    mesh = jax.make_mesh((len(devices),), ('devices',), axis_types=(AxisType.Auto,), devices=devices)

    def split(x, axis):
        """Over all devices along an axis, where that goes."""
        axes = [None] * x.ndim
        if x.ndim and x.shape[axis] % len(devices) == 0:
            axes[axis] = 'devices'
        return NamedSharding(mesh, PartitionSpec(*axes))

    token = jnp.zeros((1, 1), jnp.int32)
    shapes = meta.unbox(jax.eval_shape(Transformer(cfg.model).init, jax.random.key(0), token, token, token))
    narrow = jnp.float32 if dtype == 'int8' else jnp.dtype(dtype)
    as_read = lambda path, x: jax.ShapeDtypeStruct(x.shape, x.dtype if path[-1].key == 'scale' else narrow)
    tick = functools.partial(tick, total=sum(x.size for x in jax.tree.leaves(shapes)))
    stored = checkpoints.stored(step, jax.tree_util.tree_map_with_path(as_read, shapes), tick=tick)
    leaf = lambda *path: functools.reduce(lambda node, name: node[name], ('params', *path), stored)
    with freed_at_once():
        weights = lay_out(serving, leaf, lambda x: jax.device_put(x, split(x, 0)))
    checkpoints.close()
    return Served(cfg, step, tokenizer, serving, weights, mesh)


def _checkpoint(workdir, step):
    """(the Checkpoints of a run, the step asked for or the newest)."""
    where = workdir / 'checkpoints'
    checkpoints = Checkpoints(where) if where.is_dir() else None
    steps = checkpoints.steps() if checkpoints else []
    if not steps:
        raise CheckpointError(f'{where}: no checkpoint yet; train first')
    if step is not None and step not in steps:
        raise CheckpointError(f'{where}: no step {step}; there are {", ".join(map(str, steps))}')
    return checkpoints, steps[-1] if step is None else step


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
        if cfg.attention.kind == 'dense' or (phase == 'decode' and context <= cfg.attention.k):
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
