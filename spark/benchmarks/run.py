"""The benchmarks by name."""

import pathlib

from spark import config
from spark.benchmarks import decoding, lookups, training

# name: (function, the shipped configs that it measures, as FILE:VARIANT)
BENCHMARKS = {
    'topk': (lookups.topk, ()),
    'ffn': (lookups.ffn, ()),
    'attention': (lookups.attention, ()),
    'train_step': (training.train_step, ('tiny.py:spark', 'tiny.py:dense')),
    'faults': (training.faults, ('tiny.py:spark',)),
    'compile': (training.compile_time, ('gemma2_2b.py:spark',)),
    'ffn_decode': (decoding.ffn_decode, ('gemma2_2b.py:spark', 'gemma2_2b.py:dense')),
    'decode': (decoding.decode, ('gemma2_2b.py:spark', 'gemma2_2b.py:dense')),
    'prefill': (decoding.prefill, ('gemma2_2b.py:spark', 'gemma2_2b.py:dense')),
}


def run(name: str, configs: pathlib.Path, repeats: int | None = None) -> list[dict]:
    """The rows (see `timing.row`) of a benchmark; `configs` is the directory of the shipped configs."""
    function, specs = BENCHMARKS[name]
    cfgs = (config.validate(config.from_file(configs / file, variant)) for file, variant in (s.split(':') for s in specs))
    return function(*cfgs, **({'repeats': repeats} if repeats else {}))
