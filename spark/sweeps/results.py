"""The results of a sweep: a row per run, means over seeds, tables and plots."""

import base64
import contextlib
import csv
import io
import json
import pathlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from spark import config, flops
from spark.data.tokenizer import tokenizer_for
from spark.errors import ConfigError
from spark.nn.runs import at_step
from spark.runtime import Path, absolute, write_text
from spark.sweeps import execute, grid, plots


class Row(NamedTuple):
    """The status of a run, its values on the axes, and its results, empty if it is not finished."""

    run: str
    axes: dict
    status: str
    result: dict


def collect(
    out: Path, axes: dict[str, list], runs: Iterable[grid.Run] = (), stopped: dict[str, str] | None = None
) -> list[Row]:
    """A row for each of `runs` and each run directory in OUT, in the order of the axes' values; those off the axes come last.

    `stopped` says by name why a run that is not finished does not go on.
    """
    cfgs = {run.name: run.cfg for run in runs}
    cfgs |= {p.parent.name: config.load(p) for p in out.glob('runs/*/config.json')}
    rows = [_row(out, name, cfg, axes, (stopped or {}).get(name)) for name, cfg in cfgs.items()]
    rank = lambda value, values: values.index(value) if value in values else len(values)
    return sorted(rows, key=lambda row: ([rank(row.axes[field], axes[field]) for field in axes], row.run))


def write(out: Path, rows: list[Row], axes: dict[str, list]) -> list[Path]:
    """Writes results.csv, results.md, the plots and results.html; returns their paths."""
    paths = [out / 'results.csv', out / 'results.md']
    columns = list(dict.fromkeys(name for row in rows for name in row.result))
    table = io.StringIO(newline='')
    writer = csv.DictWriter(table, ['run', *axes, 'status', *columns])
    writer.writeheader()
    writer.writerows({'run': row.run, **row.axes, 'status': row.status, **row.result} for row in rows)
    write_text(paths[0], table.getvalue())
    points = average(rows, axes)
    write_text(paths[1], markdown(points, rows, axes) + '\n')
    if points:
        labels = {name: field for field, name in grid.short_names(axes).items() if field != 'seed'}
        paths += plots.draw(points, pareto(points), labels, out)
    return [*paths, page(out, rows, axes, paths[2:])]


def page(out: Path, rows: list[Row], axes: dict[str, list], pictures: list[Path]) -> Path:
    """Writes results.html, which needs no other file: the rows, to filter and sort, and the pictures, PNG; returns its path."""
    text = lambda value: '+'.join(value) if isinstance(value, tuple) else str(value) if isinstance(value, bool) else value
    cells = [{'run': row.run, **row.axes, 'status': row.status, **row.result} for row in rows]
    names = {name: name for row in cells for name in row} | grid.short_names(axes)
    data = {
        'title': absolute(out).name,
        'columns': [[name, short] for name, short in names.items()],
        'rows': [[text(row.get(name)) for name in names] for row in cells],
        'pictures': [f'data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}' for path in pictures],
    }
    template = pathlib.Path(__file__).with_name('results.html').read_text('utf-8')
    # Escaped so that no text can end the script element.
    data = json.dumps(data, ensure_ascii=False, separators=(',', ':')).replace('<', '\\u003c')
    write_text(out / 'results.html', template.replace('"DATA"', data))
    return out / 'results.html'


def average(rows: list[Row], axes: dict[str, list]) -> list[dict]:
    """One point for the finished rows that differ only in the seed; the std of one value is NaN.

    Returns [{'axes', 'seeds': their number, 'losses': {seed: test loss}, and for each result (mean, sample std, min, max),
    'within': sample std of the test loss after subtracting each seed's mean over all points}].
    """
    groups = {}
    for row in rows:
        if row.result:
            groups.setdefault(tuple((f, row.axes[f]) for f in axes if f != 'seed'), []).append(row)
    points = []
    for key, group in groups.items():
        losses = {row.axes.get('seed'): row.result['test_loss'] for row in group}
        point = {'axes': dict(key), 'seeds': len(group), 'losses': losses}
        for name in group[0].result:
            if values := [row.result[name] for row in group if row.result.get(name) is not None]:
                point[name] = (*_mean_and_std(values), min(values), max(values))
        points.append(point)
    common = set.intersection(*(set(p['losses']) for p in points)) if points else ()
    seed_mean = {seed: np.mean([p['losses'][seed] for p in points]) for seed in common}
    for p in points:
        residuals = [p['losses'][seed] - seed_mean[seed] for seed in common]
        p['within'] = _mean_and_std(residuals)[1] if residuals else float('nan')
    return points


