"""Evaluations of a run while it trains: the held-out splits, and the entries of train.evals."""

import functools
import importlib
import math
from collections.abc import Callable
from typing import NamedTuple

import jax

from spark.config import ExperimentConfig
from spark.data.tokenizer import Tokenizer
from spark.errors import ConfigError, SparkError, root_cause
from spark.training.feed import Feed
from spark.training.step import Trainer, evaluate

Stop = Callable[[], bool]


class Evaluation(NamedTuple):
    """What a run evaluates."""

    label: str  # its metrics are LABEL/…
    every: int  # steps between evaluations; 0: only after the last step
    run: Callable[[dict, str, Stop], dict | None]  # (parameters, title, stop) → metrics, or None if `stop()` was true


class Evaluations:
    """The evaluations of a run; what they need is found, or an error raised, before anything is compiled."""

    def __init__(self, cfg: ExperimentConfig, trainer: Trainer, tokenizer: Tokenizer, feed: Feed):
        t = cfg.train
        of_split = lambda split, every, limit: Evaluation(split, every, _losses(trainer, feed.held_out[split], limit))
        self._usual = of_split('validation', t.eval_every, t.eval_batches)
        self.final = [of_split(split, 0, t.final_eval) for split in feed.held_out]
        self.entries = [
            Evaluation(entry.label, entry.every, _of_entry(entry, trainer, tokenizer, data)) for entry, data in feed.evals
        ]

    def due(self, step: int, at_stop: bool = False) -> list[Evaluation]:
        """What is evaluated at a step that is not the last one; at train.stop_at the validation split in any case."""
        is_due = lambda e: (e.every and step % e.every == 0) or (at_stop and e is self._usual)
        return [e for e in (self._usual, *self.entries) if is_due(e)]


def _losses(trainer, data, limit, eval_step=None):
    return lambda params, title, stop: evaluate(trainer, params, data, title, limit, stop=stop, eval_step=eval_step)


def _of_entry(entry, trainer, tokenizer, data):
    """The function `Evaluation.run` of an entry."""
    if not (entry.statistics or entry.tasks):
        eval_step = trainer.eval_step_with(_own(entry, trainer)) if entry.metrics else None
        return _losses(trainer, data, entry.batches, eval_step)
    from spark.evaluation import in_loop  # it stands above training, and is not needed without such an entry

    try:
        return (in_loop.of_tasks if entry.tasks else in_loop.of_lookups)(entry, trainer, tokenizer, data)
    except SparkError as e:
        raise type(e)(f'train.evals: {entry.name}: {str(e).removeprefix("--")}') from None


def _own(entry, trainer):
    """The function that an entry names, of parameters and a batch."""
    what = f'train.evals: {entry.name}: metrics={entry.metrics}'
    module, _, name = entry.metrics.partition(':')
    try:
        function = functools.partial(getattr(importlib.import_module(module), name), trainer.model)
    except Exception as e:  # whatever a module raises
        want = 'want MODULE:FUNCTION, of a module that Python finds (PYTHONPATH)'
        raise ConfigError(f'{what}: cannot be imported: {root_cause(e)}; {want}') from None
    rows = trainer.cfg.data.batch_size // trainer.cfg.train.accumulate
    batch = {name: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for name, x in trainer.abstract_batch().items()}
    try:
        with trainer.context():
            found = jax.eval_shape(function, trainer.variables(trainer.abstract_state.params, trainer.abstract_state.step), batch)
    except Exception as e:
        raise ConfigError(f'{what}: fails on (model, params, batch): {root_cause(e)}') from None
    named = isinstance(found, dict) and found and all(isinstance(name, str) for name in found)
    if not named or any(getattr(x, 'shape', None) != () for x in found.values()):
        raise ConfigError(f'{what}: returns {found}: want {{name: a number}}, sums over the tokens of the batch')
    if taken := [name for name in found if name in TAKEN or name.startswith('ema_')]:
        raise ConfigError(f'{what}: returns {taken[0]!r}, which evaluation itself reports: want another name')
    return function


# Names in a record of an evaluation; ema_… are those of the mean of the parameters.
TAKEN = (
    'step', 'split', 'loss', 'perplexity', 'bits_per_byte', 'tokens', 'bytes',
    'active', 'attended', 'active_by_layer', 'attended_by_layer',
)  # fmt: skip


def said(report: dict) -> str:
    """An evaluation in a few words: its loss, or its first metrics."""
    if 'loss' in report:
        mean = f', of the mean of the parameters {report["ema_loss"]:.4f}' if 'ema_loss' in report else ''
        return f'loss {report["loss"]:.4f}{mean}'
    numbers = [(name, x) for name, x in report.items() if isinstance(x, int | float) and math.isfinite(x)]
    return ', '.join(f'{name} {x:.4f}' for name, x in numbers[:3])
