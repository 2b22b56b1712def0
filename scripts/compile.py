"""Compile the train step for a TPU slice that is not there: does it fit, what does it compute, how does it communicate.

    python scripts/compile.py --config=PATH[:VARIANT] --topology=v5e:16x16 [--config.x.y=value …] [--search] [--json=FILE]

Prints bytes per chip against its memory, FLOPs, collectives by kind and mesh axis, and the largest buffers with the line of
source that makes each. --search tries rematerialisation policies and batch sizes, and says which are the best that fit. Needs
libtpu (.[aot]). Exit codes: 0 it fits, 2 it does not, or a bad config.
"""

import os
import pathlib

from absl import flags
from ml_collections import config_flags

from spark import config, errors
from spark.runtime import write_json

CONFIG = config_flags.DEFINE_config_file('config', None, 'A file of configs/, or one of its variants: PATH[:VARIANT].')
TOPOLOGY = flags.DEFINE_string('topology', None, 'A slice such as v5e:16x16, v4:2x2x2, v5p:4x4x4, v6e:16x16, tpu7x:2x2x1.')
SEARCH = flags.DEFINE_bool('search', False, 'Also find the cheapest rematerialisation and the largest batch that fit.')
HLO = flags.DEFINE_string('hlo', None, 'Also write the compiled program to this file.')
JSON = flags.DEFINE_string('json', None, 'Also write the report to this file.')


def main():
    for name, flag in [('config', CONFIG), ('topology', TOPOLOGY)]:
        if not flag.value:
            raise errors.ConfigError(f'--{name} is missing; see --help')
    cfg = config.validate(CONFIG.value)
    os.environ.setdefault('JAX_PLATFORMS', 'cpu')
    from spark.compiling import aot

    devices = aot.devices(TOPOLOGY.value, cfg.mesh.slices)
    if not cfg.model.vocab_size:
        from spark.data import pipeline

        cfg = pipeline.tokenizer_for(cfg)[1]
    print(f'Compiling for {len(devices)} × {devices[0].device_kind} …', flush=True)
    report, too_big = {'config': cfg.model_dump(), 'topology': TOPOLOGY.value}, None
    try:
        made, text = aot.report(cfg, devices)
        report |= made
        print(tables(report))
        if HLO.value:
            write(HLO, text)
        aot.check_fit(report['memory'])
    except aot.TooBig as e:
        too_big = e
    if SEARCH.value:
        report['search'] = aot.search(cfg, devices, print)
    if JSON.value:
        write_json(JSON.value, report | {'fits': too_big is None})
    if too_big:
        raise too_big


def write(flag, text):
    """A text file named by a flag."""
    try:
        pathlib.Path(flag.value).write_text(text)
    except OSError as e:
        raise errors.ConfigError(f'--{flag.name}={flag.value}: {e.strerror or e}') from None


def bounds(report):
    """What a step takes at least, by what the device can do; nothing of a device that is not known."""
    if not report['bandwidth'] or not report['peak_flops']:
        return []
    compute = report['traced_flops'] / report['devices'] / report['peak_flops']
    moving = report['traffic'] / report['bandwidth']
    lines = ['', '| a step takes at least | ms | |', '|---|---|---|']
    lines += [f'| matmuls | {1e3 * compute:.0f} | at {report["peak_flops"] / 1e12:.0f} TFLOP/s |']
    gb = report['traffic'] / 1e9
    return [*lines, f'| memory traffic | {1e3 * moving:.0f} | {gb:.0f} GB at {report["bandwidth"] / 1e9:.0f} GB/s |']


def tables(report):
    """The report in Markdown."""
    m, gib = report['memory'], 2**30
    fits = '' if not m['hbm'] else f'{m["peak"] / m["hbm"]:.0%} of {m["hbm"] / gib:.0f} GiB: ' + (
        'fits' if m['peak'] <= m['hbm'] else 'DOES NOT FIT')  # fmt: skip
    work = lambda n: f'{n:.3e} | {n / report["tokens"]:.3e}'
    lines = [
        '', '| per chip | GB |  |', '|---|---|---|',
        f'| arguments (parameters, optimizer, batch) | {m["arguments"] / 1e9:.2f} | updated in place |',
        f'| temporaries | {m["temporaries"] / 1e9:.2f} | |',
        f'| peak | {m["peak"] / 1e9:.2f} | {fits} |',
        '', '| FLOPs of a step | all chips | per token |', '|---|---|---|',
        f'| model: forward and backward, every entry of a lookup | {work(report["model_flops"])} |',
        f'| matmuls as traced, rematerialisation included | {work(report["traced_flops"])} |',
        *bounds(report),
        '', '| collective | mesh axes | per step | GB per chip |', '|---|---|---|---|',
    ]  # fmt: skip
    lines += [f'| {c["kind"]} | {c["axes"]} | {c["count"]:,} | {c["bytes"] / 1e9:.3f} |' for c in report['collectives']]
    lines += ['', '| largest buffers | GB | made by |', '|---|---|---|']
    lines += [f'| {b["shape"]} | {b["bytes"] / 1e9:.3f} | {b["source"] or b["operation"]} |' for b in report['buffers']]
    return '\n'.join(lines)


if __name__ == '__main__':
    errors.run(main, check=config.check_flags)
