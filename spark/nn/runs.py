"""Which layers are scanned together, and the k of each layer at each step.

Layers are scanned in groups of one `pattern`. Consecutive groups whose lookups are equal but for k are one scan: a k that differs
is an array that is scanned over, and a k that follows a schedule is computed from the step.
"""

import functools
import itertools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Num

from spark.config import AttentionConfig, FFNConfig, ModelConfig
from spark.config.layers import ALL_KEYS, Schedule, schedule

Half = FFNConfig | AttentionConfig
Step = int | np.integer | Int[Array | np.ndarray, '']
K = int | Num[Array, ''] | None  # of a lookup; None: that of its config

PIECES = 1024  # k falls in at most so many stairs: a table of them is exact everywhere, in whatever arithmetic


class Run(NamedTuple):
    """Consecutive groups of layers that are one scan. Their parameters are stacked under `name`.

    That is 'groups', or, of several, 'groups_0', 'groups_1', …: a pattern with 'groups/' finds nothing then, rather than a part.
    """

    name: str
    first: int  # layer
    length: int  # groups
    layers: tuple[ModelConfig, ...]  # by place in the pattern; where k varies, with the largest
    varies: tuple[dict[str, bool], ...]  # by place: is k of 'ffn' and 'attention' an array?

    def where(self, i: int) -> slice:
        """The layers at place i of the pattern."""
        P = len(self.layers)
        return slice(self.first + i, self.first + self.length * P, P)


@functools.lru_cache
def runs(cfg: ModelConfig) -> tuple[Run, ...]:
    """The scans of a model, in the order of its layers."""
    P, found, first = len(cfg.pattern), [], 0
    groups = [cfg.per_layer[i : i + P] for i in range(0, cfg.n_layers, P)]
    alike = itertools.groupby(groups, lambda group: [(_structure(x.ffn), _structure(x.attention)) for x in group])
    scans = [list(members) for _, members in alike]
    for i, members in enumerate(scans):
        layers, varies = zip(*map(_place, zip(*members, strict=True)), strict=True)
        found.append(Run(f'groups_{i}' if len(scans) > 1 else 'groups', first, len(members), layers, varies))
        first += len(members) * P
    return tuple(found)


def place(cfg: ModelConfig, layer: int) -> tuple[Run, int, int]:
    """Where a layer is: (its run, the group in that, the place in the pattern)."""
    run = next(run for run in reversed(runs(cfg)) if run.first <= layer)
    return run, *divmod(layer - run.first, len(cfg.pattern))


def _structure(half):
    """What a scan needs to be equal."""
    return half.model_copy(update={'k': 0, 'k_schedule': bool(half.k_schedule)}) if half.any_k else half


def _place(layers):
    """(one config for all layers at a place of a run, of which halves k is an array)."""
    varies, largest = {}, {}
    for half in ('ffn', 'attention'):
        lookups = [getattr(layer, half) for layer in layers]
        ks = {x.k for x in lookups}
        varies[half] = len(ks) > 1 or bool(lookups[0].k_schedule)
        largest[half] = lookups[0].model_copy(update={'k': max(ks)})
    return (layers[0].model_copy(update=largest) if any(varies.values()) else layers[0]), varies


def scheduled(cfg: ModelConfig) -> list[str]:
    """The halves whose k follows a schedule."""
    return [half for half in ('ffn', 'attention') if getattr(cfg, half).k_schedule]


def ks(cfg: ModelConfig, half: str, step: Step | None = None) -> Int[Array | np.ndarray, ' n_layers']:
    """The k of each layer in update `step`, of which 1 is the first; 0 where there is no top-k.

    `step` may be a number that a program computes. It is not needed where there is no schedule.
    """
    lookups, shared = [getattr(layer, half) for layer in cfg.per_layer], getattr(cfg, half)
    if not shared.k_schedule:
        return np.array([x.k for x in lookups], np.int32)
    if step is None:
        raise ValueError(f'model.{half}.k_schedule = {shared.k_schedule!r}: k depends on the step, which is missing')
    fall = _schedule(shared)
    stairs = min(fall.length, PIECES)
    part = np.arange(stairs + 1) / stairs
    part = (1 - np.cos(np.pi * part)) / 2 if fall.form == 'cosine' else part
    tables = np.stack([_table(x, part) for x in lookups])
    xp = np if isinstance(step, int | np.integer | np.ndarray) else jnp
    return xp.asarray(tables)[:, xp.clip(step - fall.steps, 0, fall.length) * stairs // fall.length]


def _table(lookup, part):
    """k where so much of its fall has passed."""
    fall = _schedule(lookup) if lookup.k_schedule else Schedule(lookup.k, lookup.k, 0)
    return np.rint([fall.start, *(fall.top + (lookup.k - fall.top) * part[1:])]).astype(np.int32)


def _schedule(lookup):
    return schedule(lookup.k_schedule, lookup.k, getattr(lookup, 'd_ff', ALL_KEYS))


def at_step(cfg: ModelConfig, step: int) -> ModelConfig:
    """The same model without a schedule, with the k of update `step`, for a checkpoint of that step."""
    changes, words, alike = {}, [cfg.layers], cfg.model_copy(update={'layers': ''})
    for half in scheduled(cfg):
        changes[half] = getattr(cfg, half).model_copy(update={'k_schedule': '', 'k': int(ks(alike, half, step)[0])})
        words.append(f'{half}.k={"/".join(map(str, ks(cfg, half, step)))}')
    return cfg.model_copy(update=changes | {'layers': ' '.join(words) if cfg.layers else ''})
