"""Pictures of evaluations and sweeps: matplotlib figures, written as PNG."""

import itertools

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from scipy.stats import norm

COLORS = ['#0072b2', '#d55e00', '#009e73', '#cc79a7', '#56b4e9', '#e69f00', '#000000', '#999933']  # told apart by all (Okabe-Ito)


def sweep(points, front, labels, out):
    """Loss against FLOPs with the Pareto front, and against each axis, with the spread over seeds; the paths written.

    Args:
      points: of `results.average`.
      front: those of `results.pareto`.
      labels: {short name: field} of the axes other than the seed.
      out: a directory.
    """
    paths = [_loss_flops(points, front, labels, out / 'loss_flops.png')]
    for label, field in labels.items():
        if len({p['axes'][field] for p in points}) > 1:
            paths.append(_loss_axis(points, label, labels, out / f'loss_{label}.png'))
    return paths


def evaluation(cfg, report, sums, layer, out):
    """activity.png, scores_LAYER.png and attended.png of `evaluate.evaluate`'s report and sums; the paths written.

    Args:
      cfg: the ModelConfig.
      report, sums: of evaluate.
      layer: whose scores are drawn.
      out: a directory.
    """
    title = f'step {report["step"]}, {report["split"]} split'
    return [
        _activity(cfg, report['layers'], title, out / 'activity.png'),
        _scores(cfg, sums, layer, title, out / f'scores_{layer}.png'),
        _attended(cfg, sums, title, out / 'attended.png'),
    ]


