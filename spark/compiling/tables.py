"""The report on a compiled train step as Markdown tables."""


def tables(report: dict) -> str:
    """Memory, FLOPs, the least time of a step, collectives, and the largest buffers."""
    m, evaluation = report['memory'], report.get('evaluation', {})
    work = lambda n: f'{n:.3e} | {n / report["tokens"]:.3e}'
    least_times = []
    if report['bandwidth'] and report['peak_flops']:  # of a known device
        compute = report['traced_flops'] / report['devices'] / report['peak_flops']
        memory, gb = report['traffic'] / report['bandwidth'], report['traffic'] / 1e9
        least_times = [
            '', '| a step takes at least | ms | |', '|---|---|---|',
            f'| matmuls | {1e3 * compute:.0f} | at {report["peak_flops"] / 1e12:.0f} TFLOP/s |',
            f'| memory traffic | {1e3 * memory:.0f} | {gb:.0f} GB at {report["bandwidth"] / 1e9:.0f} GB/s |',
        ]  # fmt: skip
    lines = [
        '', '| per chip | GB |  |', '|---|---|---|',
        f'| arguments (parameters, optimizer, batch) | {m["arguments"] / 1e9:.2f} | updated in place |',
        f'| temporaries | {m["temporaries"] / 1e9:.2f} | |',
        f'| peak | {m["peak"] / 1e9:.2f} | {_fits(m)} |',
        *(f'| peak of evaluation, {name} | {e["peak"] / 1e9:.2f} | {_fits(e)} |' for name, e in evaluation.items()),
        '', '| FLOPs of a step | all chips | per token |', '|---|---|---|',
        f'| model: forward and backward, every entry of a lookup | {work(report["model_flops"])} |',
        f'| matmuls as traced, rematerialisation included | {work(report["traced_flops"])} |',
        *least_times,
        '', '| collective | mesh axes | per step | GB per chip |', '|---|---|---|---|',
    ]  # fmt: skip
    lines += [f'| {c["kind"]} | {c["axes"]} | {c["count"]:,} | {c["bytes"] / 1e9:.3f} |' for c in report['collectives']]
    lines += ['', '| largest buffers | GB | made by |', '|---|---|---|']
    lines += [f'| {b["shape"]} | {b["bytes"] / 1e9:.3f} | {b["source"] or b["operation"]} |' for b in report['buffers']]
    return '\n'.join(lines)


def _fits(memory):
    peak, hbm = memory['peak'], memory['hbm']
    return f'{peak / hbm:.0%} of {hbm / 2**30:.0f} GiB: {"fits" if peak <= hbm else "DOES NOT FIT"}' if hbm else ''