def pareto(points: list[dict]) -> list[dict]:
    """The points that no other point beats in both FLOPs and test loss, by ascending FLOPs."""
    best, front = np.inf, []
    for point in sorted(points, key=lambda p: (p['mflops'][0], p['test_loss'][0])):
        if point['test_loss'][0] < best:
            best = point['test_loss'][0]
            front.append(point)
    return front


def markdown(points: list[dict], rows: list[Row], axes: dict[str, list]) -> str:
    """The points as a table with the Pareto front marked; below it, every run that did not finish, and why."""
    short = grid.short_names(axes)
    fields = [field for field in axes if field != 'seed']
    head = [*(short[f] for f in fields), 'seeds', 'parameters', 'test loss', 'bits/byte', 'active', 'attended', 'MFLOPs']
    head += ['dense ÷ this', 'behind the best', '']
    lines = ['| ' + ' | '.join(head) + ' |', '|' + '---|' * len(head)]
    front = [id(p) for p in pareto(points)]
    best = min(points, key=lambda p: p['test_loss'][0], default=None)
    with_spread = lambda mean, std: f'{mean:.4f}' + ('' if np.isnan(std) else f' ± {std:.4f}')
    number = lambda p, name, digits: f'{p[name][0]:.{digits}f}' if name in p else '–'
    for p in points:
        # Compared seed by seed, because data and initial weights shift the losses of all points alike.
        behind = [loss - best['losses'][seed] for seed, loss in p['losses'].items() if seed in best['losses']]
        active = f'{p["active"][0]:.1%}' if 'active' in p else '–'
        lines.append('| ' + ' | '.join([
            *(str(p['axes'][f]) or '(base)' for f in fields), str(p['seeds']), f'{p["parameters"][0]:,.0f}',
            with_spread(*p['test_loss'][:2]), number(p, 'bits_per_byte', 4), active, number(p, 'attended', 1),
            number(p, 'mflops', 3), f'{p["flops_ratio"][0]:.2f}×',
            with_spread(*_mean_and_std(behind)) if behind and p is not best else '–', 'Pareto' if id(p) in front else '',
        ]) + ' |')  # fmt: skip
    notes = [f'MFLOPs: per token, forward, mean over a context of {int(p["context"][0])} tokens, without the output head, '
             'with the measured activity. ± is the standard deviation over seeds; the distance behind the best is taken '
             'seed by seed.' for p in points[:1]]  # fmt: skip
    failed = [f'- `{row.run}`: {row.status}' for row in rows if row.status != 'done']
    return '\n'.join([*lines, '', *notes, *(['', 'Not finished:', '', *failed] if failed else [])])


def _mean_and_std(values):
    """Mean and sample standard deviation, NaN for a single value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else float('nan')


def _row(out, name, cfg, axes, stopped):
    values = {field: config.fields(cfg)[field] for field in axes}
    summary = out / 'runs' / name / 'summary.json'
    if summary.exists():
        with _read(summary, 'the summary of a run'):
            return Row(name, values, 'done', _result(cfg, json.loads(summary.read_text())))
    if end := execute.failure(out, name) or stopped:
        return Row(name, values, end, {})
    step, _ = execute.latest_metrics(summary.parent)
    return Row(name, values, f'unfinished, at step {step}' if step or summary.parent.exists() else 'not started', {})


@contextlib.contextmanager
def _read(path, what):
    """Turns what a damaged file raises into a ConfigError that says what to do."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as e:
        why = f'{type(e).__name__}: {e}'
        raise ConfigError(f'{path}: not {what} ({why}): delete it, and the sweep writes it again') from None


def _result(cfg, summary):
    model, test, context = at_step(tokenizer_for(cfg)[1].model, cfg.train.steps), summary['test'], cfg.data.seq_len
    neurons = np.array([layer.ffn.d_ff for layer in model.per_layer])
    active = np.array(test['active_by_layer']) * neurons if 'active_by_layer' in test else None
    body = lambda cfg, **measured: flops.group(flops.flops_per_token(cfg, context, 'prefill', **measured))['body']
    measured = body(model, active=active, attended=test['attended_by_layer'])
    return {
        'parameters': summary['parameters'],
        'test_loss': test['loss'],
        'validation_loss': summary['validation']['loss'],
        **{name: test.get(name) for name in ('perplexity', 'bits_per_byte', 'active', 'attended')},
        'd_ff': model.ffn.d_ff,
        'context': context,
        'mflops': measured / 1e6,
        'mflops_configured': body(model) / 1e6,
        'flops_ratio': body(flops.dense_twin(model)) / measured,
        **{name: summary[name] for name in ('train_seconds', 'tokens_per_second')},
    }
