"""The benchmarks by name."""

import pathlib

from spark import config
from spark.benchmarks import decoding, lookups, training
from spark.config import ExperimentConfig

_LOOKUPS = {'topk': lookups.topk, 'ffn': lookups.ffn, 'attention': lookups.attention}
_DECODING = {'ffn_decode': decoding.ffn_decode, 'decode': decoding.decode, 'prefill': decoding.prefill}
NAMES = (*_LOOKUPS, 'train_step', 'faults', 'compile', *_DECODING)


def run(name: str, configs: pathlib.Path, repeats: int | None = None) -> list[dict]:
    """The rows of a benchmark (see `timing.row`).

    Args:
      name: one of NAMES.
      configs: the directory of tiny.py and gemma2_2b.py, whose models are measured.
      repeats: interleaved repeats of each side; None for the benchmark's own number.
    """

    def load(file: str, variant: str) -> ExperimentConfig:
        return config.validate(config.from_file(configs / file, variant))

    options = {'repeats': repeats} if repeats else {}
    match name:
        case 'train_step':
            return training.train_step(load('tiny.py', 'spark'), load('tiny.py', 'dense'), **options)
        case 'faults':
            return training.faults(load('tiny.py', 'spark'), **options)
        case 'compile':
            return training.compile_time(load('gemma2_2b.py', 'spark'), **options)
        case _ if name in _DECODING:
            return _DECODING[name](load('gemma2_2b.py', 'spark').model, load('gemma2_2b.py', 'dense').model, **options)
    return _LOOKUPS[name](**options)
