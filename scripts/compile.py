"""Compile training and evaluation for a TPU slice that this machine does not have: what fits, what do they move and compute?

    python scripts/compile.py --config=PATH[:VARIANT] --topology=v5e:16x16 [--config.x.y=value …] [--noevaluation] [--search]
        [--json=FILE]

Prints bytes per chip against its memory, of the train step and of evaluation; of the step FLOPs, collectives by kind and mesh
axis, and the largest buffers with the line of source that makes each. --search tries rematerialisation policies and batch
sizes, and prints the largest batch that fits for each policy. Needs libtpu (.[aot]).
Exit codes: 0 it fits, 2 it does not, or a bad config.
"""

import math
import os

from absl import flags
from ml_collections import config_flags

from spark import config, errors
from spark.runtime import write_json, write_text

CONFIG = config_flags.DEFINE_config_file('config', None, 'A file of configs/, or one of its variants: PATH[:VARIANT].')
TOPOLOGY = flags.DEFINE_string('topology', None, 'A slice such as v5e:16x16, v4:2x2x2, v5p:4x4x4, v6e:16x16, tpu7x:2x2x1.')
EVALUATION = flags.DEFINE_bool('evaluation', True, 'Also compile evaluation, while training and by evaluate.py.')
SEARCH = flags.DEFINE_bool('search', False, 'Also find, for each rematerialisation policy, the largest batch that fits.')
HLO = flags.DEFINE_string('hlo', None, 'Also write the compiled program to this file.')
JSON = flags.DEFINE_string('json', None, 'Also write the report to this file.')


def main() -> None:
    cfg = config.validate(CONFIG.value)
    os.environ.setdefault('JAX_PLATFORMS', 'cpu')
    os.environ['JAX_ENABLE_COMPILATION_CACHE'] = 'false'  # without a chip, no program can be read from it
    from spark.compiling import aot
    from spark.compiling.tables import tables

    devices = aot.devices(TOPOLOGY.value, cfg.mesh.slices)
    if not cfg.model.vocab_size:
        from spark.data.tokenizer import tokenizer_for

        cfg = tokenizer_for(cfg)[1]
    devices_text = f'{len(devices)} × {devices[0].device_kind}'
    print(f'Compiling for {devices_text}: about a minute, or 5 to 15 for Gemma-2, on two cores', flush=True)
    report, too_big = {'config': cfg.model_dump(), 'topology': TOPOLOGY.value}, None
    try:
        compiled, text = aot.report(cfg, devices)
        report |= compiled
        if EVALUATION.value and report['memory']['peak'] <= (report['memory']['hbm'] or math.inf):
            report['evaluation'] = aot.evaluation(cfg, devices)
        print(tables(report))
        if HLO.value:
            write_text(HLO.value, text)
        aot.check_fit(report['memory'])
        for name, memory in report.get('evaluation', {}).items():
            aot.check_fit(memory, f'evaluation ({name})')
    except aot.TooBig as e:
        too_big = e
    if SEARCH.value:
        report['search'] = aot.search(cfg, devices)
    if JSON.value:
        write_json(JSON.value, report | {'fits': too_big is None})
    if too_big:
        raise too_big


if __name__ == '__main__':
    errors.run(main, check=config.check_flags, required=[CONFIG, TOPOLOGY])
