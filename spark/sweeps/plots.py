"""The figures of a sweep: test loss against compute and against each axis, written as PNG."""

import itertools

import numpy as np

from spark.evaluation.plots import COLORS, figure, save
from spark.runtime import Path

MANY = 16  # more points, lines or ticks than that are not labelled one by one


def draw(points: list[dict], front: list[dict], labels: dict[str, str], out: Path) -> list[Path]:
    """Writes loss_flops.png, with the Pareto front, and loss_NAME.png for each of `labels`, {NAME: axis}; returns their paths."""
    paths = [_loss_flops(points, front, labels, out / 'loss_flops.png')]
    for label, field in labels.items():
        if len({p['axes'][field] for p in points}) > 1:
            paths.append(_loss_axis(points, label, labels, out / f'loss_{label}.png'))
    return paths


def _loss_flops(points, front, labels, path):
    fig, ax = figure(8, 5.5)
    cost, loss = ([p[name][0] for p in front] for name in ('mflops', 'test_loss'))
    ax.step(cost, loss, where='post', color='0.6', lw=1.5, zorder=1, label='Pareto front')
    many = len(points) > MANY
    color_by = None if many else next(iter(labels), None)
    values = list(dict.fromkeys(p['axes'][labels[color_by]] for p in points)) if color_by else [None]
    for value, color in zip(values, itertools.cycle(COLORS), strict=False):
        group = [p for p in points if color_by is None or p['axes'][labels[color_by]] == value]
        name = f'{color_by} = {value}' if color_by else None
        _errorbar(ax, [p['mflops'][0] for p in group], group, color=color, fmt='o', label=name)
    for p in () if many else points:
        text = ', '.join(f'{name} {p["axes"][field]}' for name, field in labels.items() if name != color_by)
        ax.annotate(text, (p['mflops'][0], p['test_loss'][0]), xytext=(6, 4), textcoords='offset points', fontsize=8, color='0.3')
    _log_x(ax)
    ax.set_xlabel('MFLOPs per token, forward, without the output head, as measured')
    return _finish(fig, ax, 'Test loss against compute', points, path)


def _loss_axis(points, label, labels, path):
    field = labels[label]
    many = len({tuple(p['axes'][f] for f in labels.values() if f != field) for p in points}) > MANY
    others = {name: f for name, f in labels.items() if name != label and not many}  # more lines than that tell nothing
    ticks = list(dict.fromkeys(p['axes'][field] for p in points))
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in ticks)
    ticks = sorted(ticks) if numeric else ticks[::-1]  # names stand beside the plot, the first one on top
    fig, ax = figure(7, 5) if numeric else figure(8, 1.5 + 0.35 * len(ticks))
    x_of = {v: v if numeric else i for i, v in enumerate(ticks)}
    lines = {}
    for p in points:
        lines.setdefault(tuple(p['axes'][f] for f in others.values()), []).append(p)
    for (key, group), color in zip(lines.items(), itertools.cycle(COLORS), strict=False):
        group.sort(key=lambda p: x_of[p['axes'][field]])
        name = ', '.join(f'{n} = {v}' for n, v in zip(others, key, strict=True))
        x = [x_of[p['axes'][field]] for p in group]
        _errorbar(ax, x, group, not numeric, color=color, fmt='o-' if numeric and not many else 'o', label=name or None)
    if numeric and min(ticks) > 0 and max(ticks) >= 8 * min(ticks):
        _log_x(ax)
    if not numeric:
        ax.set_yticks([x_of[v] for v in ticks], [str(v) or '(base)' for v in ticks])
    elif len(ticks) <= MANY:
        ax.set_xticks([x_of[v] for v in ticks], [str(v) for v in ticks])
        ax.minorticks_off()
    (ax.set_xlabel if numeric else ax.set_ylabel)(field)
    return _finish(fig, ax, f'Test loss against {label}', points, path, sideways=not numeric)


def _errorbar(ax, x, points, sideways=False, **style):
    """The mean over seeds, with a thin bar for their range and a thick one for the std about each seed's mean."""
    mean, _, least, most = np.array([p['test_loss'] for p in points]).T
    within = np.nan_to_num([p['within'] for p in points])
    at, error = ((mean, x), 'xerr') if sideways else ((x, mean), 'yerr')
    ax.errorbar(*at, **{error: [mean - least, most - mean]}, capsize=0, lw=0.8, alpha=0.5, fmt='none', color=style['color'])
    ax.errorbar(*at, **{error: within}, capsize=3, elinewidth=3, ms=5, lw=1.5, **style)


def _log_x(ax):
    """A logarithmic axis with plain numbers, over more than a decade at its powers only."""
    ax.set_xscale('log')
    low, high = ax.get_xlim()
    ax.xaxis.set_major_formatter('{x:.4g}')
    ax.xaxis.set_minor_formatter('{x:.4g}' if high < 20 * low else '')


def _finish(fig, ax, title, points, path, sideways=False):
    seeds = max(p['seeds'] for p in points)
    spread = f"\n{seeds} seeds: mean, range (thin), standard deviation about each seed's mean (thick)"
    fig.suptitle(title + (spread if seeds > 1 else ''), fontsize=11)  # over the names beside the plot, too
    (ax.set_xlabel if sideways else ax.set_ylabel)('test loss, nats per token')
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, fontsize=9)
    return save(fig, path)
