"""AdamW with warm-up and decay (arXiv 1711.05101)."""

from typing import Any

import jax
import optax

from spark.config import OptimizerConfig


def schedule(cfg: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate by step: a linear warm-up to `lr`, then a cosine to lr · final_lr at `steps`.

    With decay_steps it stays at `lr` instead, and falls linearly in the last steps: such a run can be branched at any step.
    """
    start, end = 0.0 if cfg.warmup_steps else cfg.lr, cfg.lr * cfg.final_lr
    if cfg.decay_steps:
        rise, fall = (start, cfg.lr, cfg.warmup_steps), (cfg.lr, end, cfg.decay_steps)
        return optax.join_schedules([optax.linear_schedule(*ends) for ends in (rise, fall)], [steps - cfg.decay_steps])
    return optax.warmup_cosine_decay_schedule(start, cfg.lr, cfg.warmup_steps, steps, end_value=end)


def decayed(params: Any) -> Any:
    """A tree that is True for the parameters with weight decay: all but the scales of norms."""
    named_scale = lambda path: any(getattr(entry, 'key', None) == 'scale' for entry in path)
    return jax.tree_util.tree_map_with_path(lambda path, _: not named_scale(path), params)


def make_optimizer(cfg: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """AdamW with clipping by the global gradient norm."""
    adamw = optax.adamw(schedule(cfg, steps), b1=cfg.b1, b2=cfg.b2, eps=cfg.eps, weight_decay=cfg.weight_decay, mask=decayed)
    return optax.chain(optax.clip_by_global_norm(cfg.clip), adamw) if cfg.clip else adamw
