"""An evaluation's report as Markdown tables."""

_FFN = [
    ('active_mean', 'active mean', '.1%'), ('active_p95', 'p95', '.1%'), ('active_max', 'max', '.1%'),
    ('calibration', 'calibration', '.3f'), ('recall', 'recall', '.3f'), ('recall_fitted', 'fitted', '.3f'),
    ('recall_constant', 'constant', '.3f'), ('contribution_kept', 'kept', '.3f'), ('contribution_kept_fitted', 'fitted', '.3f'),
    ('contribution_kept_constant', 'constant', '.3f'), ('contribution_best', 'best', '.3f'),
    ('ks_median', 'KS median', '.3f'), ('ks_p95', 'p95', '.3f'), ('ks_chance', 'chance', '.3f'),
    ('dead', 'dead', 'd'), ('gini', 'Gini', '.2f'),
]  # fmt: skip
_ATTENTION = [
    ('attended_mean', 'keys mean', '.1f'), ('attended_p95', 'p95', '.0f'), ('attended_max', 'max', '.0f'),
    ('attention_calibration', 'calibration', '.3f'), ('attention_recall', 'recall', '.3f'),
    ('attention_contribution_kept', 'kept', '.3f'), ('attention_contribution_best', 'best', '.3f'),
    ('attention_ks_median', 'KS median', '.3f'), ('attention_ks_p95', 'p95', '.3f'),
    ('attention_ks_chance', 'chance', '.3f'),
]  # fmt: skip


def tables(report: dict) -> str:
    """The loss of the whole split and by position; and, if the report has them, the lookups of each layer and FLOPs by part."""
    lines = [*_losses(report), *_fit(report), '', *_positions(report['by_position'], report['position_in'])]
    if 'layers' in report:
        layers = report['layers']
        lines += ['', *_layers('FFN', layers, _FFN), '', *_layers('attention', layers, _ATTENTION)]
        lines += [*_unions(layers), '', *_flops(report['flops'])]
    return '\n'.join(lines)


def _losses(report):
    lines = [
        f'Step {report["step"]} on the {report["split"]} split: {report["tokens"]:,} tokens, {report["documents"]:,} documents, '
        f'{report["bytes"]:,} bytes',
        '',
        '|  | loss | perplexity | bits/byte |',
        '|---|---|---|---|',
    ]
    for name, losses in [('all tokens', report), ('without document ends', report['without_ends'])]:
        bits = f'{losses["bits_per_byte"]:.4f}' if 'bits_per_byte' in losses else '–'
        lines.append(f'| {name} | {losses["loss"]:.4f} | {losses["perplexity"]:.3f} | {bits} |')
    return lines


def _fit(report):
    """What predictors were fitted to, and whether that is enough."""
    if 'fit_tokens' not in report:
        return []
    few = report['fit_tokens'] < report['fit_tokens_wanted']
    warning = f': fewer than the {report["fit_tokens_wanted"]:,} wanted, so a fit to more text may reach more' if few else ''
    return ['', f'Predictors were fitted to {report["fit_tokens"]:,} tokens of {report["fit_text"]}{warning}.']


def _positions(pieces, where):
    attended = 'attended_mean' in pieces[0] if pieces else False
    names = ['mean', 'p95', 'max'] if attended else []
    heads = [f'position in the {where}', 'tokens', 'loss', *(f'keys {name}, layer by layer' for name in names)]
    lines = ['| ' + ' | '.join(heads) + ' |', '|' + '---|' * len(heads)]
    for piece in pieces:
        cells = [f'{piece["from"]} … {piece["to"] - 1}', f'{piece["tokens"]:,}', f'{piece["loss"]:.4f}']
        cells += [' '.join(f'{n:.0f}' for n in piece[f'attended_{name}']) for name in names]
        lines.append('| ' + ' | '.join(cells) + ' |')
    return lines


def _layers(half, layers, columns):
    """A row for each layer; columns that no layer has are left out."""
    columns = [column for column in columns if any(column[0] in layer for layer in layers)]
    heads = ' | '.join(head for _, head, _ in columns)
    lines = [f'| {half} of layer | {heads} |', '|' + '---|' * (1 + len(columns))]
    for layer in layers:
        cells = [format(layer[name], style) if name in layer else '–' for name, _, style in columns]
        lines.append(f'| {layer["layer"]} {layer["span"]} | ' + ' | '.join(cells) + ' |')
    return lines


def _unions(layers):
    """The share of neurons that any of several tokens activates."""
    if 'union' not in layers[0]:
        return []
    lines = []
    for name, which in [('union', 'consecutive tokens'), ('union_rows', 'tokens of different rows')]:
        sizes = list(layers[0][name])
        lines += ['', f'| active for any of n {which}, n = | ' + ' | '.join(sizes) + ' |', '|' + '---|' * (1 + len(sizes))]
        for layer in layers:
            lines.append(f'| {layer["layer"]} {layer["span"]} | ' + ' | '.join(f'{layer[name][n]:.1%}' for n in sizes) + ' |')
    return lines


def _flops(flops):
    decode = flops['decode']
    sparse = decode['measured'] != decode['dense']
    counts = ('dense', 'configured', 'measured') if sparse else ('measured',)
    columns = [*((phase, count) for phase in ('prefill', 'decode') for count in counts), ('training', 'configured')]
    lines = [f'FLOPs per token, millions, at a context of {flops["context"]} tokens:', '']
    lines += ['| part | ' + ' | '.join(map(', '.join, columns)) + ' |', '|' + '---|' * (len(columns) + 1)]
    names = {'total': 'all', 'body': 'all but the head'}
    for part in decode['dense']:
        cells = [f'{flops[phase][count][part] / 1e6:,.3f}' for phase, count in columns]
        lines.append(f'| {names.get(part, part)} | ' + ' | '.join(cells) + ' |')
    if sparse:
        parts = {'ffn': 'FFN', 'attention': 'attention', 'body': 'all but the head'}
        ratios = [f'{name} {decode["dense"][part] / decode["measured"][part]:.2f}×' for part, name in parts.items()]
        lines += ['', f'Dense over this model, decoding: {", ".join(ratios)}.']
    return lines
