"""An evaluation's report as Markdown tables."""

_LAYER_COLUMNS = [
    ('active_mean', 'active mean', '.1%'), ('active_p95', 'p95', '.1%'), ('active_max', 'max', '.1%'),
    ('recall', 'recall', '.3f'), ('precision', 'precision', '.3f'), ('ks', 'KS', '.3f'),
    ('dead', 'dead', 'd'), ('gini', 'Gini', '.2f'),
    ('attended_mean', 'keys mean', '.1f'), ('attended_max', 'max', '.0f'),
    ('attention_recall', 'recall', '.3f'), ('attention_precision', 'precision', '.3f'), ('attention_ks', 'KS', '.3f'),
]  # fmt: skip


def tables(report: dict) -> str:
    """The loss of the whole split; and, if the report has them, the lookups of each layer and FLOPs by part."""
    lines = _losses(report)
    if 'layers' in report:
        lines += ['', *_layers(report['layers']), '', *_flops(report['flops'])]
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


def _layers(layers):
    heads = ' | '.join(head for _, head, _ in _LAYER_COLUMNS)
    lines = [f'| layer | {heads} |', '|' + '---|' * (1 + len(_LAYER_COLUMNS))]
    for layer in layers:
        cells = [format(layer[name], style) if name in layer else '–' for name, _, style in _LAYER_COLUMNS]
        lines.append(f'| {layer["layer"]} {layer["span"]} | ' + ' | '.join(cells) + ' |')
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
