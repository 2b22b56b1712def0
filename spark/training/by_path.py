"""What each parameter gets: the rule of its updates, its learning rate and its weight decay, by patterns over their paths."""

import math
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

from spark.config import OptimizerConfig, by_pattern, nearest
from spark.errors import ConfigError

MUON_RMS = 0.2  # of the updates of AdamW, which Muon's are scaled to (arXiv 2502.16982)


class Setting(NamedTuple):
    """How a parameter moves: by lr · rate · (width · shape · update of the rule + decay · parameter)."""

    rule: str  # an optimizer's name
    rate: float  # 0: it is frozen
    decay: float
    shape: float  # what makes Muon's updates as large as AdamW's
    width: float  # muP's factor
    size: int  # numbers in it

    @property
    def frozen(self) -> bool:
        """Does it never move?"""
        return self.rate == 0


def name(path: Iterable) -> str:
    """'groups/ffn_0/K1' of a path in a tree of Flax variables."""
    return '/'.join(str(entry.key) for entry in path if entry.key != 'params')


def map_by_name(f: Callable, params: Any, *rest: Any) -> Any:
    """The tree of f(name, leaf, …)."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: f(name(path), *leaves), params, *rest)


def sides(name: str, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """(axes of the input, axes of the output) of a stack of matrices; None for what is none."""
    if not name.startswith('groups') or ndim < 3:  # the first axis is that of layers
        return None
    split = ndim - 1 if name.endswith('/out') else 2  # heads and head_dim are one side
    return tuple(range(1, split)), tuple(range(split, ndim))


def settings(cfg: OptimizerConfig, params: Any, width: float = 1.0) -> dict[str, Setting]:
    """The Setting of each parameter, by name; of several patterns that match a name the last one counts.

    `width` is that of the model over its base width (muP, arXiv 2203.03466). A matrix moves by 1 / width, since what its updates
    add up to grows with the number of inputs; Muon's updates add up to less, and take the root. The logits are made by the
    embedding and the final norm together: each moves by the root. Weight decay does not depend on the width.

    Raises a ConfigError for a pattern that matches none.
    """
    shapes = {name(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(params)}
    rates, decays = _chosen('rates', cfg.rates, shapes), _chosen('decays', cfg.decays, shapes)
    found = {}
    for key, shape in shapes.items():
        axes = sides(key, len(shape))
        rule = cfg.name if cfg.name != 'muon' or axes else 'adamw'
        of_shape = MUON_RMS * math.sqrt(max(math.prod(shape[i] for i in side) for side in axes)) if rule == 'muon' else 1.0
        root = rule == 'muon' or key in ('embedding', 'final_norm/scale')
        of_width = width**-0.5 if root else 1 / width if axes else 1.0
        decay = 0.0 if key.endswith('scale') else cfg.weight_decay  # of norms
        found[key] = Setting(rule, rates.get(key, 1.0), decays.get(key, decay), of_shape, of_width, math.prod(shape))
    if all(setting.frozen for setting in found.values()):
        raise ConfigError(f'optimizer.rates = {cfg.rates!r}: every parameter has rate 0, and none would move')
    for pattern, decay in by_pattern(cfg.decays):
        if decay and all(setting.frozen for key, setting in found.items() if re.search(pattern, key)):
            raise ConfigError(f'optimizer.decays = {cfg.decays!r}: what {pattern!r} matches is frozen, and does not decay')
    return found


def _chosen(field, text, names):
    """{name: the number of the last pattern that matches it}, for the names that one matches."""
    chosen = {}
    for pattern, number in by_pattern(text):
        matched = [name for name in names if re.search(pattern, name)]
        if not matched:
            known = ', '.join(dict.fromkeys(_short(name) for name in names))
            hint = nearest(pattern, {part for name in names for part in (name, *name.split('/'))})
            raise ConfigError(f'optimizer.{field} = {text!r}: {pattern!r} matches no parameter{hint or "."} There are {known}')
        chosen |= dict.fromkeys(matched, number)
    return chosen


def without_frozen(found: dict[str, Setting], grads: Any) -> Any:
    """The gradients with zeros for frozen parameters: they count in no norm, clipping included, and XLA does not compute them."""
    if not any(setting.frozen for setting in found.values()):
        return grads
    return map_by_name(lambda name, g: jax.numpy.zeros_like(g) if found[name].frozen else g, grads)


def table(found: dict[str, Setting]) -> str:
    """What moves at which rate and what decays: a line for each group of parameters that are treated alike.

    The rate's second factor is muP's, which the decay leaves out.
    """
    groups = {}
    for key, setting in found.items():
        rate = 'frozen' if setting.frozen else f'lr × {setting.rate:g}' + f' × {setting.width:g}' * (setting.width != 1)
        decay = '' if setting.frozen else f'decay {setting.decay:g}'
        groups.setdefault((setting.rule, rate, decay), []).append(key)
    lines = [(*group, f'{sum(found[key].size for key in keys):,}', _listed(keys, found)) for group, keys in groups.items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return '\n'.join('  ' + '  '.join(f'{x:<{w}}' for x, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _listed(keys, names):
    """Names in short: 'groups/ffn_*/{K1,K2}'. An asterisk stands for all places in the pattern of layers."""
    leaves = {}
    for key in keys:
        whole = all(other in keys for other in names if _short(other) == _short(key))
        parent, _, leaf = (_short(key) if whole else key).rpartition('/')
        leaves.setdefault(parent, {})[leaf] = None
    braced = lambda names: f'{{{",".join(names)}}}' if len(names) > 1 else next(iter(names))
    return ' '.join(f'{parent}/' * bool(parent) + braced(names) for parent, names in leaves.items())


def _short(name):
    """The name without the place in the pattern of layers."""
    return re.sub(r'_\d+(?=/)', '_*', name)
