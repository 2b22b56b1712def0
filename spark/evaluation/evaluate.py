"""Evaluates a checkpoint on a whole split: loss, the statistics of its lookups, and the FLOPs that follow from them."""

import contextlib
import functools
import pathlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from spark import config, flops
from spark.checkpoints.manager import field_of_params, open_checkpoint
from spark.data import rows
from spark.data.tokenizer import tokenizer_for
from spark.errors import ConfigError
from spark.evaluation import calibrate, predictor, sparsity
from spark.nn.runs import at_step
from spark.progress import tqdm
from spark.training.loss import cross_entropy, losses
from spark.training.step import Trainer

FETCH_EVERY = 64  # batches whose int32 sums stay on the device, before they are fetched and added up in 64 bits


class Model(NamedTuple):
    """A trained model, ready to run inside `trainer.context()`."""

    cfg: config.ExperimentConfig
    step: int
    tokenizer: object
    trainer: Trainer
    params: dict


def load(
    workdir: pathlib.Path | epath.Path, step: int | None = None, source: str = '', batch_size: int = 0, length: int = 0,
    ema: bool = False,
) -> Model:  # fmt: skip
    """The model of a run directory at its newest checkpoint or that of `step`, without the state of the optimizer.

    It runs on the mesh of the run if that fits the available devices, else on all devices, else on one. `source` replaces the
    held-out text of the run, as DataConfig.eval_source does. `length` is the tokens in a row; 0: data.seq_len. `batch_size` is
    the rows per batch; 0: as many as hold the tokens of a microbatch. `ema`: with the mean of the parameters in their place.
    """
    cfg = config.load(workdir / 'config.json')
    field = field_of_params(cfg, ema)
    length = length or cfg.data.seq_len
    rows_ = max(cfg.data.batch_size // cfg.train.accumulate * cfg.data.seq_len // length, 1)
    data = {'batch_size': batch_size or rows_, 'seq_len': length} | ({'eval_source': source} if source else {})
    train = cfg.train.model_copy(update={'accumulate': 1})
    cfg = cfg.model_copy(update={'data': cfg.data.model_copy(update=data), 'train': train})
    tokenizer, cfg = tokenizer_for(cfg)
    checkpoints, step = open_checkpoint(workdir, step)
    cfg = cfg.model_copy(update={'model': at_step(cfg.model, step)})
    cfg, devices = _fit_mesh(cfg, jax.devices())
    trainer = Trainer(cfg, devices)
    params = checkpoints.restore_params(step, trainer.abstract_state.params, field)
    checkpoints.close()
    return Model(cfg, step, tokenizer, trainer, params)


def steps(workdir: pathlib.Path | epath.Path) -> list[int]:
    """The steps of the checkpoints of a run, ascending."""
    checkpoints, _ = open_checkpoint(workdir)
    with contextlib.closing(checkpoints):
        return checkpoints.steps()


def evaluate(
    model: Model, split: str, context: int | None = None, statistics: bool = True, fit: bool = False
) -> tuple[dict, dict]:
    """Evaluates all tokens of a split once: (a report for JSON, the sums of `sparsity.observe` for plots).

    `without_ends` leaves out the end of each document, as evaluation harnesses do. FLOPs are at a context, default data.seq_len.
    Without `statistics` the report has losses only, and costs a forward pass. `fit` compares the predictors with those of
    `predictor.fitted`, fitted to other text: another split, or every other row, of which the report then is not.
    """
    cfg, trainer, params = model.cfg, model.trainer, model.params
    dataset, fitted = rows.EvalBatches(cfg.data, split, trainer.local_rows), {}
    if fit:
        params, dataset, fitted = with_fitted(model, split)
    with trainer.context(), contextlib.closing(iter(dataset)) as batches:
        bar = tqdm(batches, desc=split, total=len(dataset), unit='batch', leave=False)
        sums = accumulate(trainer, params, model.tokenizer.eos, bar, statistics)
    report = {'step': model.step, 'split': split, 'tokens': int(sums['tokens']), 'documents': int(sums['ends']), **fitted}
    report |= {'bytes': int(sums['bytes']), **losses(sums['nll'], sums['tokens'], sums['bytes'])}
    report['position_in'] = 'row' if cfg.model.attention.documents == 'joined' else 'document'
    report['by_position'] = sparsity.positions(sums)
    report['without_ends'] = losses(sums['nll'] - sums['nll_ends'], sums['tokens'] - sums['ends'], sums['bytes'])
    if not statistics:
        return report, sums
    layers = sparsity.report(cfg.model, sums)
    if any('active_mean' in layer for layer in layers):
        report['active'] = float(np.mean([layer.get('active_mean', 1) for layer in layers]))
    report['attended'] = float(np.mean([layer['attended_mean'] for layer in layers]))
    return report | {'layers': layers, 'flops': flops_report(cfg.model, context or cfg.data.seq_len, layers)}, sums


class EveryOtherRow:
    """The batches of `rows.EvalBatches` with padding in place of the rows of even or of odd number, which stay where `odd`."""

    def __init__(self, batches: rows.EvalBatches, odd: bool, local_rows: np.ndarray, batch_size: int):
        self._batches, self._odd, self._rows, self._size = batches, odd, local_rows, batch_size

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[dict]:
        with contextlib.closing(iter(self._batches)) as batches:
            for i, batch in enumerate(batches):
                stays = (i * self._size + self._rows) % 2 == self._odd
                yield {name: np.where(stays[:, None], x, 0) for name, x in batch.items()}


def with_fitted(model: Model, split: str) -> tuple[dict, rows.EvalBatches | EveryOtherRow, dict]:
    """(Parameters with fitted predictors, the text to evaluate, what the report says of the fit).

    The fit takes the other held-out split; where that is the same text, it takes every other row, and the rest is evaluated.
    """
    data, trainer = model.cfg.data, model.trainer
    for layer in model.cfg.model.per_layer:
        if not layer.ffn.traits.predictor:
            kind = f'model.ffn.kind = {layer.ffn.kind!r}'
            raise ConfigError(f'{kind}: want a kind with a predictor, to compare it with a fitted one')
    other, opened = 'test' if split == 'validation' else 'validation', {}
    own, text = (rows.EvalBatches(data, name, trainer.local_rows, opened) for name in (split, other))
    same = {(part.store.digest, part.name) for part in own.splits} & {(part.store.digest, part.name) for part in text.splits}
    if same:
        own, text = (EveryOtherRow(own, odd, trainer.local_rows, data.batch_size) for odd in (False, True))
    with trainer.context():
        params, tokens = predictor.fitted(trainer, model.params, text, 0.5 if same else 1)
    fit = {'fit_tokens': tokens, 'fit_tokens_wanted': predictor.wanted(trainer)}
    return params, own, fit | {'fit_text': f'every other row of {split}, which is not evaluated' if same else other}


def with_k(model: Model, share: float, split: str = 'validation') -> tuple[Model, float]:
    """(The model with the k at which this share of its neurons is active, on the first batch of a split; what is measured)."""
    trainer, ffn = model.trainer, model.cfg.model.ffn
    with trainer.context(), contextlib.closing(iter(rows.EvalBatches(model.cfg.data, split, trainer.local_rows))) as batches:
        k, found = calibrate.k_measured(trainer, model.params, next(batches), share)
    cfg = model.cfg.model_copy(update={'model': model.cfg.model.model_copy(update={'ffn': ffn.model_copy(update={'k': k})})})
    return model._replace(cfg=cfg, trainer=Trainer(cfg, list(trainer.mesh.devices.flat))), found


def accumulate(
    trainer: Trainer, params: dict, eos: int, batches: Iterable, statistics: bool = True, compiled: tuple | None = None
) -> dict | None:
    """The sums of `sparsity.observe` and of the losses over host batches, in 64 bits; None if there are no batches.

    `compiled` is what `step_for` has returned, to compile nothing where this is called again.
    """
    step, shapes = compiled or step_for(trainer, eos, statistics, params)
    leaves, tree = jax.tree.flatten(shapes)
    zero = _zeros(tree, tuple(leaves))
    data, heads = trainer.cfg.data, trainer.cfg.model.attention.n_heads
    most = max(min(FETCH_EVERY, 2**31 // (data.batch_size * data.seq_len * heads)), 1)  # an int32 counts queries of all heads
    total, sums, pending = None, None, 0
    for batch in batches:
        sums = step(params, trainer.put(batch), sums if pending else zero())
        pending += 1
        if pending == most:
            total, pending = _add(total, sums), 0
    return _add(total, sums) if pending else total


def step_for(
    trainer: Trainer, eos: int, statistics: bool = True, params: dict | None = None
) -> tuple[jax.stages.Wrapped, dict]:
    """(a jitted function of parameters, a batch and sums that returns the new sums; the shapes of the sums).

    `params` are those to expect if others than the model's own.
    """
    model, cfg, pieces = trainer.model, trainer.cfg.model, trainer.cfg.train.loss_pieces

    def totals(params, batch):
        if statistics:
            hidden, sums = sparsity.observe(model, params, batch)
        else:
            hidden, sums = model.apply(params, *(batch[name] for name in ('tokens', 'positions', 'segments'))), {}
        nll_BxL, _, _ = cross_entropy(model, params, hidden, batch['targets'], pieces)
        real_BxL = batch['segments'] > 0
        end_BxL = real_BxL & (batch['targets'] == eos)
        sums |= {'nll': jnp.sum(nll_BxL * real_BxL), 'nll_ends': jnp.sum(nll_BxL * end_BxL)}
        sums |= {'nll_by_position': sparsity.by_position(cfg, nll_BxL, batch)}
        sums |= {'positions': sparsity.by_position(cfg, jnp.ones_like(batch['tokens']), batch)}
        return sums | {'tokens': jnp.sum(real_BxL), 'ends': jnp.sum(end_BxL), 'bytes': jnp.sum(batch['bytes'])}

    replicated = NamedSharding(trainer.mesh, PartitionSpec())

    @functools.partial(jax.jit, donate_argnums=2, out_shardings=replicated)
    def step(params, batch, sums):
        return jax.tree.map(jnp.add, sums, totals(params, batch))

    shapes = jax.eval_shape(totals, params or trainer.abstract_state.params, trainer.abstract_batch())
    return step, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), shapes)


def flops_report(cfg: config.ModelConfig, context: int, layers: list[dict]) -> dict:
    """FLOPs per token by phase and part: with k as configured, with the measured activity, and of the dense twin.

    `layers` are those of the report of `evaluate`. The measured keys per query are the mean of all queries in prefill, and of
    the queries that saw more than k keys in decoding at a context beyond k. Training computes every entry: nothing is measured.

    Returns {'context', 'training' | 'prefill' | 'decode': {'configured' | 'measured' | 'dense': {part or group: FLOPs}}}.
    """

    def measured(name, scale=1, where=True):
        return np.where(where, np.array([layer.get(name, np.nan) for layer in layers]) * scale, np.nan)

    active = measured('active_mean', np.array([layer.ffn.d_ff for layer in cfg.per_layer]))
    ks = np.array([layer.attention.k for layer in cfg.per_layer])  # 0 where attention has no top-k
    report = {'context': context}
    for phase in flops.PHASES:
        count = lambda cfg, phase=phase, **activity: flops.flops_per_token(cfg, context, phase, **activity)
        selected = (ks > 0) & ((ks < context) | (phase != 'decode'))
        attended = measured('attended_mean' if phase == 'prefill' else 'attended_long', where=selected)
        ways = {'dense': count(flops.dense_twin(cfg)), 'configured': count(cfg)}
        if phase != 'training':
            ways['measured'] = count(cfg, active=active, attended=attended)
        report[phase] = {way: parts | flops.group(parts) for way, parts in ways.items()}
    return report


@functools.lru_cache(maxsize=8)
def _zeros(tree, leaves):
    """A function, compiled once, that returns zeros of these shapes."""
    shapes = tree.unflatten(leaves)
    return jax.jit(lambda: jax.tree.map(jnp.zeros_like, shapes), out_shardings=jax.tree.map(lambda x: x.sharding, shapes))


def _add(total, sums):
    wide = lambda x: np.asarray(x, np.int64 if np.issubdtype(x.dtype, np.integer) else np.float64)
    sums = jax.tree.map(wide, jax.device_get(sums))
    return sums if total is None else jax.tree.map(np.add, total, sums)


def _fit_mesh(cfg, devices):
    """The config with a mesh that fits, and its devices: the mesh of the run, else fsdp over all devices, else one device."""
    n, rows = len(devices), cfg.data.batch_size
    whole = -(-rows // n) * n
    for_all, for_one = config.MeshConfig(data=1, fsdp=n), config.MeshConfig()
    for mesh, batch_size, count in [(cfg.mesh, rows, n), (for_all, whole, n), (for_one, rows, 1)]:
        data = cfg.data.model_copy(update={'batch_size': batch_size})
        fitted = cfg.model_copy(update={'mesh': mesh, 'data': data})
        with contextlib.suppress(ConfigError):
            config.check_devices(fitted, count)
            return fitted, devices[:count]
    raise ConfigError(f'mesh: {n} devices fit neither the run nor its evaluation')
