"""Optimizers and learning-rate schedules by name, from optax."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from spark.config import OptimizerConfig
from spark.training.by_path import Setting, map_by_name, sides


def schedule(cfg: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate by step: a linear warm-up to `lr`, which no step begins at 0, then the shape that `cfg` names.

    A wsd schedule stays at `lr` until its cool-down: such a run can be branched at any step.
    """
    lr, warm, end = cfg.lr, cfg.warmup_steps, cfg.lr * cfg.final_lr
    start = 0.0 if cfg.warmup_from_zero and warm else lr / (warm + 1)
    match cfg.shape:
        case 'cosine':
            return optax.warmup_cosine_decay_schedule(start, lr, warm, steps, end_value=end)
        case 'constant':
            after, begins = optax.constant_schedule(lr), warm
        case 'linear':
            after, begins = optax.linear_schedule(lr, end, steps - warm), warm
        case 'inverse_sqrt':
            first = max(warm, 1)
            after, begins = lambda i: jnp.maximum(lr * jnp.sqrt(first / (first + jnp.maximum(i, 0))), end), warm
        case 'wsd':
            length = cfg.decay_steps or max(round(cfg.decay_share * steps), 1)
            after, begins = _cooldown(cfg.decay_form, lr, end, length), steps - length
    return optax.join_schedules([optax.linear_schedule(start, lr, warm), after], [begins])


def _cooldown(form, lr, end, length):
    """From `lr` to `end` in `length` steps."""
    match form:
        case 'linear':
            return optax.linear_schedule(lr, end, length)
        case 'cosine':
            return optax.cosine_decay_schedule(lr, length, alpha=end / lr)
        case 'sqrt':  # arXiv 2405.18392
            return lambda i: lr + (end - lr) * jnp.sqrt(jnp.clip(i / length, 0, 1))


def average(decay: float, count: jax.Array, mean: Any, params: Any) -> Any:
    """The mean of the parameters after each of count + 1 updates, the last of which made `params`.

    What is n updates old weighs decay**n. The mean before the first update weighs nothing.
    """
    kept = decay * jnp.expm1(count * math.log(decay)) / jnp.expm1((count + 1) * math.log(decay))
    return jax.tree.map(lambda old, new: kept * old + (1 - kept) * new, mean, params)


def title(cfg: OptimizerConfig, steps: int) -> str:
    """The optimizer and its learning rate in one line."""
    rate = schedule(cfg, steps)
    parts = [f'{float(rate(0)):.3g} at first', f'{cfg.lr:g} from step {cfg.warmup_steps}'][not cfg.warmup_steps :]
    parts += [f'{float(rate(steps)):.3g} at the end'] if cfg.shape != 'constant' else []
    return f'{cfg.name}, schedule {cfg.shape}, lr ' + ', '.join(parts)


def make_optimizer(cfg: OptimizerConfig, steps: int, found: dict[str, Setting]) -> optax.GradientTransformation:
    """Clipping by the global gradient norm, then the rules of `by_path.settings`, with decoupled weight decay.

    Frozen parameters do not move, and have no state. Their gradients must be zeros (`by_path.without_frozen`).
    """

    def move(updates, params):
        def one(name, u, p):
            setting = found[name]
            scale = setting.shape * setting.width
            u = u if scale == 1 else scale * u
            u = u + setting.decay * p if setting.decay else u
            return u if setting.rate == 1 else setting.rate * u

        return map_by_name(one, updates, params)

    trained = lambda tree: map_by_name(lambda name, _: not found[name].frozen, tree)
    # The mask is also there where all are trained: checkpoints of older versions have its place in the tree.
    tx = _directions(cfg, found), optax.masked(optax.stateless(move), trained)
    tx = optax.chain(*tx, optax.scale_by_learning_rate(schedule(cfg, steps)))
    frozen = any(setting.frozen for setting in found.values())
    tx = optax.masked(tx, trained) if frozen else tx
    return optax.chain(optax.clip_by_global_norm(cfg.clip), tx) if cfg.clip else tx


def _directions(cfg, found):
    """The updates of each parameter by its rule, before weight decay and learning rate."""
    rules = {rule: _direction(rule, cfg) for rule in dict.fromkeys(s.rule for s in found.values() if not s.frozen)}
    if len(rules) == 1:
        return next(iter(rules.values()))
    return optax.partition(rules, lambda tree: map_by_name(lambda name, _: found[name].rule, tree))


def _direction(rule, cfg):
    match rule:
        case 'adamw':
            return optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps)
        case 'lion':
            return optax.scale_by_lion(cfg.b1, cfg.b2)
        case 'muon':
            dims = lambda name, x: MuonDimensionNumbers(*sides(name, x.ndim))
            return scale_by_muon(beta=cfg.momentum, eps=cfg.eps, weight_dimension_numbers=lambda tree: map_by_name(dims, tree))
        case 'adafactor':  # without the scale of the parameters, so that `lr` means what it means for AdamW (arXiv 2106.04560)
            decay = lambda step, exponent: jnp.minimum(1 - (step + 1.0) ** -exponent, cfg.b2)
            factored = optax.scale_by_factored_rms(epsilon=cfg.eps**2, decay_rate_fn=decay)
            momentum = [optax.ema(cfg.b1, debias=False)] if cfg.b1 else []
            return optax.chain(factored, optax.clip_by_block_rms(1.0), *momentum)
