"""What came out of a sweep: a row per run, means over seeds, tables and plots.

    OUT/results.csv     a row per run
    OUT/results.md      means over seeds and the Pareto front; below, the runs that did not finish, and why
    OUT/loss_*.png
"""

import csv
import dataclasses
import json

import numpy as np

from spark import config, flops
from spark.data import pipeline
from spark.errors import Preempted
from spark.evaluation import plots
from spark.sweeps.grid import latest, short_names


@dataclasses.dataclass(frozen=True)
class Row:
    """Where a run stands; `result` holds the figures of a finished one."""

    run: str
    axes: dict
    status: str
    result: dict = dataclasses.field(default_factory=dict)


def collect(out, axes, runs=()):
    """A Row for every one of `runs` and every run directory in OUT, in the order of the axes' values, others last."""
    cfgs = {run.name: run.cfg for run in runs}
    cfgs |= {p.parent.name: config.load(p) for p in out.glob('runs/*/config.json')}
    rows = [_row(out, name, cfg, axes) for name, cfg in cfgs.items()]
    place = lambda value, values: values.index(value) if value in values else len(values)
    return sorted(rows, key=lambda row: ([place(row.axes[field], axes[field]) for field in axes], row.run))


def write(out, rows, axes):
    """results.csv, results.md and the plots of Rows; the paths."""
    short = short_names(axes)
    paths = [out / 'results.csv', out / 'results.md']
    columns = list(dict.fromkeys(name for row in rows for name in row.result))
    with paths[0].open('w', newline='') as f:
        writer = csv.DictWriter(f, ['run', *axes, 'status', *columns])
        writer.writeheader()
        for row in rows:
            writer.writerow({'run': row.run, **row.axes, 'status': row.status, **row.result})
    points = average(rows, axes)
    paths[1].write_text(markdown(points, rows, axes) + '\n')
    if points:
        labels = {short[field]: field for field in axes if field != 'seed'}
        paths += plots.sweep(points, pareto(points), labels, out)
    return paths


def average(rows, axes):
    """Finished rows that differ in nothing but the seed, as one.

    Returns:
      [{'axes', 'seeds': how many, 'losses': {seed: test loss}, name: (mean, sample std, min, max),
        'within': sample std of the test loss once every seed's mean over the points is taken out}]; a std of one value is NaN.
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
            values = [row.result[name] for row in group if row.result.get(name) is not None]
            if values:
                point[name] = (*_mean_and_std(values), min(values), max(values))
        points.append(point)
    common = set.intersection(*(set(p['losses']) for p in points)) if points else ()
    level = {seed: np.mean([p['losses'][seed] for p in points]) for seed in common}
    for p in points:
        rest = [p['losses'][seed] - level[seed] for seed in common]
        p['within'] = _mean_and_std(rest)[1] if rest else float('nan')
    return points


def pareto(points, cost='mflops', loss='test_loss'):
    """The points that no other one beats in both cost and loss, by ascending cost."""
    best, front = np.inf, []
    for point in sorted(points, key=lambda p: (p[cost][0], p[loss][0])):
        if point[loss][0] < best:
            best = point[loss][0]
            front.append(point)
    return front


def markdown(points, rows, axes):
    """The averaged points as a table, the Pareto front marked; below it every run that did not finish, and why."""
    short = short_names(axes)
    fields = [field for field in axes if field != 'seed']
    head = [*(short[f] for f in fields), 'seeds', 'parameters', 'test loss', 'bits/byte', 'active', 'attended', 'MFLOPs']
    head += ['dense ÷ this', 'behind the best', '']
    lines = ['| ' + ' | '.join(head) + ' |', '|' + '---|' * len(head)]
    front = [id(p) for p in pareto(points)]
    best = min(points, key=lambda p: p['test_loss'][0], default=None)
    with_spread = lambda mean, std: f'{mean:.4f}' + ('' if np.isnan(std) else f' ± {std:.4f}')
    number = lambda p, name, digits: f'{p[name][0]:.{digits}f}' if name in p else '–'
    for p in points:
        # Seed by seed, since a seed's data and initial weights move all points alike.
        behind = [loss - best['losses'][seed] for seed, loss in p['losses'].items() if seed in best['losses']]
        active = f'{p["active"][0]:.1%}' if 'active' in p else '–'
        lines.append('| ' + ' | '.join([
            *(str(p['axes'][f]) for f in fields), str(p['seeds']), f'{p["parameters"][0]:,.0f}',
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


def _row(out, name, cfg, axes):
    values = {field: config.fields(cfg)[field] for field in axes}
    summary, ended = out / 'runs' / name / 'summary.json', out / 'logs' / f'{name}.json'
    if summary.exists():
        return Row(name, values, 'done', _figures(cfg, json.loads(summary.read_text())))
    end = json.loads(ended.read_text()) if ended.exists() else {}
    if end.get('exit_code') not in (None, 0, Preempted.exit_code):
        return Row(name, values, f'failed, exit code {end["exit_code"]}: {end["message"]}')
    step, _ = latest(summary.parent)
    return Row(name, values, f'unfinished, at step {step}' if step or summary.parent.exists() else 'not started')


def _figures(cfg, summary):
    model, test = pipeline.tokenizer_for(cfg)[1].model, summary['test']
    context = cfg.data.seq_len
    active = np.array(test['active_by_layer']) * model.ffn.d_ff if 'active_by_layer' in test else None
    body = lambda cfg, **measured: flops.group(flops.flops_per_token(cfg, context, 'prefill', **measured))['body']
    measured = body(model, active=active, attended=test['attended_by_layer'])
    return {
        'parameters': summary['parameters'],
        'test_loss': test['loss'],
        'validation_loss': summary['validation']['loss'],
        'perplexity': test['perplexity'],
        'bits_per_byte': test.get('bits_per_byte'),
        'active': test.get('active'),
        'attended': test['attended'],
        'd_ff': model.ffn.d_ff,
        'context': context,
        'mflops': measured / 1e6,
        'mflops_configured': body(model) / 1e6,
        'flops_ratio': body(flops.dense_twin(model)) / measured,
        'train_seconds': summary['train_seconds'],
        'tokens_per_second': summary['tokens_per_second'],
    }
