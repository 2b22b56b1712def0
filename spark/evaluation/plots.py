"""The figures of an evaluation, written as PNG. Sweeps share `figure`, `save` and COLORS."""


import io

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.stats import norm

from spark.config import ModelConfig
from spark.config.layers import ALL_KEYS
from spark.evaluation.sparsity import EDGES, kolmogorov_smirnov
from spark.runtime import Path, write_bytes

COLORS = ['#0072b2', '#d55e00', '#009e73', '#cc79a7', '#56b4e9', '#e69f00', '#000000', '#999933']  # Okabe-Ito: colour-blind safe


def draw(cfg: ModelConfig, report: dict, sums: dict, layer: int, out: Path) -> list[Path]:
    """Writes activity.png, scores_LAYER.png and attended.png of `evaluate`'s report and sums; returns their paths."""
    title = f'step {report["step"]}, {report["split"]} split'
    return [
        _activity(cfg, report['layers'], title, out / 'activity.png'),
        _scores(cfg, sums, layer, title, out / f'scores_{layer}.png'),
        _attended(cfg, sums, title, out / 'attended.png'),
    ]


def _activity(cfg, layers, title, path):
    """Active neurons and attended keys of each layer: mean, 95th percentile and maximum over tokens."""
    fig, axes = figure(11, 4.5, 1, 2)
    shares = [100 * layer.ffn.k / layer.ffn.d_ff for layer in cfg.per_layer]
    keys = [layer.attention.k if layer.attention.k < ALL_KEYS else 0 for layer in cfg.per_layer]
    halves = [
        ('active', 100, 'active neurons, % of d_ff', shares, f'k / d_ff = {shares[0]:.1f}%'),
        ('attended', 1, 'keys attended per query and head', keys, f'k = {keys[0]}'),
    ]
    x = [layer['layer'] for layer in layers]
    for ax, (name, scale, label, ks, k_label) in zip(axes, halves, strict=True):
        if any(f'{name}_mean' in layer for layer in layers):
            values = {q: [scale * layer.get(f'{name}_{q}', 1) for layer in layers] for q in ('mean', 'p95', 'max')}
            ax.bar(x, values['mean'], color=COLORS[0], width=0.7, label='mean')
            ax.plot(x, values['p95'], 'v', color=COLORS[1], label='95th percentile')
            ax.plot(x, values['max'], '^', color=COLORS[2], label='maximum')
            if len(set(ks)) > 1:
                ax.step(x, [k or np.nan for k in ks], where='mid', color='0.3', ls='--', lw=1, label='k')
            elif ks[0]:
                ax.axhline(ks[0], color='0.3', ls='--', lw=1, label=k_label)
            ax.legend(frameon=False, fontsize=9, ncols=2, loc='upper center')
        else:
            ax.text(0.5, 0.5, f'kind {cfg.ffn.kind!r}: every neuron is active', ha='center', transform=ax.transAxes)
        ax.set(xlabel='layer', ylabel=label, xticks=x if len(x) <= 16 else x[:: len(x) // 13], ylim=(0, 1.25 * ax.get_ylim()[1]))
    fig.suptitle(f'Activity by layer: {title}')
    return save(fig, path)


def _scores(cfg, sums, layer, title, path):
    """The standardised scores of one layer against the normal density, and the FFN's threshold if it is one by statistics."""
    fig, axes = figure(11, 4.5, 1, 2)
    own = cfg.per_layer[layer]
    middle, width, share = (EDGES[1:] + EDGES[:-1]) / 2, EDGES[1] - EDGES[0], own.ffn.k / own.ffn.d_ff
    for ax, half in zip(axes, ('ffn', 'attention'), strict=True):
        counts = sums[f'{half}_scores'][layer]
        if counts.sum():
            ax.fill_between(middle, counts / counts.sum() / width, step='mid', color=COLORS[0], alpha=0.5, label='scores')
        ax.plot(middle, norm.pdf(middle), color='0.2', lw=1, label='normal')
        if half == 'ffn' and own.ffn.any_k and own.ffn.groups == 1 and share < 1:
            threshold = norm.isf(share)
            above = counts[middle > threshold].sum() / counts.sum()
            label = f'threshold Q(1 − k/d_ff) = {threshold:.2f}\n{above:.1%} above, k/d_ff = {share:.1%}'
            ax.axvline(threshold, color=COLORS[1], ls='--', label=label)
        ax.legend(frameon=False, fontsize=9, loc='upper left')
        those = f', queries with more than {own.attention.k} visible keys' if own.attention.k < ALL_KEYS else ''
        name = 'FFN' if half == 'ffn' else f'attention{those}'
        ax.set_title(f'{name}\nKS distance {kolmogorov_smirnov(counts):.3f}', fontsize=11)
        ax.set(xlabel='score, standardised per token', ylabel='density', xlim=(-5, 5), ylim=(0, 1.25 * ax.get_ylim()[1]))
    fig.suptitle(f'Predictor scores of layer {layer}: {title}' if own.ffn.r else f'Scores of layer {layer}: {title}')
    return save(fig, path)


def _attended(cfg, sums, title, path):
    """Attended keys by position in the document, one line per layer, against all visible keys and against k."""
    fig, ax = figure(8, 5)
    positions = np.flatnonzero(sums['positions'])
    spans = [cfg.pattern[i % len(cfg.pattern)] for i in range(cfg.n_layers)]
    colors = colormaps['viridis'](np.linspace(0, 0.9, cfg.n_layers))
    for i, (span, color) in enumerate(zip(spans, colors, strict=True)):
        style = '-' if span == 'global' else ':'
        y = sums['by_position'][i][positions] / sums['positions'][positions]
        ax.plot(positions + 1, y, style, color=color, lw=1.5, label=f'layer {i}, {span}' if cfg.n_layers <= 12 else None)
    ax.plot(positions + 1, positions + 1, color='0.6', lw=1, ls='-.', label='all visible keys')
    ks = sorted({layer.attention.k for layer in cfg.per_layer if 0 < layer.attention.k < ALL_KEYS})
    for k in ks:
        ax.axhline(k, color=COLORS[1], ls='--', lw=1, label=f'k = {k}')
    if ks:
        ax.set_ylim(0, 2.5 * ks[-1])
    ax.legend(frameon=False, fontsize=9)
    ax.set_xlabel('position in the document, or in the part of it that is in the row')
    ax.set(ylabel='keys attended per query, mean over heads', title=f'Attended keys by position: {title}')
    return save(fig, path)


SELECTED = (  # (field of a layer, its name, its line) of each panel of `recall`
    [
        *(('recall', 'top-k', '-'), ('recall_fitted', 'a linear predictor, fitted', '--')),
        *(('recall_constant', 'one ranking for all', ':'), ('active_mean', 'by chance', '-.')),
    ],
    [
        *(('contribution_kept', 'top-k', '-'), ('contribution_kept_fitted', 'a linear predictor, fitted', '--')),
        *(('contribution_kept_constant', 'one ranking for all', ':'), ('contribution_best', 'the largest ones', '-.')),
    ],
    [('attention_contribution_kept', 'share of all contributions', '-'), ('attention_recall', 'recall', '--')],
)


def recall(history: list[dict], title: str, path: Path) -> Path:
    """How top-k selected at each checkpoint; `history` has {'step', 'layers'} of each. Thin lines: layers; thick: mean."""
    fig, axes = figure(15, 4.5, 1, 3)
    titles = 'FFN: recall of the k largest contributions', 'FFN: share of all contributions', 'attention to more than k keys'
    x = [report['step'] for report in history]
    for ax, name, fields in zip(axes, titles, SELECTED, strict=True):
        for (field, label, line), color in zip(fields, COLORS, strict=False):
            there = lambda layer, field=field: field in layer and (field != 'active_mean' or 'recall' in layer)
            value = lambda layer, field=field, there=there: layer[field] if there(layer) else np.nan
            y = np.array([[value(layer) for layer in report['layers']] for report in history], float)
            known = ~np.isnan(y)
            if known.any():
                mean = np.divide(np.nansum(y, axis=1), known.sum(axis=1), out=np.full(len(x), np.nan), where=known.any(axis=1))
                ax.plot(x, y, line, color=color, lw=0.6, alpha=0.5)
                ax.plot(x, mean, line, color=color, marker='o', ms=4, label=label)
        if not ax.lines:
            ax.text(0.5, 0.5, 'nothing is selected', ha='center', transform=ax.transAxes)
        else:
            ax.legend(frameon=False, fontsize=9)
        ax.set(title=name, xlabel='step', ylim=(0, 1))
    fig.suptitle(f'What top-k selects, {title}')
    return save(fig, path)


def figure(width: int | float, height: int | float, rows: int = 1, columns: int = 1) -> tuple[Figure, Axes | np.ndarray]:
    """An empty figure of so many inches, and its axes."""
    fig = Figure(figsize=(width, height), layout='constrained')
    FigureCanvasAgg(fig)
    axes = fig.subplots(rows, columns)
    for ax in np.ravel(axes):
        ax.spines[['top', 'right']].set_visible(False)
        ax.grid(alpha=0.25)
        ax.set_axisbelow(True)
    return fig, axes


def save(fig: Figure, path: Path) -> Path:
    """Writes a PNG, creates its directory, and returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = io.BytesIO()
    fig.savefig(picture, dpi=130)
    write_bytes(path, picture.getvalue())
    return path
