"""Searches: ranges, the same points for the same seed, the same points first in a longer one."""

import math

import numpy as np
import pytest

from spark.errors import ConfigError
from spark.sweeps.grid import expand, occurring, parse_axes, prepare_directory
from spark.sweeps.search import KINDS, Range, Search, fixed, parse, points
from tests.helpers import grid, small

AXES = ['optimizer.lr=log:1e-4:1e-1', 'model.ffn.k=2:9', 'model.ffn.topk=statistical,exact']


def test_ranges_hold_both_ends_and_nothing_else():
    shares = np.linspace(0, 1, 10_001)[:-1]
    for axis in (Range(2, 9), Range(1, 8, True), Range(-3, 3)):
        values = [axis.at(x) for x in shares]
        assert set(values) == set(range(axis.low, axis.high + 1)) and all(isinstance(v, int) for v in values)
    assert np.bincount([Range(2, 9).at(x) for x in shares])[2:].tolist() == [1250] * 8
    values = [Range(1e-4, 1e-1, True).at(x) for x in shares]
    assert min(values) == 1e-4 and max(values) <= 1e-1 and np.median(values) == pytest.approx(10**-2.5, rel=0.01)
    assert [Range(1e-4, 1e-1, True).at(x) for x in (1 / 3, 2 / 3)] == [1e-3, 1e-2]
    assert Range(0.0, 0.5).at(0.123456) == 0.06173 and Range(0.0, 0.11111111).at(1 - 1e-9) == 0.1111


@pytest.mark.parametrize('kind', KINDS)
def test_the_same_seed_gives_the_same_points_and_a_longer_search_begins_with_them(kind):
    axes = parse_axes(AXES)
    first = points(axes, Search(kind, 5, 7))
    assert first == points(axes, Search(kind, 5, 7)) == points(axes, Search(kind, 33, 7))[:5]
    assert first != points(axes, Search(kind, 5, 8))
    lr, k, topk = zip(*points(axes, Search(kind, 256)), strict=True)
    assert np.log10(lr).mean() == pytest.approx(-2.5, abs=0.2) and set(k) == set(range(2, 10))
    assert topk.count('exact') == pytest.approx(128, abs=1 if kind == 'sobol' else 32)


def test_every_point_has_each_seed_of_a_list():
    axes = parse_axes([*AXES[:2], 'seed=0,1'])
    found = points(axes, Search('sobol', 3))
    assert [p[2] for p in found] == [0, 1] * 3 and [p[:2] for p in found[::2]] == [p[:2] for p in found[1::2]]
    assert found[::2] == [(*p, 0) for p in points(parse_axes(AXES[:2]), Search('sobol', 3))]
    searched = points(parse_axes([*AXES[:2], 'seed=0:99']), Search('sobol', 16))
    assert len({p[2] for p in searched}) > 8


@pytest.mark.parametrize('kind', KINDS)
def test_the_points_do_not_depend_on_the_order_of_the_axes(kind):
    axes = parse_axes([*AXES, 'seed=0,1'])
    other = dict(reversed(axes.items()))
    by_name = lambda axes: [dict(zip(axes, point, strict=True)) for point in points(axes, Search(kind, 4))]
    assert by_name(axes) == by_name(other)


def test_a_sweep_goes_on_with_the_order_of_its_axes(tmp_path):
    """It is that of the names of the runs."""
    base, axes, runs = grid('optimizer.lr=0.1,0.2', 'model.ffn.k=2,3')
    prepare_directory(tmp_path / 'out', base, axes, runs)
    other = dict(reversed(axes.items()))
    with pytest.raises(ConfigError, match=r'belongs to a sweep over optimizer\.lr, model\.ffn\.k: want --axis in this order'):
        prepare_directory(tmp_path / 'out', base, other, expand(base, other))


def test_runs_of_a_search(tmp_path):
    base, axes, search = small(), parse_axes(AXES[:2]), Search('sobol', 6)
    runs = expand(base, axes, search)
    assert len(runs) == 6 and all(2 <= run.cfg.model.ffn.k <= 9 and 1e-4 <= run.cfg.optimizer.lr <= 1e-1 for run in runs)
    assert runs[0].name == f'lr-{runs[0].cfg.optimizer.lr}_k-{runs[0].cfg.model.ffn.k}'
    values = occurring(axes, runs)
    assert values['optimizer.lr'] == sorted({run.cfg.optimizer.lr for run in runs})
    few = expand(base, parse_axes(['model.ffn.topk=statistical,exact']), Search('random', 40))
    assert len(few) == 2  # points that are alike are one run
    out = tmp_path / 'out'
    prepare_directory(out, base, axes, runs, fixed(axes, search))
    more = Search('sobol', 9)
    assert [run.name for run in expand(base, axes, more)][:6] == [run.name for run in runs]
    prepare_directory(out, base, axes, expand(base, axes, more), fixed(axes, more))
    other = parse_axes(['optimizer.lr=log:1e-4:1', AXES[1]])
    for axes_, search_, message in [
        (axes, Search('sobol', 6, 1), 'search = sobol with seed 0, now sobol with seed 1'),
        (other, search, r'optimizer\.lr = log:0\.0001:0\.1, now log:0\.0001:1\.0'),
    ]:
        with pytest.raises(ConfigError, match=f'belongs to a sweep with {message}: choose another directory'):
            prepare_directory(out, base, axes_, runs, fixed(axes_, search_))
    with pytest.raises(ConfigError, match='belongs to a sweep with '):
        prepare_directory(out, base, values, runs)  # a grid


@pytest.mark.parametrize('text', ['sobol', 'grid:4', 'sobol:0', 'random:4:x', 'sobol:-1'])
def test_wrong_searches(text):
    with pytest.raises(ConfigError, match=f'--search={text}: want sobol:POINTS or random:POINTS, with :SEED if it is not 0'):
        parse(text)


@pytest.mark.parametrize(
    ('axis', 'message'),
    [
        ('optimizer.lr=1e-4:1e-2', '--axis=optimizer.lr=0.0001:0.01: a grid has no ranges: want FIELD=value,value,…'),
        ('optimizer.lr=log:0:1', '--axis=optimizer.lr=log:0:1: want LOW:HIGH, or log:LOW:HIGH with LOW above 0'),
        ('optimizer.lr=2:1', '--axis=optimizer.lr=2:1: want LOW:HIGH'),
        ('optimizer.lr=lin:1:2', '--axis=optimizer.lr=lin:1:2: want LOW:HIGH'),
        ('optimizer.lr=1:2:3', '--axis=optimizer.lr=1:2:3: want LOW:HIGH'),
        ('optimizer.lr=nan:1', '--axis=optimizer.lr=nan:1: want LOW:HIGH'),
        ('optimizer.lr=-inf:1', '--axis=optimizer.lr=-inf:1: want LOW:HIGH'),
        ('optimizer.lr=1:inf', '--axis=optimizer.lr=1:inf: want LOW:HIGH'),
        ('model.ffn.k=1.5:4', "--axis=model.ffn.k=1.5:4: '1.5': want a valid integer"),
    ],
)
def test_wrong_ranges(axis, message):
    with pytest.raises(ConfigError) as e:
        grid(axis)
    assert str(e.value).startswith(message), e.value


def test_searches_are_read():
    assert parse('sobol:16') == Search('sobol', 16, 0) and parse('random:3:5') == Search('random', 3, 5)
    assert str(parse_axes(['model.ffn.k=2:9'])['model.ffn.k']) == '2:9' and math.isfinite(Range(1.0, 2.0).at(0.5))
