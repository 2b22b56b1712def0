"""Pictures of evaluations and sweeps: matplotlib figures, written as PNG."""

import itertools

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

COLORS = ['#0072b2', '#d55e00', '#009e73', '#cc79a7', '#56b4e9', '#e69f00', '#000000', '#999933']  # told apart by all (Okabe-Ito)


def sweep(points, labels, out):
    """Loss against FLOPs with the Pareto front, and against each axis, with the spread over seeds; the paths written.

    Args:
      points: of `sweep.average`.
      labels: {short name: field} of the axes other than the seed.
      out: a directory.
    """
    paths = [_loss_flops(points, labels, out / 'loss_flops.png')]
    for label, field in labels.items():
        if len({p['axes'][field] for p in points}) > 1:
            paths.append(_loss_axis(points, label, labels, out / f'loss_{label}.png'))
    return paths


def _loss_flops(points, labels, path):
    from spark.analysis.sweep import pareto

    figure, axes = _figure(8, 5.5)
    front = pareto(points)
    cost, loss = ([p[name][0] for p in front] for name in ('mflops', 'test_loss'))
    axes.step(cost, loss, where='post', color='0.6', lw=1.5, zorder=1, label='Pareto front')
    color_by = next(iter(labels), None)
    values = list(dict.fromkeys(p['axes'][labels[color_by]] for p in points)) if color_by else [None]
    for value, color in zip(values, itertools.cycle(COLORS), strict=False):
        here = [p for p in points if color_by is None or p['axes'][labels[color_by]] == value]
        name = f'{color_by} = {value}' if color_by else None
        _errorbar(axes, [p['mflops'][0] for p in here], here, color=color, fmt='o', label=name)
    for p in points:
        text = ', '.join(f'{name} {p["axes"][field]}' for name, field in labels.items() if name != color_by)
        axes.annotate(text, (p['mflops'][0], p['test_loss'][0]), xytext=(6, 4), textcoords='offset points', fontsize=8, color='0.3')
    _log_x(axes)
    axes.set_xlabel('MFLOPs per token, forward, without the output head, as measured')
    _finish(figure, axes, 'Test loss against compute', points, path)
    return path


def _loss_axis(points, label, labels, path):
    figure, axes = _figure(7, 5)
    field = labels[label]
    others = {name: f for name, f in labels.items() if name != label}
    ticks = list(dict.fromkeys(p['axes'][field] for p in points))
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in ticks)
    ticks = sorted(ticks) if numeric else ticks
    place = {v: v if numeric else i for i, v in enumerate(ticks)}
    lines = {}
    for p in points:
        lines.setdefault(tuple(p['axes'][f] for f in others.values()), []).append(p)
    for (key, here), color in zip(lines.items(), itertools.cycle(COLORS), strict=False):
        here.sort(key=lambda p: place[p['axes'][field]])
        name = ', '.join(f'{n} = {v}' for n, v in zip(others, key, strict=True))
        x = [place[p['axes'][field]] for p in here]
        _errorbar(axes, x, here, color=color, fmt='o-' if numeric else 'o', label=name or None)
    if numeric and min(ticks) > 0 and max(ticks) >= 8 * min(ticks):
        _log_x(axes)
    axes.set_xticks([place[v] for v in ticks], [str(v) for v in ticks])
    axes.minorticks_off()
    axes.set_xlabel(field)
    _finish(figure, axes, f'Test loss against {label}', points, path)
    return path


def _errorbar(axes, x, points, **style):
    """Mean, and from the smallest to the largest over seeds."""
    mean, _, least, most = np.array([p['test_loss'] for p in points]).T
    axes.errorbar(x, mean, yerr=[mean - least, most - mean], capsize=3, ms=5, lw=1.5, **style)


def _log_x(axes):
    """A logarithmic axis with plain numbers."""
    axes.set_xscale('log')
    plain = FuncFormatter(lambda x, _: f'{x:.4g}')
    axes.xaxis.set_major_formatter(plain)
    axes.xaxis.set_minor_formatter(plain)


def _finish(figure, axes, title, points, path):
    seeds = max(p['seeds'] for p in points)
    axes.set_ylabel('test loss, nats per token' + (f' (mean and range of {seeds} seeds)' if seeds > 1 else ''))
    axes.set_title(title)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)
    _save(figure, path)


def _figure(width, height, rows=1, columns=1, **more):
    figure = Figure(figsize=(width, height), layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, **more)
    for ax in np.ravel(axes):
        ax.spines[['top', 'right']].set_visible(False)
        ax.grid(alpha=0.25)
    return figure, axes


def _save(figure, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
