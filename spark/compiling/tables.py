"""The report on a compiled train step as Markdown tables."""


def tables(report: dict) -> str:
    """Memory, FLOPs, the least time of a step, collectives, and the largest buffers."""
    m, gib = report['memory'], 2**30
    fits = ''
    if m['hbm']:
        verdict = 'fits' if m['peak'] <= m['hbm'] else 'DOES NOT FIT'
        fits = f'{m["peak"] / m["hbm"]:.0%} of {m["hbm"] / gib:.0f} GiB: {verdict}'
    work = lambda n: f'{n:.3e} | {n / report["tokens"]:.3e}'
    lines = [
        '', '| per chip | GB |  |', '|---|---|---|',
        f'| arguments (parameters, optimizer, batch) | {m["arguments"] / 1e9:.2f} | updated in place |',
        f'| temporaries | {m["temporaries"] / 1e9:.2f} | |',
        f'| peak | {m["peak"] / 1e9:.2f} | {fits} |',
        '', '| FLOPs of a step | all chips | per token |', '|---|---|---|',
        f'| model: forward and backward, every entry of a lookup | {work(report["model_flops"])} |',
        f'| matmuls as traced, rematerialisation included | {work(report["traced_flops"])} |',
        *_least_times(report),
        '', '| collective | mesh axes | per step | GB per chip |', '|---|---|---|---|',
    ]  # fmt: skip
    lines += [f'| {c["kind"]} | {c["axes"]} | {c["count"]:,} | {c["bytes"] / 1e9:.3f} |' for c in report['collectives']]
    lines += ['', '| largest buffers | GB | made by |', '|---|---|---|']
    lines += [f'| {b["shape"]} | {b["bytes"] / 1e9:.3f} | {b["source"] or b["operation"]} |' for b in report['buffers']]
    return '\n'.join(lines)


def _least_times(report):
    """The table of the least time of a step at the peak rates of the device; empty if they are not known."""
    if not report['bandwidth'] or not report['peak_flops']:
        return []
    compute = report['traced_flops'] / report['devices'] / report['peak_flops']
    memory, gb = report['traffic'] / report['bandwidth'], report['traffic'] / 1e9
    return [
        '', '| a step takes at least | ms | |', '|---|---|---|',
        f'| matmuls | {1e3 * compute:.0f} | at {report["peak_flops"] / 1e12:.0f} TFLOP/s |',
        f'| memory traffic | {1e3 * memory:.0f} | {gb:.0f} GB at {report["bandwidth"] / 1e9:.0f} GB/s |',
    ]  # fmt: skip
