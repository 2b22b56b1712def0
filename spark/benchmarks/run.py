"""The benchmarks by name."""

import pathlib

from spark import config
from spark.benchmarks import data, decoding, lookups, training
from spark.benchmarks.timing import Rows
from spark.errors import ConfigError

BENCHMARKS = {  # name: (function, the shipped config that it measures, its variants)
    'topk': (lookups.topk, None, ()),
    'ffn': (lookups.ffn, None, ()),
    'attention': (lookups.attention, None, ()),
    'data': (data.data, 'tiny.py', ('spark',)),
    'train_step': (training.train_step, 'tiny.py', ('spark', 'dense')),
    'train_step_30m': (training.train_step_30m, 'tiny.py', ('spark', 'dense')),
    'faults': (training.faults, 'tiny.py', ('spark',)),
    'compile': (training.compile_time, 'gemma2_2b.py', ('spark',)),
    'ffn_decode': (decoding.ffn_decode, 'gemma2_2b.py', ('spark', 'dense')),
    'decode': (decoding.decode, 'gemma2_2b.py', ('spark', 'dense')),
    'prefill': (decoding.prefill, 'gemma2_2b.py', ('spark', 'dense')),
}


def run(name: str, configs: pathlib.Path, repeats: int | None = None, topology: str | None = None) -> Rows:
    """The rows of a benchmark; `configs` is the directory of shipped configs. With a topology: `lookups.ffn_cycles`."""
    if name not in BENCHMARKS:
        raise ConfigError(f'benchmark {name}: want one of {", ".join(BENCHMARKS)}')
    if topology and name != 'ffn':
        raise ConfigError(f'--topology={topology}: only ffn has an estimate')
    if topology:
        return lookups.ffn_cycles(topology)
    function, file, variants = BENCHMARKS[name]
    cfgs = [config.validate(config.from_file(configs / file, variant)) for variant in variants]
    return function(*cfgs, **({'repeats': repeats} if repeats else {}))