def _activity(cfg, layers, title, path):
    """Active neurons and attended keys, layer by layer: mean, 95th percentile and maximum over tokens."""
    figure, axes = _figure(11, 4.5, 1, 2)
    share = 100 * cfg.ffn.k / cfg.ffn.d_ff
    halves = [
        ('active', 100, 'active neurons, % of d_ff', share, f'k / d_ff = {share:.1f}%'),
        ('attended', 1, 'keys attended per query and head', cfg.attention.k, f'k = {cfg.attention.k}'),
    ]
    x = [layer['layer'] for layer in layers]
    for ax, (name, scale, label, k, k_label) in zip(axes, halves, strict=True):
        if f'{name}_mean' in layers[0]:
            values = {q: [scale * layer[f'{name}_{q}'] for layer in layers] for q in ('mean', 'p95', 'max')}
            ax.bar(x, values['mean'], color=COLORS[0], width=0.7, label='mean')
            ax.plot(x, values['p95'], 'v', color=COLORS[1], label='95 % of tokens are below')
            ax.plot(x, values['max'], '^', color=COLORS[2], label='maximum')
            if k:
                ax.axhline(k, color='0.3', ls='--', lw=1, label=k_label)
            ax.legend(frameon=False, fontsize=9, ncols=2, loc='upper center')
        else:
            ax.text(0.5, 0.5, f'kind {cfg.ffn.kind!r}: every neuron takes part', ha='center', transform=ax.transAxes)
        ax.set_ylim(0, 1.25 * ax.get_ylim()[1])
        ax.set_xticks(x if len(x) <= 16 else x[:: len(x) // 13])
        ax.set_xlabel('layer')
        ax.set_ylabel(label)
    figure.suptitle(f'Activity by layer: {title}')
    _save(figure, path)
    return path


def _scores(cfg, sums, layer, title, path):
    """One layer's standardised scores against the normal density, and the FFN's threshold."""
    from spark.evaluation.sparsity import EDGES, kolmogorov_smirnov

    figure, axes = _figure(11, 4.5, 1, 2)
    middle, width = (EDGES[1:] + EDGES[:-1]) / 2, EDGES[1] - EDGES[0]
    for ax, half in zip(axes, ('ffn', 'attention'), strict=True):
        counts = sums[f'{half}_scores'][layer]
        if counts.sum():
            ax.fill_between(middle, counts / counts.sum() / width, step='mid', color=COLORS[0], alpha=0.5, label='scores')
        ax.plot(middle, norm.pdf(middle), color='0.2', lw=1, label='normal')
        ax.set_xlim(-5, 5)
        ax.set_xlabel('score, standardised per token')
        ax.set_ylabel('density')
        name = 'FFN' if half == 'ffn' else f'attention, queries that see more than {cfg.attention.k} keys'
        ax.set_title(f'{name}\nKS distance {kolmogorov_smirnov(counts):.3f}', fontsize=11)
        ax.set_ylim(0, 1.25 * ax.get_ylim()[1])
    if 0 < cfg.ffn.k < cfg.ffn.d_ff:
        threshold = norm.isf(cfg.ffn.k / cfg.ffn.d_ff)
        counts = sums['ffn_scores'][layer]
        above = counts[middle > threshold].sum() / counts.sum()
        label = f'threshold Q(1 − k/d_ff) = {threshold:.2f}\n{above:.1%} above, k/d_ff = {cfg.ffn.k / cfg.ffn.d_ff:.1%}'
        axes[0].axvline(threshold, color=COLORS[1], ls='--', label=label)
    for ax in axes:
        ax.legend(frameon=False, fontsize=9, loc='upper left')
    figure.suptitle(f'Predictor scores of layer {layer}: {title}' if cfg.ffn.r else f'Scores of layer {layer}: {title}')
    _save(figure, path)
    return path


def _attended(cfg, sums, title, path):
    """Keys attended by place in the document, layer by layer, against all that are visible and against k."""
    figure, axes = _figure(8, 5)
    there = np.flatnonzero(sums['positions'])
    spans = [cfg.pattern[i % len(cfg.pattern)] for i in range(cfg.n_layers)]
    colors = colormaps['viridis'](np.linspace(0, 0.9, cfg.n_layers))
    for i, (span, color) in enumerate(zip(spans, colors, strict=True)):
        style = '-' if span == 'global' else ':'
        y = sums['by_position'][i][there] / sums['positions'][there]
        axes.plot(there + 1, y, style, color=color, lw=1.5, label=f'layer {i}, {span}' if cfg.n_layers <= 12 else None)
    axes.plot(there + 1, there + 1, color='0.6', lw=1, ls='-.', label='all visible keys')
    if cfg.attention.k:
        axes.axhline(cfg.attention.k, color=COLORS[1], ls='--', lw=1, label=f'k = {cfg.attention.k}')
        axes.set_ylim(0, 2.5 * cfg.attention.k)
    axes.set_xlabel('place in the document, or in its part that the row holds')
    axes.set_ylabel('keys attended per query, mean over heads')
    axes.legend(frameon=False, fontsize=9)
    axes.set_title(f'Attended keys by position: {title}')
    _save(figure, path)
    return path


def _loss_flops(points, front, labels, path):
    figure, axes = _figure(8, 5.5)
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
        place = p['mflops'][0], p['test_loss'][0]
        axes.annotate(text, place, xytext=(6, 4), textcoords='offset points', fontsize=8, color='0.3')
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
    """The mean over seeds; a thin bar for their range, a thick one for what is left when each seed's own level is out."""
    mean, _, least, most = np.array([p['test_loss'] for p in points]).T
    within = np.nan_to_num([p['within'] for p in points])
    axes.errorbar(x, mean, yerr=[mean - least, most - mean], capsize=0, lw=0.8, alpha=0.5, fmt='none', color=style['color'])
    axes.errorbar(x, mean, yerr=within, capsize=3, elinewidth=3, ms=5, lw=1.5, **style)


def _log_x(axes):
    """A logarithmic axis with plain numbers."""
    axes.set_xscale('log')
    plain = FuncFormatter(lambda x, _: f'{x:.4g}')
    axes.xaxis.set_major_formatter(plain)
    axes.xaxis.set_minor_formatter(plain)


def _finish(figure, axes, title, points, path):
    seeds = max(p['seeds'] for p in points)
    axes.set_ylabel('test loss, nats per token')
    spread = f'{seeds} seeds: mean, range (thin), standard deviation about each seed\'s level (thick)'
    axes.set_title(title + (f'\n{spread}' if seeds > 1 else ''), fontsize=11)
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
        ax.set_axisbelow(True)
    return figure, axes


def _save(figure, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
