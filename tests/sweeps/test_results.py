"""From run directories to rows, from rows to means, tables and plots."""

import itertools

import numpy as np
import pytest

from spark import config
from spark.errors import ConfigError
from spark.evaluation.plots import save
from spark.sweeps import plots, results
from spark.sweeps.grid import prepare_directory
from tests.helpers import grid


def result(loss, mflops, **more):
    always = {'parameters': 1000, 'flops_ratio': 2.0, 'context': 32, 'bits_per_byte': None}
    return {'test_loss': loss, 'mflops': mflops} | always | more


def test_seeds_are_averaged_and_the_front_is_what_nothing_beats(tmp_path):
    axes = {'model.ffn.k': [4, 8, 12], 'seed': [0, 1]}
    name = lambda k, seed: (f'k-{k}_seed-{seed}', {'model.ffn.k': k, 'seed': seed})
    row = lambda k, seed, status='done', result=None: results.Row(*name(k, seed), status, result or {})
    rows = [
        row(4, 0, result=result(3.0, 1.0)), row(4, 1, result=result(3.2, 1.0)),
        row(8, 0, result=result(3.3, 2.0)), row(8, 1, 'failed, exit code 3: NotFiniteError: step 5: loss nan'),
        row(12, 0, result=result(2.5, 3.0, active=0.1)), row(12, 1, 'unfinished, at step 4'),
    ]  # fmt: skip
    points = results.average(rows, axes)
    assert [p['seeds'] for p in points] == [2, 1, 1]
    np.testing.assert_allclose(points[0]['test_loss'], (3.1, np.std([3.0, 3.2], ddof=1), 3.0, 3.2))
    assert [p['axes']['model.ffn.k'] for p in results.pareto(points)] == [4, 12]
    assert all(np.isnan(p['within']) for p in points)  # one common seed
    both = results.average([*rows[:2], row(8, 0, result=result(2.0, 2.0)), row(8, 1, result=result(2.4, 2.0))], axes)
    np.testing.assert_allclose([p['within'] for p in both], 0.1 / 2**0.5)  # ±0.05 about levels 2.5 and 2.8
    paths = results.write(tmp_path, rows, axes)
    assert [p.name for p in paths] == ['results.csv', 'results.md', 'loss_flops.png', 'loss_k.png', 'results.html']
    assert all(p.exists() for p in paths)
    text = (tmp_path / 'results.md').read_text()
    assert '| 4 | 2 | 1,000 | 3.1000 ± 0.1414 |' in text and '2.00× | 0.5000 | Pareto |' in text  # 3.0 − 2.5 of seed 0 alone
    assert '2.00× | 0.8000 |  |' in text and '2.00× | – | Pareto |' in text
    assert '- `k-8_seed-1`: failed, exit code 3: NotFiniteError: step 5: loss nan' in text
    assert 'unfinished, at step 4' in text
    lines = (tmp_path / 'results.csv').read_text().splitlines()
    assert len(lines) == 7 and lines[0].startswith('run,model.ffn.k,seed,status,test_loss,mflops')
    nothing = results.write(tmp_path, rows[3:4], axes)
    assert [p.name for p in nothing] == ['results.csv', 'results.md', 'results.html']


def test_plots_of_a_search_have_points_and_no_lines(tmp_path, monkeypatch):
    """A grid's lines join points that differ in one axis only, and are named; in a search there are none."""
    drawn = []
    monkeypatch.setattr(plots, 'save', lambda fig, path: drawn.append(fig) or save(fig, path))
    points = [(round(1e-4 * 1.3**i, 6), 2 + 7 * i % 19) for i in range(20)]
    axes = {'optimizer.lr': sorted(p[0] for p in points), 'model.ffn.k': sorted({p[1] for p in points})}
    row = lambda lr, k: results.Row(f'lr-{lr}_k-{k}', {'optimizer.lr': lr, 'model.ffn.k': k}, 'done', result(3 + lr, 1 + k))
    rows = [row(*point) for point in points]
    results.write(tmp_path, rows, axes)
    assert len(drawn) == 3
    for fig in drawn:
        (ax,) = fig.axes
        fig.draw_without_rendering()
        low, high = ax.get_xlim()
        labels = [t for t in ax.get_xticklabels(which='both') if t.get_text() and low <= t.get_position()[0] <= high]
        boxes = sorted((t.get_window_extent().x0, t.get_window_extent().x1) for t in labels)
        assert not ax.texts and all(left[1] < right[0] for left, right in itertools.pairwise(boxes))
        assert ax.get_legend() is None or [t.get_text() for t in ax.get_legend().get_texts()] == ['Pareto front']
        assert any(line.get_linestyle() == 'None' and len(line.get_xdata()) == 20 for line in ax.lines)


