"""Entries of train.evals beside losses: statistics of lookups, and tasks. The loop imports this where an entry asks for it."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from spark.config import EvalConfig
from spark.data.tokenizer import Tokenizer
from spark.errors import ConfigError
from spark.evaluation import sparsity
from spark.evaluation.evaluate import Model, accumulate, step_for
from spark.training.loss import losses
from spark.training.step import Trainer

Run = Callable[[dict, str, Callable[[], bool]], dict | None]  # as `training.evals.Evaluation.run`


class _Stopped(Exception):
    """The job was asked to stop."""


def of_lookups(entry: EvalConfig, trainer: Trainer, tokenizer: Tokenizer, data: Iterable[dict]) -> Run:
    """Losses, and the numbers of `sparsity.report`: NAME_by_layer, and NAME, the mean over the layers that have it."""
    small, compiled = _of_microbatches(trainer), []

    def run(params, title, stop):
        del title
        if not compiled:
            compiled.append(step_for(small, tokenizer.eos))
        try:
            sums = accumulate(small, params, tokenizer.eos, _parts(data, entry.batches, trainer.cfg.train.accumulate, stop),
                              compiled=compiled[0])  # fmt: skip
        except _Stopped:
            return None
        report = losses(sums['nll'], sums['tokens'], sums['bytes']) | {name: int(sums[name]) for name in ('tokens', 'bytes')}
        return report | _by_name(sparsity.report(trainer.cfg.model, sums))

    return run


def _by_name(layers):
    """{name: mean over the layers that have it, NAME_by_layer: list} of reports by layer; NAME_by_layer/I where some lack it."""
    flat, found = [dict(_numbers(layer)) for layer in layers], {}
    for name in dict.fromkeys(name for layer in flat for name in layer):
        values = {i: layer[name] for i, layer in enumerate(flat) if name in layer}
        found[name] = float(np.mean(list(values.values())))
        if len(values) == len(flat):
            found[f'{name}_by_layer'] = [*values.values()]
        else:
            found |= {f'{name}_by_layer/{i}': x for i, x in values.items()}
    return found


def _numbers(layer: dict[str, Any], prefix: str = '') -> Iterator[tuple[str, float]]:
    for name, value in layer.items():
        if isinstance(value, dict):
            yield from _numbers(value, f'{name}_')
        elif name != 'layer' and isinstance(value, int | float):
            yield prefix + name, float(value)


def of_tasks(entry: EvalConfig, trainer: Trainer, tokenizer: Tokenizer, data: None) -> Run:
    """TASK/METRIC of each task; their data is read now, and not again."""
    del data
    if jax.process_count() > 1:
        raise ConfigError('tasks: want a job of one process, or scripts/evaluate.py --tasks of its run')
    try:
        from spark.evaluation import needles, tasks
    except ImportError as e:
        raise ConfigError(f"tasks: needs lm-eval: pip install 'spark-transformer[eval]' ({e})") from None
    names = entry.tasks.split(',')
    small, stops = _of_microbatches(trainer), []
    loaded = tasks.load(names, entry.task_path or None, ours=needles.tasks(tokenizer, small.cfg.data))

    def tick():
        if stops[-1]():
            raise _Stopped

    adapter = tasks.HarnessModel(Model(small.cfg, 0, tokenizer, small, {}), tick)

    def run(params, title, stop):
        del title
        stops.append(stop)
        adapter.use(params)
        try:
            found, _ = tasks.run(adapter, loaded, limit=entry.limit or None, bootstrap_iters=0)
        except _Stopped:
            return None
        finally:
            adapter.use({})
        plain = lambda name: name.removesuffix(',none').replace(',', '/')
        metrics = {f'{task}/{plain(name)}': x for task, values in found.items() for name, x in values.items()}
        return {name: float(x) for name, x in metrics.items() if isinstance(x, int | float)}

    return run


def _of_microbatches(trainer):
    """The trainer of the same run whose batch is a microbatch: more would not fit in memory."""
    cfg = trainer.cfg
    data = cfg.data.model_copy(update={'batch_size': cfg.data.batch_size // cfg.train.accumulate})
    return Trainer(cfg.model_copy(update={'data': data, 'train': cfg.train.model_copy(update={'accumulate': 1})}))


def _parts(data, limit, n, stop):
    """The microbatches of the first `limit` batches (0: of all); raises _Stopped where `stop()` is true."""
    batches = iter(data)
    try:
        for i, batch in enumerate(batches):
            if limit and i == limit:
                return
            if stop():
                raise _Stopped
            yield from ({name: x[part::n] for name, x in batch.items()} for part in range(n))
    finally:
        if hasattr(batches, 'close'):
            batches.close()
