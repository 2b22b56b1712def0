"""Points of a search, random or quasi-random, beside grids: axes are lists of values or ranges."""

import math
import re
from typing import NamedTuple

import numpy as np
from scipy.stats import qmc

from spark.errors import ConfigError

KINDS = ('sobol', 'random')


class Range(NamedTuple):
    """All numbers from `low` to `high`, both included; with `log`, each factor between them is as likely as another."""

    low: int | float
    high: int | float
    log: bool = False

    def at(self, share: float) -> int | float:
        """The value at a share in [0, 1) of the range; 4 digits of one that is no integer, since it becomes a name."""
        whole = isinstance(self.low, int)
        low, high = self.low, self.high + whole  # of an integer its whole bin
        x = low * (high / low) ** share if self.log else low + (high - low) * share
        return min(max(math.floor(x) if whole else float(f'{x:.4g}'), self.low), self.high)

    def __str__(self):
        return f'{"log:" * self.log}{self.low}:{self.high}'


class Search(NamedTuple):
    """How many points of which kind; the first points of a longer search are those of a shorter one."""

    kind: str
    points: int
    seed: int = 0


def parse(text: str) -> Search:
    """The search of 'KIND:POINTS' or 'KIND:POINTS:SEED'."""
    found = re.fullmatch(rf'({"|".join(KINDS)}):(\d{{1,6}})(?::(\d{{1,9}}))?', text)
    if not found or not int(found[2]):
        raise ConfigError(f'--search={text}: want {" or ".join(f"{kind}:POINTS" for kind in KINDS)}, with :SEED if it is not 0')
    return Search(found[1], int(found[2]), int(found[3] or 0))


def points(axes: dict[str, list | Range], search: Search) -> list[tuple]:
    """A value of each axis for each point. A list of seeds is not searched: every point has each of them."""
    seeds = axes['seed'] if isinstance(axes.get('seed'), list) else [None]
    searched = sorted(field for field in axes if field != 'seed' or seeds == [None])  # whatever the order of the flags
    shares = iter(_shares(search, len(searched)).T)
    columns = {field: [_value(axes[field], share) for share in next(shares)] for field in searched}
    return [
        tuple(columns[field][i] if field in columns else seed for field in axes) for i in range(search.points) for seed in seeds
    ]


def fixed(axes: dict[str, list | Range], search: Search | None) -> dict[str, str]:
    """What makes the points of a search, and must stay as it is if there are to be more of them."""
    if not search:
        return {}
    text = lambda values: str(values) if isinstance(values, Range) else ','.join(map(str, values))
    ranges = {field: text(values) for field, values in axes.items() if field != 'seed' or isinstance(values, Range)}
    return {'search': f'{search.kind} with seed {search.seed}', **ranges}


def _value(axis, share):
    return axis.at(share) if isinstance(axis, Range) else axis[int(share * len(axis))]


def _shares(search, axes):
    """(points, axes) shares in [0, 1), of which the first do not depend on how many there are."""
    if not axes:
        return np.zeros((search.points, 0))
    if search.kind == 'random':
        return np.random.default_rng(search.seed).random((search.points, axes))
    # The balance of a Sobol sequence is that of powers of two, of which the last one may be cut.
    return qmc.Sobol(axes, rng=search.seed).random_base2((search.points - 1).bit_length())[: search.points]