def test_names_stand_beside_the_plot(tmp_path, monkeypatch):
    """Long values of an axis, such as words for layers, are read, and the base has none."""
    drawn = []
    monkeypatch.setattr(plots, 'save', lambda fig, path: drawn.append(fig) or save(fig, path))
    words = ['', 'ffn.kind=gated attention.kind=dense', 'attention.kind=spark_low_rank', 'ffn.k=17/34/86/139']
    axes = {'model.layers': words, 'seed': [0, 1]}
    point = lambda i, seed: (f'{i}_{seed}', {'model.layers': words[i], 'seed': seed}, 'done', result(3 + i + seed, 1 + i))
    results.write(tmp_path, [results.Row(*point(i, seed)) for i in range(4) for seed in (0, 1)], axes)
    assert '| (base) | 2 |' in (tmp_path / 'results.md').read_text()
    (ax,) = drawn[1].axes
    drawn[1].draw_without_rendering()
    labels = ax.get_yticklabels()
    assert [t.get_text() for t in labels] == [*words[:0:-1], '(base)']  # the first on top
    places = {t.get_text(): t.get_position()[1] for t in labels}
    means = {float(y): float(x) for line in ax.lines for x, y in zip(*line.get_data(), strict=True) if len(line.get_xdata()) == 4}
    assert [means[places[w or '(base)']] for w in words] == [3.5, 4.5, 5.5, 6.5]
    boxes = [t.get_window_extent() for t in labels]
    assert all(below.y1 < above.y0 for below, above in itertools.pairwise(boxes)) and all(b.x0 >= 0 for b in boxes)


def test_config_of_a_run_is_what_its_row_says(tmp_path):
    base, axes, runs = grid('model.ffn.k=4,8', 'seed=0')
    prepare_directory(tmp_path, base, axes, runs)
    rows = results.collect(tmp_path, axes, runs)
    assert [(r.axes['model.ffn.k'], r.status) for r in rows] == [(4, 'not started'), (8, 'not started')]
    (tmp_path / 'logs' / f'{runs[0].name}.json').write_text('{"exit_code": 4, "message": "DataError: gone"}')
    (tmp_path / 'logs' / f'{runs[1].name}.json').write_text('{"exit_code": 75, "message": "Preempted: stopped"}')
    workdir = tmp_path / 'runs' / runs[1].name
    workdir.mkdir(parents=True)
    (workdir / 'config.json').write_text(runs[1].cfg.model_dump_json())
    (workdir / 'metrics.jsonl').write_text('{"step": 7, "split": "train", "loss": 3.5}\n{"step": 8, "spl')
    rows = results.collect(tmp_path, axes)
    assert [(r.run, r.status) for r in rows] == [(runs[1].name, 'unfinished, at step 7')]
    rows = results.collect(tmp_path, axes, runs)
    assert rows[0].status == 'failed, exit code 4: DataError: gone'
    for torn in ('{"exit_', '[]', '{"exit_code": 4}'):
        (tmp_path / 'logs' / f'{runs[0].name}.json').write_text(torn)
        with pytest.raises(ConfigError, match=rf'{runs[0].name}\.json: not the record of how a run ended .* delete it'):
            results.collect(tmp_path, axes, runs)
    (tmp_path / 'logs' / f'{runs[0].name}.json').unlink()
    assert config.load(workdir / 'config.json') == runs[1].cfg
    (workdir / 'summary.json').write_text('{"steps": ')
    with pytest.raises(ConfigError, match=r'summary\.json: not the summary of a run .* delete it'):
        results.collect(tmp_path, axes, runs)
